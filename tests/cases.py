# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the tests of the kernel are run over, for two models and for more."""

from __future__ import annotations

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MAGNITUDES = ["slerp", "linear", "geometric"]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_magnitudes = pytest.mark.parametrize("magnitude", MAGNITUDES)
with_and_without_base = pytest.mark.parametrize("with_base", [False, True])

# Squares of such numbers overflow or vanish in the dtype that sums them.
out_of_range = pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float64, 1e-250),
        (torch.float64, 1e250),
        (torch.bfloat16, 2.0**-100),
        (torch.bfloat16, 2.0**100),
    ],
    ids=str,
)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
