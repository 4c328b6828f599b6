# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Time and memory of one weight's merge on an accelerator, beside its bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.cases import cases

MIB = 2**20


def timed(function: Callable[[], object], runs: int) -> float:
    """Median seconds, with the accelerator waited for."""
    function()
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


def added(function: Callable[[], object]) -> float:
    """MiB that one call adds to the peak of the memory in use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def bandwidth(runs: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), runs)


def table(size: int = 16384, runs: int = 11) -> None:
    print(f"\n### Accelerator: one {size} x {size} weight, median of {runs} runs\n")
    if not torch.cuda.is_available():
        print("No GPU here.")
        return
    limit = bandwidth(runs)
    print(
        f"{torch.cuda.get_device_name()}; a copy moves {limit / 1e12:.2f} TB/s "
        "counting what is read and written. The share is that of a merge that reads "
        "each input once and writes the result. Memory is what a merge adds, beside "
        "its result.\n"
    )
    print(
        "| dtype | vectors | base | mergekit (ms) | plugin (ms) | times faster "
        "| share of the copy's bandwidth | mergekit (MiB) | plugin (MiB) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases((size, size), (torch.bfloat16, torch.float32), device="cuda"):
        theirs, ours = timed(case.theirs, runs), timed(case.ours, runs)
        result = size * size * case.tensors[0].dtype.itemsize
        share = case.bytes / ours / limit
        memory = [added(f) - result / MIB for f in (case.theirs, case.ours)]
        print(
            f"| {case.label} | {theirs * 1e3:.2f} | {ours * 1e3:.2f} "
            f"| {theirs / ours:.1f} | {share:.0%} "
            f"| {memory[0]:.0f} | {memory[1]:.0f} |",
            flush=True,
        )
