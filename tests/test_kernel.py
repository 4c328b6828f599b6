# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Merges by either pass: every property and every edge case of them."""

from __future__ import annotations

import math
import pickle
import warnings
from itertools import cycle, permutations
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    MAGNITUDES,
    WEIGHTS,
    Subclass,
    all_dtypes,
    all_granularities,
    all_magnitudes,
    at_angles,
    expanded,
    fit,
    models,
    negated,
    normal,
    reordered,
    rows_or_columns,
    rows_with_faults,
    sliced,
    transposed,
    two_or_three,
    unaligned,
    whole_numbers,
    with_and_without_base,
)
from cases import each_pass as each_pass
from cases import one_thread as one_thread
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import assert_rounded_once, granularities, oracle, reference, vectors

from mergekit_nuslerp import NonFiniteError, nuslerp
from mergekit_nuslerp.kernel import RangeError, gram_matrices, merge_batch

# Where vectors happen to have no unique mean, that is looked at as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

SHAPES = [(), (1,), (17,), (6, 8), (1, 8), (8, 1), (3, 4, 6), (2, 3, 4, 6)]
EMPTY = [(0,), (0, 4), (4, 0), (2, 0, 3)]

models_and_weights = pytest.mark.parametrize(
    ("count", "weights"), [(2, (0.3, 0.7)), (2, (2, -1)), (3, (0.5, 0.2, 0.3))], ids=str
)
each_input = pytest.mark.parametrize("model", [0, 1, None])


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=2e-13, atol=2e-13)


def unit_vectors(*shape: int, granularity: str, seed: int) -> torch.Tensor:
    """A weight whose vectors have length one."""
    weight = normal(*shape, seed=seed)
    for index in vectors(shape, granularity):
        weight[index] /= weight[index].norm()
    return weight


# --- the mean --------------------------------------------------------------------


@all_granularities
@all_magnitudes
@with_and_without_base
@pytest.mark.parametrize("count", WEIGHTS)
def test_the_merge_is_the_textbook_mean(granularity, magnitude, with_base, count):
    tensors, base = models(6, 8, count=count, with_base=with_base)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS[count], **options)
    assert_close(result, oracle(tensors, WEIGHTS[count], **options))


@all_granularities
@all_magnitudes
@with_and_without_base
@two_or_three
def test_a_model_of_all_the_weight_is_the_result(
    granularity, magnitude, with_base, count
):
    tensors, base = models(6, 8, count=count, with_base=with_base)
    for position in range(count):
        weights = [0.0] * count
        weights[position] = 0.4
        options = {"base": base, "granularity": granularity, "magnitude": magnitude}
        assert_close(nuslerp(tensors, weights, **options), tensors[position])


@all_granularities
@two_or_three
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_it_is_the_same_to_the_bit_in_narrow_dtypes(granularity, count, dtype):
    tensors, _ = models(64, 68, count=count, with_base=False, dtype=dtype)
    for position in range(count):
        weights = [float(n == position) for n in range(count)]
        result = nuslerp(tensors, weights, granularity=granularity)
        assert torch.equal(result, tensors[position])


@all_granularities
@all_magnitudes
@with_and_without_base
@models_and_weights
def test_the_order_of_the_models_does_not_matter(
    granularity, magnitude, with_base, count, weights
):
    weights = fit(weights, granularity)
    tensors, base = models(6, 8, count=count, with_base=with_base)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, weights, **options)
    for order in permutations(range(count)):
        permuted = [tensors[n] for n in order], [weights[n] for n in order]
        assert_close(nuslerp(*permuted, **options), result)


@all_granularities
@all_magnitudes
@two_or_three
def test_only_the_proportion_of_the_weights_matters(granularity, magnitude, count):
    tensors, base = models(6, 8, count=count)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS[count], **options)
    for factor in (1e-3, 7, 1e6, -2):
        scaled = [factor * weight for weight in WEIGHTS[count]]
        assert_close(nuslerp(tensors, scaled, **options), result)


@pytest.mark.parametrize("granularity", ["tensor", "row", "row:2"])
@all_magnitudes
@with_and_without_base
@two_or_three
def test_a_rotation_of_the_models_rotates_the_merge(
    granularity, magnitude, with_base, count
):
    rotation, _ = torch.linalg.qr(normal(8, 8, seed=5))
    tensors, base = models(6, 8, count=count, with_base=with_base)
    options = {"granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS[count], base=base, **options)
    origin = None if base is None else base @ rotation
    tensors = [tensor @ rotation for tensor in tensors]
    rotated = nuslerp(tensors, WEIGHTS[count], base=origin, **options)
    assert_close(rotated, result @ rotation)


@all_granularities
@all_magnitudes
def test_a_model_given_twice_counts_twice(granularity, magnitude):
    (a, b), base = models(6, 8)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp([a, b, a.clone()], [0.2, 0.5, 0.3], **options)
    assert_close(result, nuslerp([a, b], [0.5, 0.5], **options))
    same = nuslerp([a, a.clone(), a], WEIGHTS[3], **options)
    assert_close(same, a)


@all_granularities
@all_magnitudes
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_model_of_weight_zero_leaves_slerp_of_the_others(granularity, magnitude, t):
    pair, base = models(6, 8)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    expected = nuslerp(pair, [1 - t, t], **options)
    for spare in (normal(6, 8, seed=9), 2 * base - pair[0], base, 1e30 * base):
        for position in range(3):
            inputs, weights = list(pair), [1 - t, t]
            inputs.insert(position, spare)
            weights.insert(position, 0)
            assert_close(nuslerp(inputs, weights, **options), expected)


@two_or_three
@pytest.mark.parametrize("weights", [(1, -1, 0), (0, 0, 0), (3e-7, 2e-7, 1e-7)])
def test_weights_that_sum_to_zero_count_as_equal_with_a_warning(count, weights):
    tensors, base = models(6, 8, count=count)
    with pytest.warns(RuntimeWarning, match="sum to zero"):
        result = nuslerp(tensors, weights[:count], base=base)
    assert torch.equal(result, nuslerp(tensors, [1] * count, base=base))


def test_one_output_with_weights_that_sum_to_zero_leaves_the_others_alone():
    tensors = [normal(3, 5, 7, seed=seed) for seed in range(2)]
    weights = torch.tensor([[0.3, 0.7], [1, -1], [2, -1]])
    result = merge_batch(tensors, weights).result
    weights[1] = 1
    assert torch.equal(result, merge_batch(tensors, weights).result)


# --- the length of the result, and lambda ----------------------------------------


@all_granularities
@all_magnitudes
@two_or_three
def test_lambda_is_how_far_to_go_from_the_base(granularity, magnitude, count):
    tensors, base = models(6, 8, count=count)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    whole = nuslerp(tensors, WEIGHTS[count], **options)
    for lambda_ in (1.0, 0.3, 1.7, -0.5):
        result = nuslerp(tensors, WEIGHTS[count], lambda_=lambda_, **options)
        assert_close(result, base + lambda_ * (whole - base))
    assert torch.equal(nuslerp(tensors, WEIGHTS[count], lambda_=0, **options), base)


# --- angles ----------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.2, 1, 30, 90, 170, 179, 179.8])
@two_or_three
def test_any_angle_in_bfloat16_agrees_with_the_formula(degrees, count):
    """With a third model on the arc between the two."""
    ends = at_angles(0, degrees, degrees / 3, length=2**12, lengths=20)
    tensors = [x.bfloat16() for x in ends[:count]]
    result = nuslerp(tensors, WEIGHTS[count])
    assert_rounded_once(result, tensors, WEIGHTS[count])
    exact = oracle(tensors, WEIGHTS[count])
    assert result.double().norm().item() == pytest.approx(20, rel=1e-2)
    assert (result.double() - exact).norm() <= 2**-8 * exact.norm()


@two_or_three
@pytest.mark.parametrize("weights", [(1, 1, 0.1), (3, 7, 1)])
def test_the_length_has_no_jump_between_172_and_173_degrees(count, weights):
    lengths = []
    for step in range(21):
        ends = at_angles(0, 172 + step / 20, 100, length=2**12)
        tensors = [x.bfloat16() for x in ends[:count]]
        lengths.append(nuslerp(tensors, weights[:count]).double().norm().item())
    assert lengths == pytest.approx([1] * 21, rel=2e-2)


@all_dtypes
@pytest.mark.parametrize(
    ("rise", "linear"),
    [
        (0.0, {2: 1, 3: 1}),
        (1.0e-7, {2: 1, 3: 1}),  # 1 + cos(theta) = rise^2 / 2; the bound is 7.1e-15
        (1.4e-7, {2: 0, 3: 1}),
        (2.0**-12, {2: 0, 3: 1}),  # three take coefficients of up to 400
        (2.0**-8, {2: 0, 3: 0}),
    ],
)
def test_where_vectors_are_opposite_does_not_depend_on_the_dtype(dtype, rise, linear):
    """Of three, the third weighs nothing."""
    if dtype == torch.float16 and 0 < rise < 1e-4:
        return  # it has no such number
    ends = torch.tensor([[1.0, 0], [-1.0, rise], [0, 1.0]], dtype=torch.float64)
    for count, expected in linear.items():
        tensors = list(ends[:count].to(dtype).split(1))
        weights = [0.3, 0.7, 0.0][:count]
        merged = merge_batch(tensors, torch.tensor([weights], dtype=torch.float64))
        assert merged.linear.tolist() == [expected]
        assert_rounded_once(merged.result[0], [x[0] for x in tensors], weights)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 3.14159])
@pytest.mark.parametrize("length", [4096, 2**18])
def test_opposite_float64_vectors_of_one_value_are_linear(value, length):
    """Their sums round in one direction, as those of random numbers do not."""
    vector = torch.full((1, length), value, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="no unique"):
        merged = nuslerp([vector, -3 * vector], [0.4, 0.6])
    torch.testing.assert_close(merged, -1.4 * vector)


# --- vectors that are zero, parallel, or without a unique mean -------------------


@all_granularities
@all_magnitudes
@with_and_without_base
@pytest.mark.parametrize(
    ("count", "zeros"), [(2, {0}), (2, {1}), (4, {0}), (4, {1, 3})]
)
def test_zero_vectors_count_as_orthogonal(
    granularity, magnitude, with_base, count, zeros
):
    """As if a model had moved in a direction where no other has moved."""
    if granularity == "row*column":
        return  # whose elements have three vectors each
    tensors, base = models(6, 8, count=count, with_base=with_base)
    origin = torch.zeros_like(tensors[0]) if base is None else base
    inputs = [origin if n in zeros else x for n, x in enumerate(tensors)]
    weights = WEIGHTS[count]
    options = {"granularity": granularity, "magnitude": magnitude}
    result = nuslerp(inputs, weights, base=base, **options)
    for index in vectors((6, 8), granularity):
        moved = [(tensor - origin)[index] for tensor in inputs]
        lengths = [vector.norm().item() for vector in moved]
        wider = []
        for n, vector in enumerate(moved):
            aside = torch.zeros(*vector.shape, 4, dtype=torch.float64)
            aside.view(-1)[n] = n in zeros
            scale = 1.0 if magnitude == "slerp" else lengths[n] or 1.0
            wider.append(torch.cat([vector.unsqueeze(-1) / scale, aside], -1))
        expected = nuslerp(wider, weights)[..., 0]
        if magnitude == "linear":
            length = sum(w * size for w, size in zip(weights, lengths))
            expected = expected / expected.norm() * length
        if magnitude == "geometric":
            expected = torch.zeros_like(expected)
        assert_close((result - origin)[index], expected)


@all_dtypes
@all_magnitudes
@two_or_three
def test_a_weight_that_no_model_changed_is_the_base(dtype, magnitude, count):
    base = normal(6, 8, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for origin in (base, torch.zeros_like(base)):
            for granularity in granularities(base.shape):
                options = {"granularity": granularity, "magnitude": magnitude}
                same = [origin.clone() for _ in range(count)]
                result = nuslerp(same, WEIGHTS[count], base=origin, **options)
                assert torch.equal(result, origin)


@all_granularities
@models_and_weights
def test_parallel_vectors_are_averaged_linearly(granularity, count, weights):
    weights = fit(weights, granularity)
    base, move = whole_numbers(6, 8).double(), normal(6, 8, seed=1)
    factors = (1, 2, 0.5)[:count]
    tensors = [base + factor * move for factor in factors]
    total = sum(w * f for w, f in zip(weights, factors))
    product = math.prod(f**w for w, f in zip(weights, factors))
    for magnitude, along in zip(MAGNITUDES, (total, max(0, total), product)):
        options = {"granularity": granularity, "magnitude": magnitude}
        result = nuslerp(tensors, weights, base=base, **options)
        torch.testing.assert_close(result, base + along * move, rtol=0, atol=1e-12)


@all_dtypes
@all_magnitudes
@rows_or_columns
@with_and_without_base
@models_and_weights
def test_vectors_with_faults_beside_ordinary_ones(
    dtype, magnitude, granularity, with_base, count, weights
):
    tensors = [tensor.to(dtype) for tensor in rows_with_faults(count)]
    base = whole_numbers(7, 12, seed=9, dtype=dtype) if with_base else None
    if base is not None:
        tensors = [base + tensor for tensor in tensors]
    if granularity == "column":
        tensors = [tensor.T.contiguous() for tensor in tensors]
        base = None if base is None else base.T.contiguous()
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    with pytest.warns(RuntimeWarning) as caught:
        result = nuslerp(tensors, weights, **options)
    (message,) = (str(warning.message) for warning in caught)
    assert "2 of 7" in message
    assert reference(tensors, weights, **options).linear == 2
    assert_rounded_once(result, tensors, weights, **options)


@two_or_three
def test_nothing_is_warned_of_where_nothing_is_the_matter(count):
    """Zero vectors, parallel ones and those at an end have a unique mean."""
    tensors = rows_with_faults(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [tensor[[0, 1, 3, 4, 5]] for tensor in tensors]
        nuslerp(rows, WEIGHTS[count], granularity="row")
        nuslerp(tensors, [1, *[0] * (count - 1)], granularity="row")


@two_or_three
def test_a_batch_counts_for_each_weight(count):
    tensors = [torch.stack([x, x.abs() + 1, 3 * x]) for x in rows_with_faults(count)]
    weights = torch.full((3, count), 1 / count, dtype=torch.float64)
    merged = merge_batch(tensors, weights, granularity="row")
    assert (merged.vectors, merged.linear.tolist()) == (7, [2, 0, 2])
    experts = [tensor[None, [0, 2]] for tensor in tensors]
    merged = merge_batch(experts, weights[:1], granularity="row")
    assert (merged.vectors, merged.linear.tolist()) == (14, [4])


# --- very large and very small values --------------------------------------------


@all_magnitudes
@with_and_without_base
@two_or_three
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        (torch.bfloat16, -100),
        (torch.bfloat16, -20),
        (torch.bfloat16, 20),
        (torch.bfloat16, 100),
        (torch.float32, -100),
        (torch.float32, 100),
        (torch.float64, -400),
        (torch.float64, 400),
    ],
    ids=str,
)
def test_a_power_of_two_scales_the_merge_and_nothing_else(
    magnitude, with_base, count, dtype, exponent
):
    """Also where squares leave the range of the dtype."""
    tensors, base = models(12, 16, count=count, with_base=with_base, dtype=dtype)
    far = [2.0**exponent * tensor for tensor in tensors]
    far_base = None if base is None else 2.0**exponent * base
    close = max(torch.finfo(dtype).eps, 1e-13)
    for granularity in ("tensor", "row", "column:4"):
        options = {"granularity": granularity, "magnitude": magnitude}
        result = nuslerp(far, WEIGHTS[count], base=far_base, **options)
        plain = nuslerp(tensors, WEIGHTS[count], base=base, **options)
        torch.testing.assert_close(
            result / 2.0**exponent, plain, rtol=close, atol=close
        )
        assert_rounded_once(result, far, WEIGHTS[count], far_base, **options)


@all_magnitudes
@two_or_three
@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [
        (torch.bfloat16, 2.0**-100, 2.0**100),
        (torch.float16, 2.0**-18, 2.0**10),
        (torch.float32, 1e-36, 1e36),
        (torch.float64, 1e-135, 1e135),
    ],
    ids=str,
)
def test_vectors_of_very_different_lengths(magnitude, count, dtype, small, large):
    tensors, _ = models(6, 16, count=count, with_base=False)
    scales = (
        [small, 1.0, large, 0.0, small, large],
        [large, large, small, 1.0, small, large],
        [1.0, small, small, small, small, large],
    )
    for tensor, scale in zip(tensors, scales):
        tensor *= torch.tensor(scale, dtype=torch.float64)[:, None]
    tensors = [tensor.to(dtype) for tensor in tensors]
    for granularity in ("tensor", "row", "column", "row:2"):
        options = {"granularity": granularity, "magnitude": magnitude}
        result = nuslerp(tensors, WEIGHTS[count], **options)
        assert_rounded_once(result, tensors, WEIGHTS[count], **options)


@all_granularities
@models_and_weights
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_the_smallest_values_there_are(granularity, count, weights, dtype):
    weights = fit(weights, granularity)
    number = torch.finfo(dtype)
    smallest = number.smallest_normal * number.eps
    tensors = [
        (whole_numbers(6, 16, seed=seed).double() * smallest).to(dtype)
        for seed in range(count)
    ]
    result = nuslerp(tensors, weights, granularity=granularity)
    assert_rounded_once(result, tensors, weights, None, granularity)


def test_an_unchanged_output_beside_one_of_very_small_values():
    """A zero vector looks like one that is too short to be squared, and is not."""
    tensors = [normal(2, 6, 8, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    tensors[0][0] = 0
    for tensor in tensors:
        tensor[1] *= 2.0**-100
    result = merge_batch(tensors, torch.tensor([[0.3, 0.7]] * 2)).result
    for n in range(2):
        assert_rounded_once(result[n], [tensor[n] for tensor in tensors], [0.3, 0.7])


@all_granularities
@with_and_without_base
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("factor", [1e-160, 1e250])
def test_float64_squares_out_of_range_are_refused(
    granularity, with_base, requires_grad, factor
):
    """The inputs are finite, so no model is to blame; but there is no result either."""
    tensors = [torch.ones(2, 6, 8).double(), normal(2, 6, 8)]
    tensors[1][1] *= factor
    base = torch.zeros(2, 6, 8).double() if with_base else None
    tensors[0].requires_grad_(requires_grad)
    with pytest.raises(RangeError, match="float64") as caught:
        weights = torch.tensor([[1, 1]] * 2)
        merge_batch(tensors, weights, base=base, granularity=granularity)
    assert isinstance(caught.value, OverflowError)
    assert caught.value.args[0] == 1
    assert "squared length" in str(caught.value)


def test_a_float64_task_vector_of_zero_beside_values_too_small_to_be_squared():
    base = torch.full((6, 8), 1e-250, dtype=torch.float64)
    result = nuslerp([base.clone(), base.clone()], [1, 1], base=base)
    assert torch.equal(result, base)


@two_or_three
@all_granularities
@pytest.mark.parametrize(
    "lambda_, size",
    [(1e-43, 1e30), (1e-25, 1e-5), (1e20, 1e-25), (1e25, 1e-30), (1e39, 1e-44)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_coefficients_out_of_range_are_worked_out_in_float64(
    count, granularity, lambda_, size, dtype
):
    tensors, _ = models(6, 8, count=count, with_base=False)
    tensors = [(size * x).to(dtype) for x in tensors]
    base = torch.zeros_like(tensors[0])
    options = {"base": base, "granularity": granularity, "lambda_": lambda_}
    result = nuslerp(tensors, WEIGHTS[count], **options)
    assert_rounded_once(result, tensors, WEIGHTS[count], **options)


@pytest.mark.parametrize("granularity", ["tensor", "row", "column", "row:2"])
@pytest.mark.parametrize("t", [-1000, 10, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_far_beyond_the_models_no_digit_is_lost(granularity, t, dtype):
    first = normal(60, 50, seed=1)
    second = (first + 0.01 * normal(60, 50, seed=2)).to(dtype)
    tensors, weights = [first.to(dtype), second], [1 - t, t]
    result = nuslerp(tensors, weights, granularity=granularity)
    exact = oracle(tensors, weights, granularity=granularity)
    assert (result == exact.to(dtype)).double().mean() >= 0.999


@two_or_three
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("lambda_", [1e39, 1e307, -1e39])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_result_beyond_the_range_of_its_dtype_is_refused(
    count, requires_grad, lambda_, dtype
):
    tensors, base = models(3, 6, 8, count=count, dtype=dtype)
    for tensor in (*tensors, base):
        tensor[0] = 0
    tensors[0].requires_grad_(requires_grad)
    weights = torch.tensor([WEIGHTS[count]] * 3)
    for granularity in granularities((6, 8)):
        with pytest.raises(RangeError, match=str(dtype)) as caught:
            merge_batch(
                tensors, weights, base=base, granularity=granularity, lambda_=lambda_
            )
        assert caught.value.args[0] == 1


def test_half_precision_reaches_its_largest_number_and_no_further():
    a, b = torch.full((2, 40), 49984, dtype=torch.float16)
    base = torch.zeros_like(a)
    largest = nuslerp([a, b], [1, 1], base=base, lambda_=1.3108)
    assert (largest == 65504).all()
    with pytest.raises(RangeError, match="float16"):
        nuslerp([a, b], [1, 1], base=base, lambda_=1.3109)
    a[-1] = -49984
    with pytest.raises(RangeError, match="float16"):
        nuslerp([a, b], [-3, 4])


# --- inputs that are refused -----------------------------------------------------


@all_dtypes
@all_granularities
@two_or_three
def test_nan_or_infinity_names_the_model(dtype, granularity, count):
    """Also where the model weighs nothing, and beside zero vectors."""
    for model in (0, 1, None):
        for n, value in enumerate((math.nan, math.inf, -math.inf)):
            tensors, base = models(6, 8, count=count, dtype=dtype)
            (base if model is None else tensors[model])[5, 7] = value
            weights = [0, 1, 0][:count] if n == model else WEIGHTS[count]
            if value < 0 and model is not None:
                tensors[1 - model].zero_()
            with pytest.raises(NonFiniteError) as caught:
                nuslerp(tensors, weights, base=base, granularity=granularity)
            assert caught.value.args == (0, model)
            name = "the base" if model is None else f"model {model}"
            assert name in str(caught.value)


@all_granularities
@pytest.mark.parametrize("requires_grad", [False, True])
@each_input
def test_nan_in_a_batch_names_the_output(granularity, requires_grad, model):
    tensors, base = models(4, 6, 8)
    (base if model is None else tensors[model])[2, 4, 6] = math.nan
    tensors[0].requires_grad_(requires_grad)
    with pytest.raises(NonFiniteError) as caught:
        weights = torch.tensor([[0.3, 0.7]]).expand(4, 2)
        merge_batch(tensors, weights, base=base, granularity=granularity)
    assert caught.value.args == (2, model)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str
)
@each_input
def test_only_floating_point_weights_are_merged(dtype, model):
    *tensors, base = models(5, 7, count=2)[0] + [normal(5, 7)]
    inputs = [*tensors, base]
    inputs[-1 if model is None else model] = torch.ones(5, 7).to(dtype)
    *tensors, base = inputs
    with pytest.raises(TypeError, match=str(dtype)):
        nuslerp(tensors, [0.3, 0.7], base=base)
    with pytest.raises(TypeError, match=str(dtype)):
        merge_batch(tensors, torch.tensor([[0.3, 0.7]]).expand(5, 2), base=base)


ONE = torch.ones(5, 7)
REFUSED: list[tuple[str, int, list[float], dict[str, Any]]] = [
    ("two models or more", 0, [], {}),
    ("two models or more", 1, [1], {}),
    ("weights", 2, [], {}),
    ("weights", 2, [1], {}),
    ("weights", 2, [1, 1, 1], {}),
    *(("finite", 2, [1, x], {}) for x in (math.nan, math.inf, -math.inf)),
    ("finite", 3, [math.nan, 1, 1], {}),
    *(("negative", 3, w, {}) for w in ([1, 1, -1], [3, -1, -1], [0.5, 0.6, -0.1])),
    ("granularity", 2, [1, 1], {"granularity": "rows"}),
    ("magnitude", 2, [1, 1], {"magnitude": "l2"}),
    *(("lambda.*base", 2, [1, 1], {"lambda_": x}) for x in (0.0, 0.5, 2.0)),
    *(("lambda", 2, [1, 1], {"lambda_": x, "base": ONE}) for x in (math.nan, math.inf)),
    *(
        ("shape", 2, [1, 1], {"base": torch.ones(s)})
        for s in [(7, 5), (5, 1), (35,), ()]
    ),
    ("device", 2, [1, 1], {"base": ONE.to("meta")}),
]


@pytest.mark.parametrize(("words", "count", "weights", "options"), REFUSED)
def test_what_has_no_meaning_is_refused(words, count, weights, options):
    with pytest.raises(ValueError, match=words):
        nuslerp([ONE] * count, weights, **options)
    if words in ("finite", "negative", "magnitude", "granularity"):
        batch = torch.tensor([[1.0] * count, weights], dtype=torch.float64)
        with pytest.raises(ValueError, match=words):
            merge_batch([torch.empty(2, 0)] * count, batch, **options)


def test_shapes_of_models_that_differ_are_refused_even_where_they_broadcast():
    for other in (torch.ones(5, 1), torch.ones(1, 5, 7)):
        for tensors in ([ONE, other, ONE], [ONE, ONE, other], [other, ONE, ONE]):
            with pytest.raises(ValueError, match="shape"):
                nuslerp(tensors, [1, 1, 1])
            with pytest.raises(ValueError, match="shape"):
                gram_matrices(tensors)
    with pytest.raises(ValueError, match="shape"):  # of as many elements
        gram_matrices([torch.ones(2, 8)], base=torch.ones(4, 4))


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError(2, 1),
        NonFiniteError(2, None),
        RangeError(3, "the result is too large for torch.float16"),
    ],
    ids=str,
)
def test_errors_survive_the_way_out_of_another_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))


# --- shapes, strides, dtypes -----------------------------------------------------


@all_dtypes
@with_and_without_base
@two_or_three
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_dimensions(dtype, with_base, count, shape):
    tensors, base = models(*shape, count=count, with_base=with_base, dtype=dtype)
    for granularity in granularities(shape):
        result = nuslerp(tensors, WEIGHTS[count], base=base, granularity=granularity)
        assert (result.shape, result.dtype) == (torch.Size(shape), dtype)
        assert_rounded_once(result, tensors, WEIGHTS[count], base, granularity)


@with_and_without_base
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_weights_stay_empty(with_base, shape):
    tensors, base = models(*shape, with_base=with_base, dtype=torch.bfloat16)
    for granularity in ("tensor", "matrix", "row", "column", "row:1", "column:1"):
        result = nuslerp(tensors, [0.3, 0.7], base=base, granularity=granularity)
        assert (result.shape, result.dtype) == (torch.Size(shape), torch.bfloat16)
        assert all(result is not tensor for tensor in tensors)
        batch = [tensor.expand(3, *shape) for tensor in tensors]
        weights = torch.tensor([[0.3, 0.7]]).expand(3, 2)
        merged = merge_batch(batch, weights, granularity=granularity)
        assert merged.result.shape == (3, *shape)
        assert gram_matrices(tensors, granularity=granularity).shape[1:] == (2, 2)
    assert merge_batch([torch.empty(0, 3)] * 2, torch.empty(0, 2)).result.numel() == 0


@all_granularities
@two_or_three
@pytest.mark.parametrize(
    "layout", [transposed, sliced, expanded, reordered, unaligned, negated]
)
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 4, 8)], ids=str)
def test_strides_do_not_matter(granularity, count, layout, shape):
    tensors, base = models(*shape, count=count, make=whole_numbers, dtype=torch.float32)
    inputs = [*tensors, base]
    for places in ({0}, {1, count}, set(range(count + 1))):
        strided = [layout(x) if n in places else x for n, x in enumerate(inputs)]
        plain = [x.clone(memory_format=torch.contiguous_format) for x in strided]
        options = {"granularity": granularity}
        results = [
            nuslerp(x[:count], WEIGHTS[count], base=x[count], **options)
            for x in (strided, plain)
        ]
        assert torch.equal(*results)
        assert_rounded_once(
            results[0], plain[:count], WEIGHTS[count], plain[count], **options
        )


@all_granularities
@pytest.mark.parametrize("layout", [transposed, reordered])
def test_a_batch_in_any_memory_order(granularity, layout):
    tensors, base = models(3, 4, 8, make=whole_numbers, dtype=torch.float32)
    weights = torch.tensor([[0.3, 0.7], [1, 1], fit([2, -1], granularity)])
    options = {"granularity": granularity}
    expected = merge_batch(tensors, weights, base=base, **options)
    strided = [layout(tensor) for tensor in tensors]
    merged = merge_batch(strided, weights, base=layout(base), **options)
    assert torch.equal(merged.result, expected.result)


def test_subclasses_and_parameters_are_taken():
    a, b = normal(2, 6, 8, dtype=torch.float32)
    expected = nuslerp([a, b], [0.3, 0.7])
    with torch.no_grad():
        result = nuslerp([torch.nn.Parameter(a), b], [0.3, 0.7])
    assert torch.equal(result, expected)
    result = nuslerp([a.as_subclass(Subclass), b], [0.3, 0.7])
    torch.testing.assert_close(result.as_subclass(torch.Tensor), expected)


@all_dtypes
@all_granularities
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_are_never_modified_nor_returned(dtype, granularity, requires_grad):
    tensors, base = models(6, 8, dtype=dtype)
    inputs = [*tensors, base]
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


@all_granularities
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float64, torch.float32, torch.bfloat16), torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted(granularity, dtypes, expected):
    count = len(dtypes) - 1
    tensors, base = models(6, 8, count=count)
    *tensors, base = (x.to(dtype) for x, dtype in zip([*tensors, base], dtypes))
    result = nuslerp(tensors, WEIGHTS[count], base=base, granularity=granularity)
    assert result.dtype == expected
    assert_rounded_once(result, tensors, WEIGHTS[count], base, granularity)
    empty = [tensor[:0] for tensor in tensors]
    assert nuslerp(empty, WEIGHTS[count], base=base[:0]).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_weights_of_a_batch_in_any_dtype(dtype):
    tensors = [normal(1, 5, 7, seed=seed) for seed in range(2)]
    result = merge_batch(tensors, torch.tensor([[1, 3]], dtype=dtype)).result
    assert_close(result[0], nuslerp([tensor[0] for tensor in tensors], [1, 3]))


# --- batches, and groups of vectors ----------------------------------------------


@all_granularities
@with_and_without_base
@two_or_three
@pytest.mark.parametrize("shape", [(), (9,), (6, 8), (3, 4, 8)], ids=str)
def test_a_batch_equals_its_outputs_one_by_one(granularity, with_base, count, shape):
    tensors, base = models(4, *shape, count=count, with_base=with_base)
    weights = torch.tensor([[0.3, 0.7, 1], [1, 1, 1], [2, 1, 0], [0, 5, 1]]).double()
    weights = weights[:, :count]
    together = merge_batch(tensors, weights, base=base, granularity=granularity)
    for n, alone in enumerate(weights.tolist()):
        result = nuslerp(
            [tensor[n] for tensor in tensors],
            alone,
            base=None if base is None else base[n],
            granularity=granularity,
        )
        assert_close(together.result[n], result)


# More vectors than are merged at once of three models, along and across memory.
MANY = [
    ("row", (20000, 3)),
    ("column", (3, 20000)),
    ("column", (2, 3, 9000)),
    ("column:2", (3, 18000)),
    ("row:2", (2, 9000, 2)),
    ("dim0", (3, 90, 101)),
    ("matrix", (9000, 2, 2)),
]


@with_and_without_base
@pytest.mark.parametrize(("granularity", "shape"), MANY, ids=str)
def test_more_vectors_than_are_merged_at_once(granularity, shape, with_base):
    """Of several outputs; vectors of one repeat, so that each has a known result."""
    count = 3
    tensors, base = models(
        2, *shape, count=count, with_base=with_base, make=whole_numbers
    )
    inputs = tensors if base is None else [*tensors, base]
    inputs = [tensor.bfloat16() for tensor in inputs]
    weights = torch.tensor([[3.0, 7, 2], [1, 1, 1]])
    origin = inputs[-1] if with_base else None
    options = {"granularity": granularity}
    merged = merge_batch(inputs[:count], weights, base=origin, **options)
    places = list(vectors(shape, granularity))
    assert merged.vectors == len(places)
    step = max(1, len(places) // 50)
    for index in [*places[::step], places[-1]]:
        for output in range(2):
            parts = [tensor[output][index].flatten() for tensor in inputs]
            assert_rounded_once(
                merged.result[output][index].flatten(),
                parts[:count],
                weights[output].tolist(),
                parts[-1] if with_base else None,
            )


@pytest.mark.parametrize(("granularity", "shape"), MANY[:5], ids=str)
def test_counts_and_refusals_of_more_vectors_than_are_merged_at_once(
    granularity, shape
):
    a = whole_numbers(2, *shape).abs() + 1
    b = a.clone()
    places = list(vectors(shape, granularity))
    for index in (places[0], places[len(places) // 2], places[-1]):
        b[1][index] *= -1
    weights = torch.tensor([[1, 1], [1, 1]])
    merged = merge_batch([a, b], weights, granularity=granularity)
    assert merged.linear.tolist() == [0, 3]
    b[1][places[-1]] = math.inf
    with pytest.raises(NonFiniteError) as caught:
        merge_batch([a, b], weights, granularity=granularity)
    assert caught.value.args == (1, 1)
    b[1] = a[1] = 1
    base = torch.zeros_like(a)
    a[1][places[-1]] = b[1][places[-1]] = 1e38
    with pytest.raises(RangeError) as ranged:
        merge_batch([a, b], weights, base=base, granularity=granularity, lambda_=10)
    assert ranged.value.args[0] == 1


# --- inner products --------------------------------------------------------------


@all_dtypes
@with_and_without_base
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (7,), (6, 8), (2, 4, 6)], ids=str)
def test_gram_matrices_are_inner_products(dtype, with_base, count, shape):
    tensors, base = models(*shape, count=count, with_base=with_base, dtype=dtype)
    origin = 0 if base is None else base.double()
    moved = [tensor.double() - origin for tensor in tensors]
    for granularity in granularities(shape):
        grams = gram_matrices(tensors, base=base, granularity=granularity)
        assert grams.dtype == torch.float64
        places = list(vectors(shape, granularity))
        assert len(grams) == len(places)
        for gram, index in zip(grams, places):
            rows = torch.stack([vector[index].flatten() for vector in moved])
            torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-13, atol=1e-13)


def test_gram_matrices_of_more_vectors_than_are_taken_at_once():
    tensors, base = models(3, 20000, make=whole_numbers, dtype=torch.float32)
    vectors = torch.stack([tensor - base for tensor in tensors]).double()
    grams = gram_matrices(tensors, base=base, granularity="column")
    assert torch.equal(grams, torch.einsum("irc,jrc->cij", vectors, vectors))
    by_rows = [x.T.contiguous() for x in (*tensors, base)]
    rows = gram_matrices(by_rows[:2], base=by_rows[2], granularity="row")
    assert torch.equal(rows, grams)


def test_gram_matrices_refuse_what_a_merge_refuses():
    tensors = [normal(6, 8, seed=seed) for seed in range(2)]
    with pytest.raises(RangeError, match="float64"):
        gram_matrices([1e200 * tensor for tensor in tensors])
    with pytest.raises(RangeError, match="float64"):
        gram_matrices([1e-200 * tensor for tensor in tensors])
    with pytest.raises(NonFiniteError, match="the base"):
        gram_matrices(tensors, base=torch.full((6, 8), math.nan))
    with pytest.raises(TypeError):
        gram_matrices([tensors[0].int()])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@two_or_three
def test_narrow_vectors_that_are_all_but_opposite(dtype, count):
    """Of which sums in float32 could not tell how far from opposite they are."""
    tensors = [normal(4096, seed=seed).to(dtype) for seed in range(count)]
    tensors[1] = (-1.37 * tensors[0].double()).to(dtype)  # but for its rounding
    wide = nuslerp([tensor.double() for tensor in tensors], WEIGHTS[count])
    merged = nuslerp(tensors, WEIGHTS[count])
    assert (merged == wide.to(dtype)).double().mean() > 0.999


# --- settings of PyTorch that must not matter ------------------------------------


def fine_tunes() -> dict[str, Any]:
    base, *moves = (normal(64, 512, seed=seed) for seed in range(4))
    tensors = [(base + m / 50).bfloat16() for m in moves]
    return {"tensors": tensors, "weights": WEIGHTS[3], "base": base.bfloat16()}


@all_granularities
def test_autocast_and_coarse_matrix_products_do_not_reach_inner_products(granularity):
    given, options = fine_tunes(), {"granularity": granularity}
    merged = nuslerp(**given, **options)
    grams = gram_matrices(given["tensors"], base=given["base"], **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert nuslerp(**given, **options).equal(merged)
            again = gram_matrices(given["tensors"], base=given["base"], **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert again.equal(grams)
    given["tensors"][0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_rounded_once(nuslerp(**given, **options), **given, **options)


@all_granularities
@two_or_three
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_could_have_a_gradient(granularity, count, mode):
    tensors, base = models(64, 68, count=count, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (*tensors, base)]
    options = {"base": inputs[-1], "granularity": granularity}
    with mode():
        merged = nuslerp(inputs[:-1], WEIGHTS[count], **options)
        grams = gram_matrices(inputs[:-1], **options)
    assert not merged.requires_grad
    assert not grams.requires_grad
    assert_rounded_once(merged, inputs[:-1], WEIGHTS[count], **options)
    assert not gram_matrices(inputs[:-1], **options).requires_grad


@all_granularities
def test_inputs_made_in_inference_mode(granularity):
    with torch.inference_mode():
        a, b = normal(2, 64, 68).float()
        inside = nuslerp([a, b], [0.3, 0.7], granularity=granularity)
    outside = nuslerp([a, b], [0.3, 0.7], granularity=granularity)
    assert inside.equal(outside)


def test_a_default_device_is_not_where_inputs_are():
    tensors, base = models(64, 65, count=3)
    options = {"base": base, "granularity": "row", "magnitude": "geometric"}
    with torch.device("meta"):
        inside = nuslerp(tensors, WEIGHTS[3], **options)
        grams = gram_matrices(tensors, granularity="row")
    assert inside.equal(nuslerp(tensors, WEIGHTS[3], **options))
    assert grams.device.type == "cpu"


@with_and_without_base
@two_or_three
def test_weights_without_elements_on_the_meta_device(with_base, count):
    tensors, base = models(2, 6, 8, count=count, with_base=with_base)
    inputs = [x.bfloat16().to("meta") for x in (*tensors, *([base] * with_base))]
    base = inputs.pop() if with_base else None
    for granularity in granularities((2, 6, 8)):
        options = {"base": base, "granularity": granularity}
        result = nuslerp(inputs, WEIGHTS[count], **options)
        expected = (torch.device("meta"), torch.bfloat16, (2, 6, 8))
        assert (result.device, result.dtype, result.shape) == expected
        weights = torch.tensor([WEIGHTS[count]] * 2)
        assert merge_batch(inputs, weights, **options).result.shape == (2, 6, 8)


# --- exactness -------------------------------------------------------------------


Case = tuple[list[torch.Tensor], list[float], dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some weights, maybe a base, of any shape, dtype and layout."""
    shape = draw(st.lists(st.integers(1, 8), max_size=4).map(tuple))
    granularity = draw(st.sampled_from(granularities(shape)))
    contrast = draw(st.sampled_from([1.0, 1.0, 0.0, 0.5, 2.0, 3.0]))
    between = granularity == "row*column" or contrast != 1
    with_base = draw(st.booleans())
    count = draw(st.sampled_from([2, 2, 3, 4, 6]))
    tensors, base = models(
        *shape,
        count=count,
        with_base=with_base,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 10**6)),
    )
    origin = torch.zeros_like(tensors[0]) if base is None else base
    kinds = st.sampled_from(["ordinary", "same", "parallel", "antipodal", "zero"])
    pattern = draw(st.lists(kinds, min_size=1, max_size=5))
    places = st.lists(st.integers(0, count - 1), min_size=2, max_size=3, unique=True)
    for index, kind in zip(vectors(shape, granularity), cycle(pattern)):
        first, *others = draw(places)
        moved = (tensors[first] - origin)[index]
        factor = {"same": 1, "parallel": 2, "antipodal": -0.5, "zero": 0}.get(kind)
        for other in others if factor is not None else ():
            tensors[other][index] = origin[index] + factor * moved
    if shape:
        layout = draw(st.sampled_from([torch.clone, transposed, sliced]))
        tensors[0] = layout(tensors[0])
    if count == 2:
        arc = (0, 1) if between else (-1, 2)
        t = draw(st.floats(*arc).filter(lambda t: t == 0 or abs(t) > 1e-9))
        total = draw(st.sampled_from([1.0, 0.01, 30.0, -2.0]))
        weights = [(1 - t) * total, t * total]
    else:
        weight = st.one_of(st.floats(0.01, 10), st.sampled_from([0.0, 1.0, 1e-3]))
        several = st.lists(weight, min_size=count, max_size=count)
        weights = draw(several.filter(lambda w: sum(w) > 0.1))
    options = {
        "base": base,
        "granularity": granularity,
        "magnitude": draw(st.sampled_from(MAGNITUDES)),
        "contrast": contrast,
        "lambda_": draw(st.floats(0, 2)) if with_base else 1.0,
    }
    return tensors, weights, options


@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_the_merge_is_the_oracle_rounded_once(case):
    tensors, weights, options = case
    if len(tensors) > 2:  # nearly opposite vectors may count as without a mean
        sensitivity = reference(tensors, weights, **options).sensitivity
        assume(not sensitivity.numel() or sensitivity.max() < 1e5)
    result = nuslerp(tensors, weights, **options)
    assert_rounded_once(result, tensors, weights, **options)


@all_dtypes
@all_magnitudes
@two_or_three
@with_and_without_base
def test_a_model_s_usual_numbers_are_rounded_once(dtype, magnitude, count, with_base):
    """Raw, or task vectors of two percent of the weights."""
    tensors = [0.02 * normal(60, 50, seed=seed) for seed in range(1, count + 1)]
    options: dict[str, Any] = {"magnitude": magnitude}
    if with_base:
        base = normal(60, 50).to(dtype)
        tensors = [base + tensor for tensor in tensors]
        options |= {"base": base, "lambda_": 1.5}
    tensors = [tensor.to(dtype) for tensor in tensors]
    for granularity in granularities((60, 50)):
        options["granularity"] = granularity
        result = nuslerp(tensors, WEIGHTS[count], **options)
        assert_rounded_once(result, tensors, WEIGHTS[count], **options)
        exact = oracle(tensors, WEIGHTS[count], **options)
        if dtype.itemsize < 4:
            assert (result == exact.to(dtype)).double().mean() >= 0.999
        elif dtype == torch.float32:
            rounding = (exact.float().double() - exact).norm()
            assert (result.double() - exact).norm() <= 1.1 * rounding
