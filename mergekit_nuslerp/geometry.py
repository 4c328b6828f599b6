# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Spherical means from inner products alone.

The weighted mean of directions lies in the span of its inputs, so its coefficients
depend only on the inputs' Gram matrix. Everything here works on small tensors: one
N x N matrix a vector, however long the vectors are.

PyTorch hands `sqrt`, `sin`, `acos`, `exp` and `log` over to threads of MKL's. They take
long where a machine is busy (on two such cores 8 ms for the `sqrt` of 16,000 numbers,
and `_sqrt` 0.04), and forever in a forked process. So other functions stand here for
them: `_sqrt`, `sinc`, `atan2` and powers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Magnitude = Literal["slerp", "linear", "geometric"]

# Weights whose sum is smaller cannot be normalised.
MIN_WEIGHT_SUM = 1e-6

# Rounding of a Gram matrix, in units of its dtype's precision: a cosine that is closer
# to -1 cannot be told from it.
_GRAM_ROUNDING = 32

# Entries of matrices that are worked on at once: so few that PyTorch does it in one
# thread, as several would wait for each other where a machine is busy.
_MOST_ENTRIES = 2**15 - 1

# A contrast, and what one above 1 multiplies coefficients by, so that those of vectors
# that nearly cancel stay bounded. In merges of a small language model a gain of 2 cost
# nothing at a contrast of 2, and was better than 4, and 4 better than none, at 3.
MOST_CONTRAST = 100
_LARGEST_GAIN = 2.0

# How many times as long as a mean what adds up to it may be, where other coefficients
# multiply it. Of nearly opposite vectors it grows without bound, and would no longer
# cancel then.
_MOST_CANCELLED = 4.0

# Newton steps to a Karcher mean: some five, and a dozen where vectors nearly cancel.
_MAX_STEPS = 24


def normalize_weights(weights: torch.Tensor) -> torch.Tensor:
    """Scale weights `(..., N)` to sum to one; equal ones where they sum to zero."""
    total = weights.sum(-1, keepdim=True)
    vanishing = total.abs() < MIN_WEIGHT_SUM
    scaled = weights / torch.where(vanishing, 1, total)
    return torch.where(vanishing, 1 / weights.shape[-1], scaled)


def sums_to_zero(weights: Sequence[float]) -> bool:
    """Whether the sum is too small to divide by, so that all count the same."""
    return abs(sum(weights)) < MIN_WEIGHT_SUM


def mean_coefficients(
    gram: torch.Tensor,
    weights: torch.Tensor,
    *,
    magnitude: Magnitude = "slerp",
    antipodal_tolerance: float = 0.0,
    bounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of N vectors v_i in their weighted spherical mean.

    The mean's direction is sum c_i u_i with the unit vectors u_i = v_i / |v_i|: for
    two vectors their spherical linear interpolation, for more their Karcher mean. A
    zero vector counts as orthogonal to the others. Where no direction is singled out,
    the mean is linear: sum w_i v_i.

    Args:
        gram: `(..., N, N)` inner products, N >= 2, float64 where the device has it.
        weights: broadcastable to `(..., N)`, of the same dtype, summing to one, and
            for N > 2 none negative. Two vectors extrapolate along their great circle.
        magnitude: `"slerp"` applies the c_i to the v_i themselves, as mergekit does.
            `"linear"` makes the length sum w_i |v_i|, but not below zero, and
            `"geometric"` the product of |v_i|^w_i.
        antipodal_tolerance: vectors with `1 + cos(theta)` up to this are antipodal, as
            they are up to the rounding of `gram`'s dtype. Karcher means are found up
            to 1e-6 times this, or to rounding.
        bounded: where the c_i v_i nearly cancel, so that their lengths sum to more than
            4 times that of the mean, scale all c_i down until they do not.

    Returns:
        `(..., N)` coefficients of the v_i, in the dtype of `gram`, with finite
        derivatives everywhere, and `(...)`, whether there is a unique mean direction.

    References:
        K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    shape, count = gram.shape[:-1], gram.shape[-1]
    bound = max(antipodal_tolerance, antipodal_bound(gram.dtype))
    matrices = gram.reshape(-1, count, count)
    shares = weights.expand(shape).reshape(-1, count)
    most = max(1, _MOST_ENTRIES // (count * (count + 1)))
    means = []
    for part, own in zip(matrices.split(most), shares.split(most)):
        # Models first, so that sums over them run along memory.
        part = part.permute(1, 2, 0).contiguous()
        mean, unique = _mean(part, own.T.contiguous(), magnitude, bound)
        means.append((_bounded(mean, unique, part) if bounded else mean, unique))
    coefficients, unique = (torch.cat(parts, -1) for parts in zip(*means))
    return coefficients.T.reshape(shape), unique.reshape(shape[:-1])


def profile(
    coefficients: torch.Tensor, whole: torch.Tensor, contrast: float
) -> torch.Tensor:
    """What coefficients c are over those of the whole, s: (c / s)^contrast.

    Above a contrast of 1, what it multiplies c / s by, (c / s)^(contrast - 1), is at
    most 2. Where s is 0, the result is what c = 0 gives: 0, or 1 at a contrast of 0.

    Args:
        coefficients: `(..., vectors, N)`, none negative.
        whole: broadcastable to that, none negative.
        contrast: from 0 to 100.
    """
    ratio = coefficients / torch.where(whole == 0, math.inf, whole)
    zero = ratio == 0
    ratio = torch.where(zero, 1, ratio)
    # Exponents are tensors, as PyTorch takes `sqrt` for a number of 0.5.
    result = ratio ** torch.full_like(ratio, min(contrast, 1))
    if contrast > 1:
        largest = _LARGEST_GAIN ** min(1 / (contrast - 1), 99)  # or it overflows
        gain = ratio.clamp(max=largest) ** torch.full_like(ratio, contrast - 1)
        result = result * gain
    return torch.where(zero, 0.0**contrast, result)


def antipodal_bound(dtype: torch.dtype) -> float:
    """The largest `1 + cos(theta)` of antipodal vectors, by their Gram's `dtype`."""
    return _GRAM_ROUNDING * torch.finfo(dtype).eps


def _mean(
    gram: torch.Tensor, weights: torch.Tensor, magnitude: Magnitude, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(N, ...)` coefficients of `(N, N, ...)` Grams, linear without a unique mean."""
    zero = gram.diagonal() == 0
    unit = torch.diag_embed(zero.to(gram.dtype), dim1=0, dim2=1)
    zero = zero.movedim(-1, 0)
    # Replaced *before* the formulas are taken, here and below: selecting afterwards
    # would still leave NaN in the derivative.
    gram = gram.masked_fill(zero | zero.unsqueeze(1), 0) + unit
    lengths = _sqrt(gram.diagonal().movedim(-1, 0))
    cosines = gram / lengths / lengths.unsqueeze(1)
    mean = _slerp if len(gram) == 2 else karcher_coefficients
    directions, unique = mean(cosines, weights, bound)
    if magnitude != "slerp":
        # Without the share of zero vectors, a mean is shorter than a unit vector.
        nonzero = torch.where(zero, 0, directions)
        square = (nonzero.unsqueeze(1) * cosines * nonzero).sum((0, 1))
        shorter = zero.any(0) & (square > 0)
        if magnitude == "linear":
            # A negative weight may make the sum negative, and so turn the mean round.
            scale = (weights * torch.where(zero, 0, lengths)).sum(0).clamp(min=0)
        else:
            vanishes = (zero & (weights != 0)).any(0)
            scale = torch.where(vanishes, 0, (lengths**weights).prod(0))
        directions = nonzero * scale / lengths / _sqrt(torch.where(shorter, square, 1))
    # NaN and infinity in an input make all coefficients NaN, not the merge linear.
    linear = weights + 0 * cosines.detach().sum((0, 1))
    return torch.where(unique, directions, linear), unique


def _bounded(
    coefficients: torch.Tensor, unique: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    """Coefficients of unique means, scaled down where the vectors nearly cancel."""
    squares = gram.diagonal().movedim(-1, 0)
    present = squares > 0
    lengths = torch.where(present, _sqrt(torch.where(present, squares, 1)), 0)
    total = (coefficients * lengths).sum(0)
    nonzero = unique & (total > 0)
    parts = coefficients / torch.where(nonzero, total / _MOST_CANCELLED, 1)
    share = (parts.unsqueeze(1) * gram * parts).sum((0, 1))
    return coefficients * _sqrt(torch.where(nonzero, share, 1).clamp(1e-30, 1))


def _slerp(
    cosines: torch.Tensor, weights: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors: c_i = sin(w_i theta) / sin(theta), theta in radians."""
    cosine = cosines[0, 1]
    opposite = cosine <= bound - 1
    linear = (cosine >= 1) | opposite
    cosine = torch.where(linear, 0, cosine)
    # A product, since 1 - cosine^2 would lose the sine's digits near both ends.
    sine = _sqrt((1 - cosine) * (1 + cosine))
    turns = weights * torch.atan2(sine, cosine) / math.pi
    spherical = math.pi * turns * torch.sinc(turns) / sine
    unique = ~(opposite & (weights != 0).all(0))
    return torch.where(linear, weights, spherical), unique


def karcher_coefficients(
    cosines: torch.Tensor, weights: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of N unit vectors u_i in their weighted Karcher mean.

    The mean m minimises sum w_i theta_i^2 / 2, with theta_i the angle (radians) between
    m and u_i. There the weighted log maps cancel, so that with x_i = cos(theta_i)

        m = sum c_i u_i,    c_i = w_i f(x_i) / sum_k w_k f(x_k) x_k,
        f(x) = arccos(x) / sqrt(1 - x^2).

    The denominator is the smallest eigenvalue of the Hessian. Where it is not positive,
    the mean lies off the inputs' span, on either side of it alike. Nor is one unique
    where two vectors with a weight are antipodal, where all cancel so far that a
    coefficient is above 400 in float64 (its third power multiplies rounding) or above
    the largest of two that are not antipodal, and where 24 steps do not find it.

    Derivatives of first order in reverse mode are the mean's. Others raise
    NotImplementedError.

    Args:
        cosines: `(N, N, ...)`, models first.
        weights: `(N, ...)`, none negative, summing to one.
        bound: vectors with `1 + cos(theta)` up to this are antipodal. The c_i are found
            up to some 1e-6 times this, or to rounding.

    Returns:
        The c_i, `(N, ...)`, and `(...)`, whether there is a unique mean direction.

    References:
        H. Karcher, "Riemannian center of mass and mollifier smoothing",
        Communications on Pure and Applied Mathematics 30(5), 1977.
        S. Buss and J. Fillmore, "Spherical averages and applications to spherical
        splines and interpolation", ACM Transactions on Graphics 20(2), 2001.
    """
    epsilon = torch.finfo(cosines.dtype).eps
    cosines = _FirstOrder.apply(cosines, 1)
    with torch.no_grad():
        counts = weights != 0
        opposite = (cosines <= bound - 1) & counts & counts.unsqueeze(1)
        unique = ~opposite.flatten(0, 1).any(0)
        point, converged = weights, ~unique
        for _ in range(_MAX_STEPS):
            solution, total, smallest, step = _log_maps(point, cosines, weights)
            residual = total.abs().amax(0)
            # What is left of the log maps is felt by the inverse of that eigenvalue.
            tolerance = (1e-6 * bound * smallest).clamp(min=_GRAM_ROUNDING * epsilon)
            converged = converged | (residual <= tolerance)
            if converged.all():
                break
            # What is found stays, however long the others take.
            point = torch.where(converged, point, step())
        # Half of the digits will do, as rounding keeps more from vectors that cancel.
        unique &= residual <= epsilon**0.5
        # Larger coefficients, of vectors that cancel, would multiply rounding.
        largest = min((2 * bound) ** -0.5, epsilon ** (-1 / 6))
        unique &= (smallest > 0) & (solution.amax(0) <= largest)
    if not (torch.is_grad_enabled() and cosines.requires_grad):
        return solution, unique
    # One more step, recorded where there is a mean: by the implicit function theorem it
    # has the derivative of the mean itself, if only the first in reverse mode.
    cosines, weights = (torch.where(unique, x, x.detach()) for x in (cosines, weights))
    *_, step = _log_maps(torch.where(unique, point, weights), cosines, weights)
    solution, *_ = _log_maps(step(), cosines, weights)
    return torch.where(unique, solution, weights), unique


def _log_maps(
    point: torch.Tensor, cosines: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]:
    """What there is to know at a point m, to find the mean and to see that it is found.

    The log map of u_i at m is theta_i / sin(theta_i) (u_i - cos(theta_i) m), with
    theta_i (radians) its angle to m. Points are coefficients `(N, ...)` of the u_i.

    Returns:
        The mean's coefficients, if m is the mean; the weighted sum of the log maps,
        `(N, ...)`, zero at the mean; the Hessian's least eigenvalue, `(...)`; and a
        function that makes Newton's step and returns the next point.
    """
    x = (cosines * point).sum(1)
    length = _sqrt((point * x).sum(0))
    mean, x = point / length, x / length
    # So that no sine is zero.
    bound = 1 - 4 * torch.finfo(x.dtype).eps
    cosine = x.detach().clamp(-bound, bound)
    sine = _sqrt((1 - cosine) * (1 + cosine))
    ratio = torch.atan2(sine, cosine) / sine
    # The derivative of -ratio. Autograd's own would lose its digits near x = 1.
    slope = (1 - cosine * ratio) / sine.square()
    ratio = ratio - slope * (x - x.detach())
    pull = weights * ratio
    smallest = (pull * x).sum(0)
    total = pull - smallest * mean

    def newton_step() -> torch.Tensor:
        with torch.no_grad():
            curvature = weights * slope
            along = (cosines * (curvature * x)).sum(1)
            hessian = curvature.unsqueeze(1) * cosines
            # A small eigenvalue along the mean would be lost beside the large ones of
            # nearly opposite vectors. Above 0.03, means of vectors in a plane are.
            hessian.addcmul_(mean.unsqueeze(1), 0.03 * x - along)
            # Far from the mean the Hessian may not be positive: keep to descent.
            square = (total * (cosines * total).sum(1)).sum(0)
            least = torch.maximum(smallest, 0.1 * _sqrt(square.clamp(min=1e-30)))
            hessian.diagonal().add_(least.unsqueeze(-1))
        # Gauss-Jordan elimination for all vectors at once, without pivots, as the next
        # step mends rounding. `torch.linalg.solve` takes milliseconds on busy cores.
        rows = torch.cat([hessian, total.unsqueeze(1)], 1)
        for pivot in range(len(rows)):
            row = rows[pivot, 1:] / rows[pivot, 0]
            rows = torch.addcmul(rows[:, 1:], rows[:, :1], row, value=-1)
            rows[pivot] = row
        return mean + rows[:, 0]

    return pull / smallest, total, smallest, newton_step


class _FirstOrder(torch.autograd.Function):
    """Identity with a derivative of first order in reverse mode; others raise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values, order):
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        if ctx.order > 1:
            raise NotImplementedError("Karcher means have no second derivatives")
        return _FirstOrder.apply(gradient, ctx.order + 1), None


def _sqrt(positive: torch.Tensor) -> torch.Tensor:
    return positive * positive.rsqrt()
