# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Gram matrices and combinations by PyTorch's operations, in pieces of bounded size.

For any device, strides and mixture of dtypes. Autograd can record it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product

import torch

from mergekit_nuslerp.granularity import pieces

# Memory for a piece. On a CPU it should stay in the cache; elsewhere work on a piece
# must take longer than starting it.
_BYTES_CPU = 4 * 2**20
_BYTES_ELSEWHERE = 128 * 2**20


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's GPUs, and some of Intel's, lack float64."""
    has_float64 = device.type != "mps"
    if device.type == "xpu":
        has_float64 = torch.xpu.get_device_properties(device).has_fp64
    return torch.float64 if has_float64 else torch.float32


def is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gram(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Inner products of the vectors `inputs[i] - base`.

    Args:
        inputs: `(outer, length, inner, width)` each. A vector is what one pair of outer
            and inner indices leaves.
        base: of the same shape, or None.
        dtype: what to compute in. Sums over pieces are in the device's widest dtype.

    Returns:
        `(outer, inner, N, N)` in the device's widest dtype. NaN and infinity in the
        inputs show in it.
    """
    count, device = len(inputs), inputs[0].device
    pairs = list(combinations_with_replacement(range(count), 2))
    shape = len(pairs), *inputs[0].shape[::2]
    total = torch.zeros(shape, dtype=wide_dtype(device), device=device)
    for piece, vectors, _, buffer in _pieces(inputs, base, dtype):
        terms = (torch.mul(vectors[i], vectors[j], out=buffer) for i, j in pairs)
        total[:, piece[0], piece[2]].add_(torch.stack([x.sum((1, 3)) for x in terms]))
    order = [pairs.index((min(p), max(p))) for p in product(range(count), repeat=2)]
    return total[order].unflatten(0, (count, count)).permute(2, 3, 0, 1)


def combine(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
    row_factors: torch.Tensor | None = None,
) -> bool:
    """Write `base + sum c_i (inputs[i] - base)`, rounded once.

    Args:
        inputs, base, dtype: as in `gram`.
        coefficients: `(outer, inner, N)`.
        out: of the inputs' shape, to write to.
        row_factors: `(outer, length, N)`, by which the c_i are multiplied, if any.

    Returns:
        Whether all numbers written are finite.
    """
    # One value a vector, contiguous for each model: strided factors are slow.
    factors = coefficients.to(dtype).movedim(-1, 0).contiguous()[:, :, None, :, None]
    if row_factors is not None:
        row_factors = row_factors.to(dtype).movedim(-1, 0)[..., None, None]
    finite = torch.ones((), dtype=torch.bool, device=out.device)
    for piece, vectors, total, buffer in _pieces(inputs, base, dtype):
        for index, vector in enumerate(vectors):
            factor = factors[index, piece[0], :, piece[2]]
            if row_factors is not None:
                factor = factor * row_factors[index, piece[0], piece[1]]
            if total is None:
                total = torch.mul(vector, factor, out=buffer)
            else:
                total = torch.addcmul(total, vector, factor, out=buffer)
        # In place: small tensors that stay would keep the C library from reusing the
        # memory of large ones between them.
        extremes = out[piece].copy_(total).detach().aminmax()
        finite &= torch.stack(extremes).isfinite().all()
    return bool(finite)


def _pieces(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple]:
    """Parts of the view: where, vectors, base, and a buffer for what is worked out.

    That is the base's own, if there is one: fewer buffers leave more to each.
    What autograd records it keeps: that is one piece, and no buffers.
    """
    operands = list(inputs) if base is None else [*inputs, base]
    first, count, recorded = inputs[0], len(inputs) + 1, is_recorded(operands)
    memory = _BYTES_CPU if first.device.type == "cpu" else _BYTES_ELSEWHERE
    most = min(first.numel(), max(1, memory // dtype.itemsize // count))
    if recorded:
        most = first.numel()
    room = torch.empty(0 if recorded else count, most, dtype=dtype, device=first.device)
    for piece in pieces(first.shape, most):
        parts = [tensor[piece] for tensor in operands]
        # One operation a model: PyTorch's threads then find in their own cache what
        # they wrote there.
        buffers = room[:, : parts[0].numel()].unflatten(1, parts[0].shape).unbind()
        wide = [buffer.copy_(part) for buffer, part in zip(buffers, parts)]
        if recorded:
            wide, buffers = [part.to(dtype) for part in parts], [None] * count
        origin = None if base is None else wide.pop()
        if origin is not None:
            wide = [torch.sub(x, origin, out=out) for x, out in zip(wide, buffers)]
        yield piece, wide, origin, buffers[-1]
