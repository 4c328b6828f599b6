# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks.picture`: draw what `nuslerp_magnitude` does.

Two vectors in the plane, merged by the plugin itself. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyBboxPatch

from mergekit_nuslerp import nuslerp

FILE = Path(__file__).parents[1] / "docs" / "magnitude.svg"

# Lengths and directions (degrees) of the two vectors.
SHORT, LEFT = 1.0, 135.0
LONG, RIGHT = 2.5, 35.0

# The edges of the picture, in the same unit, and what an inch shows of it.
WEST, EAST, SOUTH, NORTH = -2.05, 2.4, -0.28, 2.85
UNITS_AN_INCH = 0.58

QUARTERS = {0.25: "¼", 0.5: "½", 0.75: "¾"}
INK, FAINT, CARD = "#1f2328", "#afb8c1", "#ffffff"
GREY = "#57606a"


class Curve(NamedTuple):
    """How a rule is drawn, and where: beside its point at t, so far from it."""

    label: str
    colour: str
    t: float
    distance: float


CURVES = {
    "linear": Curve("linear", "#0969da", 0.62, 0.11),
    "geometric": Curve("geometric", "#8250df", 0.62, -0.11),
    "slerp": Curve("slerp, the default", "#cf222e", 0.37, -0.11),
    "line": Curve("straight line", GREY, 0.63, -0.11),
}


def point(length: float, degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return length * torch.stack((angle.cos(), angle.sin()))


def merged(rule: str, t: float) -> torch.Tensor:
    start, end = point(SHORT, LEFT), point(LONG, RIGHT)
    if rule == "line":
        return torch.lerp(start, end, t)
    return nuslerp([start, end], [1 - t, t], magnitude=rule)


def figure() -> Figure:
    size = ((EAST - WEST) / UNITS_AN_INCH, (NORTH - SOUTH) / UNITS_AN_INCH)
    picture = Figure(figsize=size, facecolor="none")
    axes = picture.add_axes((0, 0, 1, 1), xlim=(WEST, EAST), ylim=(SOUTH, NORTH))
    axes.axis("off")
    # A card of its own, since the page may be light or dark.
    box = ((WEST + 0.1, SOUTH + 0.1), EAST - WEST - 0.2, NORTH - SOUTH - 0.2)
    card = FancyBboxPatch(*box, boxstyle="round,pad=0.09", ec="#d0d7de", fc=CARD)
    axes.add_patch(card)

    def write(where: torch.Tensor, text: str, colour: str, **options: object) -> None:
        axes.text(
            *where.tolist(),
            text,
            color=colour,
            ha="center",
            va="center",
            rotation_mode="anchor",
            bbox={"color": CARD, "pad": 1},
            zorder=1.5,  # over the thin lines, under the curves
            **options,
        )

    for length in (SHORT, LONG):
        arc = Arc((0, 0), 2 * length, 2 * length, theta1=RIGHT, theta2=LEFT)
        arc.set(color=FAINT, linestyle=(0, (4, 3)))
        axes.add_patch(arc)
    for t, name in QUARTERS.items():
        direction = LEFT + t * (RIGHT - LEFT)
        axes.plot(
            *zip((0, 0), point(LONG, direction)), color=FAINT, linewidth=1, zorder=1
        )
        label = f"{name} of the angle"
        write(point(LONG + 0.13, direction), label, GREY, rotation=direction - 90)

    for rule, curve in CURVES.items():
        path = torch.stack([merged(rule, i / 64) for i in range(65)])
        axes.plot(*path.T, color=curve.colour, linewidth=2.2)
        for t in QUARTERS:
            axes.plot(*merged(rule, t), "o", color=curve.colour, markersize=7)
        along = merged(rule, curve.t + 0.01) - merged(rule, curve.t - 0.01)
        slope = torch.atan2(along[1], along[0]).rad2deg().item()
        where = merged(rule, curve.t) + point(curve.distance, slope + 90)
        write(where, curve.label, curve.colour, rotation=slope, weight="bold")

    for name, length, direction in (
        ("first model", SHORT, LEFT),
        ("second model, 2.5 times as far", LONG, RIGHT),
    ):
        axes.annotate(
            "",
            point(length, direction).tolist(),
            (0, 0),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.6",
                "color": INK,
                "linewidth": 2.2,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        # Beside the arrow, on the outside.
        slope = direction if direction < 90 else direction - 180
        where = point(0.55 * length, direction) + point(0.12, slope - 90)
        write(where, name, INK, rotation=slope)
    write(point(0.12, -90), "base", INK)
    write(torch.tensor((-1.4, 0)), "points: t = ¼, ½, ¾", GREY)
    return picture


def main() -> None:
    # Outlines instead of text look the same everywhere. The salt stands in for a
    # random one, so that the same picture is the same file.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": FILE.name}):
        figure().savefig(FILE, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
