# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Gram matrices and combinations by native.cpp, for contiguous tensors on the CPU.

`gram` and `combine` are as in `portable`. Threads are as many as PyTorch's count says;
they begin and end within a call, which lets other Python threads run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from mergekit_nuslerp.granularity import pieces

_STORED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements of one call, since Ctrl-C takes effect after it, and those of all models
# together that are worth a thread.
_MOST_ELEMENTS = 2**25
_THREAD_ELEMENTS = 2**17


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or why there is none."""
    spec = find_spec("mergekit_nuslerp.passes._native")
    if spec is None or spec.origin is None:
        return None, "the C++ part was not built when this package was installed"
    try:
        return ctypes.CDLL(spec.origin), ""
    except OSError as error:
        return None, f"the C++ part cannot be loaded: {error}"


_LIBRARY, FAILURE = _load()


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
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    measure_base: bool = False,
) -> torch.Tensor:
    count = len(inputs) + measure_base
    shape = *inputs[0].shape[::2], count, count
    total = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for piece in pieces(inputs[0].shape, _MOST_ELEMENTS):
        part = torch.zeros_like(total[piece[0], piece[2]].contiguous())
        _call("gram", inputs, base, dtype, piece, [part], measure_base)
        total[piece[0], piece[2]] += part
    return total


def combine(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    coefficients: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
) -> bool:
    infinite = 0
    for piece in pieces(out.shape, _MOST_ELEMENTS):
        numbers = [coefficients[piece[0], piece[2]].contiguous(), out[piece]]
        infinite |= _call("combine", inputs, base, dtype, piece, numbers)
    return not infinite


def _call(
    function: str,
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    piece: tuple[slice, ...],
    numbers: Sequence[torch.Tensor],
    measure_base: bool = False,
) -> int:
    """Call a function of native.cpp on part of a view."""
    parts = [x[piece] for x in (inputs if base is None else [*inputs, base])]
    kind = _STORED.index(parts[0].dtype), dtype == torch.float64
    given = len(inputs), base is not None, measure_base
    sizes = (*kind, *given, *parts[0].shape, *parts[0].stride()[:2])
    worthwhile = max(1, len(parts) * parts[0].numel() // _THREAD_ELEMENTS)
    status: int = getattr(_LIBRARY, f"nuslerp_{function}")(
        (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in numbers),
        ctypes.c_int64(min(worthwhile, torch.get_num_threads())),
    )
    if status == 2:
        raise MemoryError("no memory for the sums of a merge")
    return status
