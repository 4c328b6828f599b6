# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Gram matrices and combinations by PyTorch's operations, in pieces of bounded size.

For any device, strides and mixture of dtypes. Autograd can record it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch

from mergekit_nuslerp.granularity import pieces

# Memory for a piece. On a CPU it should stay in the cache; elsewhere work on a piece
# must take longer than starting it.
_BYTES_CPU = 6 * 2**20
_BYTES_ELSEWHERE = 128 * 2**20


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gram(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    measure_base: bool = False,
) -> torch.Tensor:
    """Inner products of the vectors `inputs[i] - base`.

    Args:
        inputs: `(outer, length, inner, width)` each. A vector is what one pair of outer
            and inner indices leaves.
        base: of the same shape, or None.
        dtype: what to compute in. Sums over pieces are in the device's widest dtype.
        measure_base: add the base itself as one more vector.

    Returns:
        `(outer, inner, N, N)` in the device's widest dtype. NaN and infinity in the
        inputs show in it.
    """
    count, device = len(inputs) + measure_base, inputs[0].device
    shape = *inputs[0].shape[::2], count, count
    total = torch.zeros(shape, dtype=wide_dtype(device), device=device)
    for piece, vectors, origin, buffer in _pieces(inputs, base, dtype):
        if measure_base and origin is not None:
            vectors.append(origin)
        part = total[piece[0], piece[2]]
        for i, j in combinations_with_replacement(range(count), 2):
            product = torch.mul(vectors[i], vectors[j], out=buffer).sum((1, 3))
            part[..., i, j] += product
            if i != j:
                part[..., j, i] += product
    return total


def combine(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
) -> bool:
    """Write `base + sum c_i (inputs[i] - base)`, rounded once.

    Args:
        inputs, base, dtype: as in `gram`.
        coefficients: `(outer, inner, N)`.
        out: of the inputs' shape, to write to.

    Returns:
        Whether all numbers written are finite.
    """
    # One value a vector, contiguous for each model: strided factors are slow.
    factors = coefficients.to(dtype).movedim(-1, 0).contiguous()[:, :, None, :, None]
    finite = torch.ones((), dtype=torch.bool, device=out.device)
    for piece, vectors, total, buffer in _pieces(inputs, base, dtype):
        for vector, factor in zip(vectors, factors[:, piece[0], :, piece[2]]):
            if total is None:
                total = torch.mul(vector, factor, out=buffer)
            else:
                total = torch.addcmul(total, vector, factor, out=buffer)
        out[piece].copy_(total)
        finite &= torch.stack(out[piece].detach().aminmax()).isfinite().all()
    return bool(finite)


def _pieces(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple]:
    """Parts of the view: where, vectors, base, and a buffer for what is worked out.

    What autograd records it keeps: that is one piece, and no buffers.
    """
    given = list(inputs) if base is None else [*inputs, base]
    first, count, recorded = inputs[0], len(given) + 1, is_recorded(given)
    memory = _BYTES_CPU if first.device.type == "cpu" else _BYTES_ELSEWHERE
    most = min(first.numel(), max(1, memory // dtype.itemsize // count))
    if recorded:
        most = first.numel()
    room = torch.empty(0 if recorded else count, most, dtype=dtype, device=first.device)
    for piece in pieces(first.shape, most):
        parts = [tensor[piece] for tensor in given]
        rows = [row[: parts[0].numel()].view(parts[0].shape) for row in room]
        buffers = rows or [None] * count
        wide = [row.copy_(part) for row, part in zip(rows, parts)]
        wide = wide or [part.to(dtype) for part in parts]
        origin = None if base is None else wide.pop()
        if origin is not None:
            wide = [torch.sub(x, origin, out=row) for x, row in zip(wide, buffers)]
        yield piece, wide, origin, buffers[-1]
