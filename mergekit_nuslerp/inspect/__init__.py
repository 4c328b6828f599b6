# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`mergekit-nuslerp inspect`: the geometry of a merge before it is carried out.

`figures` says what is measured, `measure` measures it, `verdict` says what it means;
`terminal` and `page` show all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Inspection", "inspect"]

if TYPE_CHECKING:
    from mergekit_nuslerp.inspect.figures import Inspection
    from mergekit_nuslerp.inspect.measure import inspect


def __getattr__(name: str) -> Any:
    """Import mergekit only when something is measured, and not for `--help`."""
    if name in __all__:
        from mergekit_nuslerp.inspect import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
