# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The same meaning as mergekit's own functions, which are taken as they are.

Everything is in float64, where mergekit's arithmetic is precise as well. Vectors have
16 elements or more, so that the angle of random ones is well conditioned, and parallel
and antipodal ones consist of +-1, whose lengths and cosines are exact: mergekit tells
them by a cosine of exactly one.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from functools import cache
from itertools import cycle

import pytest
import torch
from mergekit.merge_methods.karcher import karcher_merge_tensors
from mergekit.merge_methods.nuslerp import nuslerp as mergekit_nuslerp_function
from mergekit.merge_methods.slerp import slerp as mergekit_slerp_function
from oracle import vectors

from mergekit_nuslerp import nuslerp
from mergekit_nuslerp.parameters import from_flags

# Where vectors happen to have no unique mean, that is looked at as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

VERSION = tuple(map(int, importlib.metadata.version("mergekit").split(".")[:3]))
BEFORE_0_1_5 = VERSION < (0, 1, 5)

FLAGS = {"flatten": (True, False), "dim 0": (False, True), "last dim": (False, False)}
SHAPES = [(), (16,), (16, 16), (16, 4, 16), (1, 16, 16), (16, 2, 2, 16)]
WEIGHTS = [(0.3, 0.7), (1, 1), (2, -1), (1, -1)]
KINDS = ["ordinary", "zero-0", "parallel", "antipodal", "zero-1", "zeros"]


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@cache
def task_vectors(
    shape: tuple[int, ...], granularity: str, first_kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two weights whose vectors are of all kinds, beginning with a given one."""
    a, b, signs = (random(*shape, seed=seed) for seed in range(3))
    signs = torch.where(signs < 0, -1.0, 1.0).double()
    start = KINDS.index(first_kind)
    kinds = cycle([*KINDS[start:], *KINDS[:start]])
    for index, kind in zip(vectors(shape, granularity), kinds):
        if kind in ("parallel", "antipodal"):
            a[index] = signs[index]
            b[index] = signs[index] * (2 if kind == "parallel" else -0.5)
        if kind in ("zero-0", "zeros"):
            a[index] = 0
        if kind in ("zero-1", "zeros"):
            b[index] = 0
    return a, b


def whole_numbers(*shape: int) -> torch.Tensor:
    """A base that can be added and subtracted without rounding the signs above."""
    return random(*shape, seed=3).mul(4).round()


def assert_same(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    granularity: str,
    tolerance: float = 1e-12,
) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    dim = {"tensor": None, "row": -1, "dim0": 0}[granularity]
    gap = torch.linalg.vector_norm(ours - theirs, dim=dim)
    assert (gap <= tolerance * torch.linalg.vector_norm(theirs, dim=dim)).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("with_base", [False, True], ids=["raw", "base"])
def test_nuslerp(with_base, flags, shape, weights):
    flatten, row_wise = flags
    if BEFORE_0_1_5 and shape == (1, 16, 16) and flags == FLAGS["last dim"]:
        pytest.skip("mergekit 0.1.4 squeezes away the dimension of size one")
    granularity = from_flags(flatten=flatten, row_wise=row_wise)
    total = sum(weights)
    t = weights[1] / total if total else 0.5
    for kind in KINDS:
        a, b = task_vectors(shape, granularity, kind)
        base = whole_numbers(*shape) if with_base else torch.zeros_like(a)
        tensors = [base + a, base + b]
        merged = mergekit_nuslerp_function(
            t,
            tensors[0] - base,
            tensors[1] - base,
            dim=0 if row_wise else -1,
            flatten=flatten,
        )
        with warnings.catch_warnings():
            if not total:
                warnings.simplefilter("ignore", RuntimeWarning)
            ours = nuslerp(
                tensors,
                weights,
                base=base if with_base else None,
                granularity=granularity,
            )
        assert_same(ours, base + merged, granularity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(kind, t):
    """`slerp` interpolates raw weights by the same formula.

    It goes over to the straight line at a wider angle than `nuslerp`, and none of these
    vectors are in between. mergekit 0.1.4 calculates in float32.
    """
    a, b = task_vectors((16, 16), "tensor", kind)
    ours = nuslerp([a, b], [1 - t, t])
    if BEFORE_0_1_5:
        merged = mergekit_slerp_function(t, a, b).double()
        assert_same(ours, merged, "tensor", tolerance=2e-6)
    else:
        merged = mergekit_slerp_function(
            torch.tensor([t], dtype=torch.float64), a[None], b[None]
        )
        assert_same(ours, merged[0], "tensor")


karcher_in_float64 = pytest.mark.skipif(
    BEFORE_0_1_5, reason="mergekit 0.1.4 takes lengths in float32"
)


def karcher(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """mergekit's `karcher`, until it no longer moves."""
    return karcher_merge_tensors(tensors, weights, max_iter=500, tol=1e-15)


@karcher_in_float64
@pytest.mark.parametrize("t", [0.5, 0.3])
def test_karcher_of_two(t):
    """The Karcher mean of two vectors is what SLERP finds."""
    tensors = [random(16, 16, seed=0), 3 * random(16, 16, seed=1)]
    mean = karcher(tensors, [1 - t, t])
    assert_same(nuslerp(tensors, [1 - t, t], magnitude="linear"), mean, "tensor")


@karcher_in_float64
@pytest.mark.parametrize("count", [3, 5, 8])
@pytest.mark.parametrize("shape", [(16,), (16, 16), (3, 16, 16)], ids=str)
def test_karcher(count, shape):
    """`karcher` takes the weighted mean of the lengths, so it is `linear`."""
    tensors = [(n + 1) * random(*shape, seed=n) for n in range(count)]
    for shares in ([1.0] * count, [n + 1.0 for n in range(count)]):
        weights = [share / sum(shares) for share in shares]
        mean = karcher(tensors, weights)
        ours = nuslerp(tensors, shares, magnitude="linear")
        assert_same(ours, mean, "tensor", tolerance=1e-10)
        if len(shape) < 2:
            continue
        rows = nuslerp(tensors, shares, granularity="row", magnitude="linear")
        for index in [*vectors(shape, "row")][:5]:
            mean = karcher([tensor[index][0] for tensor in tensors], weights)
            assert_same(rows[index][0], mean, "tensor", tolerance=1e-10)


@karcher_in_float64
def test_karcher_of_dependent_vectors():
    """Four vectors in a plane, and one that occurs twice."""
    a, b = random(16, 16, seed=0), random(16, 16, seed=1)
    tensors = [a, b, a + b, 2 * a - b, 3 * b]
    mean = karcher(tensors, [0.2] * 5)
    ours = nuslerp(tensors, [1] * 5, magnitude="linear")
    assert_same(ours, mean, "tensor", tolerance=1e-10)
