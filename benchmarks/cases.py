# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What is measured: weights, task vectors, and the two methods on them."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from mergekit.merge_methods.nuslerp import nuslerp as mergekit_nuslerp_function

from mergekit_nuslerp import nuslerp

WEIGHTS = (0.3, 0.7)
GRANULARITIES = ("tensor", "row", "column")


@dataclass(frozen=True)
class Case:
    """Two models of one weight, and a base or none."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    base: torch.Tensor | None
    granularity: str

    @property
    def label(self) -> str:
        dtype = str(self.tensors[0].dtype).removeprefix("torch.")
        return (
            f"{dtype} | {self.granularity} | {'yes' if self.base is not None else 'no'}"
        )

    @property
    def bytes(self) -> int:
        """What has to be read and written at least."""
        inputs = len(self.tensors) + (self.base is not None)
        return (inputs + 1) * self.tensors[0].nbytes

    def ours(self, *, compiled: bool = False) -> torch.Tensor:
        return nuslerp(
            self.tensors,
            WEIGHTS,
            base=self.base,
            granularity=self.granularity,
            compiled=compiled,
        )

    def compiled(self) -> torch.Tensor:
        return self.ours(compiled=True)

    def theirs(self) -> torch.Tensor:
        """As mergekit's method calls its function."""
        t = WEIGHTS[1] / sum(WEIGHTS)
        options = {
            "flatten": self.granularity == "tensor",
            # 0 in mergekit's method, which is the same for a matrix.
            "dim": -2 if self.granularity == "column" else -1,
        }
        a, b = self.tensors
        if self.base is None:
            return mergekit_nuslerp_function(t, a, b, **options)
        base = self.base
        return base + mergekit_nuslerp_function(t, a - base, b - base, **options)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The same of other tensors."""
        a, b = self.tensors
        base = None if self.base is None else change(self.base)
        return replace(self, tensors=(change(a), change(b)), base=base)


def cases(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[Case]:
    """Weights like a language model's, and task vectors of 2 % of their length."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    start = 0.02 * normal()
    a, b = (start + 0.02 * 0.02 * normal() for _ in range(2))
    for dtype in dtypes:
        models, base = (a.to(dtype), b.to(dtype)), start.to(dtype)
        for reference in (base, None):
            for granularity in GRANULARITIES:
                yield Case(models, reference, granularity)


def machine() -> str:
    """One line about what was measured on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [
                line.split(":")[1].strip() for line in lines if "model name" in line
            ]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
