# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The plugin as a merge method of a name of its own.

For a mergekit that looks for methods in entry points (`mergekit.merge_methods`), which
can add methods, but not replace mergekit's own `nuslerp`. Importing this module raises
an error where the plugin is switched off or does not fit mergekit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergekit_nuslerp import METHODS, SWITCH, plugin, switched_off

NAME = METHODS[1]


def _make() -> Any:
    if switched_off():
        raise RuntimeError(f"{SWITCH} switches `merge_method: {NAME}` off")
    made = plugin.adapter().make()
    made.spec = replace(made.spec, name=NAME)
    return made


# What mergekit's `register` takes.
method = _make()
