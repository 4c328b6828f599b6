# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Compiled loops give the merge that PyTorch's own operations give."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import normal
from oracle import assert_rounded_once
from support import EXAMPLES, load_tensors, merge_here, steps_apart
from torch._dynamo.utils import counters

from mergekit_nuslerp import NonFiniteError, loops, nuslerp, plugin, streaming
from mergekit_nuslerp.streaming import Job

WEIGHTS = [0.5, 0.2, 0.3]

# Whole runs and remainders, of vectors along memory and across it.
CASES = [
    ("tensor", (64, 64)),
    ("tensor", (53, 71)),
    ("row", (70, 96)),  # runs divide the rows
    ("row", (70, 51)),  # they do not
    ("row:7", (70, 33)),
    ("matrix", (5, 24, 32)),
    ("column", (96, 40)),
    ("column", (77, 40)),
    ("column:4", (51, 48)),
    ("column", (3, 64, 24)),  # in each of several matrices
    ("dim0", (90, 6, 10)),
]


@pytest.fixture
def calls(monkeypatch):
    """The loops that were called, which run as they are; small sizes for all."""
    seen = []

    def compiled(loop, kind):
        seen.append(loop.__name__)
        return loop

    monkeypatch.setattr(loops, "_compiled", compiled)
    monkeypatch.setattr(loops, "_GIVEN_UP", False)
    for name, value in {
        "FEWEST_ELEMENTS": 1,
        "CHUNK": 2**10,
        "RUN": 32,
        "STRIP": 8,
        "SHORTEST_RUN": 4,
        "LARGEST_REST": 100,
        "NARROWEST": 8,
    }.items():
        monkeypatch.setattr(loops, f"_{name}", value)
    return seen


def merge(count, *shape, dtype=torch.float32, with_base=True, granularity, **options):
    *tensors, base = (normal(*shape, seed=n) for n in range(count + 1))
    tensors = [(base + tensor).to(dtype) for tensor in tensors]
    base = base.to(dtype) if with_base else None
    arguments = tensors, WEIGHTS[:count], base, granularity
    return arguments, nuslerp(
        tensors, WEIGHTS[:count], base=base, granularity=granularity, **options
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("count", "with_base"), [(2, False), (2, True), (3, True)])
@pytest.mark.parametrize(("granularity", "shape"), CASES)
def test_a_merge_in_loops_is_rounded_once(
    calls, count, granularity, shape, dtype, with_base
):
    arguments, result = merge(
        count,
        *shape,
        dtype=dtype,
        with_base=with_base,
        granularity=granularity,
        compiled=True,
    )
    assert_rounded_once(result, *arguments)
    assert set(calls) == {"_products", "_combination"}


def test_groups_of_vectors(calls, monkeypatch):
    """A part of the columns at a time is not contiguous, and the last may be one."""
    monkeypatch.setattr(streaming, "_MAX_VECTORS", 20)
    for granularity, columns in (
        ("row", 48),
        ("column", 48),
        ("column", 41),
        ("column:2", 42),
    ):
        calls.clear()
        arguments, result = merge(
            2, 64, columns, granularity=granularity, compiled=True
        )
        assert_rounded_once(result, *arguments)
        assert calls


@pytest.mark.parametrize("magnitude", ["linear", "geometric"])
def test_magnitudes_and_lambda(calls, magnitude):
    options = {"magnitude": magnitude, "lambda_": 0.7, "granularity": "row"}
    _, expected = merge(3, 64, 64, **options)
    assert not calls
    _, result = merge(3, 64, 64, compiled=True, **options)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert calls


def test_models_of_different_dtypes(calls):
    a, b, base = (normal(64, 64, seed=n) for n in range(3))
    tensors = [(base + a).bfloat16(), (base + b).float()]
    result = nuslerp(tensors, [0.3, 0.7], base=base.half(), compiled=True)
    assert result.dtype == torch.float32
    assert_rounded_once(result, tensors, [0.3, 0.7], base.half())
    assert calls


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_vectors_whose_squares_are_out_of_range(calls, factor):
    tensors = [factor * normal(64, 64, seed=n).bfloat16() for n in range(2)]
    result = nuslerp(tensors, [0.3, 0.7], compiled=True)
    assert calls  # in vain: they have to be scaled
    assert_rounded_once(result, tensors, [0.3, 0.7])


def test_errors_and_warnings_are_the_same(calls):
    tensors = [normal(64, 64, seed=n).float() for n in range(2)]
    tensors[1][3] = -2 * tensors[0][3]
    with pytest.warns(RuntimeWarning, match="1 of 64 vectors"):
        nuslerp(tensors, [0.3, 0.7], granularity="row", compiled=True)
    tensors[1][5, 7] = torch.nan
    with pytest.raises(NonFiniteError, match="model 1"):
        nuslerp(tensors, [0.3, 0.7], granularity="row", compiled=True)


def test_gradients_are_recorded_without_loops(calls):
    a, b = (normal(64, 64, seed=n).requires_grad_() for n in range(2))
    nuslerp([a, b], [0.3, 0.7], compiled=True).sum().backward()
    assert a.grad is not None
    assert not calls


@pytest.mark.parametrize(
    ("shape", "granularity", "expected"),
    [
        ((1024, 1024), "tensor", True),
        ((1024, 1023), "tensor", False),  # small
        ((32001, 4096), "row", True),
        ((32001, 4099), "row", False),  # no even runs, and too long for one
        ((32001, 4096), "column", True),
        ((32001, 4099), "column", True),
        ((100000, 16), "row", False),  # short vectors
        ((100000, 16), "column", False),  # narrow
        ((200, 100000), "column", False),  # a single strip
        ((400, 100000), "column", True),  # in groups of vectors
        ((64, 256, 512), "column", True),
        ((4, 300, 2048), "column", False),  # too long to be added up one by one
        ((64, 256, 512), "matrix", True),
    ],
)
def test_which_weights_are_merged_in_loops(shape, granularity, expected):
    tensor = torch.empty(1, *shape, dtype=torch.bfloat16)
    assert loops.suits(Job.of([tensor, tensor], tensor, granularity)) == expected


def test_strided_weights_are_not():
    tensor = torch.empty(1, 2048, 2048)[:, :, ::2]
    assert not loops.suits(Job.of([tensor.transpose(1, 2)] * 2, None, "column"))


def test_without_a_compiler_it_merges_all_the_same(calls, monkeypatch):
    def compiled(loop, kind):
        calls.append(loop)
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(loops, "_compiled", compiled)
    _, expected = merge(2, 64, 64, granularity="row")
    with pytest.warns(
        RuntimeWarning,
        match=r"could not compile them: RuntimeError: no C\+\+ compiler$",
    ):
        _, result = merge(2, 64, 64, granularity="row", compiled=True)
    assert result.equal(expected)
    _, result = merge(2, 64, 64, granularity="row", compiled=True)
    assert result.equal(expected)
    assert len(calls) == 1  # not tried again


def test_out_of_memory_is_not_taken_for_a_missing_compiler(calls, monkeypatch):
    def compiled(loop, kind):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loops, "_compiled", compiled)
    with pytest.raises(torch.OutOfMemoryError):
        merge(2, 64, 64, granularity="row", compiled=True)


def test_the_environment_asks_for_loops(
    calls, monkeypatch, caplog, checkpoints, tmp_path
):
    config = (EXAMPLES / "row_wise.yaml").read_text(encoding="utf-8")
    plugin.announce.cache_clear()
    merge_here(config, tmp_path / "plain", cwd=checkpoints)
    assert not calls
    assert "compiled" not in caplog.text
    monkeypatch.setenv("MERGEKIT_NUSLERP", "compile")
    plugin.announce.cache_clear()
    merge_here(config, tmp_path / "compiled", cwd=checkpoints)
    assert calls
    assert "in compiled loops" in caplog.text
    compiled = load_tensors(tmp_path / "compiled")
    for name, expected in load_tensors(tmp_path / "plain").items():
        assert steps_apart(compiled[name], expected).max() <= 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_really_compiled(monkeypatch):
    monkeypatch.setattr(loops, "_GIVEN_UP", False)
    monkeypatch.setattr(loops, "_CHUNK", 2**19)

    def check(*shape, granularity):
        with torch.inference_mode():
            arguments, result = merge(
                2,
                *shape,
                dtype=torch.bfloat16,
                granularity=granularity,
                compiled=True,
            )
        assert_rounded_once(result, *arguments)

    before = counters["stats"]["unique_graphs"]
    check(1100, 1024, granularity="row")
    check(1100, 1024, granularity="column")
    # Two loops along memory and two across it, wherever in a tensor a piece begins.
    assert counters["stats"]["unique_graphs"] - before == 4
    # The same loops take other sizes, parts of tensors, and remainders.
    check(1037, 1536, granularity="tensor")
    check(1000, 1300, granularity="column")
    assert counters["stats"]["unique_graphs"] - before == 4
    assert not loops._GIVEN_UP
