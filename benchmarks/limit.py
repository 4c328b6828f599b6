# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How far the plugin is from the limit: a copy, and the same merge as two loops.

torch.compile makes one fused loop of the inner products and one of the combination.
Each reads its inputs once and stores nothing wide. Needs a compiler for C++.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from benchmarks.cases import DTYPES, GRANULARITIES, PAIRS, WEIGHTS, Case, cases
from benchmarks.measure import MIB, Function, compare, interleaved
from mergekit_nuslerp.geometry import mean_coefficients

# Elements, or rows, whose products are added up before float64 takes over.
RUN = 4096
STRIP = 32

# Share of elements that have to equal the plugin's. The others lie so close to the
# middle between two numbers that the order of a sum decides.
EQUAL = 0.999


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the plugin computes in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def task_vectors(
    a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In a wide dtype, and what they start from."""
    a, b = a.to(wide(a.dtype)), b.to(wide(b.dtype))
    start = None if base is None else base.to(a.dtype)
    return (a, b, None) if start is None else (a - start, b - start, start)


def inner_products(
    granularity: str, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """`(..., 3)` in float64: aa, ab and bb of each vector."""
    x, y, _ = task_vectors(a, b, base)
    sums = []
    for products in (x * x, x * y, y * y):
        if granularity == "tensor":
            sums.append(products.view(-1, RUN).sum(-1).double().sum())
        elif granularity == "row":
            sums.append(products.sum(-1).double())
        else:
            strips = products.view(-1, STRIP, products.shape[-1]).sum(1)
            sums.append(strips.double().sum(0))
    return torch.stack(sums, -1)


def combine(
    granularity: str,
    coefficients: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """With coefficients `(2, ...)`."""
    if granularity == "row":
        coefficients = coefficients.unsqueeze(-1)
    x, y, start = task_vectors(a, b, base)
    result = coefficients[0] * x + coefficients[1] * y
    return (result if start is None else result + start).to(a.dtype)


class Fused:
    """A case's merge, compiled for its dtype, shape and granularity."""

    def __init__(self, case: Case):
        # A function that was compiled for many kinds of inputs is not for another.
        torch.compiler.reset()
        self.arguments = (*case.tensors, case.base)
        self.granularity = case.granularity
        self.inner_products, self.combine = (
            torch.compile(function, dynamic=False, fullgraph=True)
            for function in (inner_products, combine)
        )
        same = (self() == case.ours()).sum().item() / case.tensors[0].numel()
        if same < EQUAL:
            raise RuntimeError(f"only {same:.2%} equal the plugin's: {case.label}")

    def __call__(self) -> torch.Tensor:
        products = self.inner_products(self.granularity, *self.arguments)
        weights = torch.tensor(WEIGHTS[:2], dtype=torch.float64)
        gram = products[..., [[0, 1], [1, 2]]]
        values, _ = mean_coefficients(gram, weights / weights.sum())
        # Each side by side in memory, so that a loop can load them together.
        dtype = wide(self.arguments[0].dtype)
        coefficients = values.to(dtype).movedim(-1, 0).contiguous()
        return self.combine(self.granularity, coefficients, *self.arguments)


def table(size: int = 4096, runs: int = 11) -> None:
    source = torch.ones(2**30, dtype=torch.uint8)
    target = torch.ones_like(source)
    rounds = interleaved((partial(target.copy_, source), source.clone), runs)
    # The system hands out fresh memory page by page, as it is touched first.
    copy, fresh = (2 * source.nbytes / median(times) for times in zip(*rounds))
    del source, target
    entries = (
        ((*c.label, f"{c.bytes / copy * 1e3:.1f}"), c.methods() | {"fused": Fused(c)})
        for c in cases((size, size), DTYPES)
    )
    compare(
        f"The limit: one {size} x {size} weight",
        "dtype | vectors | base | bytes alone (ms)",
        entries,
        (("plugin", "fused"), *PAIRS),
        runs,
        note=f"A copy moves {copy / 1e9:.1f} GB/s, counting what is read and written, "
        f"and {fresh / 1e9:.1f} GB/s into fresh memory. `fused` is the same merge as "
        "two loops compiled by PyTorch for this one shape. The bytes are those of "
        "reading each input once and writing the result into used memory.",
    )


def embedding(rows: int = 128256, columns: int = 8192, runs: int = 3) -> None:
    """A weight for which mergekit's own method would need more memory than is there."""
    parts = 8

    def entries() -> Iterator[tuple]:
        # Repeated, as making numbers takes float32 copies.
        part = next(cases((rows // parts, columns), (torch.bfloat16,)))
        whole = part.mapped(lambda tensor: tensor.repeat(parts, 1))
        for granularity in GRANULARITIES:
            small, large = (replace(c, granularity=granularity) for c in (part, whole))
            others = {"mergekit": small.theirs, "fused": Fused(large)}
            yield [granularity], large.methods() | others

    compare(
        f"A large embedding: {rows} x {columns} in bfloat16 with a base",
        "vectors",
        entries(),
        (("plugin", "fused"), *PAIRS),
        runs,
        note=f"mergekit's own method merges {rows // parts} of the rows, for its "
        f"memory, and its time is multiplied by {parts}.",
        factors={"mergekit": parts},
    )


# Each beside a plain weight of as many elements, or almost as many.
SHAPES: tuple[tuple[str, tuple[int, ...], tuple[int, int]], ...] = (
    ("", (32001, 4096), (32000, 4096)),
    (", transposed view", (4096, 4096), (4096, 4096)),
    ("", (64, 64, 64, 64), (4096, 4096)),
    ("", (8, 2048, 1024), (4096, 4096)),
)


def shapes(runs: int = 11, compared: tuple = SHAPES) -> None:
    def entries() -> Iterator[tuple]:
        for note, shape, beside in compared:
            odd = next(cases(shape, (torch.bfloat16,)))
            if note:
                odd = odd.mapped(torch.Tensor.t)
            plain = next(cases(beside, (torch.bfloat16,)))
            for granularity in GRANULARITIES:
                one, two = (replace(c, granularity=granularity) for c in (odd, plain))
                label = (f"{shape}{note}", beside, granularity)
                yield label, one.methods() | {"plugin, beside": two.ours}

    compare(
        "Shapes: bfloat16 with a base",
        "shape | beside | vectors",
        entries(),
        (("plugin", "plugin, beside"), *PAIRS),
        runs,
    )


def threads(size: int = 4096, runs: int = 11) -> None:
    before, most = torch.get_num_threads(), max(4, os.cpu_count() or 1)
    moved = (2 * 3 + 1) * 2 * size * size
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.ones_like(source)

    def limited(count: int, function: Function) -> None:
        torch.set_num_threads(count)
        function()

    def entries() -> Iterator[tuple]:
        for case in cases((size, size), (torch.bfloat16,), bases=(True,)):
            for count in (n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most):
                methods = {
                    "plugin": (count, case.ours),
                    "plugin, portable": (count, case.portable),
                    "copy": (count, partial(target.copy_, source)),
                    "plugin, one thread": (1, case.ours),
                    "portable, one thread": (1, case.portable),
                }
                calls = {name: partial(limited, *m) for name, m in methods.items()}
                yield (case.granularity, count), calls

    try:
        compare(
            f"Threads: one {size} x {size} weight in bfloat16 with a base, on "
            f"{os.cpu_count()} cores",
            "vectors | threads",
            entries(),
            (
                ("plugin, one thread", "plugin"),
                ("portable, one thread", "plugin, portable"),
                ("copy", "plugin"),
            ),
            runs,
            note="The bytes are those of reading each input twice and writing the "
            "result. A copy, into used memory, reads and writes as many with as many "
            "threads; copy / plugin is the plugin's share of its bandwidth.",
            rates=dict.fromkeys(("plugin", "plugin, portable", "copy"), moved),
        )
    finally:
        torch.set_num_threads(before)


def finished(function: Function) -> None:
    """Call a function, and wait for the accelerator."""
    function()
    torch.cuda.synchronize()


def added(function: Function) -> float:
    """MiB that one call adds to the peak of the memory in use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    finished(function)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def accelerator(size: int = 16384, runs: int = 11) -> None:
    if not torch.cuda.is_available():
        print("\nNo accelerator here.")
        return

    def entries() -> Iterator[tuple]:
        dtypes = (torch.bfloat16, torch.float32)
        for case in cases((size, size), dtypes, device="cuda"):
            methods: dict[str, Function] = {
                "mergekit": case.theirs,
                "plugin": case.ours,
            }
            result = case.tensors[0].nbytes / MIB
            memory = (f"{added(method) - result:.0f}" for method in methods.values())
            source = torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda")
            methods["copy"] = partial(torch.empty_like(source).copy_, source)
            label = (*case.label, *memory)
            yield label, {name: partial(finished, m) for name, m in methods.items()}

    compare(
        f"Accelerator: one {size} x {size} weight",
        "dtype | vectors | base | mergekit (MiB) | plugin (MiB)",
        entries(),
        (PAIRS[0], ("copy", "plugin")),
        runs,
        note=f"{torch.cuda.get_device_name()}. A copy reads and writes as many bytes "
        "as a merge that reads each input once and writes the result; copy / plugin is "
        "the plugin's share of its bandwidth. Memory is what a merge adds, beside its "
        "result.",
    )
