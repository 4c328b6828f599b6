# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How close merges come to the float64 result rounded once."""

from __future__ import annotations

import torch

from benchmarks.cases import Case, cases


def exact(case: Case) -> torch.Tensor:
    """mergekit's own formula, in float64."""
    return case.mapped(torch.Tensor.double).theirs()


def table(elements: int = 2**21) -> None:
    print(f"\n### Exactness: {elements:,} elements\n")
    print(
        "Elements that equal the float64 result rounded once; for float32 the error "
        "relative to that of rounding the float64 result once.\n"
    )
    rows((elements // 2048, 2048), (torch.bfloat16, torch.float16, torch.float32))


def large(elements: int = 2**26) -> None:
    """float32 errors must not grow with the size of a weight."""
    print(f"\n### Exactness of float32 at {elements:,} elements\n")
    rows((elements // 8192, 8192), (torch.float32,))


def rows(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    print("| dtype | vectors | base | mergekit | plugin | plugin, compiled |")
    print("|---|---|---|---|---|---|")
    for case in cases(shape, dtypes):
        reference = exact(case)
        rounded = reference.to(case.tensors[0].dtype)
        cells = []
        for result in (case.theirs(), case.ours(), case.compiled()):
            if result.dtype == torch.float32:
                error = (result.double() - reference).norm()
                cells.append(f"{error / (rounded.double() - reference).norm():.2f}x")
            else:
                cells.append(f"{(result == rounded).double().mean():.3%}")
        print(f"| {case.label} | {' | '.join(cells)} |", flush=True)
