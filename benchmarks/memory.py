# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a merge adds to the peak memory of a process. Linux only."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.cases import ALL_GRANULARITIES, GRANULARITIES, cases
from benchmarks.measure import MIB, head, numbers, row, status


def measure(method: str, granularity: str, elements: int) -> None:
    """Print MiB that a merge adds, of its result, and of large pages. To run alone."""
    shape = (elements // 8192, 8192)
    small = next(cases((128, 128), (torch.bfloat16,), granularities=(granularity,)))
    # What libraries take once is no part of the merge.
    getattr(small, method)()
    # Made of a small weight, so that nothing larger than the inputs came before.
    case = small.mapped(lambda t: t.repeat(shape[0] // 128, shape[1] // 128))
    large = status("AnonHugePages", "smaps_rollup")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # peak is present
    before = status("VmHWM")
    result = getattr(case, method)()
    added = status("VmHWM") - before
    large = status("AnonHugePages", "smaps_rollup") - large
    print(added / MIB, result.nbytes / MIB, large / MIB)


def table(elements: int = 2**28) -> None:
    head(
        f"Memory: {elements:,} elements in bfloat16 with a base",
        "vectors | result | mergekit | plugin | plugin, portable "
        "| mergekit, beside the result | plugin, beside it | portable, beside it "
        "| plugin's in large pages",
        "MiB added to the peak of the process by one merge, the result included. Linux "
        "is asked for large pages, of 2 MiB, where a page is all result.",
    )
    for granularity in ALL_GRANULARITIES:
        added, beside, large = [], [], ""
        for method in ("theirs", "ours", "portable"):
            if method == "theirs" and granularity not in GRANULARITIES:
                added, beside = [""], [""]
                continue
            more, result, pages = numbers(
                "from benchmarks.memory import measure; "
                f"measure({method!r}, {granularity!r}, {elements})"
            )
            added.append(f"{more:.0f}")
            beside.append(f"{more - result:.0f}")
            large = f"{pages:.0f}" if method == "ours" else large
        row(granularity, f"{result:.0f}", *added, *beside, large)
