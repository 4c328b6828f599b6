# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements of a weight form one vector.

Every granularity is the same four-dimensional view of a weight, `(outer, length,
inner, width)`: a vector is what one pair of outer and inner indices leaves, and
sums over a vector are sums over `length` and `width`. So the kernel has one code
path, and a new granularity is one more line in `vector_view`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import product

# Rows and columns at once, each with coefficients of their own that are multiplied.
ROW_COLUMN = "row*column"

# What configs and `nuslerp` take, with N the rows or columns in a block.
NAMES = ("tensor", "matrix", "row", "column", "row:N", "column:N", ROW_COLUMN)

# mergekit's `nuslerp_row_wise: true`, also of more than two dimensions; by flags only.
FIRST_DIMENSION = "dim0"

# In configs: for each weight one of the above, as `heads` resolves it.
HEAD = "head"


def parse(granularity: str) -> tuple[str, int]:
    """Split a granularity, or raise ValueError, into its kind and the block's size."""
    match = re.fullmatch(r"(row|column):([1-9]\d*)", granularity)
    if match:
        return match[1], int(match[2])
    if ":" in granularity or granularity not in (*NAMES, FIRST_DIMENSION):
        raise ValueError(
            f"granularity must be one of {', '.join(NAMES)}, not {granularity!r}"
        )
    return granularity, 1


def vector_view(shape: Sequence[int], granularity: str) -> tuple[int, int, int, int]:
    """Sizes `(outer, length, inner, width)` for weights of one batch.

    Args:
        shape: `(batch, *weight_shape)`. The batch axis always separates vectors, and so
            do the dimensions before the last two, but for `"tensor"` and `"dim0"`.
        granularity: as in `nuslerp`; ValueError if unknown, or if a block does not
            divide its dimension. Weights of fewer than two dimensions are one vector.
            Of `"row*column"` the columns' view.
    """
    kind, block = parse(granularity)
    batch, *weight = shape
    *leading, rows, columns = (1, 1, *weight)
    matrices = batch * math.prod(leading)
    if kind == "tensor" or len(weight) < 2:
        return batch, math.prod(leading) * rows, 1, columns
    if kind == "matrix":
        return matrices, rows, 1, columns
    if kind == FIRST_DIMENSION:
        return batch, weight[0], math.prod(weight[1:]), 1
    if kind == "row":
        return matrices * _blocks(rows, block, "row"), block, 1, columns
    return matrices, rows, _blocks(columns, block, "column"), block


def matrix_count(shape: Sequence[int], granularity: str) -> int:
    """How many matrices of `(batch, *weight_shape)` vectors are compared to: of
    `"tensor"` and `"dim0"`, whose vectors run across matrices, the number of weights.
    """
    across = parse(granularity)[0] in ("tensor", FIRST_DIMENSION)
    return vector_view(shape, "tensor" if across else "matrix")[0]


def _blocks(size: int, block: int, kind: str) -> int:
    if size % block:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        near = [n for n in divisors if n < block][-1:]
        near += [n for n in divisors if n > block][:1]
        raise ValueError(
            f"granularity '{kind}:{block}' does not divide {size} {kind}s into equal "
            f"blocks. Write {' or '.join(f'{kind}:{n}' for n in near)}"
        )
    return size // block


def pieces(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut a view into equal parts of at most `most` elements, in memory's order."""
    cuts: list[list[slice]] = []
    for size in reversed(sizes):
        count = max(1, math.ceil(size / max(1, most)))
        step = max(1, math.ceil(size / count))
        cuts.insert(0, [slice(i, min(i + step, size)) for i in range(0, size, step)])
        most //= step
    yield from product(*cuts)
