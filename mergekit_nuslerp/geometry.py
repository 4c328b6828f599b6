# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Spherical means from inner products alone.

The weighted mean of directions lies in the span of its inputs, so its coefficients
depend only on the inputs' Gram matrix. Everything here works on small tensors: one
N x N matrix a vector, however long the vectors are.

PyTorch hands `sqrt`, `sin`, `acos`, `exp` and `log` over to threads of MKL's. They take
long where a machine is busy, and forever in a forked process. So other functions stand
here for them: `_sqrt`, `sinc`, `atan2` and powers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import numpy as np
import torch

Magnitude = Literal["slerp", "linear", "geometric"]

# mergekit's bound: weights whose sum is smaller cannot be normalised.
MIN_WEIGHT_SUM = 1e-6

# Rounding of a Gram matrix, in units of its dtype's precision: a cosine that is closer
# to -1 cannot be told from it.
_GRAM_ROUNDING = 32

# Newton steps to a Karcher mean: five where vectors are close to orthogonal, a dozen
# where they nearly cancel.
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
            they are up to the rounding of `gram`'s dtype.

    Returns:
        `(..., N)` coefficients of the v_i, in the dtype of `gram`, with finite
        derivatives everywhere, and `(...)`, whether there is a unique mean direction.

    References:
        K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    weights = weights.expand(gram.shape[:-1])
    squares = gram.diagonal(dim1=-2, dim2=-1)
    zero = squares == 0
    # Each `where` here and below replaces what the formula cannot take *before* it is
    # taken: selecting afterwards would still leave NaN in the derivative.
    lengths = _sqrt(torch.where(zero, 1, squares))
    pair = gram.shape[-1] == 2
    if not pair or magnitude != "slerp":  # a pair's direction takes one, no matrices
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        cosines = torch.where(zero.unsqueeze(-1) | zero.unsqueeze(-2), identity, gram)
        cosines = cosines / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)
    bound = max(antipodal_tolerance, antipodal_bound(gram.dtype))
    if pair:
        cosine = gram[..., 0, 1] / lengths[..., 0] / lengths[..., 1]
        cosine = torch.where(zero.any(-1), 0, cosine)
        directions, unique = _slerp(cosine, weights, bound)
    else:
        directions, unique = karcher_coefficients(cosines, weights, bound)
    if magnitude != "slerp":
        lengths = torch.where(zero, 0, lengths)
        directions = _resize(directions, cosines, lengths, weights, magnitude)
    return torch.where(unique.unsqueeze(-1), directions, weights), unique


def antipodal_bound(dtype: torch.dtype) -> float:
    """The largest `1 + cos(theta)` of antipodal vectors, by their Gram's `dtype`."""
    return _GRAM_ROUNDING * torch.finfo(dtype).eps


def _resize(
    directions: torch.Tensor,
    cosines: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor,
    magnitude: Magnitude,
) -> torch.Tensor:
    """Coefficients of the v_i for a mean of a chosen length, from those of the u_i."""
    zero = lengths == 0
    nonzero = torch.where(zero, 1, lengths)
    if magnitude == "linear":
        length = (weights * lengths).sum(-1, keepdim=True).clamp(min=0)
    else:
        length = (nonzero**weights).prod(-1, keepdim=True)
        length = torch.where((zero & (weights != 0)).any(-1, keepdim=True), 0, length)
    # Of a unit vector, zero vectors leave less than a unit vector.
    kept = torch.where(zero, 0, directions)
    square = (kept.unsqueeze(-1) * cosines * kept.unsqueeze(-2)).sum((-2, -1))
    shortened = zero.any(-1) & (square > 0)
    return kept * length / nonzero / _sqrt(torch.where(shortened, square, 1))[..., None]


def _slerp(
    cosine: torch.Tensor, weights: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors: c_i = sin(w_i theta) / sin(theta), theta in radians."""
    opposite = cosine <= bound - 1
    linear = (cosine >= 1) | opposite
    cosine = torch.where(linear, 0, cosine)
    # A product, since 1 - cosine^2 would lose the sine's digits near both ends.
    sine = _sqrt((1 - cosine) * (1 + cosine))
    turns = weights * torch.atan2(sine, cosine).unsqueeze(-1) / math.pi
    spherical = math.pi * turns * torch.sinc(turns) / sine.unsqueeze(-1)
    unique = ~(opposite & (weights != 0).all(-1))
    return torch.where(linear.unsqueeze(-1), weights, spherical), unique


def karcher_coefficients(
    cosines: torch.Tensor, weights: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of N unit vectors u_i in their weighted Karcher mean.

    The mean m minimises sum w_i theta_i^2 / 2, with theta_i the angle (radians) between
    m and u_i. There the weighted log maps cancel, so that with x_i = cos(theta_i)

        m = sum c_i u_i,    c_i = w_i f(x_i) / sum_k w_k f(x_k) x_k,
        f(x) = arccos(x) / sqrt(1 - x^2).

    The denominator is the smallest eigenvalue of the Hessian. Where it is not positive,
    the mean lies off the inputs' span, on either side of it alike. There is no unique
    mean of vectors that cancel so far that a coefficient is larger than those of two
    that are not antipodal, or than 400 in float64: its third power multiplies rounding,
    which leaves half of the digits. Derivatives of first order are the mean's.

    References:
        H. Karcher, "Riemannian center of mass and mollifier smoothing",
        Communications on Pure and Applied Mathematics 30(5), 1977.
        S. Buss and J. Fillmore, "Spherical averages and applications to spherical
        splines and interpolation", ACM Transactions on Graphics 20(2), 2001.
    """
    epsilon = torch.finfo(cosines.dtype).eps
    with torch.no_grad():
        counts = weights != 0
        pairs = counts.unsqueeze(-1) & counts.unsqueeze(-2)
        unique = ~(pairs & (cosines <= bound - 1)).flatten(-2).any(-1)
        point, converged = weights, ~unique
        for _ in range(_MAX_STEPS):
            at = _LogMaps(point, cosines, weights)
            residual = at.total.abs().amax(-1)
            converged = converged | (residual <= _GRAM_ROUNDING * epsilon)
            if converged.all():
                break
            # Each by itself, so that a vector comes out the same in any company.
            moved = at.mean + at.newton_step()
            point = torch.where(converged.unsqueeze(-1), point, moved)
        # Where vectors all but cancel, rounding may keep a mean from converging fully.
        residual = at.total.abs().amax(-1)
        unique &= (residual <= epsilon**0.5) & (at.length() <= epsilon ** (2 / 3))
        largest = min((2 * bound) ** -0.5, epsilon ** (-1 / 6))
        unique &= (at.smallest.squeeze(-1) > 0) & (at.solution.amax(-1) <= largest)
    if not (torch.is_grad_enabled() and cosines.requires_grad):
        return at.solution, unique
    # One more step, recorded: by the implicit function theorem it has the derivative
    # of the mean itself. Where there is none, take it on an orthonormal basis.
    known = unique.unsqueeze(-1)
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    cosines = torch.where(known.unsqueeze(-1), cosines, identity)
    weights = torch.where(known, weights, 1 / cosines.shape[-1])
    at = _LogMaps(torch.where(known, at.mean, weights), cosines, weights)
    return _LogMaps(at.mean + at.newton_step(), cosines, weights).solution, unique


class _LogMaps:
    """The weighted log maps of unit vectors at a point of their span.

    All are coefficients `(..., N)` of the vectors: of the point, `mean`, of the log
    maps' sum, `total`, and of the mean if this is it, `solution`. `smallest` is the
    Hessian's smallest eigenvalue, `(..., 1)`.
    """

    def __init__(
        self, point: torch.Tensor, cosines: torch.Tensor, weights: torch.Tensor
    ):
        x = _product(cosines, point)
        length = _sqrt((point * x).sum(-1, keepdim=True))
        self.mean, x = point / length, x / length
        bound = 1 - 4 * torch.finfo(x.dtype).eps
        at = x.detach().clamp(-bound, bound)
        sine = _sqrt((1 - at) * (1 + at))
        ratio = torch.atan2(sine, at) / sine
        # The derivative of -ratio. Autograd's own would lose its digits near x = 1.
        self.slope = (1 - at * ratio) / sine.square()
        if x.requires_grad:
            ratio = ratio - self.slope * (x - x.detach())
        pull = weights * ratio
        self.smallest = (pull * x).sum(-1, keepdim=True)
        self.total = pull - self.smallest * self.mean
        self.solution = pull / self.smallest
        self.cosines, self.weights, self.x = cosines, weights, x

    def length(self) -> torch.Tensor:
        """Length `(...)` of the sum of the log maps."""
        inner = _product(self.cosines, self.total)
        return _sqrt((self.total * inner).sum(-1).clamp(min=1e-30))

    def newton_step(self) -> torch.Tensor:
        """Coefficients `(..., N)` of the tangent vector that cancels the log maps."""
        with torch.no_grad():
            # Far from the mean the Hessian may not be positive: keep to descent.
            smallest = torch.maximum(self.smallest, 0.1 * self.length().unsqueeze(-1))
            curvature = self.weights * self.slope
            along = _product(self.cosines, curvature * self.x).unsqueeze(-2)
            hessian = curvature.unsqueeze(-1) * self.cosines
            hessian -= self.mean.unsqueeze(-1) * along
            hessian.diagonal(dim1=-2, dim2=-1).add_(smallest)
        if self.total.device.type == "cpu" and not self.total.requires_grad:
            # PyTorch's waits for threads, which takes long where a machine is busy.
            with suppress(np.linalg.LinAlgError):
                step = np.linalg.solve(hessian.numpy(), self.total.numpy()[..., None])
                return torch.from_numpy(step[..., 0])
        return torch.linalg.solve_ex(hessian, self.total)[0]


def _sqrt(positive: torch.Tensor) -> torch.Tensor:
    return positive * positive.rsqrt()


def _product(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    # No `@`, which waits for threads.
    return (matrix * vector.unsqueeze(-2)).sum(-1)
