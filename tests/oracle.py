# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a merge should be: slow, in float64, on whole vectors, by the textbook.

Written apart from the package and sharing no code with it: log map, average and exp
map on whole vectors instead of Newton steps on inner products, loops instead of views,
angles from a half-angle formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import torch


class Reference(NamedTuple):
    """A merge in float64, and how strongly each element feels rounding on the way."""

    value: torch.Tensor
    # The size of the terms that add up to an element, over how well determined the
    # mean is: as vectors cancel the coefficients grow without bound, and so do errors.
    sensitivity: torch.Tensor
    linear: int  # vectors without a unique mean


class _Direction(NamedTuple):
    """Means of unit vectors, a row each."""

    mean: torch.Tensor
    coefficients: torch.Tensor  # of the unit vectors
    condition: torch.Tensor  # from 1 down to 0
    straight: torch.Tensor  # whether the weights are the coefficients instead
    unique: torch.Tensor


def vectors(shape: Sequence[int], granularity: str) -> Iterator[tuple[Any, ...]]:
    """The index of each vector of a weight."""
    kind, _, size = granularity.partition(":")
    every = slice(None)
    if kind == "tensor" or len(shape) < 2:
        yield (...,)
        return
    if kind == "dim0":
        for trailing in product(*map(range, shape[1:])):
            yield (every, *trailing)
        return
    if kind == "row*column":
        for each in ("row", "column", "matrix"):
            yield from vectors(shape, each)
        return
    *experts, rows, columns = shape
    block = int(size or 1)
    for expert in product(*map(range, experts)):
        if kind == "matrix":
            yield (*expert, every, every)
        elif kind == "row":
            for i in range(0, rows, block):
                yield (*expert, slice(i, i + block), every)
        else:
            for j in range(0, columns, block):
                yield (*expert, every, slice(j, j + block))


@cache
def _members(shape: tuple[int, ...], granularity: str) -> torch.Tensor:
    """Which elements each vector of a weight has, a row each."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    return torch.stack(
        [numbers[place].flatten() for place in vectors(shape, granularity)]
    )


def granularities(shape: Sequence[int]) -> list[str]:
    """Every granularity, with blocks that divide a weight of this shape."""
    rows, columns = shape[-2:] if len(shape) > 1 else (6, 6)
    blocks = [
        f"{kind}:{max([n for n in range(1, size) if size % n == 0], default=1)}"
        for kind, size in (("row", rows), ("column", columns))
    ]
    return ["tensor", "matrix", "row", "column", "dim0", *blocks, "row*column"]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    # By the largest element first, so that no square overflows or vanishes.
    largest = vectors.abs().amax(-1, keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


def _length(vectors: torch.Tensor) -> torch.Tensor:
    largest = vectors.abs().amax(-1, keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    return (largest * vectors.norm(dim=-1, keepdim=True)).squeeze(-1)


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between unit vectors, in radians, to the last digits whatever it is."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def log_maps(mean: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """From one point on the sphere, tangents to others, as long as the way there."""
    mean = mean.unsqueeze(-2)
    tangents = units - (units * mean).sum(-1, keepdim=True) * mean
    length = tangents.norm(dim=-1, keepdim=True)
    theta = angle(mean, units).unsqueeze(-1)
    return tangents * theta / torch.where(length > 0, length, 1)


def _karcher(
    units: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log maps, their average, exp map, and again: means, and whether they settled."""
    share = weights.unsqueeze(-1)
    mean = _unit((share * units).sum(-2))
    moving = torch.ones(len(units), dtype=torch.bool)
    for _ in range(4000):
        here = mean[moving]
        step = (share * log_maps(here, units[moving])).sum(-2)
        size = step.norm(dim=-1, keepdim=True)
        way = _unit(step)
        mean[moving] = _unit(torch.cos(size) * here + torch.sin(size) * way)
        moving[moving.clone()] = size.squeeze(-1) > 2e-14
        if not moving.any():
            break
    return mean, ~moving


def largest_coefficient(tolerance: float) -> float:
    """Of three vectors or more that do not count as cancelling.

    No two vectors that are not antipodal have larger ones; and above this, rounding of
    float64 inner products would be felt.
    """
    return min(1 / math.sqrt(2 * tolerance), torch.finfo(torch.float64).eps ** (-1 / 6))


def _of_many(
    units: torch.Tensor, weights: torch.Tensor, tolerance: float
) -> _Direction:
    mean, unique = _karcher(units, weights)
    theta = angle(mean.unsqueeze(-2), units)
    ratio = torch.sinc(theta / math.pi)  # sin(theta) / theta
    total = (weights * theta.cos() / ratio).sum(-1, keepdim=True)
    coefficients = weights / ratio / torch.where(total == 0, math.inf, total)
    unique &= total.squeeze(-1) > 0
    unique &= coefficients.amax(-1) <= largest_coefficient(tolerance)
    counted = weights.nonzero().flatten().tolist()
    for i, j in combinations(counted, 2):
        unique &= (units[:, i] + units[:, j]).square().sum(-1) / 2 > tolerance
    condition = total.squeeze(-1).clamp(max=1).square()
    condition = condition * torch.where(weights > 0, ratio, 1).amin(-1)
    return _Direction(mean, coefficients, condition, ~unique, unique)


def _of_two(units: torch.Tensor, weights: torch.Tensor, tolerance: float) -> _Direction:
    first, second = units.unbind(-2)
    theta = angle(first, second)
    one_plus_cosine = (first + second).square().sum(-1) / 2
    opposite = one_plus_cosine <= tolerance
    straight = opposite | (theta == 0)
    sines = torch.sin(weights * theta.unsqueeze(-1))
    coefficients = sines / torch.where(straight, 1, torch.sin(theta)).unsqueeze(-1)
    coefficients = torch.where(straight.unsqueeze(-1), weights, coefficients)
    mean = _unit((coefficients.unsqueeze(-1) * units).sum(-2))
    unique = ~opposite | (weights == 0).any()
    condition = torch.where(straight, 1, one_plus_cosine)
    return _Direction(mean, coefficients, condition, ~unique, unique)


def _directions(
    vectors: torch.Tensor, weights: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, _Direction]:
    """Of vectors `(count, models, length)`: their lengths, unit vectors and means."""
    models = vectors.shape[1]
    length = _length(vectors)
    # Each zero vector gets a dimension of its own: orthogonal to everything.
    own = (length == 0).unsqueeze(-1) * torch.eye(models, dtype=torch.float64)
    units = torch.cat([_unit(vectors), own], -1)
    find = _of_two if models == 2 else _of_many
    return length, units, find(units, weights, tolerance)


def _merge(
    vectors: torch.Tensor, weights: torch.Tensor, magnitude: str, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge vectors, `(count, models, length)`: results, sensitivity, uniqueness."""
    elements = vectors.shape[-1]
    length, units, direction = _directions(vectors, weights, tolerance)
    mean, coefficients, condition, straight, unique = direction
    weight = weights.unsqueeze(-1)
    linear = (weight * vectors).sum(-2)
    if magnitude == "slerp":
        value = (coefficients.unsqueeze(-1) * vectors).sum(-2)
        terms = vectors.abs().sum(-2)
    else:
        if magnitude == "linear":
            long = (weights * length).sum(-1).clamp(min=0)
            feels = (weights.abs() * length).sum(-1)
        else:
            logs = torch.where(length > 0, length, 1).log()
            long = (weights * logs).sum(-1).exp()
            long[((length == 0) & (weights != 0)).any(-1)] = 0
            feels = long * (1 + (weights * logs).abs().sum(-1))
        value = long.unsqueeze(-1) * _unit(mean[:, :elements])
        left = mean[:, :elements].norm(dim=-1)
        feels = feels / torch.where(left > 0, left, 1)
        terms = feels.unsqueeze(-1) * units[..., :elements].abs().sum(-2)
    reach = torch.cat([coefficients.abs(), weights.abs().expand_as(coefficients)], -1)
    terms = terms * (reach.amax(-1).clamp(min=1) / condition).unsqueeze(-1)
    plain = weights.abs().amax().clamp(min=1) * vectors.abs().sum(-2)
    straight = straight.unsqueeze(-1)
    return (
        torch.where(straight, linear, value),
        torch.where(straight, plain, terms),
        unique,
    )


class _Level(NamedTuple):
    """Coefficients of each element's vector, `(models, *shape)`."""

    coefficients: torch.Tensor
    errors: torch.Tensor  # how strongly they feel rounding
    linear: int


def _level(
    moved: Sequence[torch.Tensor],
    weights: torch.Tensor,
    kind: str,
    magnitude: str,
    tolerance: float,
    bounded: bool = False,
) -> _Level:
    members = _members(tuple(moved[0].shape), kind)
    rows = torch.stack([v.flatten()[members] for v in moved], 1)
    elements = rows.shape[-1]
    length, _, direction = _directions(rows, weights, tolerance)
    mean, c, condition, _, unique = direction
    errors = torch.maximum(c.abs(), weights).amax(-1).clamp(min=1) / condition
    errors = errors.unsqueeze(-1).expand_as(c)
    if magnitude != "slerp":
        long = (weights * length).sum(-1)
        if magnitude == "geometric":
            long = (length**weights).prod(-1)
        left = mean[:, :elements].norm(dim=-1)
        scale = long / torch.where(left > 0, left, 1)
        scale = scale.unsqueeze(-1) / torch.where(length > 0, length, math.inf)
        c, errors = scale * c, scale * errors
    if bounded:
        merged = _length((c.unsqueeze(-1) * rows).sum(-2))
        terms = (c * length).sum(-1)
        least = (4 * merged / torch.where(terms > 0, terms, 1)).clamp(max=1)
        scale = torch.where(terms > 0, least, 1).unsqueeze(-1)
        c, errors = scale * c, scale * errors
    c = torch.where(unique.unsqueeze(-1), c, weights)
    errors = torch.where(unique.unsqueeze(-1), errors, 1)
    owner = torch.empty(moved[0].shape, dtype=torch.int64)
    owner.view(-1)[members] = torch.arange(len(members)).unsqueeze(-1)
    return _Level(c.T[:, owner], errors.T[:, owner], int((~unique).sum()))


def _with_profiles(
    moved: Sequence[torch.Tensor],
    weights: torch.Tensor,
    granularity: str,
    magnitude: str,
    contrast: float,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Merge by coefficients s (c / s)^p, or s (r k / s^2)^p by rows and columns.

    There the terms of a row's or a column's mean are at most 4 times as long as it.
    """
    both = granularity == "row*column"
    kinds = ("row", "column") if both else (granularity,)
    options = magnitude, tolerance
    across = granularity in ("tensor", "dim0")
    whole = _level(moved, weights, "tensor" if across else "matrix", *options)
    s = torch.where(whole.coefficients > 0, whole.coefficients, math.inf)
    power = torch.ones_like(s)
    relative = abs(1 - contrast * len(kinds)) * whole.errors / s
    linear = whole.linear
    for kind in kinds:
        level = _level(moved, weights, kind, *options, bounded=both)
        ratio = level.coefficients / s
        if contrast <= 1:
            power *= ratio**contrast
        else:
            power *= ratio * (ratio ** (contrast - 1)).clamp(max=2)
        felt = torch.where(level.coefficients > 0, level.coefficients, math.inf)
        relative = relative + contrast * level.errors / felt
        linear += level.linear
    factors = whole.coefficients * power
    vectors = torch.stack(list(moved))
    terms = (factors * (1 + relative) * vectors.abs()).sum(0)
    return (factors * vectors).sum(0), terms, linear


def reference(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    *,
    magnitude: str = "slerp",
    contrast: float = 1.0,
    lambda_: float = 1.0,
) -> Reference:
    """Merge weights, and say how well conditioned each element is."""
    tolerance = 32 * torch.finfo(torch.float64).eps  # no cosine is more exact
    total = sum(weights)
    shares = [1 / len(weights) if abs(total) < 1e-6 else w / total for w in weights]

    origin = torch.zeros_like(tensors[0]) if base is None else base
    origin = origin.detach().double()
    moved = [tensor.detach().double() - origin for tensor in tensors]
    value = origin.clone(memory_format=torch.contiguous_format)
    sensitivity = value.abs()
    if not value.numel():
        return Reference(value, sensitivity, 0)
    members = _members(tuple(value.shape), granularity.removesuffix("*column"))
    if value.dim() > 1 and (
        granularity == "row*column" or (contrast != 1 and len(members) > 1)
    ):
        weighed = torch.tensor(shares, dtype=torch.float64)
        merged, terms, linear = _with_profiles(
            moved, weighed, granularity, magnitude, contrast, tolerance
        )
        felt = sensitivity + abs(lambda_) * terms
        return Reference(value + lambda_ * merged, felt, linear)
    merged, terms, unique = _merge(
        torch.stack([v.flatten()[members] for v in moved], 1),
        torch.tensor(shares, dtype=torch.float64),
        magnitude,
        tolerance,
    )
    value.view(-1)[members] += lambda_ * merged
    sensitivity.view(-1)[members] += abs(lambda_) * terms
    return Reference(value, sensitivity, int((~unique).sum()))


def oracle(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    *,
    magnitude: str = "slerp",
    contrast: float = 1.0,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The merge of weights in float64."""
    options = {"magnitude": magnitude, "contrast": contrast, "lambda_": lambda_}
    return reference(tensors, weights, base, granularity, **options).value


def assert_rounded_once(
    result: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    *,
    magnitude: str = "slerp",
    contrast: float = 1.0,
    lambda_: float = 1.0,
) -> None:
    """Every element is within half a unit in the last place of the exact merge.

    On top of that comes only what arithmetic of at least twice the input's precision
    leaves behind, or as much for float64, which has no wider dtype.
    """
    options = {"magnitude": magnitude, "contrast": contrast, "lambda_": lambda_}
    exact, sensitivity, _ = reference(tensors, weights, base, granularity, **options)
    number = torch.finfo(result.dtype)
    exponent = torch.frexp(exact).exponent - 1
    last_place = torch.ldexp(torch.full_like(exact, number.eps), exponent)
    last_place = last_place.clamp(min=number.smallest_normal * number.eps)
    inner = torch.finfo(torch.float32 if number.bits < 32 else torch.float64)
    error = (result.detach().double() - exact).abs()
    excess = error - 0.5 * last_place - 32 * inner.eps * sensitivity
    assert not (excess > 0).any(), f"off by up to {(error / last_place).max()} ulp"
    assert result.isfinite().all()
