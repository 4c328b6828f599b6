# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Gram matrices and combinations by native.cpp, for contiguous tensors on the CPU.

`gram` and `combine` are as in `portable`. Threads are as many as PyTorch's count says;
they begin and end within a call, which lets other Python threads run.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from mergekit_nuslerp.granularity import pieces

_STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements of one call, since Ctrl-C takes effect after it, and those of all models
# together that are worth a thread.
_MOST_ELEMENTS = 2**25
_THREAD_ELEMENTS = 2**19

FAILURE = ""  # why the compiled library does not serve, if it does not
try:
    _FOUND = find_spec("mergekit_nuslerp.passes._native")
    if _FOUND is None or _FOUND.origin is None:
        raise OSError("it was not built when this package was installed")
    _LIBRARY = ctypes.CDLL(_FOUND.origin)
except OSError as error:
    FAILURE = f"the C++ part cannot be loaded: {error}"


def serves(inputs: Sequence[torch.Tensor]) -> bool:
    """Whether this pass can take these inputs."""
    dtype = inputs[0].dtype
    return not FAILURE and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype in _STORED
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in inputs
    )


def gram(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    shape = *inputs[0].shape[::2], len(inputs), len(inputs)
    # Not `torch.zeros`, which starts threads for large ones; they spin for long after.
    zeros = bytearray(8 * math.prod(shape))
    total = torch.frombuffer(zeros, dtype=torch.float64).view(shape)
    for piece in pieces(inputs[0].shape, _MOST_ELEMENTS):
        # What is added to is contiguous: where inner is cut, outer is one.
        _call(inputs, base, dtype, piece, None, total[piece[0], piece[2]])
    return total


def combine(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
    row_factors: torch.Tensor | None = None,
) -> bool:
    infinite = 0
    for piece in pieces(out.shape, _MOST_ELEMENTS):
        factors = coefficients[piece[0], piece[2]].contiguous()
        if row_factors is not None:
            parts = factors, row_factors[piece[0], piece[1]]
            factors = torch.cat([part.flatten() for part in parts])
        infinite |= _call(inputs, base, dtype, piece, factors, out[piece])
    return not infinite


def _call(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    piece: tuple[slice, ...],
    coefficients: torch.Tensor | None,
    result: torch.Tensor,
) -> int:
    """Take part of a view through native.cpp, whose `Sizes` say what it needs."""
    parts = [x[piece] for x in (inputs if base is None else [*inputs, base])]
    first, in_double = parts[0], dtype == torch.float64
    sizes = _STORED.index(first.dtype), in_double, len(inputs), base is not None
    has_rows = coefficients is not None and coefficients.dim() == 1
    sizes = (*sizes, has_rows, *first.shape, *first.stride()[:2])
    worthwhile = max(1, len(parts) * first.numel() // _THREAD_ELEMENTS)
    status: int = _LIBRARY.nuslerp(
        (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        ctypes.c_void_p(None if coefficients is None else coefficients.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
        ctypes.c_int64(min(worthwhile, torch.get_num_threads())),
    )
    if status == 2:
        raise MemoryError("no memory for the sums of a merge")
    return status
