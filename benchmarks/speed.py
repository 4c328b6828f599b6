# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Time of one weight's merge, as a ratio taken in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.cases import cases


def paired(first: Callable, second: Callable, runs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios of runs side by side."""
    first(), second()
    times = []
    for _ in range(runs):
        pair = []
        for function in (first, second):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    return (
        median(a for a, _ in times),
        median(b for _, b in times),
        median(a / b for a, b in times),
    )


def table(size: int = 4096, runs: int = 11) -> None:
    print(f"\n### Speed: one {size} x {size} weight, median of {runs} pairs\n")
    print("| dtype | vectors | base | mergekit (ms) | plugin (ms) | times faster |")
    print("|---|---|---|---|---|---|")
    for case in cases((size, size), (torch.bfloat16, torch.float32)):
        theirs, ours, ratio = paired(case.theirs, case.ours, runs)
        print(
            f"| {case.label} | {theirs * 1e3:.0f} | {ours * 1e3:.0f} | {ratio:.1f} |",
            flush=True,
        )
