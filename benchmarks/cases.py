# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What is measured: weights, task vectors, and the methods on them."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from mergekit.merge_methods.nuslerp import nuslerp as mergekit_nuslerp_function

from mergekit_nuslerp import SWITCH, nuslerp, passes

# What each table compares: the first method's time over the second's.
PAIRS = (("mergekit", "plugin"), ("mergekit", "plugin, portable"))

WEIGHTS = (0.3, 0.7, 0.5, 0.4, 0.6, 0.2, 0.9, 0.8)
GRANULARITIES = ("tensor", "row", "column")
ALL_GRANULARITIES = (*GRANULARITIES, "row:128", "column:128", "row*column")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def portable_pass() -> Iterator[None]:
    """PyTorch's operations and no C++."""
    os.environ[SWITCH] = "portable"
    try:
        yield
    finally:
        del os.environ[SWITCH]


@dataclass(frozen=True)
class Case:
    """Models of one weight, and a base or none."""

    tensors: tuple[torch.Tensor, ...]
    base: torch.Tensor | None
    granularity: str = "tensor"
    magnitude: str = "slerp"

    @property
    def label(self) -> tuple[str, str, str]:
        dtype = name(self.tensors[0].dtype)
        return dtype, self.granularity, "no" if self.base is None else "yes"

    @property
    def bytes(self) -> int:
        """What has to be read and written at least."""
        inputs = len(self.tensors) + (self.base is not None)
        return (inputs + 1) * self.tensors[0].nbytes

    def ours(self) -> torch.Tensor:
        return nuslerp(
            self.tensors,
            WEIGHTS[: len(self.tensors)],
            base=self.base,
            granularity=self.granularity,
            magnitude=self.magnitude,
        )

    def portable(self) -> torch.Tensor:
        with portable_pass():
            return self.ours()

    def theirs(self) -> torch.Tensor:
        """As mergekit's method calls its function."""
        t = WEIGHTS[1] / sum(WEIGHTS[:2])
        # 0 instead of -2 in mergekit's method, which is the same for a matrix.
        dim = -2 if self.granularity == "column" else -1
        options = {"flatten": self.granularity == "tensor", "dim": dim}
        a, b = self.tensors
        if self.base is None:
            return mergekit_nuslerp_function(t, a, b, **options)
        base = self.base
        return base + mergekit_nuslerp_function(t, a - base, b - base, **options)

    def methods(self) -> dict[str, Callable[[], torch.Tensor]]:
        ours = {"plugin": self.ours, "plugin, portable": self.portable}
        return {"mergekit": self.theirs, **ours}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The same of other tensors."""
        base = None if self.base is None else change(self.base)
        return replace(self, tensors=tuple(map(change, self.tensors)), base=base)


def cases(
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    models: int = 2,
    bases: Sequence[bool] = (True, False),
    granularities: Sequence[str] = GRANULARITIES,
    device: str = "cpu",
) -> Iterator[Case]:
    """Weights like a language model's, and task vectors of 2 % of their length."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator, device=device)

    start = 0.02 * normal()
    tuned = [start + 0.02 * 0.02 * normal() for _ in range(models)]
    for dtype in dtypes:
        tensors, base = tuple(tensor.to(dtype) for tensor in tuned), start.to(dtype)
        for has_base in bases:
            for granularity in granularities:
                yield Case(tensors, base if has_base else None, granularity)


@cache
def other_adapter(path: Path) -> ModuleType:
    """The adapter of another checkout of the plugin, beside today's in this process."""

    def withdraw() -> dict[str, ModuleType]:
        names = [n for n in sys.modules if n.partition(".")[0] == "mergekit_nuslerp"]
        return {name: sys.modules.pop(name) for name in names}

    own = withdraw()
    sys.path.insert(0, str(path))
    try:
        return import_module("mergekit_nuslerp.plugin").adapter()
    finally:
        sys.path.remove(str(path))
        withdraw()
        sys.modules.update(own)


def machine() -> str:
    """One line about what was measured on."""
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"model name\s*: (.*)", info.read_text())
    model = found[1] if found else platform.processor()
    return (
        f"{model}, {os.cpu_count()} cores, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}; "
        f"{passes.description()}"
    )
