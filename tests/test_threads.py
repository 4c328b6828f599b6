# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Threads, processes and signals: merges are the same and leave no trace in them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import WEIGHTS, models, need_native, normal, threads, two_or_three
from support import clean_environment

from mergekit_nuslerp import NonFiniteError, nuslerp
from mergekit_nuslerp.kernel import gram_matrices

pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

any_granularity = pytest.mark.parametrize(
    "granularity", ["tensor", "matrix", "row", "column", "row:4", "column:4", "dim0"]
)


@pytest.fixture(autouse=True)
def native_pass() -> None:
    need_native()


@pytest.fixture(scope="module")
def large() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Three models and a base of 2^20 elements and some more."""
    tensors, base = models(96, 96, 120, count=3, dtype=torch.bfloat16)
    return tensors, base


@two_or_three
@any_granularity
@pytest.mark.parametrize("with_base", [False, True])
def test_any_number_of_threads_gives_the_same_bytes(
    large, granularity, count, with_base
):
    tensors, base = large[0][:count], large[1] if with_base else None
    options = {"base": base, "granularity": granularity}
    merges, grams = [], []
    for number in (1, 2, 3, 7, 7, 1):
        with threads(number):
            merges.append(nuslerp(tensors, WEIGHTS[count], **options))
            grams.append(gram_matrices(tensors, **options))
    for merged, gram in zip(merges, grams):
        assert merged.equal(merges[0])
        assert gram.equal(grams[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_so_it_does_in_wider_dtypes(dtype, granularity):
    tensors = [normal(2100, 517, seed=seed, dtype=dtype) for seed in range(2)]
    merges = []
    for number in (1, 2, 3, 7):
        with threads(number):
            merges.append(nuslerp(tensors, [0.3, 0.7], granularity=granularity))
    assert all(merged.equal(merges[0]) for merged in merges)


TASKS = Path("/proc/self/task")


def settled_count() -> int:
    """Of this process's threads, once those of earlier tests have gone."""
    counts = [len(os.listdir(TASKS))]
    while len(counts) < 50 or len({*counts[-50:]}) > 1:
        time.sleep(0.01)
        counts.append(len(os.listdir(TASKS)))
    return counts[-1]


@pytest.mark.skipif(not TASKS.exists(), reason="needs Linux's list of threads")
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_several_threads_take_part_and_end(large, granularity):
    tensors, base = large
    counts, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            counts.append(len(os.listdir(TASKS)))

    with threads(3):
        tensors[0].float().exp()  # PyTorch's own threads, which stay
        before = settled_count() + 1
        watcher = threading.Thread(target=watch)
        watcher.start()
        deadline = time.monotonic() + 30
        while max(counts, default=0) < before + 2 and time.monotonic() < deadline:
            nuslerp(tensors, WEIGHTS[3], base=base, granularity=granularity)
        done.set()
        watcher.join()
    assert max(counts) == before + 2
    while len(os.listdir(TASKS)) >= before and time.monotonic() < deadline + 9:
        time.sleep(0.01)  # the system takes a moment to forget them
    assert len(os.listdir(TASKS)) < before


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("setting", ["", "portable"])
def test_the_number_of_threads_stays_as_it_was(large, setting, monkeypatch):
    monkeypatch.setenv("MERGEKIT_NUSLERP", setting)
    tensors, base = large
    broken = base.clone()
    broken[3, 4, 5] = torch.nan
    with threads(3):
        for granularity in ("tensor", "column"):
            nuslerp(tensors, WEIGHTS[3], base=base, granularity=granularity)
            assert torch.get_num_threads() == threads_of_a_new_thread() == 3
            with pytest.raises(NonFiniteError):
                nuslerp(tensors, WEIGHTS[3], base=broken, granularity=granularity)
            assert torch.get_num_threads() == threads_of_a_new_thread() == 3


@any_granularity
def test_eight_python_threads_at_once_agree_with_one(large, granularity):
    """As mergekit's executor for several GPUs runs its tasks."""
    tensors, base = large
    options = {"base": base, "granularity": granularity}
    expected = nuslerp(tensors, WEIGHTS[3], **options)
    results = []

    def merge() -> None:
        results.append(nuslerp(tensors, WEIGHTS[3], **options))

    workers = [threading.Thread(target=merge) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [result.equal(expected) for result in results] == [True] * 8


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=tempfile.gettempdir(),  # not where the sources are, which have no C++ part
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(),
    )


def test_another_python_thread_runs_during_a_merge():
    """The interpreter's lock is released: a counter goes on counting."""
    a = torch.ones(2**23)
    ticks, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks[0] += 1

    counter = threading.Thread(target=count)
    with threads(1):
        counter.start()
        before = ticks[0]
        nuslerp([a, a, a, a], [1, 1, 1, 1])
        during = ticks[0] - before
        done.set()
        counter.join()
    assert during > 1000


FORK = """
import os, signal, torch
from mergekit_nuslerp import nuslerp, passes
torch.set_num_threads(3)
a, b = torch.randn(2, 1200, 1100).bfloat16()
names = ("tensor", "row", "column")
expected = [nuslerp([a, b], [0.3, 0.7], granularity=name) for name in names]
assert passes.choose([a, b]) is passes.native
child = os.fork()
if not child:
    signal.alarm(20)
    merged = [nuslerp([a, b], [0.3, 0.7], granularity=name) for name in names]
    torch.set_num_threads(1)  # OpenMP does not outlive a fork
    os._exit(not all(x.equal(y) for x, y in zip(merged, expected)))
print("child", os.waitpid(child, 0)[1])
assert nuslerp([a, b], [0.3, 0.7]).equal(expected[0])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_merges():
    finished = run(FORK)
    assert "child 0" in finished.stdout, finished.stderr


# Signals itself a tenth into the second merge, and says how long the first took.
INTERRUPTED = """
import os, signal, sys, threading, time, torch
from mergekit_nuslerp import nuslerp
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
a = torch.ones(2**27, dtype=torch.bfloat16)
before = torch.get_num_threads()
for _ in range(2):  # the first finds its memory
    start = time.monotonic()
    nuslerp([a] * 8, [1] * 8)
    whole = time.monotonic() - start
threading.Timer(whole / 10, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    nuslerp([a] * 8, [1] * 8)
    print("not interrupted")
except KeyboardInterrupt:
    print("share", (time.monotonic() - start) / whole)
assert torch.get_num_threads() == before
small = a[:2**20].view(1024, 1024)
assert nuslerp([small] * 3, [1] * 3, granularity="row").equal(small)
print("merged")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_ends_a_large_merge_long_before_its_end():
    finished = run(INTERRUPTED)
    lines = finished.stdout.split()
    assert lines[0] == "share", finished
    assert float(lines[1]) < 0.6
    assert lines[2] == "merged"
