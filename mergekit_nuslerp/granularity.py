# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements of a weight form one vector.

Every granularity is the same four-dimensional view of a weight, `(outer, length,
inner, width)`: a vector is what one pair of outer and inner indices leaves, and
sums over a vector are sums over `length` and `width`. So the kernel has one code
path, and a new granularity is one more line in `vector_view`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

import torch

# What users may write, with N the rows or columns in a block.
NAMES = ("tensor", "matrix", "row", "column", "row:N", "column:N")

# mergekit's `nuslerp_row_wise: true`, for tensors of more than two dimensions too.
FIRST_DIMENSION = "dim0"


def from_flags(*, flatten: bool, row_wise: bool) -> str:
    """Translate mergekit's two flags.

    `nuslerp_row_wise: true` makes the vectors run along dimension 0, so that one
    vector is a *column* W[:, j] of a matrix; `false` makes them run along the last
    dimension, and one vector is a *row* W[i, :].
    """
    if flatten:
        return "tensor"
    return FIRST_DIMENSION if row_wise else "row"


def parse(granularity: str) -> tuple[str, int]:
    """Split a granularity into its kind and the rows or columns in a block.

    Raises:
        ValueError: not a granularity.
    """
    found = re.fullmatch(r"(row|column):([1-9]\d*)", granularity)
    if found:
        return found[1], int(found[2])
    if ":" in granularity or granularity not in (*NAMES, FIRST_DIMENSION):
        raise ValueError(
            f"granularity must be one of {', '.join(NAMES)}, not {granularity!r}"
        )
    return granularity, 1


def vector_view(shape: Sequence[int], granularity: str) -> tuple[int, ...]:
    """Sizes `(outer, length, inner, width)` for weights of one batch.

    Args:
        shape: `(batch, *weight_shape)`. The batch axis always separates vectors, and so
            do the dimensions before the last two, but for `"tensor"` and `"dim0"`.
        granularity: `"tensor"`, one vector a weight; `"matrix"`, one for its last two
            dimensions; `"row"`, W[i, :]; `"column"`, W[:, j]; `"row:N"`, `"column:N"`,
            N neighbours of them; `"dim0"`, vectors along the first dimension. Weights
            of fewer than two dimensions are one vector whatever the granularity.

    Raises:
        ValueError: an unknown granularity, or a block that does not divide its
            dimension.
    """
    kind, block = parse(granularity)
    batch, *weight = shape
    if kind == "tensor" or len(weight) < 2:
        return batch, 1, 1, prod(weight)
    if kind == FIRST_DIMENSION:
        return batch, weight[0], prod(weight[1:]), 1
    *leading, rows, columns = weight
    matrices = batch * prod(leading)
    if kind == "matrix":
        return matrices, 1, 1, rows * columns
    if kind == "row":
        return matrices * _blocks(rows, block, "row"), 1, 1, block * columns
    return matrices, rows, _blocks(columns, block, "column"), block


def _blocks(size: int, block: int, kind: str) -> int:
    if size % block:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        below = max(n for n in divisors if n < block)
        near = [below, *(n for n in divisors if n > block)][:2]
        raise ValueError(
            f"granularity '{kind}:{block}' does not divide {size} {kind}s into equal "
            f"blocks. Write {' or '.join(f'{kind}:{n}' for n in near)}"
        )
    return size // block


def as_stored(
    tensors: Sequence[torch.Tensor], granularity: str
) -> tuple[list[int], str]:
    """The same vectors, of dimensions in an order that is cheap to read.

    Where vectors take in whole dimensions, the order of their elements is free. And
    the rows of a matrix are the columns of its transpose. So transposed weights can be
    read as they lie instead of in leaps or through a contiguous copy.

    Args:
        tensors: each `(batch, *weight_shape)`. The first decides, but rows and columns
            change places only where that takes a copy of none.
        granularity: as in `vector_view`.

    Returns:
        The order of the dimensions, batch first, and the granularity in that order.

    Raises:
        As `vector_view`.
    """
    first = tensors[0]
    vector_view(first.shape, granularity)  # for errors in the words of the caller
    kind, block = parse(granularity)
    order, strides = list(range(first.ndim)), first.stride()
    if kind in ("tensor", "matrix"):
        start = 1 if kind == "tensor" else max(1, first.ndim - 2)
        order[start:] = sorted(order[start:], key=lambda dim: -strides[dim])
        return order, granularity
    if kind == FIRST_DIMENSION and first.ndim == 3:
        kind = "column"
    if kind in ("row", "column") and first.ndim > 2 and strides[-2] < strides[-1]:
        kind = "row" if kind == "column" else "column"
        swapped = kind if block == 1 else f"{kind}:{block}"
        if all(_is_view(tensor.mT, swapped) for tensor in tensors):
            return [*order[:-2], order[-1], order[-2]], swapped
    return order, granularity


def _is_view(tensor: torch.Tensor, granularity: str) -> bool:
    """Whether a batch can be seen as vectors without copying it."""
    try:
        tensor.view(vector_view(tensor.shape, granularity))
    except RuntimeError:
        return False
    return True
