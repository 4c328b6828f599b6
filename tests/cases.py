# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the tests of the kernel are run over: passes, dtypes, weights of some models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from mergekit_nuslerp.passes import native

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MAGNITUDES = ["slerp", "linear", "geometric"]
WEIGHTS = {
    2: [0.3, 0.7],
    3: [0.5, 0.2, 0.3],
    4: [0.2, 0.4, 0.3, 0.1],
    5: [1.0, 2.0, 0.0, 3.0, 1.0],
    8: [1.0] * 8,
}

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_magnitudes = pytest.mark.parametrize("magnitude", MAGNITUDES)
all_granularities = pytest.mark.parametrize(
    "granularity",
    ["tensor", "matrix", "row", "column", "row:2", "column:4", "row*column"],
)
with_and_without_base = pytest.mark.parametrize("with_base", [False, True])
two_or_three = pytest.mark.parametrize("count", [2, 3])
rows_or_columns = pytest.mark.parametrize("granularity", ["row", "column"])


def fit(weights: Sequence[float], granularity: str) -> list[float]:
    """The weights, or as shares without the signs that `row*column` refuses."""
    if granularity != "row*column":
        return list(weights)
    sizes = [abs(weight) for weight in weights]
    return [size / sum(sizes) for size in sizes]


def need_native() -> None:
    """Skip a test where the C++ part was not built, and fail where it does not load."""
    if "was not built" in native.FAILURE:
        pytest.skip(native.FAILURE)
    assert not native.FAILURE


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several would wait for each other, as tests run side by side."""
    with threads(1):
        yield


@pytest.fixture(autouse=True, params=["native", "portable"])
def each_pass(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> str:
    """Runs every test of a module that imports it with either pass."""
    if request.param == "native":
        need_native()
    else:
        monkeypatch.setenv("MERGEKIT_NUSLERP", "portable")
    return request.param


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def whole_numbers(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Numbers so small that their products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=-1, keepdim=True)


def models(
    *shape: int,
    count: int = 2,
    with_base: bool = True,
    dtype: torch.dtype = torch.float64,
    make: Callable[..., torch.Tensor] = normal,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Weights and, where asked for, a base near them.

    More than two lie in one orthant, but for rounding, so that whatever elements form
    a vector no angle is over 90 degrees, and a unique mean exists.
    """
    tensors = [make(*shape, seed=seed + n) for n in range(count)]
    if count > 2:
        signs = normal(*shape, seed=seed + count + 1).sign()
        tensors = [(n + 1) * signs * x.abs() for n, x in enumerate(tensors)]
    if not with_base:
        return [tensor.to(dtype) for tensor in tensors], None
    base = make(*shape, seed=seed + count).to(dtype)
    return [(base + tensor).to(dtype) for tensor in tensors], base


def rows_with_faults(count: int) -> list[torch.Tensor]:
    """Whole numbers, exact in every dtype; each row is a vector.

    Rows 0 ordinary, 1 parallel, 2 with an antipodal pair, 3 first zero, 4 all but the
    first zero, 5 all zero, 6 cancelling.
    """
    tensors = [whole_numbers(7, 12, seed=n).abs().double() + 1 for n in range(count)]
    cancelling = torch.tensor([2.0, -1.0, -1.0]).repeat(4)
    for n, tensor in enumerate(tensors):
        tensor[1] = (n + 1) * tensors[0][1]
        tensor[5] = 0
        tensor[6] = cancelling.roll(n)
        if n:
            tensor[4] = 0
    tensors[1][2] = -2 * tensors[0][2]
    tensors[0][3] = 0
    if count == 2:
        tensors[1][6] = -tensors[0][6]
    return tensors


def at_angles(*degrees: float, length: int, lengths: float = 1.0) -> list[torch.Tensor]:
    """Vectors along one arc, at these angles from its beginning."""
    plane, _ = torch.linalg.qr(normal(length, 2))
    angles = [math.radians(angle) for angle in degrees]
    return [
        lengths * (math.cos(a) * plane[:, 0] + math.sin(a) * plane[:, 1])
        for a in angles
    ]


class Subclass(torch.Tensor):
    """Its elements need not be where `data_ptr` says."""


# --- in memory -------------------------------------------------------------------


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    gaps = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
    gaps[..., 1::2] = tensor
    return gaps[..., 1::2]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor)


def reordered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, but not from the start of its memory."""
    longer = tensor.new_full((tensor.numel() + 3,), math.nan)
    longer[1:-2] = tensor.flatten()
    return longer[1:-2].view(tensor.shape)


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, but to be read with the other sign."""
    return torch._neg_view(-tensor)
