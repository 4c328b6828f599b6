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
        for run in range(runs + 1):
            order = [without, with_plugin]
            times = {}
            for python in order if run % 2 else order[::-1]:
                start = time.perf_counter()
                subprocess.run([python, "-c", code], check=True)
                times[python] = (time.perf_counter() - start) * 1e3
            if run:  # the first pair warms up
                pairs.append((times[without], times[with_plugin]))
        difference = sorted(b - a for a, b in pairs)
        quarter = len(difference) // 4
        print(
            f"| `{code}` | {median(a for a, _ in pairs):.1f} "
            f"| {median(b for _, b in pairs):.1f} | {median(difference):+.1f} "
            f"| {difference[quarter]:+.1f} to {difference[-1 - quarter]:+.1f} |"
        )
