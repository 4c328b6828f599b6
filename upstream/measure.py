# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Time, scratch and exactness of a mergekit's own methods: the figures in the texts.

Run it once for each mergekit, with the plugin's hook switched off:

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=TREE:. python -m upstream.measure
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from functools import partial

os.environ["MERGEKIT_NUSLERP"] = "0"

import torch
from mergekit.merge_methods import merge_tensors
from torch.utils._python_dispatch import TorchDispatchMode

WEIGHTS = [0.3, 0.7]


class _Scratch(TorchDispatchMode):
    """The most bytes of new tensors that are alive at one time."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.inputs = {tensor.data_ptr() for tensor in inputs}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                place = tensor.untyped_storage().data_ptr()
                if place in self.inputs:
                    continue
                self.alive[place] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self.alive.pop, place, None)
                self.most = max(self.most, sum(self.alive.values()))
        return result


def best(merge: Callable[[], torch.Tensor], runs: int = 3) -> float:
    """Milliseconds of the fastest of some runs."""
    merge()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        merge()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def scratch(merge: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """MiB beside inputs and result."""
    with _Scratch(inputs) as counted:
        result = merge()
    return (counted.most - result.nbytes) / 2**20


def weights(size: int, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Fine-tunes of one base, and the base."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(size, size, generator=generator)
    tuned = [
        base + 4e-4 * torch.randn(size, size, generator=generator) for _ in range(count)
    ]
    return [tensor.to(dtype) for tensor in (*tuned, base)]


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    """The flat merge of two task vectors in float64."""
    *tasks, base = (tensor.double() for tensor in inputs)
    a, b = (task - base for task in tasks)
    u, v = a / a.norm(), b / b.norm()
    theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    first, second = (torch.sin(weight * theta) / theta.sin() for weight in WEIGHTS)
    return base + first * a + second * b


def main(size: int = 4096, small: int = 2048) -> None:
    print("nuslerp, two models and a base | ms | MiB | rounded as float64 is")
    for dtype in (torch.bfloat16, torch.float32):
        inputs = weights(size, 2, dtype)
        for name, options in {
            "tensor": {},
            "row": {"nuslerp_flatten": False},
            "column": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        }.items():
            parameters = {"weight": WEIGHTS, **options}
            merge = partial(
                merge_tensors, inputs, "nuslerp", base_index=2, parameters=parameters
            )
            share = ""
            if name == "tensor":
                same = merge() == exact(inputs).to(dtype)
                share = f"{same.double().mean():.3%}"
            figures = f"{best(merge):.0f} | {scratch(merge, inputs):.0f} | {share}"
            print(f"{dtype} {name} | {figures}")
    print("karcher, three models | ms | MiB")
    for dtype in (torch.bfloat16, torch.float32):
        inputs = weights(small, 3, dtype)[:3]
        merge = partial(merge_tensors, inputs, "karcher")
        print(f"{dtype} | {best(merge):.0f} | {scratch(merge, inputs):.0f}")


if __name__ == "__main__":
    main()
