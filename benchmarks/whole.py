# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Whole merges by `mergekit-yaml`, and the start of Python."""

from __future__ import annotations

import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from safetensors.torch import load_file, save_file

from benchmarks.measure import Usage, head, row, used
from mergekit_nuslerp.checkpoints import write_checkpoints

CONFIG = """
merge_method: nuslerp
base_model: ./base
dtype: bfloat16
models:
  - {model: ./sft, parameters: {weight: 0.3}}
  - {model: ./kd, parameters: {weight: 0.7}}
"""

LINEAR = """
merge_method: linear
dtype: bfloat16
models:
  - {model: ./base, parameters: {weight: 0.2}}
  - {model: ./sft, parameters: {weight: 0.3}}
  - {model: ./kd, parameters: {weight: 0.5}}
"""

PASSTHROUGH = """
merge_method: passthrough
dtype: bfloat16
models:
  - {model: ./sft}
"""

# The config, and how the plugin is switched. What linear takes is the least of a merge
# of three models, and what passthrough takes is that of reading and writing one.
METHODS = {
    "mergekit's nuslerp": (CONFIG, {"MERGEKIT_NUSLERP": "0"}),
    "plugin": (CONFIG, {"MERGEKIT_NUSLERP": "1"}),
    "mergekit's linear": (LINEAR, {"MERGEKIT_NUSLERP": "0"}),
    "passthrough of one": (PASSTHROUGH, {"MERGEKIT_NUSLERP": "0"}),
}
OURS = "plugin"
BEFORE = "plugin before"

# Layers, hidden size and rounds: Llama's shape with 0.13, 1.2 and 7 B parameters.
SIZES = ((12, 768, 3), (24, 2048, 3))
LARGEST = (36, 4096, 1)
LARGEST_GB = 70  # three models and the result, with some room

_LAYERS_IN_FILE = 4

Measured = list[dict[str, Usage]]  # rounds of a merge by each method


def merge(
    folder: Path, method: tuple[str, dict[str, str]], python: Sequence[str] = ()
) -> Usage:
    """One merge in a process of its own."""
    config, environment = method
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()  # what was written before is not to be waited for in this merge
    merging = ["-m", "mergekit.scripts.run_yaml", "config.yaml", "out", "--quiet"]
    return used(
        [sys.executable, *python, *merging],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stderr=subprocess.DEVNULL,
    )


def write_models(folder: Path, layers: int, hidden_size: int) -> float:
    """Write a base and fine-tunes of it, and return the billions of parameters of each.

    All layers are the first one, rolled: a merge takes the same time, and billions of
    random numbers would take minutes, and all of a model at a time in memory.
    """
    options = {"hidden_size": hidden_size, "vocabulary": 32000, "shards": 1}
    models = write_checkpoints(folder, layers=1, **options)
    sizes = [_grow(model, layers) for model in models]
    return sizes[0] / 2e9


def _grow(model: Path, layers: int) -> int:
    """Give a checkpoint of one layer more of them, and return its bytes."""
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings["num_hidden_layers"] = layers
    (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")

    first = "model.layers.0."
    rest = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    layer = {name: rest.pop(name) for name in list(rest) if name.startswith(first)}
    weight_map, size = {}, 0
    for start in range(0, layers, _LAYERS_IN_FILE):
        shard = {
            name.replace(first, f"model.layers.{number}."): weight.roll(number)
            for number in range(start, min(start + _LAYERS_IN_FILE, layers))
            for name, weight in layer.items()
        }
        if not start:
            shard |= rest
        part = f"model-{start:05d}.safetensors"
        save_file(shard, model / part, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, part))
        size += sum(weight.nbytes for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    file = model / "model.safetensors.index.json"
    file.write_text(json.dumps(index), encoding="utf-8")
    return size


def measure(
    methods: dict[str, tuple], layers: int, hidden_size: int, runs: int, profile: bool
) -> tuple[float, Measured]:
    """Billions of parameters, and rounds of a merge by each method."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        billions = write_models(folder, layers, hidden_size)
        # So that each finds the files in memory, as far as they fit.
        merge(folder, methods[OURS])
        rounds = [{m: merge(folder, methods[m]) for m in methods} for _ in range(runs)]
        report(billions, rounds)
        if profile:
            merge(folder, methods[OURS], ("-m", "cProfile", "-o", "profile"))
            print_profile(billions, folder / "profile")
    return billions, rounds


def middle(rounds: Measured, method: str, quantity: str) -> float:
    return median(getattr(usages[method], quantity) for usages in rounds)


def report(billions: float, rounds: Measured) -> None:
    head(
        f"Whole merges: {billions:.2f} B parameters in bfloat16, median of "
        f"{len(rounds)} rounds",
        "method | wall (s) | CPU, user (s) | CPU, system (s) | peak memory (MiB) "
        "| plugin's CPU / its | plugin's wall / its",
    )
    for method in rounds[0]:
        seconds = (middle(rounds, method, of) for of in ("wall", "user", "system"))
        cells = [f"{each:.1f}" for each in seconds]
        cells.append(f"{middle(rounds, method, 'memory'):.0f}")
        for of in ("cpu", "wall"):
            ratios = (getattr(u[OURS], of) / getattr(u[method], of) for u in rounds)
            cells.append(f"{median(ratios):.2f}")
        row(method, *cells)


def growth(measured: list[tuple[float, Measured]]) -> None:
    head(
        "Whole merges: seconds a billion parameters, net of the start",
        "from | to | method | wall (s / B) | CPU (s / B)",
        "The start is the same for all sizes.",
    )
    for (small, few), (large, many) in pairwise(measured):
        for method in few[0]:
            slopes = []
            for of in ("wall", "cpu"):
                more = middle(many, method, of) - middle(few, method, of)
                slopes.append(f"{more / (large - small):.1f}")
            row(f"{small:.2f} B", f"{large:.2f} B", method, *slopes)


def print_profile(billions: float, file: Path, most: int = 15) -> None:
    """Where the time of a merge went, and what of it was outside Python."""
    stats = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in stats.values())
    head(
        f"A profile of the plugin's merge of {billions:.2f} B parameters",
        "function | calls | own time (s) | with what it calls (s)",
        f"The functions with most time of their own, of {total:.1f} s under cProfile.",
    )
    ranked = sorted(stats.items(), key=lambda item: item[1][2], reverse=True)
    for (path, line, name), (_, calls, own, cumulative, _) in ranked[:most]:
        where = "" if path == "~" else f" ({'/'.join(Path(path).parts[-2:])}:{line})"
        row(f"`{name}`{where}", calls, f"{own:.2f}", f"{cumulative:.2f}")
    outside = Counter()
    for (path, _, name), (*_, callers) in stats.items():
        if name == "_call" and path.endswith("passes/native.py"):
            for (_, _, caller), (_, _, own, _) in callers.items():
                outside[caller] += own
    seconds = ", ".join(f"{name} {own:.2f} s" for name, own in outside.items())
    print(f"\nIn C++, without Python's lock: {seconds or 'nothing'}.", flush=True)


def table(
    *, largest: bool = False, against: Path | None = None, profile=False, sizes=SIZES
) -> None:
    methods = dict(METHODS)
    if against:
        environment = {"MERGEKIT_NUSLERP": "1", "PYTHONPATH": str(against)}
        methods[BEFORE] = (CONFIG, environment)
        code = "import mergekit_nuslerp as plugin; print(plugin.__file__)"
        found = subprocess.check_output(
            [sys.executable, "-c", code], cwd=against, env={**os.environ, **environment}
        )
        print(f"\n`{BEFORE}` is {os.fsdecode(found).strip()}.")
    if largest and shutil.disk_usage(tempfile.gettempdir()).free < LARGEST_GB * 1e9:
        print(f"\nThe largest size needs {LARGEST_GB} GB of disk; left out.")
    elif largest:
        sizes = (*sizes, LARGEST)
    growth([measure(methods, *size, profile) for size in sizes])


def startup(interpreters: tuple[str, str], runs: int = 20) -> None:
    """Compare two interpreters that differ in nothing but the plugin: with, without."""
    head(
        f"Start: {runs} pairs of fresh interpreters",
        "code | time | without (ms) | with (ms) | difference (ms) | lower quartile "
        "| upper quartile",
    )
    for code in ("pass", "import torch"):
        pairs = []
        for run in range(runs + 1):
            order = (0, 1) if run % 2 else (1, 0)
            usages = {which: used([interpreters[which], "-c", code]) for which in order}
            pairs.append((usages[1], usages[0]))
        for time in ("wall", "cpu"):
            # The first pair warms up.
            values = [[getattr(u, time) * 1e3 for u in pair] for pair in pairs[1:]]
            before, after = zip(*values)
            difference = sorted(b - a for a, b in values)
            quarter = len(difference) // 4
            cells = [f"{median(before):.1f}", f"{median(after):.1f}"]
            quartiles = difference[quarter], difference[-1 - quarter]
            cells += [f"{each:+.1f}" for each in (median(difference), *quartiles)]
            row(f"`{code}`", time, *cells)
