# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How close merges come to the float64 result rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.cases import ALL_GRANULARITIES, DTYPES, cases, name
from benchmarks.measure import head, row

NOTE = (
    "Elements that equal the float64 result rounded once; for float32 the error "
    "relative to that of rounding the float64 result once."
)
MAGNITUDES = ("slerp", "linear", "geometric")


def exactness(result: torch.Tensor, exact: torch.Tensor) -> str:
    rounded = exact.to(result.dtype)
    if result.dtype != torch.float32:
        return f"{(result == rounded).double().mean():.3%}"
    error, least = ((r.double() - exact).norm() for r in (result, rounded))
    return f"{error / least:.2f}x"


def table(shape: Sequence[int] = (1024, 2048)) -> None:
    elements = f"{shape[0] * shape[1]:,}"
    head(
        f"Exactness: {elements} elements",
        "dtype | vectors | base | mergekit | plugin | plugin, portable",
        f"{NOTE} That result is mergekit's own formula's.",
    )
    for case in cases(shape, DTYPES):
        exact = case.mapped(torch.Tensor.double).theirs()
        row(*case.label, *(exactness(m(), exact) for m in case.methods().values()))
    columns = (f"{name(dtype)} | {name(dtype)}, portable" for dtype in DTYPES)
    head(
        f"Exactness of two and three models: {elements} elements, with a base",
        f"models | vectors | magnitude | {' | '.join(columns)}",
        f"{NOTE} That result is the portable pass's for float64 inputs, which the "
        "tests hold to an oracle.",
    )
    for models in (2, 3):
        inputs = list(
            cases(
                shape, DTYPES, models=models, bases=(True,), granularities=("tensor",)
            )
        )
        for granularity in ALL_GRANULARITIES:
            for magnitude in MAGNITUDES:
                cells: list[str] = []
                for given in inputs:
                    case = replace(given, granularity=granularity, magnitude=magnitude)
                    exact = case.mapped(torch.Tensor.double).portable()
                    cells += (exactness(m(), exact) for m in (case.ours, case.portable))
                row(models, granularity, magnitude, *cells)


def large() -> None:
    """Errors must not grow with the size of a weight."""
    table((8192, 8192))
