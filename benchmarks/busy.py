# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Many small weights; and merges while other processes keep all cores busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.nuslerp import nuslerp_merge_method

from benchmarks.cases import PAIRS, WEIGHTS, Case, cases, other_adapter, portable_pass
from benchmarks.measure import Function, Rounds, compare, one_round
from mergekit_nuslerp.plugin import adapter

SHAPES = ((64,), (1024,), (64, 64), (256, 256))

# Each says that it has begun, and ends with its parent.
SPIN = "import os; p = os.getppid(); print('busy', flush=True)\n"
SPIN += "while os.getppid() == p: pass"
MERGE = "from benchmarks.busy import merge_on; merge_on()"
LOADS = {"a spin on each core": [SPIN] * (os.cpu_count() or 1), "a merge": [MERGE]}

# Merges timed together: the scheduler favours a process that has just slept.
TOGETHER = 5


def merge_on(size: int = 4096) -> None:
    """Merge with all threads, again and again."""
    case, parent = next(cases((size, size), (torch.bfloat16,))), os.getppid()
    print("busy", flush=True)
    while os.getppid() == parent:
        case.ours()


def measure(codes: Sequence[str], functions: Sequence[Function], runs: int) -> Rounds:
    """Seconds of all while other processes stand still, and while they run."""
    commands = ([sys.executable, "-c", code] for code in codes)
    others = [subprocess.Popen(c, stdout=subprocess.PIPE) for c in commands]

    def tell(signal: int) -> None:
        for other in others:
            other.send_signal(signal)

    def repeated(function: Function) -> None:
        for _ in range(TOGETHER):
            function()

    try:
        if not all(other.stdout.readline() for other in others if other.stdout):
            raise RuntimeError("a process to be busy with has failed")
        together = [partial(repeated, function) for function in functions]
        rounds = []
        for _ in range(runs + 1):
            tell(SIGSTOP)
            quiet = one_round(together)
            tell(SIGCONT)
            times = quiet + one_round(together)
            rounds.append([seconds / TOGETHER for seconds in times])
        return rounds[1:]
    finally:
        for other in others:
            other.kill()
            other.communicate()


def merges(
    count: int, shape: tuple[int, ...], against: Path | None, **options: Any
) -> tuple[Case, dict[str, Function]]:
    """The same merge by each method. mergekit's own takes two models only."""
    # One large weight, cut up.
    case = next(cases((count, prod(shape)), **options))
    models, has_base = len(case.tensors), case.base is not None
    tensors = enumerate((*case.tensors, case.base) if has_base else case.tensors)
    state_dicts = {
        model: {f"{n}.weight": part.view(shape) for n, part in enumerate(tensor)}
        for model, tensor in tensors
    }

    def merge(method: object) -> object:
        weights = {"weight": dict(enumerate(WEIGHTS[:models]))}
        base = models if has_base else None
        return merge_state_dicts(state_dicts, method, parameters=weights, base=base)

    def portable() -> object:
        with portable_pass():
            return merge(ours)

    # The plugin takes mergekit's own method out of the registry and leaves it as it is.
    ours = adapter().make()
    methods = {"mergekit": partial(merge, nuslerp_merge_method)} if models == 2 else {}
    methods |= {"plugin": partial(merge, ours), "plugin, portable": portable}
    if against is not None:
        methods["plugin before"] = partial(merge, other_adapter(against).make())
    return case, methods


def batches(count: int = 300, runs: int = 11, against: Path | None = None) -> None:
    kinds = ((torch.bfloat16, True), (torch.float32, False))

    def entries() -> Iterator[tuple]:
        for models, shape, (dtype, has_base) in product((2, 3), SHAPES, kinds):
            options = {"dtypes": (dtype,), "models": models, "bases": (has_base,)}
            case, methods = merges(count, shape, against, **options)
            yield (models, shape, case.label[0], case.label[2]), methods

    compare(
        f"Small weights: `merge_state_dicts` of {count}",
        "models | weights | dtype | base",
        entries(),
        (*PAIRS, ("plugin", "plugin before")) if against else PAIRS,
        runs,
        note="mergekit's own method merges two models.",
    )


def table(
    size: int = 4096, count: int = 300, runs: int = 7, against: Path | None = None
) -> None:
    large = [
        ([case.granularity], case.methods())
        for case in cases((size, size), (torch.bfloat16,), bases=(True,))
    ]
    three = {"dtypes": (torch.bfloat16,), "models": 3}
    small = [([s], merges(count, s, against, **three)[1]) for s in SHAPES]
    for title, what, entries in (
        (f"one {size} x {size} weight", "vectors", large),
        (f"`merge_state_dicts` of {count} weights of three models", "weights", small),
    ):
        for load, codes in LOADS.items():
            compare(
                f"Busy with {load}: {title} in bfloat16 with a base",
                what,
                entries,
                [(f"{method}, busy", method) for method in entries[0][1]],
                runs,
                note=f"{TOGETHER} merges, one after the other, while other processes "
                "stand still, and then while they run.",
                measure=partial(measure, codes),
                states=("", ", busy"),
            )
