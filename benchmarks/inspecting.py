# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Time and memory of `inspect`, beside what it cannot do without. Linux only."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from benchmarks.measure import MIB, Function, head, numbers, row, status
from benchmarks.whole import CONFIG
from mergekit_nuslerp.checkpoints import write_checkpoints
from mergekit_nuslerp.inspect import inspect
from mergekit_nuslerp.kernel import gram_matrices

GRANULARITIES = {"tensor": True, "row": False}  # and `nuslerp_flatten`


def configuration(
    folder: Path, *, flatten: bool = True, dtype: str = "bfloat16"
) -> MergeConfiguration:
    text = CONFIG.replace("./", f"{folder}/").replace("bfloat16", dtype)
    text += f"parameters: {{nuslerp_flatten: {str(flatten).lower()}}}\n"
    return MergeConfiguration.model_validate(yaml.safe_load(text))


def loaded(config: MergeConfiguration) -> Iterator[list[torch.Tensor]]:
    """All tensors, those of one name in all models at a time, the base's last."""
    models = sorted(config.referenced_models(), key=lambda m: m == config.base_model)
    loaders = [LoaderCache().get(model) for model in models]
    for name in loaders[0].index.tensor_paths:
        yield [loader.get_tensor(name) for loader in loaders]


def seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read(config: MergeConfiguration) -> None:
    """Look at each byte once, in one thread, as mergekit loads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for tensors in loaded(config):
        for tensor in tensors:
            tensor.view(torch.int32).amax()
    torch.set_num_threads(threads)


def gram_seconds(config: MergeConfiguration, granularity: str) -> float:
    """One pass over tensors that are in memory."""
    total = 0.0
    for tensors in loaded(config):
        *inputs, base = (tensor.clone() for tensor in tensors)
        options = {"base": base, "granularity": granularity}
        total += seconds(partial(gram_matrices, inputs, **options))
    return total


def forget(folder: Path, *, files: str) -> None:
    """Close files, and have the system forget what is in them, if it is to."""
    LoaderCache().loaders.clear()
    gc.collect()
    if files == "on disk":
        for path in folder.glob("*/*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_memory(folder: str, small: str, dtype: str) -> None:
    """Print the MiB that one inspection adds. Runs in a process of its own."""
    # What libraries take once is no part of the inspection.
    inspect(configuration(Path(small), dtype=dtype))
    config = configuration(Path(folder), dtype=dtype)
    before, largest, done = status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, status("RssAnon"))

    # The files' pages count in the resident size, too, but the system takes them back
    # as it likes. Of private memory it keeps no high water mark.
    watcher = threading.Thread(target=watch)
    watcher.start()
    inspect(config)
    done.set()
    watcher.join()
    print((largest - before) / MIB, status("VmHWM") / MIB)


def table(layers: int = 24, hidden_size: int = 1280, runs: int = 5) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder, small = Path(directory) / "large", Path(directory) / "small"
        sizes = {"layers": layers, "hidden_size": hidden_size, "vocabulary": 32000}
        write_checkpoints(folder, **sizes)
        write_checkpoints(small)
        config = configuration(folder)
        elements = [tensors[0].numel() for tensors in loaded(config)]
        head(
            f"Inspection: 3 checkpoints of {sum(elements) / 1e9:.2f} B parameters in "
            f"bfloat16, fastest of {runs}",
            "files | vectors | reading (s) | one Gram pass (s) | inspect (s) "
            "| of 1.3 x reading + Gram pass",
        )
        for files in ("in memory", "on disk"):
            for granularity, flatten in GRANULARITIES.items():
                config = configuration(folder, flatten=flatten)
                inspect(config)
                times = []
                for _ in range(runs):
                    forget(folder, files=files)
                    reading = seconds(partial(read, config))
                    gram = gram_seconds(config, granularity)
                    forget(folder, files=files)
                    times.append((reading, gram, seconds(partial(inspect, config))))
                # Each without what else the machine did meanwhile, as far as may be.
                reading, gram, inspecting = (min(column) for column in zip(*times))
                cells = (f"{each:.1f}" for each in (reading, gram, inspecting))
                share = inspecting / (1.3 * reading + gram)
                row(files, granularity, *cells, f"{share:.2f}")
        head(
            "Inspection: MiB added to the private memory of the process",
            "dtype | three largest tensors | added | resident, with files",
        )
        for dtype in ("bfloat16", "float32"):  # as stored, and converted
            added, resident = numbers(
                "from benchmarks.inspecting import measure_memory; "
                f"measure_memory({str(folder)!r}, {str(small)!r}, {dtype!r})"
            )
            three = 3 * max(elements) * getattr(torch, dtype).itemsize / MIB
            row(dtype, f"{three:.0f}", f"{added:.0f}", f"{resident:.0f}")
