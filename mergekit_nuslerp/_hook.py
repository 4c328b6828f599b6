# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the environment variable says beside switching the plugin off."""

import os

from mergekit_nuslerp import OFF, SWITCH, switch

_ON = ("", "1", "true", "on", "yes")
_COMPILED = ("compile", "compiled")


def compiled():
    """Whether the user wants compiled loops."""
    return switch() in _COMPILED


def misspelt():
    """What to say about a value of the switch that means nothing, or nothing."""
    if switch() in (*OFF, *_ON, *_COMPILED):
        return ""
    return f"{SWITCH}={os.environ[SWITCH]} has no effect; it may be 0, 1 or compile"
