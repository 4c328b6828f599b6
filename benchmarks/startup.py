# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the installed plugin adds to the start of Python and of PyTorch."""

from __future__ import annotations

import os
import subprocess
import time
from statistics import median


def start(python: str, code: str) -> tuple[float, float]:
    """Wall and CPU milliseconds of a fresh interpreter."""
    begin = time.perf_counter()
    process = subprocess.Popen([python, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{python} -c {code!r} failed")
    wall = time.perf_counter() - begin
    return wall * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def table(with_plugin: str, without: str, runs: int = 20) -> None:
    """Compare two interpreters that differ in nothing but the plugin."""
    print(f"\n### Start: {runs} pairs of fresh interpreters\n")
    print("| | | without (ms) | with (ms) | median difference (ms) | quartiles (ms) |")
    print("|---|---|---|---|---|---|")
    interpreters = (without, with_plugin)
    for code in ("pass", "import torch"):
        pairs = []
        for run in range(runs + 1):
            times = [(0.0, 0.0), (0.0, 0.0)]
            for which in (0, 1) if run % 2 else (1, 0):
                times[which] = start(interpreters[which], code)
            if run:  # the first pair warms up
                pairs.append(times)
        for index, kind in enumerate(("wall", "CPU")):
            before = [pair[0][index] for pair in pairs]
            after = [pair[1][index] for pair in pairs]
            difference = sorted(b - a for a, b in zip(before, after))
            quarter = len(difference) // 4
            print(
                f"| `{code}` | {kind} | {median(before):.1f} | {median(after):.1f} "
                f"| {median(difference):+.1f} "
                f"| {difference[quarter]:+.1f} to {difference[-1 - quarter]:+.1f} |"
            )
