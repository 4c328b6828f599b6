# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The two passes over large tensors, and which of them takes given inputs.

A pass is a module with `gram` and `combine`, as in `portable`, the reference.
"""

import ctypes
import mmap
from collections.abc import Sequence
from types import ModuleType

import torch

import mergekit_nuslerp
from mergekit_nuslerp.passes import native, portable


def choose(inputs: Sequence[torch.Tensor]) -> ModuleType:
    """The pass that serves these inputs, of the models and the base."""
    if mergekit_nuslerp.portable() or portable.is_recorded(inputs):
        return portable
    return native if native.serves(inputs) else portable


def new_result(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory to merge into. Linux has large pages of it ready five times as fast."""
    result = torch.empty(shape, dtype=dtype, device=device)
    large = device.type == "cpu" and result.nbytes >= 2**21
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        start, stop = result.data_ptr(), result.data_ptr() + result.nbytes
        start += -start % mmap.PAGESIZE
        pages = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
        ctypes.CDLL(None).madvise(*pages, mmap.MADV_HUGEPAGE)
    return result


def description() -> str:
    """Which pass serves contiguous tensors on the CPU, and why."""
    if mergekit_nuslerp.portable():
        return f"portable pass (PyTorch), as {mergekit_nuslerp.SWITCH}=portable says"
    if native.FAILURE:
        return f"portable pass (PyTorch), since {native.FAILURE}"
    return "native pass (C++)"
