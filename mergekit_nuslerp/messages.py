# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What others wrote, in messages: short, and harmless to a terminal."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

LONGEST = 590  # with "Error: " before it no more than 600


def shortened(message: str, most: int = LONGEST) -> str:
    """A message in one line, without control characters.

    Of a long one both ends, as either may say the reason.
    """
    line = printable(" ".join(message.split()))
    end = (most - 7) // 2
    return line if len(line) <= most else f"{line[:end]} [...] {line[-end:]}"


def printable(text: str) -> str:
    """A text whose control characters are written out."""
    return "".join(
        char if char.isprintable() or char == "\n" else ascii(char)[1:-1]
        for char in text
    )


def brief(value: Any) -> str:
    """How a value is written, cut short where it is long or nested.

    YAML's aliases make values that would fill a disk when written out.
    """
    short = Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 2, 3, 3, 3
    short.maxstring = short.maxother = 60
    return short.repr(value)
