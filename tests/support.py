# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Running mergekit in tests, and looking at what came out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import mergekit_nuslerp

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "example_configs"


# Of the tiny checkpoints that most tests share.
LAYERS = 4

# A merge of them.
CONFIG = """
merge_method: nuslerp
base_model: ./base
models:
  - model: ./sft
    parameters: {weight: 0.3}
  - model: ./kd
    parameters: {weight: 0.7}
dtype: bfloat16
"""


class Finished(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def announcements(self) -> int:
        """How many times the plugin said that it merges."""
        return self.stderr.count(announcement())


class Demo(NamedTuple):
    """A finished run of the demo."""

    folder: Path
    status: int
    stdout: str
    stderr: str


def announcement() -> str:
    """How the line begins that the plugin logs when a process first uses it."""
    return f"mergekit-nuslerp {mergekit_nuslerp.__version__} merges"


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what switches the plugin on or off."""
    switches = {"MERGEKIT_NUSLERP", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    kept = {key: value for key, value in os.environ.items() if key not in switches}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def run_command(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end, in a clean environment unless told otherwise."""
    process = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return Finished(process.returncode, process.stdout, process.stderr)


def run_mergekit(
    config: Path,
    out: Path,
    *options: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run `mergekit-yaml`, which takes some seconds to start."""
    found = shutil.which("mergekit-yaml", path=sysconfig.get_path("scripts"))
    command = [found] if found else [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    return run_command(*command, config, out, *options, cwd=cwd, env=env)


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Relative paths start at `folder` inside the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def merge_here(config: str, out: Path, *, cwd: Path) -> None:
    """Do what `mergekit-yaml` does with a config's text, in this process."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # mergekit remembers by its path what it has opened, so `./base` would stay one
    # and the same model wherever that is.
    LoaderCache.loaders.clear()
    with working_directory(cwd):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(config)),
            str(out),
            options=MergeOptions(quiet=True),
            config_source=config,
        )
    LoaderCache.loaders.clear()


def write_t5(folder: Path, *names: str) -> None:
    """Write small models of two modules, an encoder and a decoder."""
    transformers = pytest.importorskip("transformers")
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
    for name in names:
        config = transformers.T5Config(
            vocab_size=32, feed_forward_proj="gated-gelu", **shape
        )
        model = transformers.T5ForConditionalGeneration(config)
        model.save_pretrained(folder / name)


def load_tensors(folder: Path):
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def steps_apart(first, second):
    """How many representable numbers lie between two tensors' elements."""
    import torch

    assert first.dtype == second.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    lowest = torch.iinfo(integer).min

    def position(tensor):
        bits = tensor.contiguous().view(integer).long()
        # Negative numbers are stored as a sign and a size.
        return torch.where(bits < 0, lowest - bits, bits)

    return (position(first) - position(second)).abs()
