# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Time of one weight's merge, as a ratio taken in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from benchmarks.cases import cases

# Seconds before each call: OpenMP's threads go on spinning for a while, and would slow
# down what comes next. Not longer: after tens of milliseconds of idling, a virtual
# machine's cores take another ten to wake, and OpenMP waits for all of them.
PAUSE = 0.005


def interleaved(
    functions: Sequence[Callable[[], object]], runs: int
) -> list[list[float]]:
    """Seconds of each function, in rounds in which they run one after the other."""
    for function in functions:
        function()
    rounds = []
    for _ in range(runs):
        times = []
        for function in functions:
            time.sleep(PAUSE)
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return rounds


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each function, over the rounds."""
    return [median(times) for times in zip(*rounds)]


def median_ratio(rounds: Sequence[Sequence[float]], over: int, under: int) -> float:
    """Of two functions, each ratio taken within a round."""
    return median(times[over] / times[under] for times in rounds)


def table(size: int = 4096, runs: int = 11) -> None:
    print(f"\n### Speed: one {size} x {size} weight, median of {runs} rounds\n")
    print("| dtype | vectors | base | mergekit (ms) | plugin (ms) | times faster |")
    print("|---|---|---|---|---|---|")
    for case in cases((size, size), (torch.bfloat16, torch.float32)):
        rounds = interleaved((case.theirs, case.ours), runs)
        theirs, ours = medians(rounds)
        print(
            f"| {case.label} | {theirs * 1e3:.0f} | {ours * 1e3:.0f} "
            f"| {median_ratio(rounds, 0, 1):.1f} |",
            flush=True,
        )
