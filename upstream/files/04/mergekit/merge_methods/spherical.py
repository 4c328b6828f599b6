# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Spherical means from inner products.

The mean of directions lies in their span, so its coefficients depend on their Gram
matrix alone. All tensors here are small, one N x N matrix for each vector.
"""

from __future__ import annotations

import math

import torch

# take geometry: MIN_WEIGHT_SUM, _GRAM_ROUNDING


# take geometry: normalize_weights


def mean_coefficients(
    gram: torch.Tensor, weights: torch.Tensor, *, antipodal_tolerance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of two vectors in their SLERP, linear where they are antipodal.

    A zero vector counts as orthogonal to the other one.
    """
    bound = max(antipodal_tolerance, antipodal_bound(gram.dtype))
    # Inputs first, so that sums over them run along memory.
    weights = weights.expand(gram.shape[:-1]).movedim(-1, 0)
    gram = gram.movedim((-2, -1), (0, 1))
    zero = gram.diagonal() == 0
    unit = torch.diag_embed(zero.to(gram.dtype), dim1=0, dim2=1)
    zero = zero.movedim(-1, 0)
    # Replaced *before* the formula is taken: selecting afterwards would still leave NaN
    # in the derivative.
    gram = gram.masked_fill(zero | zero.unsqueeze(1), 0) + unit
    lengths = _sqrt(gram.diagonal().movedim(-1, 0))
    cosines = gram / lengths / lengths.unsqueeze(1)
    directions, unique = _slerp(cosines, weights, bound)
    return torch.where(unique, directions, weights).movedim(0, -1), unique


# take geometry: _slerp, _sqrt, antipodal_bound
