# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Coefficients compared to the matrix's: `row*column`, and contrast."""

from __future__ import annotations

import math
import warnings
from itertools import permutations

import pytest
import torch
from cases import (
    DTYPES,
    WEIGHTS,
    all_magnitudes,
    at_angles,
    models,
    normal,
    rows_with_faults,
    two_or_three,
    uniform,
    whole_numbers,
    with_and_without_base,
)
from cases import each_pass as each_pass
from cases import one_thread as one_thread
from oracle import assert_rounded_once, oracle, reference

from mergekit_nuslerp import NonFiniteError, nuslerp
from mergekit_nuslerp.kernel import RangeError, merge_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

BOTH = "row*column"
each_number = pytest.mark.parametrize("count", [2, 3, 5])
all_contrasts = pytest.mark.parametrize("contrast", [0, 0.5, 2])
some_contrasts = pytest.mark.parametrize("contrast", [1, 2])
granularities = pytest.mark.parametrize(
    "granularity", ["matrix", "row", "column:4", BOTH]
)


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@granularities
@all_magnitudes
@pytest.mark.parametrize("contrast", [0, 0.5, 1, 2, 5])
@each_number
def test_the_merge_is_the_textbook_s(granularity, magnitude, contrast, count):
    for shape, with_base in (((6, 8), True), ((8, 4), False), ((2, 4, 4), True)):
        tensors, base = models(*shape, count=count, with_base=with_base)
        options = {"granularity": granularity, "magnitude": magnitude, "base": base}
        options["contrast"] = contrast
        result = nuslerp(tensors, WEIGHTS[count], **options)
        assert_close(result, oracle(tensors, WEIGHTS[count], **options))


def test_by_rows_and_columns_of_two_by_two():
    """Written out by hand, of models of length one in each row and column."""
    a, b = torch.eye(2).double(), torch.tensor([[0.0, 1], [1, 0]]).double()
    b[0] = a[0]
    # Rows at 0 and 90 degrees; columns at 45 and 90, of lengths 1 and sqrt(2), and 0.
    s = math.sin(math.pi / 6) / math.sin(math.pi / 3)
    assert math.cos(math.pi / 3) == pytest.approx(float((a * b).sum() / 2))
    rows = [0.5, math.sqrt(0.5)]
    first = math.sin(math.pi / 8) / math.sin(math.pi / 4)
    columns = [first, math.sqrt(0.5)]
    c = [[r * k / s for k in columns] for r in rows]
    expected = [[c[0][0] * 2, 0], [c[1][0], c[1][1]]]
    result = nuslerp([a, b], [1, 1], granularity=BOTH)
    assert_close(result, torch.tensor(expected, dtype=torch.float64))


@all_magnitudes
@some_contrasts
@each_number
@pytest.mark.parametrize("shape", [(6, 8), (5, 1)], ids=str)
def test_a_matrix_and_its_transpose_merge_alike(magnitude, contrast, count, shape):
    tensors, base = models(*shape, count=count)
    options = {"magnitude": magnitude, "contrast": contrast}
    turned = [tensor.T.contiguous() for tensor in tensors]
    origin = base.T.contiguous()
    for granularity, other in ((BOTH, BOTH), ("row", "column")):
        result = nuslerp(
            tensors, WEIGHTS[count], base=base, granularity=granularity, **options
        )
        merged = nuslerp(
            turned, WEIGHTS[count], base=origin, granularity=other, **options
        )
        assert_close(result, merged.T)


@granularities
@all_magnitudes
@each_number
def test_at_contrast_0_each_matrix_is_merged_as_a_whole(granularity, magnitude, count):
    tensors, base = models(3, 6, 8, count=count)
    options = {"magnitude": magnitude, "base": base}
    result = nuslerp(
        tensors, WEIGHTS[count], granularity=granularity, contrast=0, **options
    )
    merged = nuslerp(tensors, WEIGHTS[count], granularity="matrix", **options)
    assert_close(result, merged)


@granularities
@all_magnitudes
def test_contrast_goes_through_the_granularity_s_merge(granularity, magnitude):
    """The bound is no step there."""
    tensors, base = models(6, 8, count=3)
    options = {"magnitude": magnitude, "base": base, "granularity": granularity}
    merged = nuslerp(tensors, WEIGHTS[3], contrast=1.0, **options)
    assert merged.equal(nuslerp(tensors, WEIGHTS[3], **options))
    for near in (1 - 1e-9, 1 + 1e-9, 1 + 1e-15, math.nextafter(1, 2)):
        result = nuslerp(tensors, WEIGHTS[3], contrast=near, **options)
        torch.testing.assert_close(result, merged, rtol=1e-7, atol=1e-7)


@all_contrasts
@with_and_without_base
@each_number
def test_the_order_of_the_models_does_not_matter(contrast, with_base, count):
    tensors, base = models(6, 8, count=count, with_base=with_base)
    options = {"contrast": contrast, "base": base}
    for granularity in (BOTH, "row"):
        options["granularity"] = granularity
        result = nuslerp(tensors, WEIGHTS[count], **options)
        for order in list(permutations(range(count)))[:30]:
            inputs = [tensors[n] for n in order]
            weights = [WEIGHTS[count][n] for n in order]
            assert_close(nuslerp(inputs, weights, **options), result)


@granularities
@all_contrasts
@each_number
def test_parallel_vectors_take_the_weights(granularity, contrast, count):
    base, move = normal(2, 6, 8)
    tensors = [base + (n + 1) * move for n in range(count)]
    weights = [weight / sum(WEIGHTS[count]) for weight in WEIGHTS[count]]
    along = sum(w * (n + 1) for n, w in enumerate(weights))
    options = {"granularity": granularity, "contrast": contrast, "base": base}
    assert_close(nuslerp(tensors, weights, **options), base + along * move)


@all_contrasts
@each_number
@pytest.mark.parametrize("shape", [(), (1,), (17,)], ids=str)
def test_one_vector_has_no_profile(contrast, count, shape):
    tensors, base = models(*shape, count=count)
    expected = nuslerp(tensors, WEIGHTS[count], base=base)
    for granularity in ("tensor", "row", "column:4", BOTH):
        options = {"granularity": granularity, "contrast": contrast, "base": base}
        assert nuslerp(tensors, WEIGHTS[count], **options).equal(expected)
        weights = torch.tensor([WEIGHTS[count]])
        options["base"] = base.unsqueeze(0)
        inputs = [tensor.unsqueeze(0) for tensor in tensors]
        assert merge_batch(inputs, weights, **options).vectors == 1


@all_contrasts
@each_number
@with_and_without_base
def test_each_expert_is_merged_by_itself(contrast, count, with_base):
    tensors, base = models(3, 2, 6, 8, count=count, with_base=with_base)
    options = {"granularity": BOTH, "contrast": contrast}
    weights = torch.tensor([WEIGHTS[count]] * 3, dtype=torch.float64)
    weights[1] = weights[1].flip(0)
    merged = merge_batch(tensors, weights, base=base, **options)
    assert merged.vectors == 2 * (6 + 8 + 1)
    for n in range(3):
        for expert in range(2):
            alone = nuslerp(
                [tensor[n, expert] for tensor in tensors],
                weights[n].tolist(),
                base=None if base is None else base[n, expert],
                **options,
            )
            assert_close(merged.result[n, expert], alone)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@all_magnitudes
@some_contrasts
@two_or_three
def test_16_bit_merges_are_rounded_once(dtype, magnitude, contrast, count):
    base = normal(60, 50).to(dtype)
    tensors = [
        (base + 0.02 * normal(60, 50, seed=seed)).to(dtype)
        for seed in range(1, count + 1)
    ]
    for granularity in (BOTH, "row", "column:10"):
        options = {"granularity": granularity, "magnitude": magnitude, "base": base}
        options |= {"contrast": contrast, "lambda_": 1.5}
        result = nuslerp(tensors, WEIGHTS[count], **options)
        assert_rounded_once(result, tensors, WEIGHTS[count], **options)
        exact = oracle(tensors, WEIGHTS[count], **options)
        assert (result == exact.to(dtype)).double().mean() >= 0.999


@pytest.mark.parametrize("contrast", [1, 2])
@pytest.mark.parametrize("shape", [(15000, 3), (3, 15000), (2, 3, 8000)], ids=str)
def test_more_vectors_than_are_merged_at_once(shape, contrast):
    tensors, base = models(*shape, count=3, make=whole_numbers)
    tensors, base = [tensor.bfloat16() for tensor in tensors], base.bfloat16()
    options = {"granularity": BOTH, "contrast": contrast, "base": base}
    result = nuslerp(tensors, WEIGHTS[3], **options)
    assert_rounded_once(result, tensors, WEIGHTS[3], **options)


def test_vectors_are_counted_once_where_the_matrix_nearly_cancels():
    """Then all inner products are taken again, in float64."""
    a = normal(6, 64, dtype=torch.bfloat16)
    b = (-a.double() + 0.03 * normal(6, 64, seed=1)).bfloat16()
    b[0] = -a[0]
    inputs = [a.unsqueeze(0), b.unsqueeze(0)]
    weights = torch.tensor([[0.5, 0.5]])
    merged = merge_batch(inputs, weights, granularity="row", contrast=2.0)
    assert merged.linear.tolist() == [1]


# --- zero vectors, opposite ones, and the bound ----------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@all_magnitudes
@some_contrasts
@two_or_three
@with_and_without_base
def test_vectors_with_faults_beside_ordinary_ones(
    dtype, magnitude, contrast, count, with_base
):
    tensors = [tensor.to(dtype) for tensor in rows_with_faults(count)]
    base = whole_numbers(7, 12, seed=9, dtype=dtype) if with_base else None
    if base is not None:
        tensors = [base + tensor for tensor in tensors]
    for granularity in (BOTH, "row"):
        options = {"granularity": granularity, "magnitude": magnitude, "base": base}
        options["contrast"] = contrast
        with pytest.warns(RuntimeWarning) as caught:
            result = nuslerp(tensors, WEIGHTS[count], **options)
        (message,) = (str(warning.message) for warning in caught)
        vectors = 7 + 12 + 1 if granularity == BOTH else 7 + (contrast != 1)
        assert f"2 of {vectors} vectors" in message
        assert reference(tensors, WEIGHTS[count], **options).linear == 2
        assert_rounded_once(result, tensors, WEIGHTS[count], **options)


def test_every_level_without_a_mean_is_counted():
    a = normal(4, 6)
    with pytest.warns(RuntimeWarning, match="11 of 11 vectors"):
        result = nuslerp([a, -2 * a], [0.4, 0.6], granularity=BOTH)
    assert_close(result, -0.8 * a)
    with pytest.warns(RuntimeWarning, match="5 of 5 vectors"):
        nuslerp([a, -2 * a], [0.4, 0.6], granularity="row", contrast=2)


@granularities
@all_magnitudes
@some_contrasts
@each_number
def test_a_model_without_a_part_has_none(granularity, magnitude, contrast, count):
    """Its coefficients are zero, of its vectors and of the tensor."""
    tensors, base = models(6, 8, count=count)
    options = {"granularity": granularity, "magnitude": magnitude, "base": base}
    options["contrast"] = contrast
    expected = nuslerp(tensors, WEIGHTS[count], **options)
    for spare in (normal(6, 8, seed=9), base, 2 * base - tensors[0]):
        inputs, weights = [*tensors, spare], [*WEIGHTS[count], 0.0]
        assert_close(nuslerp(inputs, weights, **options), expected)
    alone = [float(n == 1) for n in range(count)]
    assert_close(nuslerp(tensors, alone, **options), tensors[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nuslerp([base] * count, WEIGHTS[count], **options).equal(base)
        inputs = [base, *tensors[1:]]
        result = nuslerp(inputs, WEIGHTS[count], **options)
    assert_close(result, oracle(inputs, WEIGHTS[count], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("contrast", [1.5, 2, 6, 100])
@pytest.mark.parametrize("degrees", [150, 179, 179.9, 179.9999, 180])
def test_vectors_that_nearly_cancel_stay_bounded(dtype, contrast, degrees):
    ends = at_angles(0, degrees, 60, length=64)
    first = torch.stack([ends[0]] * 9).to(dtype)
    second = torch.stack([ends[1]] + [ends[2]] * 8).to(dtype)
    for granularity, longest in (("row", 2), (BOTH, 4)):
        plain, result = (
            nuslerp([first, second], [1, 1], granularity=granularity, contrast=power)
            for power in (1, contrast)
        )
        # Rounding of 16 bits, and of the coefficients of what has all but cancelled.
        rounding = 1e-5 + 4 * torch.finfo(dtype).eps
        most = longest * (1 + rounding) * plain.double().norm(dim=-1) + rounding
        assert result.isfinite().all()
        assert (result.double().norm(dim=-1) <= most).all()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (0.5, 0.2, 0.3)], ids=str)
@all_magnitudes
def test_what_cancels_in_a_row_still_cancels_by_rows_and_columns(weights, magnitude):
    """Coefficients of the row alone are some 50 there, and its columns differ."""
    tensors = [normal(16, 96, seed=seed) for seed in range(len(weights))]
    tensors[1][5] = 0.01 * tensors[1][5] - tensors[0][5]
    if len(weights) > 2:  # the sum is next to nothing, and no two are opposite
        tensors[2][5] = tensors[1][5] - 0.5 * tensors[0][5]
        tensors[1][5] = normal(96, seed=7)
        tensors[0][5] = -tensors[1][5] - 0.99 * tensors[2][5]
    options = {"granularity": BOTH, "magnitude": magnitude}
    result = nuslerp(tensors, weights, **options)
    exact = oracle(tensors, weights, **options)
    torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)
    rows = torch.stack([tensor.norm(dim=-1) for tensor in (result, *tensors)])
    assert (rows[0] < 1.5 * rows[1:].amax(0)).all()


def test_opposite_rows_take_the_weights_though_they_nearly_cancel():
    first, second = normal(16, 96, seed=1), normal(16, 96, seed=2)
    second[5] = -first[5]
    result = nuslerp([first, second], [0.55, 0.45], granularity=BOTH)
    assert_close(result, oracle([first, second], [0.55, 0.45], granularity=BOTH))


@all_contrasts
@two_or_three
@all_magnitudes
def test_gradients_of_vectors_with_faults_are_finite(contrast, count, magnitude):
    for granularity in (BOTH, "row"):
        tensors = [tensor.requires_grad_() for tensor in rows_with_faults(count)]
        options = {"granularity": granularity, "magnitude": magnitude}
        result = nuslerp(tensors, WEIGHTS[count], contrast=contrast, **options)
        result.sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("granularity", ["row", "column:4", BOTH])
@all_magnitudes
@pytest.mark.parametrize("contrast", [0.5, 1, 2])
@two_or_three
def test_gradients_agree_with_finite_differences(
    granularity, magnitude, contrast, count
):
    tensors, base = models(4, 8, count=count)
    inputs = [*tensors, base]

    def merge(*inputs: torch.Tensor) -> torch.Tensor:
        return nuslerp(
            inputs[:count],
            WEIGHTS[count],
            base=inputs[count],
            granularity=granularity,
            magnitude=magnitude,
            contrast=contrast,
        )

    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(merge, inputs, fast_mode=True)


# --- what is refused -------------------------------------------------------------


@two_or_three
def test_weights_below_zero_are_refused(count):
    tensors, _ = models(6, 8, count=count)
    weights = [2.0, -1, 1][:count]
    for options in (
        {"granularity": BOTH},
        {"granularity": "row", "contrast": 2},
        {"contrast": 0},
    ):
        with pytest.raises(ValueError, match="must not be negative"):
            nuslerp(tensors, weights, **options)


@pytest.mark.parametrize("contrast", [-1, -1e-9, 101, math.nan, math.inf])
def test_a_contrast_is_a_number_from_0_to_100(contrast):
    with pytest.raises(ValueError, match="contrast"):
        nuslerp(list(normal(2, 6, 8)), [1, 1], granularity="row", contrast=contrast)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 8, 6), (1, 2, 3, 3)], ids=str)
def test_errors_name_the_weight_and_not_the_expert(shape):
    tensors, base = models(3, *shape)
    weights = torch.tensor([[0.3, 0.7]] * 3)
    options = {"base": base, "granularity": BOTH, "contrast": 2.0}
    tensors[1][1].view(-1)[-1] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        merge_batch(tensors, weights, **options)
    assert caught.value.args == (1, 1)
    tensors[1][1].view(-1)[-1] = 1e200
    with pytest.raises(RangeError) as ranged:
        merge_batch(tensors, weights, **options)
    assert ranged.value.args[0] == 1


@pytest.mark.parametrize("seed", [14, 147, 224])
def test_three_models_whose_matrix_all_but_cancels(seed):
    """More than its rows do. Sums of float32 products would show in float16 then."""
    lengths = 10 ** (uniform(2, 4, 1, seed=seed) - 0.5)
    *pair, small = normal(3, 4, 24, seed=seed)
    pair = [length * tensor for length, tensor in zip(lengths, pair)]
    third = 0.01 * small - sum(pair)
    tensors = [(tensor / 256).half() for tensor in (*pair, third)]
    options = {"granularity": "row", "contrast": 2.0}
    result = nuslerp(tensors, [1, 1, 1], **options)
    assert result.equal(oracle(tensors, [1, 1, 1], **options).half())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_that_is_nearly_opposite_is_merged_in_float64(seed):
    """Its large coefficients would multiply float32's rounding."""
    first, second = normal(2, 2, 2000, seed=seed)
    second[0] = 0.01 * second[0] - first[0]
    tensors = [(tensor / 64).half() for tensor in (first, second)]
    options = {"granularity": "row", "contrast": 2.0}
    result = nuslerp(tensors, [1, 1], **options)
    assert result.equal(oracle(tensors, [1, 1], **options).half())


def test_rows_whose_squares_are_finite_and_the_matrix_s_is_not():
    tensors = [torch.full((2, 1), 1e154, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(RangeError, match="a squared length is too large"):
        nuslerp(tensors, [1, 1], granularity="row", contrast=2.0)
