# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Spherical interpolation from inner products alone.

The interpolated point lies in the span of its inputs, so its coefficients depend
only on the inputs' Gram matrix. Everything here works on small tensors: one N x N
matrix a vector, however long the vectors are.
"""

from __future__ import annotations

import torch

# mergekit's bound: weights whose sum is smaller cannot be normalised.
MIN_WEIGHT_SUM = 1e-6

# Rounding of a Gram matrix, in units of its dtype's precision: a cosine that is closer
# to -1 cannot be told from it.
_COSINE_ROUNDING = 32


def normalize_weights(weights: torch.Tensor) -> torch.Tensor:
    """Scale weights to sum to one, or make them equal where they sum to almost zero.

    Args:
        weights: `(..., N)`, any finite values, in a floating-point dtype.

    Returns:
        `(..., N)`.
    """
    total = weights.sum(-1, keepdim=True)
    vanishing = total.abs() < MIN_WEIGHT_SUM
    scaled = weights / torch.where(vanishing, 1, total)
    return torch.where(vanishing, 1 / weights.shape[-1], scaled)


def slerp_coefficients(
    gram: torch.Tensor, weights: torch.Tensor, *, antipodal_tolerance: float
) -> torch.Tensor:
    """Coefficients of two vectors in their spherical linear interpolation.

    With the angle theta between v_0 and v_1 (radians), the result
    c_0 v_0 + c_1 v_1 has c_i = sin(w_i theta) / sin(theta). Weights outside [0, 1]
    extrapolate along the same great circle. A zero vector counts as orthogonal to
    the other one. Parallel vectors take the formula's limit, c_i = w_i, and so do
    antipodal ones, between which no great circle is singled out.

    Args:
        gram: `(..., 2, 2)` inner products, float64 where the device has it.
        weights: broadcastable to `(..., 2)`, of the same dtype, summing to one.
        antipodal_tolerance: vectors with `1 + cos(theta)` up to this are antipodal.

    Returns:
        `(..., 2)`, in the dtype of `gram`, with finite derivatives everywhere.

    Reference:
        K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    if gram.shape[-1] != 2:
        raise ValueError(
            f"NuSLERP interpolates exactly two models, not {gram.shape[-1]}"
        )
    squared = gram.diagonal(dim1=-2, dim2=-1)
    zero = squared == 0
    # Each `where` below replaces what the formula cannot take *before* it is taken:
    # selecting afterwards would still leave NaN in the derivative.
    lengths = torch.where(zero, 1, squared).sqrt()
    cosine = gram[..., 0, 1] / lengths.prod(-1)
    cosine = torch.where(zero.any(-1), 0, cosine)

    rounding = _COSINE_ROUNDING * torch.finfo(gram.dtype).eps
    tolerance = max(antipodal_tolerance, rounding)
    linear = (cosine >= 1) | (cosine <= tolerance - 1)
    cosine = torch.where(linear, 0, cosine)
    # A product, since 1 - cosine^2 would lose the sine's digits near both ends.
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    theta = torch.atan2(sine, cosine).unsqueeze(-1)
    spherical = torch.sin(weights * theta) / sine.unsqueeze(-1)
    return torch.where(linear.unsqueeze(-1), weights, spherical)
