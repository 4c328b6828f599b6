# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Whole merges through `mergekit-yaml`, by this plugin and by mergekit's methods."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from safetensors.torch import load_file, save_file

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
    "mergekit's nuslerp": (CONFIG, "0"),
    "plugin": (CONFIG, "1"),
    "plugin, compiled": (CONFIG, "compile"),
    "mergekit's linear": (LINEAR, "0"),
    "passthrough of one": (PASSTHROUGH, "0"),
}
THEIRS, OURS, COMPILED, SIMPLE, _ = METHODS

# Layers, hidden size and rounds: Llama's shape with 0.13, 1.2 and 7 B parameters.
SIZES = ((12, 768, 3), (24, 2048, 3))
LARGEST = (36, 4096, 1)
LARGEST_GB = 70  # three models and the result, with some room

_LAYERS_IN_FILE = 4


class Usage(NamedTuple):
    """Of one process: seconds, and MiB at the peak."""

    wall: float
    user: float
    system: float
    memory: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


def merge(folder: Path, config: str, switch: str) -> Usage:
    """One merge in a process of its own."""
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()  # what was written before is not to be waited for in this merge
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yaml", "out"]
    environment = {**os.environ, "MERGEKIT_NUSLERP": switch}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--quiet"],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise RuntimeError(f"mergekit-yaml failed in {folder}")
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Usage(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / unit)


def write_models(
    folder: Path, layers: int, hidden_size: int, vocabulary: int = 32000
) -> float:
    """Write a base and fine-tunes of it, and return the billions of parameters of each.

    All layers are the first one, rolled: a merge takes the same time, and billions of
    random numbers would take minutes, and all of a model at a time in memory.
    """
    elements = 0
    for model in write_checkpoints(
        folder, layers=1, hidden_size=hidden_size, vocabulary=vocabulary, shards=1
    ):
        elements = _grow(model, layers)
    return elements / 1e9


def _grow(model: Path, layers: int) -> int:
    """Give a checkpoint of one layer more of them, and return its elements."""
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings["num_hidden_layers"] = layers
    (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")

    first = "model.layers.0."
    rest = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    layer = {name: rest.pop(name) for name in list(rest) if name.startswith(first)}
    weight_map, size, elements = {}, 0, 0
    for start in range(0, layers, _LAYERS_IN_FILE):
        shard = {
            name.replace(first, f"model.layers.{number}."): weight.roll(number)
            for number in range(start, min(start + _LAYERS_IN_FILE, layers))
            for name, weight in layer.items()
        }
        if not start:
            shard |= rest
        file = f"model-{start:05d}.safetensors"
        save_file(shard, model / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        size += sum(weight.nbytes for weight in shard.values())
        elements += sum(weight.numel() for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(
        json.dumps(index), encoding="utf-8"
    )
    return elements


def measure(
    layers: int, hidden_size: int, runs: int
) -> tuple[float, list[dict[str, Usage]]]:
    """Billions of parameters, and rounds of a merge by each method."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        billions = write_models(folder, layers, hidden_size)
        # So that each finds the files in memory, as far as they fit, and the loops
        # that were compiled before.
        merge(folder, CONFIG, "compile")
        rounds = [
            {
                name: merge(folder, config, switch)
                for name, (config, switch) in METHODS.items()
            }
            for _ in range(runs)
        ]
    return billions, rounds


def middle(rounds: list[dict[str, Usage]], method: str, quantity: str) -> float:
    return median(getattr(usages[method], quantity) for usages in rounds)


def ratio(rounds: list[dict[str, Usage]], over: str, under: str, quantity: str) -> str:
    """Median of those taken within a round."""
    values = (
        getattr(usages[over], quantity) / getattr(usages[under], quantity)
        for usages in rounds
    )
    return f"{median(values):.2f}"


def report(billions: float, rounds: list[dict[str, Usage]]) -> None:
    runs = f"median of {len(rounds)} rounds" if len(rounds) > 1 else "one round"
    print(f"\n### Whole merges: {billions:.2f} B parameters in bfloat16, {runs}\n")
    print(
        "| method | wall (s) | CPU, user (s) | CPU, system (s) | peak memory (MiB) |\n"
        "|---|---|---|---|---|"
    )
    for method in METHODS:
        seconds = (
            f"{middle(rounds, method, quantity):.1f}"
            for quantity in ("wall", "user", "system")
        )
        print(
            f"| {method} | {' | '.join(seconds)} "
            f"| {middle(rounds, method, 'memory'):.0f} |"
        )
    print(
        f"\nplugin / mergekit's nuslerp: CPU {ratio(rounds, OURS, THEIRS, 'cpu')}, "
        f"wall {ratio(rounds, OURS, THEIRS, 'wall')}; plugin / mergekit's linear: "
        f"wall {ratio(rounds, OURS, SIMPLE, 'wall')}; compiled / not: "
        f"CPU {ratio(rounds, COMPILED, OURS, 'cpu')}, "
        f"wall {ratio(rounds, COMPILED, OURS, 'wall')}.",
        flush=True,
    )


def growth(measured: list[tuple[float, list[dict[str, Usage]]]]) -> None:
    """Without the start, which is the same for all sizes."""
    print("\n### Whole merges: seconds a billion parameters, net of the start\n")
    print("| from | to | method | wall (s / B) | CPU (s / B) |")
    print("|---|---|---|---|---|")
    for (small, few), (large, many) in pairwise(measured):
        for method in METHODS:
            slopes = (
                (middle(many, method, quantity) - middle(few, method, quantity))
                / (large - small)
                for quantity in ("wall", "cpu")
            )
            cells = " | ".join(f"{slope:.1f}" for slope in slopes)
            print(f"| {small:.2f} B | {large:.2f} B | {method} | {cells} |")


def table(
    *, largest: bool = False, sizes: tuple[tuple[int, int, int], ...] = SIZES
) -> None:
    loads = " ".join(f"{load:.2f}" for load in os.getloadavg())
    print(f"\nLoad of the machine before the whole merges: {loads}.")
    if largest:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if free < LARGEST_GB * 1e9:
            print(f"The largest size needs {LARGEST_GB} GB of disk; left out.")
        else:
            sizes = (*sizes, LARGEST)
    measured = []
    for size in sizes:
        measured.append(measure(*size))
        report(*measured[-1])
    growth(measured)
