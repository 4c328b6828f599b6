# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Linear combinations of vectors whose coefficients depend on their inner products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement, product

import torch

# take passes.portable: _BYTES_CPU, _BYTES_ELSEWHERE
# take kernel: _GRAM_ENTRIES, _GROUP_ELEMENTS, _SQUARES, _COEFFICIENTS, _NEAR_ANTIPODAL


def merge_vectors(
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    sizes: Sequence[int],
    solve: Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Merge into base + sum of c_i (v_i - base), with coefficients for each vector.

    Tensors have one shape and dtype. Seen as `sizes`, (outer, length, inner, width), a
    pair of outer and inner indices leaves one vector. `solve` takes Gram matrices and
    the `1 + cos(theta)` up to which vectors count as antipodal, and returns
    coefficients and whether there is a unique mean. Work on 16-bit inputs in float32,
    and in float64 where that is too coarse and on others. Chunking bounds inference
    scratch, not autograd graphs.
    """
    given = [*tensors] if base is None else [*tensors, base]
    views = [tensor.reshape(sizes) for tensor in given]
    dtype, device = views[0].dtype, views[0].device
    result = torch.empty(sizes, dtype=dtype, device=device)
    recorded, wide = is_recorded(given), wide_dtype(device)
    narrow = torch.float32 if dtype.itemsize == 2 and not recorded else wide
    # Vectors of one group are still in the cache when they are combined.
    outers, length, inners, width = sizes
    if device.type == "meta" or not math.prod(sizes):
        return result.reshape(tensors[0].shape)
    most = max(1, _GRAM_ENTRIES // len(tensors) ** 2)
    near = max(1, _GROUP_ELEMENTS // (length * inners * width))
    steps = min(near, max(1, most // inners)), most
    if recorded:  # autograd would copy the whole gradient for each group
        steps = outers, inners
    for outer, inner in product(_slices(outers, steps[0]), _slices(inners, steps[1])):
        inputs = [view[outer, :, inner] for view in views]
        origin = None if base is None else inputs.pop()
        for working in (narrow, wide):
            gram = _gram(inputs, origin, working)
            tolerance = 0 if working == wide else _NEAR_ANTIPODAL
            coefficients, unique = solve(gram, tolerance)
            if working == wide or _is_precise(gram, coefficients, unique):
                break
        # Contiguous for each input: strided factors are slow.
        factors = coefficients.to(working).movedim(-1, 0).contiguous()
        factors = factors[:, :, None, :, None]
        out = result[outer, :, inner]
        for chunk, vectors, total in _chunks(inputs, origin, working):
            for vector, factor in zip(vectors, factors[:, chunk[0], :, chunk[2]]):
                if total is None:
                    total = vector * factor
                else:
                    total = torch.addcmul(total, vector, factor)
            out[chunk] = total
    return result.reshape(tensors[0].shape)


def _gram(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Inner products, (outer, inner, N, N), of the differences from the base."""
    count, wide = len(inputs), wide_dtype(inputs[0].device)
    pairs = list(combinations_with_replacement(range(count), 2))
    total = inputs[0].new_zeros(len(pairs), *inputs[0].shape[::2], dtype=wide)
    for chunk, vectors, _ in _chunks(inputs, base, dtype):
        terms = [(vectors[i] * vectors[j]).sum((1, 3)) for i, j in pairs]
        total[:, chunk[0], chunk[2]] += torch.stack(terms)
    order = [pairs.index((min(p), max(p))) for p in product(range(count), repeat=2)]
    return total[order].unflatten(0, (count, count)).permute(2, 3, 0, 1)


def _chunks(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple]:
    """Yield an index, the differences from the base, and the base, in memory order."""
    given = [*inputs] if base is None else [*inputs, base]
    on_cpu, sizes = given[0].device.type == "cpu", given[0].shape
    most = (_BYTES_CPU if on_cpu else _BYTES_ELSEWHERE) // dtype.itemsize
    most = max(1, most // (len(given) + 1))
    if is_recorded(given):
        most = given[0].numel()
    parts: list[list[slice]] = []
    for size in reversed(sizes):
        step = max(1, min(size, most))
        most //= step
        parts.insert(0, _slices(size, step))
    for chunk in product(*parts):
        vectors = [tensor[chunk].to(dtype) for tensor in given]
        origin = None if base is None else vectors.pop()
        if origin is not None:
            vectors = [vector - origin for vector in vectors]
        yield chunk, vectors, origin


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]


# take passes.portable: wide_dtype, is_recorded


# take kernel: _is_precise
