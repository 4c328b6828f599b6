# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The geometry of merges as one page for a browser, which needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files

from mergekit_nuslerp.inspect.figures import FIGURES, Inspection
from mergekit_nuslerp.inspect.terminal import differences
from mergekit_nuslerp.inspect.words import labels_of, place_of, short_names, with_stacks


def page(inspections: Sequence[Inspection]) -> str:
    """Put all figures, and all that is needed to draw them, into one HTML page.

    The fragment of its address selects a tensor: `page.html#lm_head.weight`; of several
    inspections it also selects one, by its place: `page.html#1/lm_head.weight`.
    """
    data = {
        "figures": [figure._asdict() for figure in FIGURES],
        "inspections": [i.model_dump(mode="json", by_alias=True) for i in inspections],
        "names": [short_names(inspection) for inspection in inspections],
        "labels": [_labels(inspection) for inspection in inspections],
        "compared": differences(inspections),
    }
    # In JSON these characters stand in strings only. Escaped there, no name can end
    # the script element; the page's own script never makes HTML of a name.
    escaped = re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(data))
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    return template.replace("{{data}}", escaped, 1)


def _labels(inspection: Inspection) -> dict[str, str]:
    """A short name for the column of each tensor."""
    layered = [tensor for tensor in inspection.tensors if tensor.layer is not None]
    labels = with_stacks(labels_of(map(place_of, layered)))
    return {tensor.name: labels[place_of(tensor)] for tensor in layered}
