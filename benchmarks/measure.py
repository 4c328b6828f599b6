# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Times, memory and tables."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

MIB = 2**20

# Seconds before each call: OpenMP's threads go on spinning for a while, and would slow
# down what comes next. Not longer: after tens of milliseconds of idling, a virtual
# machine's cores take another ten to wake, and OpenMP waits for all of them.
PAUSE = 0.005

Function = Callable[[], object]
Rounds = list[list[float]]  # seconds of each function, in each round


def head(title: str, columns: str, note: str = "") -> None:
    """Begin a Markdown table. Columns are separated by " | "."""
    load = " ".join(f"{load:.2f}" for load in os.getloadavg())
    print(f"\n### {title}\n\n{note} (Load before: {load}.)\n".replace("\n ", "\n"))
    row(columns)
    print("|---" * len(columns.split(" | ")) + "|", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def one_round(functions: Sequence[Function]) -> list[float]:
    """Seconds of each function, run one after the other."""
    times = []
    for function in functions:
        time.sleep(PAUSE)
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def interleaved(functions: Sequence[Function], runs: int) -> Rounds:
    """Rounds of all functions, each called once before."""
    for function in functions:
        function()
    return [one_round(functions) for _ in range(runs)]


def compare(
    title: str,
    labels: str,
    entries: Iterable[tuple[Sequence[object], Mapping[str, Function]]],
    pairs: Sequence[tuple[str, str]],
    runs: int,
    *,
    note: str = "",
    measure: Callable[[Sequence[Function], int], Rounds] = interleaved,
    states: Sequence[str] = ("",),
    factors: Mapping[str, float] = {},
    rates: Mapping[str, int] = {},
) -> None:
    """A table of median times, and of median ratios within a round.

    An entry is what names a row, and its methods: the first one has all of them. A
    pair is the first method's time over the second's. Times are taken by `measure`, in
    each of the states, which add to the methods' names. Factors are for methods that
    do a part of the work only, and rates for the bytes that one moves.
    """
    names: list[str] = []
    for label, methods in entries:
        measured = [name + state for state in states for name in methods]
        if not names:
            names = measured
            columns = [labels, *(f"{name} (ms)" for name in names)]
            columns += [f"{name} (GB/s)" for name in rates]
            columns += [f"{over} / {under}" for over, under in pairs]
            head(f"{title}, median of {runs} rounds", " | ".join(columns), note)
        times = {
            name: [seconds * factors.get(name, 1) for seconds in each]
            for name, each in zip(measured, zip(*measure([*methods.values()], runs)))
        }
        row(
            *label,
            *(f"{median(times[n]) * 1e3:.1f}" if n in times else "" for n in names),
            *(f"{moved / median(times[n]) / 1e9:.1f}" for n, moved in rates.items()),
            *(
                f"{median(a / b for a, b in zip(times[over], times[under])):.2f}"
                if over in times and under in times
                else ""
                for over, under in pairs
            ),
        )


def status(field: str, file: str = "status") -> int:
    """A figure that Linux keeps about this process, in bytes."""
    with open(f"/proc/self/{file}", encoding="utf-8") as lines:
        (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


class Usage(NamedTuple):
    """Of one process: seconds, and MiB at the peak."""

    wall: float
    user: float
    system: float
    memory: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


# A process begins with the peak memory of the one that it comes from: a small one.
_USED = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.check_call(sys.argv[1:])
wall, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print("\\n", wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss)
"""


def used(command: Sequence[str], **options: Any) -> Usage:
    """What a command takes."""
    *times, memory = numbers(_USED, *command, **options)
    # Kilobytes on Linux, bytes on macOS.
    return Usage(*times, memory / (MIB if sys.platform == "darwin" else 2**10))


def numbers(code: str, *arguments: str, **options: Any) -> list[float]:
    """What some code prints last in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    options = {"stdout": subprocess.PIPE, "text": True, "check": True, **options}
    done = subprocess.run(command, **options)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]
