# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Whole merges through `mergekit-yaml`, with and without the plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CONFIG = """
merge_method: nuslerp
base_model: ./base
dtype: bfloat16
models:
  - {model: ./sft, parameters: {weight: 0.3}}
  - {model: ./kd, parameters: {weight: 0.7}}
"""


def merge(folder: Path, *, plugin: bool) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak MiB of one merge in a process of its own."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yaml", "out"]
    environment = {**os.environ, "MERGEKIT_NUSLERP": "1" if plugin else "0"}
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
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def table(layers: int = 24, hidden_size: int = 1280, runs: int = 3) -> None:
    from mergekit_nuslerp.checkpoints import write_checkpoints

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_checkpoints(
            folder, layers=layers, hidden_size=hidden_size, vocabulary=32000
        )
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        bytes_each = sum(
            f.stat().st_size for f in (folder / "base").glob("*.safetensors")
        )
        print(
            f"\n### Whole merges: {bytes_each / 2e9:.2f} B parameters in bfloat16, "
            f"median of {runs} pairs\n"
        )
        merge(folder, plugin=False)  # so that both find the files in memory
        pairs = [[merge(folder, plugin=p) for p in (False, True)] for _ in range(runs)]
    print("| | mergekit | plugin | plugin / mergekit |")
    print("|---|---|---|---|")
    for index, name in enumerate(("wall (s)", "CPU (s)", "peak memory (MiB)")):
        theirs = median(pair[0][index] for pair in pairs)
        ours = median(pair[1][index] for pair in pairs)
        ratio = median(pair[1][index] / pair[0][index] for pair in pairs)
        print(f"| {name} | {theirs:.1f} | {ours:.1f} | {ratio:.2f} |", flush=True)
