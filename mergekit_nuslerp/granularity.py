# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements of a weight form one vector.

Every granularity is the same four-dimensional view of a weight, `(outer, length,
inner, width)`: a vector is what one pair of outer and inner indices leaves, and
sums over a vector are sums over `length` and `width`. So the kernel has one code
path, and a new granularity is one more line in `vector_view`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch

Granularity = Literal["tensor", "row", "column"]


def from_flags(*, flatten: bool, row_wise: bool) -> Granularity:
    """Translate mergekit's two flags.

    `nuslerp_row_wise: true` makes the vectors run along dimension 0, so that one
    vector is a *column* W[:, j] of a matrix; `false` makes them run along the last
    dimension, and one vector is a *row* W[i, :].
    """
    if flatten:
        return "tensor"
    return "column" if row_wise else "row"


def vector_view(shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """Sizes `(outer, length, inner, width)` for weights of one batch.

    Args:
        shape: `(batch, *weight_shape)`. The batch axis always separates vectors.
        granularity: `"tensor"`, one vector a weight; `"row"`, vectors along the
            last dimension; `"column"`, vectors along the first. Weights of fewer
            than two dimensions are one vector whatever the granularity.

    Raises:
        ValueError: an unknown granularity.
    """
    batch, *weight = shape
    if granularity not in ("tensor", "row", "column"):
        raise ValueError(
            f"granularity must be 'tensor', 'row' or 'column', not {granularity!r}"
        )
    if granularity == "tensor" or len(weight) < 2:
        return batch, 1, 1, prod(weight)
    if granularity == "row":
        return batch * prod(weight[:-1]), 1, 1, weight[-1]
    return batch, weight[0], prod(weight[1:]), 1


def storage_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions of a batch from the slowest to the fastest in memory, batch first.

    Where a weight is one vector the order of its elements is free, so a transposed
    weight can be read as it lies instead of through a contiguous copy.
    """
    strides = tensor.stride()
    weight_dims = range(1, tensor.ndim)
    return [0, *sorted(weight_dims, key=lambda dim: -strides[dim])]
