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
    squares = gram.diagonal(dim1=-2, dim2=-1)
    zero = squares == 0
    # Replaced before the division: selecting afterwards would leave NaN in the
    # derivative.
    lengths = _sqrt(torch.where(zero, 1, squares))
    cosine = gram[..., 0, 1] / lengths[..., 0] / lengths[..., 1]
    cosine = torch.where(zero.any(-1), 0, cosine)
    weights = weights.expand(gram.shape[:-1])
    bound = max(antipodal_tolerance, antipodal_bound(gram.dtype))
    return _slerp(cosine, weights, bound)


# take geometry: _slerp, _sqrt, antipodal_bound
