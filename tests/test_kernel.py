# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Two models through the kernel: every property and every edge case of a merge."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from itertools import cycle
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
from cases import (
    DTYPES,
    MAGNITUDES,
    all_dtypes,
    all_magnitudes,
    normal,
    out_of_range,
    with_and_without_base,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_rounded_once, granularities, oracle, reference, vectors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mergekit_nuslerp import kernel, nuslerp, streaming
from mergekit_nuslerp.kernel import NonFiniteError

# Where vectors happen to have no unique mean, that is looked at as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

GRANULARITIES = ["tensor", "row", "column"]
SHAPES = [(), (1,), (17,), (5, 7), (1, 7), (7, 1), (3, 4, 5), (2, 3, 4, 5)]


all_granularities = pytest.mark.parametrize("granularity", GRANULARITIES)
both = pytest.mark.parametrize("position", [0, 1])


def merge_batch(*args: Any, **kwargs: Any) -> torch.Tensor:
    return kernel.merge_batch(*args, **kwargs).result


def whole_numbers(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Numbers so small that their products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def models(
    *shape: int,
    with_base: bool = True,
    dtype: torch.dtype = torch.float64,
    make: Callable[..., torch.Tensor] = normal,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Two weights and, where asked for, a base near them."""
    a, b, base = (make(*shape, seed=seed + n, dtype=dtype) for n in range(3))
    if not with_base:
        return [a, b], None
    return [base + a, base + b], base


def unit_vectors(*shape: int, granularity: str, seed: int) -> torch.Tensor:
    """A weight whose vectors have length one."""
    weight = normal(*shape, seed=seed)
    for index in vectors(shape, granularity):
        weight[index] /= weight[index].norm()
    return weight


def degenerate(length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows: ordinary, parallel, antipodal, zero (first, second, both), as vectors."""
    a, b = normal(6, length, seed=1), normal(6, length, seed=2)
    b[1] = 2 * a[1]
    b[2] = -0.5 * a[2]
    a[3] = 0
    b[4] = 0
    a[5] = b[5] = 0
    return a, b


# --- the interpolation -----------------------------------------------------------


@all_granularities
@with_and_without_base
@both
def test_endpoints(granularity, with_base, position):
    tensors, base = models(5, 7, with_base=with_base)
    weights = [0.0, 0.0]
    weights[position] = 0.6
    result = nuslerp(tensors, weights, base=base, granularity=granularity)
    torch.testing.assert_close(result, tensors[position], rtol=1e-14, atol=1e-14)


@all_granularities
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@both
def test_endpoints_return_narrow_weights_as_they_were(granularity, dtype, position):
    tensors, _ = models(64, 65, with_base=False, dtype=dtype)
    weights = [1 - position, position]
    assert torch.equal(
        nuslerp(tensors, weights, granularity=granularity), tensors[position]
    )


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("weights", [(0.3, 0.7), (2, -1)])
def test_swapping_models_with_their_weights_changes_nothing(
    granularity, with_base, weights
):
    tensors, base = models(5, 7, with_base=with_base)
    result = nuslerp(tensors, weights, base=base, granularity=granularity)
    swapped = nuslerp(tensors[::-1], weights[::-1], base=base, granularity=granularity)
    torch.testing.assert_close(swapped, result, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("factor", [1e-3, 7, 1e6])
def test_only_the_ratio_of_the_weights_matters(factor):
    tensors, base = models(5, 7)
    result = nuslerp(tensors, [0.3, 0.7], base=base)
    scaled = nuslerp(tensors, [0.3 * factor, 0.7 * factor], base=base)
    torch.testing.assert_close(scaled, result, rtol=1e-14, atol=1e-14)


@all_granularities
def test_unit_vectors_stay_on_the_sphere_and_turn_by_their_fraction(granularity):
    t = 0.7
    a, b = (unit_vectors(6, 8, granularity=granularity, seed=seed) for seed in (1, 2))
    result = nuslerp([a, b], [1 - t, t], granularity=granularity)
    for index in vectors(a.shape, granularity):
        u, v, m = (tensor[index].flatten() for tensor in (a, b, result))
        assert m.norm().item() == pytest.approx(1, rel=1e-14)
        turned, whole = torch.acos(u @ m), torch.acos(u @ v)
        assert turned.item() == pytest.approx(t * whole.item(), rel=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@with_and_without_base
def test_a_rotation_of_the_models_rotates_the_merge(granularity, with_base):
    rotation, _ = torch.linalg.qr(normal(9, 9, seed=5))
    tensors, base = models(5, 9, with_base=with_base)
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    rotated = nuslerp(
        [tensor @ rotation for tensor in tensors],
        [0.3, 0.7],
        base=None if base is None else base @ rotation,
        granularity=granularity,
    )
    torch.testing.assert_close(rotated, result @ rotation, rtol=1e-13, atol=1e-13)


@all_granularities
@both
def test_extrapolating_by_one_more_angle_reflects_the_model_left_behind(
    granularity, position
):
    """At t = 2, as far beyond one model as the other lies before it."""
    a, b = (unit_vectors(5, 16, granularity=granularity, seed=seed) for seed in (1, 2))
    base = normal(5, 16)
    weights = [2, -1] if position == 0 else [-1, 2]
    result = nuslerp([base + a, base + b], weights, base=base, granularity=granularity)
    near, far = (a, b) if position == 0 else (b, a)
    for index in vectors(a.shape, granularity):
        mirror, vector = near[index], far[index]
        expected = 2 * (mirror * vector).sum() * mirror - vector
        torch.testing.assert_close(result[index] - base[index], expected)


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (3e-7, 4e-7)])
def test_weights_that_sum_to_zero_count_as_equal_with_a_warning(
    granularity, with_base, weights
):
    tensors, base = models(5, 7, with_base=with_base)
    with pytest.warns(RuntimeWarning, match="sum to zero"):
        result = nuslerp(tensors, weights, base=base, granularity=granularity)
    equal = nuslerp(tensors, [1, 1], base=base, granularity=granularity)
    assert torch.equal(result, equal)


def test_one_output_with_weights_that_sum_to_zero_leaves_the_others_alone():
    tensors = [normal(3, 5, 7, seed=seed) for seed in range(2)]
    weights = torch.tensor([[0.3, 0.7], [1, -1], [2, -1]])
    result = merge_batch(tensors, weights)
    weights[1] = 1
    assert torch.equal(result, merge_batch(tensors, weights))


# --- vectors without an angle, or without a unique arc ---------------------------


@all_dtypes
@pytest.mark.parametrize("granularity", ["row", "column"])
@with_and_without_base
@pytest.mark.parametrize("weights", [(0.3, 0.7), (2, -1)])
def test_degenerate_vectors_beside_ordinary_ones(
    dtype, granularity, with_base, weights
):
    tensors = [tensor.to(dtype) for tensor in degenerate()]
    base = None
    if with_base:
        base = whole_numbers(6, 12, dtype=dtype)
        tensors = [base + tensor for tensor in tensors]
    if granularity == "column":
        tensors = [tensor.T.contiguous() for tensor in tensors]
        base = None if base is None else base.T.contiguous()
    result = nuslerp(tensors, weights, base=base, granularity=granularity)
    assert_rounded_once(result, tensors, weights, base, granularity)


@all_dtypes
@all_granularities
@with_and_without_base
@both
def test_a_weight_that_one_model_left_as_it_was(
    dtype, granularity, with_base, position
):
    """A zero vector counts as orthogonal to the other one."""
    t = 0.3
    tensors, base = models(5, 8, with_base=True, dtype=dtype, make=whole_numbers)
    tensors[position] = base.clone()
    if not with_base:
        tensors = [tensor - base for tensor in tensors]
        base = None
    result = nuslerp(tensors, [1 - t, t], base=base, granularity=granularity)
    origin = 0 if base is None else base.double()
    share = t if position == 0 else 1 - t
    other = tensors[1 - position].double() - origin
    expected = origin + math.sin(share * math.pi / 2) * other
    torch.testing.assert_close(result, expected.to(dtype), rtol=2e-7, atol=1e-6)
    assert_rounded_once(result, tensors, [1 - t, t], base, granularity)


@all_dtypes
@all_granularities
def test_a_weight_that_no_model_changed_is_the_base(dtype, granularity):
    base = normal(5, 8, dtype=dtype)
    result = nuslerp(
        [base.clone(), base.clone()], [0.3, 0.7], base=base, granularity=granularity
    )
    assert torch.equal(result, base)
    zero = torch.zeros_like(base)
    assert torch.equal(nuslerp([zero, zero], [1, 1], granularity=granularity), zero)


@all_granularities
@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.3])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (2, -1)])
def test_parallel_and_antipodal_vectors_are_interpolated_linearly(
    granularity, factor, weights
):
    a = normal(5, 16)
    base = whole_numbers(5, 16, dtype=torch.float64)
    result = nuslerp([a, factor * a], weights, granularity=granularity)
    expected = weights[0] * a + weights[1] * (factor * a)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
    tensors = [base + a, base + factor * a]
    result = nuslerp(tensors, weights, base=base, granularity=granularity)
    torch.testing.assert_close(result, base + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_antipodal_is_judged_by_the_precision_of_the_inputs(dtype):
    """What rounding of the inputs can make of antipodal vectors is antipodal still."""
    eps = torch.finfo(dtype).eps
    for share, linear in ((0.25, True), (4.0, False)):
        # |u + v| = d and 1 + cos(theta) = d^2 / 2; along axes no rounding is felt.
        gap = math.sqrt(2 * share * eps)
        a = torch.tensor([1.0, 0.0], dtype=dtype)
        b = torch.tensor([-1.0, gap], dtype=dtype)
        result = nuslerp([a, b], [0.3, 0.7]).double()
        straight = 0.3 * a.double() + 0.7 * b.double()
        close = torch.allclose(result, straight, rtol=2 * eps, atol=2 * eps)
        assert close == linear
        assert_rounded_once(result.to(dtype), [a, b], [0.3, 0.7])


# --- very large and very small values --------------------------------------------


@all_granularities
@with_and_without_base
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        (torch.float32, -100),
        (torch.float32, 100),
        (torch.float64, -830),
        (torch.float64, 830),
        (torch.bfloat16, -20),
        (torch.bfloat16, 20),
    ],
    ids=str,
)
def test_a_power_of_two_scales_the_merge_and_nothing_else(
    granularity, with_base, dtype, exponent
):
    tensors, base = models(6, 40, with_base=with_base, dtype=dtype)
    factor = 2.0**exponent
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    scaled = nuslerp(
        [factor * tensor for tensor in tensors],
        [0.3, 0.7],
        base=None if base is None else factor * base,
        granularity=granularity,
    )
    rounding = 1e-13 if dtype == torch.float64 else 0
    torch.testing.assert_close(scaled / factor, result, rtol=rounding, atol=rounding)


@all_granularities
@with_and_without_base
@out_of_range
def test_values_whose_squares_leave_the_range(granularity, with_base, dtype, factor):
    """The same merge as at ordinary scale, but for the scale."""
    tensors, base = models(40, 50, with_base=with_base, dtype=dtype)
    far = [(factor * tensor.double()).to(dtype) for tensor in tensors]
    far_base = None if base is None else (factor * base.double()).to(dtype)
    result = nuslerp(far, [0.3, 0.7], base=far_base, granularity=granularity)
    assert_rounded_once(result, far, [0.3, 0.7], far_base, granularity)
    ordinary = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.double() / factor, ordinary.double(), rtol=2 * eps, atol=8 * eps
    )


@all_granularities
@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [
        (torch.bfloat16, 2.0**-110, 2.0**110),
        (torch.float16, 2.0**-20, 2.0**12),
        (torch.float32, 1e-36, 1e36),
        (torch.float64, 1e-290, 1e290),
    ],
    ids=str,
)
def test_vectors_of_very_different_lengths(granularity, dtype, small, large):
    tensors, _ = models(8, 9, with_base=False)
    scales = ([small, 1.0, large, 0.0], [large, large, small, 1.0])
    for tensor, scale in zip(tensors, scales):
        tensor *= torch.tensor(scale, dtype=torch.float64).repeat(2)[:, None]
    tensors = [tensor.to(dtype) for tensor in tensors]
    result = nuslerp(tensors, [0.3, 0.7], granularity=granularity)
    assert_rounded_once(result, tensors, [0.3, 0.7], None, granularity)


@all_granularities
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_values_there_are(granularity, dtype):
    """Multiples of the smallest subnormal number, whose own inverse is out of range."""
    number = torch.finfo(dtype)
    unit = number.smallest_normal * number.eps
    tensors = [
        (whole_numbers(5, 16, seed=seed).double() * unit).to(dtype) for seed in (1, 2)
    ]
    weights = [-6.0, 7.0]  # far along the circle, so that rounding leaves something
    result = nuslerp(tensors, weights, granularity=granularity)
    assert_rounded_once(result, tensors, weights, None, granularity)


def test_a_frozen_output_beside_one_of_very_small_values():
    """A zero vector looks like one that is too short to be squared, and is not."""
    tensors = [normal(2, 6, 8, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    tensors[0][0] = 0
    for tensor in tensors:
        tensor[1] *= 2.0**-100
    weights = torch.tensor([[0.3, 0.7], [0.3, 0.7]], dtype=torch.float64)
    result = merge_batch(tensors, weights)
    for n in range(2):
        assert_rounded_once(result[n], [tensor[n] for tensor in tensors], [0.3, 0.7])
    base = normal(2, 6, 8, dtype=torch.bfloat16)
    moved = [base.clone(), normal(2, 6, 8, seed=3, dtype=torch.bfloat16)]
    result = merge_batch(moved, weights, base=base)
    for n in range(2):
        assert_rounded_once(result[n], [x[n] for x in moved], [0.3, 0.7], base[n])


# --- the length of the result, and lambda ----------------------------------------


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_lengths_and_directions_of_each_vector(granularity, with_base, t):
    """`linear` and `geometric` lengths, in the direction between unit vectors."""
    units = [
        unit_vectors(6, 9, granularity=granularity, seed=seed) for seed in range(2)
    ]
    direction = nuslerp(units, [1 - t, t], granularity=granularity)
    base = whole_numbers(6, 9, dtype=torch.float64)
    a, b = torch.empty_like(base), torch.empty_like(base)
    lengths = []
    for n, index in enumerate(vectors(base.shape, granularity)):
        ends = 1.0 + n, 3.0 / (1 + n)
        for weight, unit, end in zip((a, b), units, ends):
            weight[index] = end * unit[index] + with_base * base[index]
        linear = max(0.0, (1 - t) * ends[0] + t * ends[1])
        lengths.append((index, (linear, ends[0] ** (1 - t) * ends[1] ** t)))
    origin = base if with_base else None
    for n, magnitude in enumerate(("linear", "geometric")):
        result = nuslerp(
            [a, b],
            [1 - t, t],
            base=origin,
            granularity=granularity,
            magnitude=magnitude,
        )
        for index, both_lengths in lengths:
            expected = both_lengths[n] * direction[index] + with_base * base[index]
            torch.testing.assert_close(result[index], expected, rtol=0, atol=1e-12)


@all_granularities
def test_with_lengths_apart_linear_turns_half_of_the_angle(granularity):
    """mergekit's own rule lets the model four times as long turn it 84 %."""
    a, b = (unit_vectors(4, 8, granularity=granularity, seed=seed) for seed in (1, 2))
    result = nuslerp([a, 4 * b], [1, 1], granularity=granularity, magnitude="linear")
    own = nuslerp([a, 4 * b], [1, 1], granularity=granularity)
    for index in vectors(a.shape, granularity):
        u, v, m, o = (tensor[index].flatten() for tensor in (a, b, result, own))
        whole = torch.acos(u @ v).item()
        assert m.norm().item() == pytest.approx(2.5, rel=1e-13)
        assert torch.acos(u @ m / m.norm()).item() == pytest.approx(whole / 2, 1e-12)
        assert torch.acos(u @ o / o.norm()).item() > 0.7 * whole


@all_dtypes
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_near_antipodal_vectors_do_not_blow_linear_up(dtype, granularity):
    """Vectors of lengths 1 and 1.5, closer and closer to opposite."""
    a = unit_vectors(12, 64, granularity="row", seed=1)
    gaps = 2.0 ** -torch.arange(1, 13, dtype=torch.float64)[:, None]
    b = -1.5 * (a + gaps * unit_vectors(12, 64, granularity="row", seed=2))
    b *= 1.5 / b.norm(dim=1, keepdim=True)
    tensors = [a.to(dtype), b.to(dtype)]
    if granularity == "column":
        tensors = [tensor.T.contiguous() for tensor in tensors]
    dim = 1 if granularity == "row" else 0
    longest = max(tensor.double().norm(dim=dim).max().item() for tensor in tensors)
    for weights in ([1, 1], [0.1, 0.9]):
        result = nuslerp(tensors, weights, granularity=granularity, magnitude="linear")
        lengths = result.double().norm(dim=dim)
        assert lengths.max() <= longest * (1 + torch.finfo(dtype).eps)
    own = nuslerp(tensors, [1, 1], granularity=granularity)
    assert own.double().norm(dim=dim).max() > longest


@all_dtypes
@all_granularities
@both
def test_linear_scales_what_only_one_model_changed(dtype, granularity, position):
    """A frozen model: t |delta|, where `slerp` gives sin(t 90 degrees) |delta|."""
    t = 0.3
    tensors, base = models(5, 8, dtype=dtype, make=whole_numbers)
    tensors[position] = base.clone()
    options = {"granularity": granularity, "magnitude": "linear"}
    result = nuslerp(tensors, [1 - t, t], base=base, **options)
    share = t if position == 0 else 1 - t
    other = tensors[1 - position].double()
    expected = base.double() + share * (other - base.double())
    torch.testing.assert_close(result, expected.to(dtype), rtol=2e-7, atol=1e-6)
    assert_rounded_once(result, tensors, [1 - t, t], base, **options)
    # Of a length that is zero, no geometric mean is anything else.
    frozen = nuslerp(
        tensors, [1 - t, t], base=base, granularity=granularity, magnitude="geometric"
    )
    assert torch.equal(frozen, base)


@all_granularities
@all_magnitudes
def test_lambda_is_how_far_to_go_from_the_base(granularity, magnitude):
    tensors, base = models(5, 7)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    whole = nuslerp(tensors, [0.3, 0.7], **options)
    for lambda_ in (1.0, 0.3, 0.0, 1.7, -0.5):
        result = nuslerp(tensors, [0.3, 0.7], lambda_=lambda_, **options)
        expected = base + lambda_ * (whole - base)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(nuslerp(tensors, [0.3, 0.7], lambda_=0, **options), base)


@all_dtypes
@all_magnitudes
@pytest.mark.parametrize("lambda_", [0.3, 1.5])
def test_lambda_and_magnitude_round_once(dtype, magnitude, lambda_):
    shape = (12, 40)
    tensors, base = models(*shape, dtype=dtype)
    for granularity in granularities(shape):
        options = {
            "base": base,
            "granularity": granularity,
            "magnitude": magnitude,
            "lambda_": lambda_,
        }
        result = nuslerp(tensors, [0.3, 0.7], **options)
        assert_rounded_once(result, tensors, [0.3, 0.7], **options)


# --- vectors that are counted ----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", ["row", "column"])
def test_vectors_without_a_unique_arc_are_counted_in_one_warning(dtype, granularity):
    a, b = (whole_numbers(7, 16, seed=seed, dtype=dtype) for seed in (1, 2))
    b[2], b[5] = -a[2], -2 * a[5]
    if granularity == "column":
        a, b = a.T, b.T
    with pytest.warns(RuntimeWarning) as caught:
        nuslerp([a, b], [1, 1], granularity=granularity)
    (message,) = (str(warning.message) for warning in caught)
    assert "2 of 7" in message
    assert reference([a, b], [1, 1], None, granularity).linear == 2


def test_nothing_is_warned_of_where_nothing_is_the_matter():
    """Zero vectors, parallel ones and those at an end have a unique mean."""
    a, b = degenerate()
    a, b = (torch.cat([tensor[:2], tensor[3:]]) for tensor in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nuslerp([a, b], [0.3, 0.7], granularity="row")
        nuslerp([a, -a], [1, 0], granularity="row")


def test_a_batch_counts_for_each_weight():
    tensors = [normal(3, 6, 8, seed=seed) for seed in range(2)]
    tensors[1][0, 1] = -tensors[0][0, 1]
    tensors[1][2, :4] = -2 * tensors[0][2, :4]
    weights = torch.full((3, 2), 0.5, dtype=torch.float64)
    merged = kernel.merge_batch(tensors, weights, granularity="row")
    assert merged.vectors == 6
    assert merged.linear.tolist() == [1, 0, 4]
    whole = kernel.merge_batch(tensors, weights, granularity="tensor")
    assert whole.vectors == 1
    assert whole.linear.tolist() == [0, 0, 0]


# --- inputs that are refused -----------------------------------------------------


@all_dtypes
@all_granularities
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("model", [0, 1, None])
def test_nan_or_infinity_names_the_model(dtype, granularity, value, model):
    tensors, base = models(5, 7, dtype=dtype)
    (base if model is None else tensors[model])[2, 3] = value
    with pytest.raises(NonFiniteError) as caught:
        nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert (caught.value.output, caught.value.model) == (0, model)
    assert ("base" if model is None else f"model {model}") in str(caught.value)


@all_granularities
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("model", [0, 1, None])
def test_nan_in_a_batch_names_the_output(granularity, requires_grad, model):
    tensors, base = models(4, 5, 7)
    (base if model is None else tensors[model])[2, 4, 6] = math.nan
    tensors[0].requires_grad_(requires_grad)
    weights = torch.tensor([[0.3, 0.7]]).expand(4, 2)
    with pytest.raises(NonFiniteError) as caught:
        merge_batch(tensors, weights, base=base, granularity=granularity)
    assert (caught.value.output, caught.value.model) == (2, model)


@both
def test_nan_is_found_beside_a_zero_vector(position):
    """Neither a zero vector nor a weight of zero hides what is in the other model."""
    tensors = [torch.zeros(5, 7), torch.zeros(5, 7)]
    tensors[position][4, 6] = math.nan
    weights = [position, 1 - position]
    with pytest.raises(NonFiniteError) as caught:
        nuslerp(tensors, weights)
    assert caught.value.model == position


def test_nan_in_the_last_piece_of_many_is_found(monkeypatch):
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", 4096)
    tensors, base = models(70, 31, dtype=torch.bfloat16)
    tensors[1][69, 30] = math.inf
    for granularity in GRANULARITIES:
        with pytest.raises(NonFiniteError) as caught:
            nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
        assert caught.value.model == 1


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("model", [0, 1, None])
def test_only_floating_point_weights_are_interpolated(dtype, model):
    tensors, base = models(5, 7)
    other = torch.ones(5, 7).to(dtype)
    if model is None:
        base = other
    else:
        tensors[model] = other
    with pytest.raises(TypeError, match=str(dtype)):
        nuslerp(tensors, [0.3, 0.7], base=base)
    with pytest.raises(TypeError, match=str(dtype)):
        merge_batch(tensors, torch.tensor([[0.3, 0.7]]).expand(5, 2), base=base)


@pytest.mark.parametrize("shape", [(7, 5), (5, 1), (35,), (1, 5, 7), ()])
@pytest.mark.parametrize("model", [0, 1, None])
def test_shapes_that_differ_are_refused_even_where_they_broadcast(shape, model):
    tensors, base = models(5, 7)
    if model is None:
        base = normal(*shape)
    else:
        tensors[model] = normal(*shape)
    with pytest.raises(ValueError, match="shape"):
        nuslerp(tensors, [0.3, 0.7], base=base)


@pytest.mark.parametrize("count", [0, 1])
def test_one_model_is_not_enough(count):
    tensors = [normal(5, 7, seed=seed) for seed in range(count)]
    with pytest.raises(ValueError, match="two"):
        nuslerp(tensors, [1.0] * count)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_weight_for_each_model(count):
    tensors, _ = models(5, 7, with_base=False)
    with pytest.raises(ValueError, match="weights"):
        nuslerp(tensors, [1.0] * count)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@both
def test_weights_are_finite(value, position):
    tensors, _ = models(5, 7, with_base=False)
    weights = [1.0, 1.0]
    weights[position] = value
    with pytest.raises(ValueError, match="finite"):
        nuslerp(tensors, weights)
    with pytest.raises(ValueError, match="finite"):
        merge_batch(tensors, torch.tensor([[0.3, 0.7], weights]).repeat(3, 1)[:5])


@all_granularities
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_task_vector_that_float64_cannot_hold_is_not_called_infinite(
    granularity, requires_grad
):
    """The inputs are finite, so no model is to blame; but there is no result either."""
    base = torch.full((5, 7), -1.7e308, dtype=torch.float64)
    tensors = [-base, base / 2]
    tensors[0].requires_grad_(requires_grad)
    with pytest.raises(OverflowError, match="float64"):
        nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("magnitude", ["linear", "geometric"])
def test_a_length_that_float64_cannot_hold(magnitude, requires_grad):
    tensors, _ = models(64, 64, with_base=False)
    tensors = [1e307 * tensor for tensor in tensors]
    tensors[0].requires_grad_(requires_grad)
    with pytest.raises(OverflowError, match="float64"):
        nuslerp(tensors, [0.3, 0.7], magnitude=magnitude)
    assert nuslerp(tensors, [0.3, 0.7]).isfinite().all()


@pytest.mark.parametrize("model", [1, None])
def test_the_error_survives_the_way_out_of_another_process(model):
    error = pickle.loads(pickle.dumps(NonFiniteError(2, model)))
    assert (error.output, error.model) == (2, model)
    assert str(error) == str(NonFiniteError(2, model))


def test_an_unknown_granularity_is_refused():
    tensors, _ = models(5, 7, with_base=False)
    with pytest.raises(ValueError, match="granularity"):
        nuslerp(tensors, [1, 1], granularity="rows")


def test_an_unknown_magnitude_is_refused():
    tensors, _ = models(5, 7, with_base=False)
    with pytest.raises(ValueError, match="magnitude"):
        nuslerp(tensors, [1, 1], magnitude="l2")
    with pytest.raises(ValueError, match="magnitude"):
        nuslerp([torch.empty(0)] * 2, [1, 1], magnitude="l2")


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 2.0])
def test_lambda_scales_task_vectors_so_it_needs_a_base(lambda_):
    tensors, _ = models(5, 7, with_base=False)
    with pytest.raises(ValueError, match=r"lambda.*base"):
        nuslerp(tensors, [1, 1], lambda_=lambda_)


@pytest.mark.parametrize("lambda_", [math.nan, math.inf])
def test_lambda_is_finite(lambda_):
    tensors, base = models(5, 7)
    with pytest.raises(ValueError, match="lambda"):
        nuslerp(tensors, [1, 1], base=base, lambda_=lambda_)


# --- shapes, strides, dtypes -----------------------------------------------------


@all_dtypes
@all_granularities
@with_and_without_base
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_dimensions(dtype, granularity, with_base, shape):
    tensors, base = models(*shape, with_base=with_base, dtype=dtype)
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert (result.shape, result.dtype) == (torch.Size(shape), dtype)
    assert_rounded_once(result, tensors, [0.3, 0.7], base, granularity)


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_empty_weights_stay_empty(granularity, with_base, shape):
    tensors, base = models(*shape, with_base=with_base, dtype=torch.bfloat16)
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert (result.shape, result.dtype) == (torch.Size(shape), torch.bfloat16)
    batch = [tensor.expand(3, *shape) for tensor in tensors]
    weights = torch.tensor([[0.3, 0.7]]).expand(3, 2)
    assert merge_batch(batch, weights, granularity=granularity).shape == (3, *shape)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
    room[..., 1::2] = tensor
    return room[..., 1::2]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor)


def reordered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


@all_granularities
@pytest.mark.parametrize("layout", [transposed, sliced, expanded, reordered])
@pytest.mark.parametrize("which", ["all", 0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 9), (4, 5, 6), (2, 3, 4, 5)], ids=str)
def test_strides_do_not_matter(granularity, layout, which, shape):
    tensors, base = models(*shape, make=whole_numbers, dtype=torch.float32)
    strided = [
        layout(tensor) if which in ("all", n) else tensor
        for n, tensor in enumerate([*tensors, base])
    ]
    result = nuslerp(strided[:2], [0.3, 0.7], base=strided[2], granularity=granularity)
    plain = [tensor.contiguous() for tensor in strided]
    expected = nuslerp(plain[:2], [0.3, 0.7], base=plain[2], granularity=granularity)
    assert torch.equal(result, expected)
    assert_rounded_once(result, plain[:2], [0.3, 0.7], plain[2], granularity)


@all_granularities
@pytest.mark.parametrize("layout", [transposed, reordered])
def test_a_batch_in_any_memory_order(granularity, layout):
    tensors, base = models(3, 4, 5, make=whole_numbers, dtype=torch.float32)
    weights = torch.tensor([[0.3, 0.7], [1, 1], [2, -1]])
    expected = merge_batch(tensors, weights, base=base, granularity=granularity)
    result = merge_batch(
        [layout(tensor) for tensor in tensors],
        weights,
        base=layout(base),
        granularity=granularity,
    )
    assert torch.equal(result, expected)


@all_dtypes
@all_granularities
@pytest.mark.parametrize("scale", [1.0, 2.0**-100], ids=["ordinary", "small"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_never_modified_nor_returned(
    dtype, granularity, scale, requires_grad
):
    tensors, base = models(6, 9, dtype=dtype)
    inputs = [scale * tensor for tensor in (*tensors, base)]
    copies = [tensor.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.requires_grad_(requires_grad)
    for weights in ([0.3, 0.7], [1, 0], [0, 1]):
        for origin in (inputs[2], None):
            result = nuslerp(inputs[:2], weights, base=origin, granularity=granularity)
            with torch.no_grad():
                result.fill_(7)
    for tensor, copy in zip(inputs, copies):
        assert torch.equal(tensor, copy)


def test_an_empty_result_is_a_new_tensor():
    tensors = [torch.empty(0, 4), torch.empty(0, 4)]
    result = nuslerp(tensors, [1, 1])
    assert all(result is not tensor for tensor in tensors)


@all_granularities
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.bfloat16, torch.float32), torch.float32),
        ((torch.float64, torch.float16, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted(granularity, dtypes, expected):
    tensors, base = models(6, 9)
    *tensors, base = (x.to(dtype) for x, dtype in zip([*tensors, base], dtypes))
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert result.dtype == expected
    assert_rounded_once(result, tensors, [0.3, 0.7], base, granularity)
    empty = [tensor[:0] for tensor in tensors]
    assert nuslerp(empty, [1, 1], base=base[:0]).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_weights_of_a_batch_in_any_dtype(dtype):
    tensors = [normal(1, 5, 7, seed=seed) for seed in range(2)]
    result = merge_batch(tensors, torch.tensor([[1, 3]], dtype=dtype))
    expected = nuslerp([tensor[0] for tensor in tensors], [1, 3])
    torch.testing.assert_close(result[0], expected, rtol=1e-14, atol=1e-14)


# --- batches and pieces ----------------------------------------------------------


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("shape", [(), (9,), (6, 9), (3, 4, 5)], ids=str)
def test_a_batch_equals_its_outputs_one_by_one(granularity, with_base, shape):
    tensors, base = models(
        4, *shape, with_base=with_base, make=whole_numbers, dtype=torch.float32
    )
    weights = torch.tensor([[0.3, 0.7], [1, 1], [2, -1], [0, 5]], dtype=torch.float64)
    together = merge_batch(tensors, weights, base=base, granularity=granularity)
    for n, pair in enumerate(weights.tolist()):
        alone = nuslerp(
            [tensor[n] for tensor in tensors],
            pair,
            base=None if base is None else base[n],
            granularity=granularity,
        )
        assert torch.equal(together[n], alone)


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("room", "most_vectors", "strip"),
    [
        (4096, 64 * 1024, 64),  # several vectors to a piece, or a part of one
        (1111, 7, 3),  # nothing divides anything: ragged ends everywhere
        (20000, 2, 1000),  # fewer vectors at once than would fit
        (61, 1, 1),  # a single element at a time
    ],
)
def test_the_size_of_the_pieces_does_not_matter(
    monkeypatch, granularity, with_base, dtype, room, most_vectors, strip
):
    shape = (2, 5, 7, 3) if room < 100 else (3, 29, 5, 13)
    tensors, base = models(*shape, with_base=with_base, make=whole_numbers, dtype=dtype)
    tensors[0][0, 0], tensors[1][1, 1] = 0, 0
    weights = torch.tensor([[0.3, 0.7], [1, 1], [2, -1]])[: shape[0]]
    at_once = merge_batch(tensors, weights, base=base, granularity=granularity)
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", room)
    monkeypatch.setattr(streaming, "_MAX_VECTORS", most_vectors)
    monkeypatch.setattr(streaming, "_STRIP_LENGTH", strip)
    in_pieces = merge_batch(tensors, weights, base=base, granularity=granularity)
    # Sums are exact here; what is left is rounding once, at the ends of pieces too.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(in_pieces, at_once, rtol=eps, atol=1e-6)


@all_granularities
def test_extreme_values_in_pieces(monkeypatch, granularity):
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", 1111)
    for scale in (2.0**-100, 2.0**100):
        tensors, base = models(37, 29, dtype=torch.bfloat16)
        tensors, base = [scale * tensor for tensor in tensors], scale * base
        result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
        assert_rounded_once(result, tensors, [0.3, 0.7], base, granularity)


def as_on_an_accelerator(monkeypatch):
    """One worker, whose operations widen their inputs."""
    start = streaming.Worker.__init__

    def mixing(self, job, dtype, rows):
        start(self, job, dtype, rows)
        self.mixes = rows is not None

    monkeypatch.setattr(streaming.Worker, "__init__", mixing)
    monkeypatch.setattr(streaming, "_MAX_THREADS", 1)
    monkeypatch.setattr(streaming, "_SPARE", [])


@all_granularities
@with_and_without_base
@all_magnitudes
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_operations_that_widen_inputs_themselves(
    monkeypatch, granularity, with_base, magnitude, dtype
):
    """As on an accelerator, and with coefficients in the thousands."""
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", 4096)
    tensors, base = models(64, 65, with_base=with_base, dtype=dtype)
    if base is not None:  # a fine-tune that hardly changed a thing
        tensors[0] = base.clone()
        base[:, 7] = base[3] = 1e-3
        tensors[0][:, 7] = tensors[0][3] = base[0, 7] * (1 + torch.finfo(dtype).eps)
    result = nuslerp(
        tensors, [0.3, 0.7], base=base, granularity=granularity, magnitude=magnitude
    )
    assert_rounded_once(
        result, tensors, [0.3, 0.7], base, granularity, magnitude=magnitude
    )


class Watch(TorchDispatchMode):
    """The bytes of new tensors, and the longest runs across memory that are reduced.

    Of many such runs side by side, as CUDA keeps something for each of them.
    """

    def __init__(self):
        super().__init__()
        self.allocated, self.longest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.allocated.append(storage.nbytes())
        if func in (torch.ops.aten.sum.dim_IntList, torch.ops.aten.amax.default):
            elements = args[0]
            reduced = {dim % elements.ndim for dim in args[1]}
            dims = [dim for dim, size in enumerate(elements.shape) if size > 1]
            across = dims and min(dims, key=elements.stride) not in reduced
            if across and found.numel() > 64:
                length = prod(elements.shape[dim] for dim in reduced)
                self.longest = max(self.longest, length)
        return found


def tensors_in(values):
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("granularity", ["tensor", "row", "column", "column:4"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.bfloat16, 1), (torch.bfloat16, 1e-30), (torch.float32, 1)],
)
def test_an_accelerator_provides_scratch_and_little_else(
    monkeypatch, granularity, dtype, scale
):
    """CUDA needs memory of its own to reduce long runs across memory."""
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", 3 * 8 * 400 * 512)
    tensors, _ = models(600, 512, dtype=dtype)
    tensors = [scale * tensor for tensor in tensors]
    with Watch() as watch:
        result = nuslerp(tensors, [0.3, 0.7], granularity=granularity)
    assert_rounded_once(result, tensors, [0.3, 0.7], None, granularity)
    known = {result.nbytes, streaming._SCRATCH_BYTES_CPU}
    assert known <= set(watch.allocated)
    assert max(set(watch.allocated) - known) < result.nbytes / 5
    assert watch.longest <= 256


@all_granularities
@pytest.mark.parametrize("shape", [(2**13, 2**12), (2, 2**24), (2**24, 2)])
def test_scratch_does_not_grow_with_the_weight(monkeypatch, granularity, shape):
    monkeypatch.setattr(streaming, "_SPARE", [])
    weights = [torch.empty(1, *shape, dtype=torch.bfloat16) for _ in range(3)]
    job = streaming.Job.of(weights[:2], weights[2], granularity)
    crew = streaming.Crew(job, torch.float32)
    most = streaming._MAX_THREADS * streaming._SCRATCH_BYTES_CPU
    assert 0 < sum(block.nbytes for block in crew.blocks) <= most
    group = next(crew.groups())  # others are smaller
    outer, _, inner, _ = group.sizes
    assert outer * inner <= streaming._MAX_VECTORS
    assert max(piece[0].numel() for piece in group.pieces) <= crew.chunk


def test_a_default_device_is_not_where_inputs_are(monkeypatch):
    monkeypatch.setattr(streaming, "_SPARE", [])
    tensors, base = models(64, 65)
    with torch.device("meta"):
        inside = nuslerp(tensors, [0.3, 0.7], base=base, granularity="row")
    assert inside.equal(nuslerp(tensors, [0.3, 0.7], base=base, granularity="row"))


# --- gradients -------------------------------------------------------------------


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("weights", [(0.3, 0.7), (2, -1)])
def test_gradients_agree_with_finite_differences(granularity, with_base, weights):
    tensors, base = models(4, 5, with_base=with_base)
    inputs = tensors if base is None else [*tensors, base]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def merge(a, b, origin=None):
        return nuslerp([a, b], weights, base=origin, granularity=granularity)

    assert torch.autograd.gradcheck(merge, inputs)


@all_granularities
@pytest.mark.parametrize("model", [0, 1, None])
def test_a_gradient_for_one_input_alone(granularity, model):
    tensors, base = models(4, 5)
    wanted = base if model is None else tensors[model]

    def merge(x):
        inputs = [x if tensor is wanted else tensor for tensor in (*tensors, base)]
        return nuslerp(inputs[:2], [0.3, 0.7], base=inputs[2], granularity=granularity)

    assert torch.autograd.gradcheck(merge, [wanted.clone().requires_grad_()])


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recording_a_gradient_does_not_change_the_merge(granularity, with_base, dtype):
    tensors, base = models(6, 9, with_base=with_base, dtype=dtype)
    tensors[0].requires_grad_()
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert result.requires_grad
    assert_rounded_once(result, tensors, [0.3, 0.7], base, granularity)
    with torch.no_grad():
        plain = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    assert not plain.requires_grad
    assert_rounded_once(plain, tensors, [0.3, 0.7], base, granularity)


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_gradients_of_more_vectors_than_are_worked_out_at_once(
    monkeypatch, granularity
):
    monkeypatch.setattr(streaming, "_MAX_VECTORS", 4)
    monkeypatch.setattr(streaming, "_STRIP_LENGTH", 2)
    tensors, base = models(9, 11)
    inputs = [tensor.requires_grad_() for tensor in (*tensors, base)]
    result = nuslerp(inputs[:2], [0.3, 0.7], base=base, granularity=granularity)
    assert_rounded_once(result, inputs[:2], [0.3, 0.7], base, granularity)
    result.sum().backward()
    assert all((tensor.grad != 0).any(0).all() for tensor in inputs)


@pytest.mark.parametrize("granularity", ["row", "column"])
@with_and_without_base
@pytest.mark.parametrize("t", [0.3, 2.0])
def test_gradients_of_degenerate_vectors(granularity, with_base, t):
    a, b = degenerate()
    base = whole_numbers(6, 12, dtype=torch.float64) if with_base else None
    if base is not None:
        # Differences of a few bits are exact, so degenerate vectors stay degenerate.
        a, b = (torch.round(256 * vector) / 256 + base for vector in (a, b))
        b[1:3] = base[1:3] + torch.tensor([[2.0], [-0.5]]) * (a[1:3] - base[1:3])
    if granularity == "column":
        a, b = a.T.contiguous(), b.T.contiguous()
        base = None if base is None else base.T.contiguous()
    a, b = a.requires_grad_(), b.requires_grad_()
    nuslerp([a, b], [1 - t, t], base=base, granularity=granularity).sum().backward()
    grads = [a.grad, b.grad]
    if granularity == "column":
        grads = [grad.T for grad in grads]
    assert all(grad.isfinite().all() for grad in grads)
    # Parallel and antipodal vectors: exactly the coefficients of the straight line.
    for grad, share in zip(grads, (1 - t, t)):
        linear = torch.full_like(grad[1:3], share)
        torch.testing.assert_close(grad[1:3], linear, rtol=1e-12, atol=1e-12)
    # Beside a zero vector, and for it: the coefficients of a right angle.
    for grad, share in zip(grads, (1 - t, t)):
        right = torch.full_like(grad[3:], math.sin(share * math.pi / 2))
        torch.testing.assert_close(grad[3:], right, rtol=1e-12, atol=1e-12)


@all_granularities
def test_gradients_reach_narrow_inputs(granularity):
    tensors, base = models(5, 9, dtype=torch.bfloat16)
    narrow = [tensor.requires_grad_() for tensor in (*tensors, base)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    for a, b, origin in (narrow, wide):
        result = nuslerp([a, b], [0.3, 0.7], base=origin, granularity=granularity)
        result.double().square().sum().backward()
    for tensor, exact in zip(narrow, wide):
        assert tensor.grad.dtype == torch.bfloat16
        difference = (tensor.grad.double() - exact.grad).norm()
        assert difference <= 2**-7 * exact.grad.norm()


@all_granularities
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.bfloat16, 2.0**-100),
        (torch.bfloat16, 2.0**100),
        (torch.float32, 2.0**-100),
        (torch.float64, 2.0**-830),
        (torch.float64, 2.0**830),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_the_scale(granularity, dtype, factor):
    gradients = []
    for scale in (1, factor):
        tensors, base = models(5, 9, dtype=dtype)
        inputs = [(scale * tensor).requires_grad_() for tensor in (*tensors, base)]
        a, b, origin = inputs
        result = nuslerp([a, b], [0.3, 0.7], base=origin, granularity=granularity)
        assert_rounded_once(result, [a, b], [0.3, 0.7], origin, granularity)
        result.sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for ordinary, scaled in zip(*gradients):
        torch.testing.assert_close(scaled, ordinary)


# --- exactness -------------------------------------------------------------------


Case = tuple[list[torch.Tensor], list[float], dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two weights, maybe a base, of any shape, dtype and layout."""
    shape = draw(st.lists(st.integers(1, 9), max_size=4).map(tuple))
    granularity = draw(st.sampled_from(granularities(shape)))
    dtype = draw(st.sampled_from(DTYPES))
    with_base = draw(st.booleans())
    seed = draw(st.integers(0, 10**6))
    tensors, base = models(*shape, with_base=with_base, dtype=dtype, seed=seed)
    origin = torch.zeros_like(tensors[0]) if base is None else base
    kinds = st.sampled_from(["ordinary", "parallel", "antipodal", "zero-0", "zero-1"])
    pattern = draw(st.lists(kinds, min_size=1, max_size=5))
    for index, kind in zip(vectors(shape, granularity), cycle(pattern)):
        if kind == "parallel":
            tensors[1][index] = origin[index] + 2 * (tensors[0] - origin)[index]
        elif kind == "antipodal":
            tensors[1][index] = origin[index] - (tensors[0] - origin)[index] / 2
        elif kind.startswith("zero"):
            tensors[int(kind[-1])][index] = origin[index]
    if shape:
        tensors[0] = draw(st.sampled_from([torch.clone, transposed, sliced]))(
            tensors[0]
        )
    t = draw(st.floats(-1, 2).filter(lambda t: t == 0 or abs(t) > 1e-9))
    total = draw(st.sampled_from([1.0, 0.01, 30.0, -2.0]))
    options = {
        "base": base,
        "granularity": granularity,
        "magnitude": draw(st.sampled_from(MAGNITUDES)),
        "lambda_": draw(st.floats(0, 2)) if with_base else 1.0,
    }
    return tensors, [(1 - t) * total, t * total], options


@settings(deadline=None, max_examples=150)
@given(case=cases(), room=st.sampled_from([12 * 1024 * 1024, 4096, 997]))
def test_the_merge_is_the_oracle_rounded_once(case, room):
    tensors, weights, options = case
    with mock.patch.object(streaming, "_SCRATCH_BYTES_CPU", room):
        result = nuslerp(tensors, weights, **options)
    assert_rounded_once(result, tensors, weights, **options)


@cache
def weight_like(
    dtype: torch.dtype, *, raw: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Weights of a model's usual size; task vectors of two percent of them."""
    shape = (400, 500)
    base = (0.02 * normal(*shape)).to(dtype)
    share = 1.0 if raw else 0.02
    tensors = [
        (base.double() + share * 0.02 * normal(*shape, seed=seed)).to(dtype)
        for seed in (1, 2)
    ]
    return tensors, None if raw else base


@pytest.mark.parametrize("raw", [False, True], ids=["task-vectors", "raw"])
@all_granularities
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_narrow_weights_are_rounded_correctly(dtype, granularity, raw):
    tensors, base = weight_like(dtype, raw=raw)
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    exact = oracle(tensors, [0.3, 0.7], base, granularity)
    equal = (result == exact.to(dtype)).double().mean().item()
    assert equal >= 0.999


@pytest.mark.parametrize("raw", [False, True], ids=["task-vectors", "raw"])
@all_granularities
def test_float32_is_about_as_good_as_rounding_once(granularity, raw):
    tensors, base = weight_like(torch.float32, raw=raw)
    result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
    exact = oracle(tensors, [0.3, 0.7], base, granularity)
    rounding = (exact.float().double() - exact).norm()
    assert (result.double() - exact).norm() <= 2.5 * rounding


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 3.14159])
@pytest.mark.parametrize("length", [4096, 2**18])
def test_opposite_float64_vectors_of_one_value_are_linear(value, length, granularity):
    """Their sums round in one direction, as those of random numbers do not."""
    vector = torch.full((1, length), value, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="no unique"):
        merged = nuslerp([vector, -3 * vector], [0.4, 0.6], granularity=granularity)
    torch.testing.assert_close(merged, -1.4 * vector)
