# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a merge should be: slow, in float64, vector by vector, by the textbook.

Written apart from the package and sharing no code with it: whole vectors instead of
inner products, a loop instead of a view, the angle from a half-angle formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch


class Reference(NamedTuple):
    """A merge in float64, and how strongly each element feels rounding on the way."""

    value: torch.Tensor
    # The size of the terms that add up to an element, over 1 + cos(theta): towards
    # antipodal vectors the coefficients grow without bound, and so do their errors.
    sensitivity: torch.Tensor


def vectors(shape: Sequence[int], granularity: str) -> Iterator[tuple[Any, ...]]:
    """The index of each vector of a weight."""
    if granularity == "tensor" or len(shape) < 2:
        yield (...,)
    elif granularity == "row":
        for leading in product(*map(range, shape[:-1])):
            yield (*leading, slice(None))
    else:
        for trailing in product(*map(range, shape[1:])):
            yield (slice(None), *trailing)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    # By the largest element first, so that no square overflows or vanishes.
    vector = vector / vector.abs().max()
    return vector / vector.norm()


def _coefficients(
    a: torch.Tensor, b: torch.Tensor, t: float, tolerance: float
) -> tuple[float, float, float]:
    """The two coefficients, and 1 + cos(theta), or 1 where they are linear."""
    if a.any() and b.any():
        a, b = _unit(a), _unit(b)
        apart, together = (a - b).norm().item(), (a + b).norm().item()
        theta = 2 * math.atan2(apart, together)
        one_plus_cosine = together**2 / 2
    else:
        theta, one_plus_cosine = math.pi / 2, 1.0
    if theta == 0 or one_plus_cosine <= tolerance:
        return 1 - t, t, 1.0
    sine = math.sin(theta)
    return (
        math.sin((1 - t) * theta) / sine,
        math.sin(t * theta) / sine,
        one_plus_cosine,
    )


def reference(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> Reference:
    """Merge two weights, and say how well conditioned each element is."""
    first, second = tensors
    dtype = torch.promote_types(first.dtype, second.dtype)
    if base is not None:
        dtype = torch.promote_types(dtype, base.dtype)
    tolerance = torch.finfo(dtype).eps
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total

    origin = torch.zeros_like(first) if base is None else base
    origin = origin.detach().double()
    a = first.detach().double() - origin
    b = second.detach().double() - origin
    value, sensitivity = torch.empty_like(a), torch.empty_like(a)
    for index in vectors(a.shape, granularity):
        if not a[index].numel():
            continue
        c0, c1, condition = _coefficients(a[index], b[index], t, tolerance)
        value[index] = origin[index] + (c0 * a[index] + c1 * b[index])
        largest = max(1.0, abs(t), abs(1 - t), abs(c0), abs(c1))
        terms = largest * (a[index].abs() + b[index].abs())
        sensitivity[index] = (origin[index].abs() + terms) / condition
    return Reference(value, sensitivity)


def oracle(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> torch.Tensor:
    """The merge of two weights in float64."""
    return reference(tensors, weights, base, granularity).value


def assert_rounded_once(
    result: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> None:
    """Every element is within half a unit in the last place of the exact merge.

    On top of that comes only what arithmetic of at least twice the input's precision
    leaves behind, or as much for float64, which has no wider dtype.
    """
    exact, sensitivity = reference(tensors, weights, base, granularity)
    number = torch.finfo(result.dtype)
    exponent = torch.frexp(exact).exponent - 1
    last_place = torch.ldexp(torch.full_like(exact, number.eps), exponent)
    last_place = last_place.clamp(min=number.smallest_normal * number.eps)
    inner = torch.finfo(torch.float32 if number.bits < 32 else torch.float64)
    error = (result.detach().double() - exact).abs()
    excess = error - 0.5 * last_place - 32 * inner.eps * sensitivity
    assert not (excess > 0).any(), f"off by up to {(error / last_place).max()} ulp"
    assert result.isfinite().all()
