# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a merge adds to the peak memory of a process. Linux only."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import GRANULARITIES, cases

MIB = 2**20


def _high_water() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(method: str, granularity: str, elements: int) -> None:
    """Print the MiB added by one merge with a base. Runs in a process of its own."""
    shape = (elements // 8192, 8192)
    small = next(c for c in cases((8, 8), (torch.bfloat16,)) if c.base is not None)
    small = replace(small, granularity=granularity)
    # What libraries take once, and a compiler, is no part of the merge. Small weights
    # are not compiled for.
    tiles = 128 if method == "compiled" else 1
    getattr(small.mapped(lambda t: t.repeat(tiles, tiles)), method)()
    # Made of a small weight, so that nothing larger than the inputs came before.
    case = small.mapped(lambda t: t.repeat(shape[0] // 8, shape[1] // 8))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # peak is present
    before = _high_water()
    result = getattr(case, method)()
    print((_high_water() - before) / MIB, result.nbytes / MIB)


def table(elements: int = 2**28) -> None:
    print(f"\n### Memory: {elements:,} elements in bfloat16 with a base\n")
    print("MiB added to the peak of the process by one merge, the result included.\n")
    print(
        "| vectors | result | mergekit | plugin | plugin, beside the result "
        "| compiled, beside the result |"
    )
    print("|---|---|---|---|---|---|")
    for granularity in GRANULARITIES:
        added = {}
        for method in ("theirs", "ours", "compiled"):
            code = (
                "from benchmarks.memory import measure; "
                f"measure({method!r}, {granularity!r}, {elements})"
            )
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            added[method], result = map(float, done.stdout.split()[-2:])
        print(
            f"| {granularity} | {result:.0f} | {added['theirs']:.0f} "
            f"| {added['ours']:.0f} | {added['ours'] - result:.0f} "
            f"| {added['compiled'] - result:.0f} |",
            flush=True,
        )
