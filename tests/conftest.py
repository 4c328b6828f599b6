# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

from __future__ import annotations

import gc
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from zlib import crc32

import hypothesis
import pytest
import torch

# Before anything reads them: no test needs a network, and the plugin must be on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("MERGEKIT_NUSLERP", None)

if "PYTEST_XDIST_WORKER" in os.environ:
    # As tests run side by side, several threads for each would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

from support import LAYERS, Demo

# Other numbers, to look for tests that only some of them pass.
SEED = int(os.environ.get("TEST_SEED", 0))
hypothesis.settings.register_profile("tests", derandomize=SEED == 0)
hypothesis.settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Python looks for garbage faster where it need not look through all modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(request: pytest.FixtureRequest) -> None:
    """What a test draws depends on its name, not on what its process ran before."""
    # Not `torch.manual_seed`, which notes a traceback for each device that is absent.
    torch.default_generator.manual_seed(crc32(request.node.nodeid.encode()) + SEED)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models `base`, `sft`, `kd`, `dpo`. Not to be written to."""
    from mergekit_nuslerp.demo import write_models

    folder = tmp_path_factory.mktemp("checkpoints")
    write_models(folder, layers=LAYERS, hidden_size=32, vocabulary=272)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once. Its folder is not to be written to."""
    from mergekit_nuslerp.demo import run

    # A space, because people's folders have them.
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = run(folder)
    return Demo(folder, status, out.getvalue(), err.getvalue())
