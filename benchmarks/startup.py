# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the installed plugin adds to the start of Python and of PyTorch."""

from __future__ import annotations

import subprocess
import time
from statistics import median


def table(with_plugin: str, without: str, runs: int = 20) -> None:
    """Compare two interpreters that differ in nothing but the plugin."""
    print(f"\n### Start: {runs} pairs of fresh interpreters\n")
    print("| | without (ms) | with (ms) | median difference (ms) | spread (ms) |")
    print("|---|---|---|---|---|")
    for code in ("pass", "import torch"):
        pairs = []
        interpreters = (without, with_plugin)
        for run in range(runs + 1):
            times = [0.0, 0.0]
            for which in (0, 1) if run % 2 else (1, 0):
                start = time.perf_counter()
                subprocess.run([interpreters[which], "-c", code], check=True)
                times[which] = (time.perf_counter() - start) * 1e3
            if run:  # the first pair warms up
                pairs.append(times)
        difference = sorted(b - a for a, b in pairs)
        quarter = len(difference) // 4
        print(
            f"| `{code}` | {median(a for a, _ in pairs):.1f} "
            f"| {median(b for _, b in pairs):.1f} | {median(difference):+.1f} "
            f"| {difference[quarter]:+.1f} to {difference[-1 - quarter]:+.1f} |"
        )
