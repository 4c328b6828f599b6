# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Large weights are merged by several threads, which leave no trace."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import oracle

from mergekit_nuslerp import NonFiniteError, kernel, nuslerp, streaming


@pytest.fixture(autouse=True)
def several_threads(monkeypatch):
    """Three threads and small pieces, whatever machine this is."""
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", 16 * 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(96, 128, generator=generator) for _ in range(4)]


GRANULARITIES = ("tensor", "row", "column", "row:32", "column:64")
SHARES = {2: (0.3, 0.7), 3: (0.5, 0.2, 0.3)}
any_number = pytest.mark.parametrize("count", SHARES)


def threads_of_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@any_number
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_number_of_threads_gives_the_same_merge(weights, granularity, count):
    *others, base = (weight.double() for weight in weights)
    # Opposite rows and columns, to be counted by whichever thread merges them.
    others[1][:3] = 2 * base[:3] - others[0][:3]
    others[1][:, 5] = 2 * base[:, 5] - others[0][:, 5]
    tensors = [tensor.unsqueeze(0) for tensor in others[:count]]
    shares = torch.tensor([SHARES[count]], dtype=torch.float64)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(
            kernel.merge_batch(
                tensors, shares, base=base.unsqueeze(0), granularity=granularity
            )
        )
    expected = {"row": 3, "column": 1}.get(granularity, 0)
    for result in results:
        torch.testing.assert_close(
            result.result, results[0].result, rtol=1e-14, atol=1e-13
        )
        assert result.linear.tolist() == [expected]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_several_threads_take_part(weights, granularity, monkeypatch):
    workers, threads, read = set(), set(), streaming.Worker.read
    met = threading.Barrier(3)

    def watched(self, piece):
        if self not in workers:
            workers.add(self)
            threads.add(threading.get_ident())
            met.wait(30)  # or the first would be done before the others start
        read(self, piece)

    monkeypatch.setattr(streaming.Worker, "read", watched)
    nuslerp(weights[:2], [1, 1], granularity=granularity)
    assert len(workers) == 3
    assert threading.get_ident() not in threads


def test_the_number_of_threads_stays_as_it_was(weights):
    nuslerp(weights[:2], [1, 1])
    assert torch.get_num_threads() == 3
    assert threads_of_a_new_thread() == 3
    weights[0][3, 4] = float("nan")
    with pytest.raises(NonFiniteError):
        nuslerp(weights[:2], [1, 1])
    assert torch.get_num_threads() == 3
    assert threads_of_a_new_thread() == 3


@any_number
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_could_have_a_gradient(weights, granularity, mode, count):
    *others, base = (weight.requires_grad_() for weight in weights)
    others, shares = others[:count], SHARES[count]
    with mode():
        merged = nuslerp(others, shares, base=base, granularity=granularity)
    assert not merged.requires_grad
    exact = oracle(others, shares, base, granularity)
    assert merged.equal(exact.float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inputs_made_in_inference_mode(granularity):
    with torch.inference_mode():
        a, b = torch.randn(2, 96, 128)
        inside = nuslerp([a, b], [0.3, 0.7], granularity=granularity)
    outside = nuslerp([a, b], [0.3, 0.7], granularity=granularity)
    assert inside.equal(outside)


def test_threads_that_keep_to_one_at_the_same_time():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with streaming.one_thread():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with streaming.one_thread():
        assert torch.get_num_threads() == 1
        thread.start()
        assert entered.wait(60)
        assert streaming.num_threads() == 3
    assert torch.get_num_threads() == 3
    leave.set()
    thread.join()
    assert threads_of_a_new_thread() == 3


def test_merges_in_several_threads_at_once(weights):
    """As mergekit's executor for several GPUs runs its tasks."""
    expected = nuslerp(weights[:2], [0.3, 0.7])
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(nuslerp(weights[:2], [3, 7])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_threads_that_the_system_refuses(weights, monkeypatch):
    """Those that have started must not wait for the others, even after the end."""
    start, started = threading.Thread.start, []

    def refuse(thread):
        if thread.name.startswith("nuslerp") and started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        nuslerp(weights[:2], [1, 1])
    assert torch.get_num_threads() == 3
    (thread,) = started
    thread.join(timeout=30)
    assert not thread.is_alive()
