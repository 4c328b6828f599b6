# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The geometry of a merge as one page for a browser, which needs no network."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from mergekit_nuslerp import report

if TYPE_CHECKING:
    from mergekit_nuslerp.inspection import Inspection


def page(inspection: Inspection) -> str:
    """Put all figures, and all that is needed to draw them, into one HTML page.

    The fragment of its address selects a tensor: `page.html#lm_head.weight`.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError(
            "the page is drawn by plotly, which is not installed: "
            "pip install 'mergekit-nuslerp[inspect]'"
        ) from None
    parts = {
        "data": _escaped(inspection.model_dump_json(by_alias=True)),
        "warnings": _escaped(json.dumps(list(report.warnings(inspection)))),
        "plotly": get_plotlyjs(),
    }
    template = files("mergekit_nuslerp").joinpath("page.html").read_text("utf-8")
    # In one go: what is filled in is not searched for places to fill in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _escaped(data: str) -> str:
    # In JSON these characters stand in strings only. Escaped there, no name can end
    # the script element; the page's own script never makes HTML of a name.
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", data)
