# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Merge vectors by spherical means of their directions.

A mean lies in the span of its inputs, so its coefficients depend on their Gram matrix
alone: one pass over the vectors takes inner products, a second one combines. Small
tensors go without `sqrt`, `sin` and `acos`: PyTorch hands these to several threads on
CPUs, which takes milliseconds where the cores are busy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement, product

import torch

# take geometry: MIN_WEIGHT_SUM, _GRAM_ROUNDING
# take passes.portable: _BYTES_CPU, _BYTES_ELSEWHERE
# take kernel: _GRAM_ENTRIES, _LEAST_SQUARE_FLOAT32, _NEAR_ANTIPODAL
# take kernel: _LARGEST_COEFFICIENT


def merge_vectors(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    sizes: Sequence[int],
    solve: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Merge into base + sum of c_i (v_i - base), with coefficients for each vector.

    Tensors have one dtype, and are viewed as `sizes`, (outer, length, inner, width):
    each of the outer * inner vectors runs along length and width. `solve` takes Gram
    matrices `(N, N, outer, inner)` and the 1 + cos(theta) up to which vectors are
    antipodal, and returns coefficients `(N, outer, inner)` and whether there is a
    unique mean, `(outer, inner)`. Work on 16-bit inputs in float32, and in float64
    where that is too coarse and on other inputs. Chunking bounds inference scratch,
    not autograd graphs, nor copies of strided inputs that cannot be viewed so.
    """
    views = [x.reshape(sizes) for x in (*tensors, *([] if base is None else [base]))]
    if not all(view.is_floating_point() for view in views):
        raise TypeError("Spherical means require floating-point tensors")
    result, count = views[0].new_empty(sizes), len(tensors)
    if not result.numel():
        return result.reshape(tensors[0].shape)
    recorded = torch.is_grad_enabled() and any(view.requires_grad for view in views)
    wide = wide_dtype(result.device)
    # Derivatives go as 1 / length^2, and may leave float32 where squares do not.
    narrow = torch.float32 if result.dtype.itemsize == 2 and not recorded else wide
    # Where both are one dtype, the second entry is all that stays.
    bounds = {narrow: _NEAR_ANTIPODAL, wide: _GRAM_ROUNDING * torch.finfo(wide).eps}
    outers, _, inners, _ = sizes
    most = max(1, _GRAM_ENTRIES // count**2)
    memory = _BYTES_CPU if result.device.type == "cpu" else _BYTES_ELSEWHERE
    if recorded:  # autograd would copy the whole gradient for each part
        most, memory = outers * inners, sys.maxsize
    for rows, columns in pieces((outers, inners), most):
        group = [view[rows, :, columns] for view in views]
        for dtype, bound in bounds.items():
            gram = _gram(group, count, dtype, memory)
            coefficients, unique = solve(gram, bound)
            if dtype == wide or _is_precise(gram.diagonal(), coefficients, unique):
                break
        # Contiguous, since strided factors are slow.
        factors = coefficients.to(dtype).contiguous()[:, :, None, :, None]
        out = result[rows, :, columns]
        for chunk, vectors, total in _chunks(group, count, dtype, memory):
            for x, factor in zip(vectors, factors[:, chunk[0], :, chunk[2]]):
                total = x * factor if total is None else total.addcmul(x, factor)
            out[chunk] = total
    return result.reshape(tensors[0].shape)


def _gram(
    given: Sequence[torch.Tensor], count: int, dtype: torch.dtype, memory: int
) -> torch.Tensor:
    """Inner products `(N, N, outer, inner)` of the differences from the base."""
    pairs = list(combinations_with_replacement(range(count), 2))
    wide = wide_dtype(given[0].device)
    total = given[0].new_zeros(len(pairs), *given[0].shape[::2], dtype=wide)
    for chunk, vectors, _ in _chunks(given, count, dtype, memory):
        terms = [(vectors[i] * vectors[j]).sum((1, 3)) for i, j in pairs]
        total[:, chunk[0], chunk[2]] += torch.stack(terms)
    order = [pairs.index((min(p), max(p))) for p in product(range(count), repeat=2)]
    return total[order].unflatten(0, (count, count))


def _chunks(
    given: Sequence[torch.Tensor], count: int, dtype: torch.dtype, memory: int
) -> Iterator[tuple]:
    """Yield where a chunk is, the differences from the base, and the base if any."""
    most = max(1, memory // dtype.itemsize // (len(given) + 1))
    for chunk in pieces(given[0].shape, most):
        vectors = [tensor[chunk].to(dtype) for tensor in given]
        base = vectors.pop() if len(given) > count else None
        yield chunk, vectors if base is None else [x - base for x in vectors], base


# take granularity: pieces


# take passes.portable: wide_dtype


def _is_precise(
    squares: torch.Tensor, coefficients: torch.Tensor, unique: torch.Tensor
) -> bool:
    """Whether float32 is enough for vectors of these squared lengths."""
    sizes, most = coefficients.abs(), _LARGEST_COEFFICIENT
    within = (sizes >= 1 / most) & (sizes <= most) | (sizes == 0)
    # Of lengths that are infinite, no coefficient is a number.
    return bool(within.all() & unique.all() & (squares >= _LEAST_SQUARE_FLOAT32).all())


# take geometry: normalize_weights, _mean as mean_coefficients, _slerp, _sqrt
