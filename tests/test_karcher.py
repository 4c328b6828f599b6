# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""More than two models: the weighted Karcher mean, and every edge case of a merge."""

from __future__ import annotations

import math
import warnings
from itertools import cycle, permutations
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
from oracle import (
    angle,
    assert_rounded_once,
    granularities,
    largest_coefficient,
    log_maps,
    oracle,
    reference,
    vectors,
)

from mergekit_nuslerp import NonFiniteError, kernel, nuslerp, streaming
from mergekit_nuslerp.geometry import karcher_coefficients, mean_coefficients

# Where vectors happen to have no unique mean, that is looked at as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

EPS = torch.finfo(torch.float64).eps
WEIGHTS = [0.5, 0.2, 0.3]

all_granularities = pytest.mark.parametrize(
    "granularity", ["tensor", "matrix", "row", "column", "row:2", "column:4"]
)
each_model = pytest.mark.parametrize("position", range(3))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The kernel sets its threads itself; here geometry is called without it."""
    with streaming.one_thread():
        yield


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=-1, keepdim=True)


# --- the mean --------------------------------------------------------------------

SIZES = [(n, d) for n in (2, 3, 5, 8) for d in (2, 3, 16, 4096)]


def rows_for(dimensions: int) -> int:
    return 100 if dimensions > 100 else 2000


def uneven(rows: int, models: int, seed: int = 0) -> torch.Tensor:
    """Weights from almost nothing to almost all."""
    weights = uniform(rows, models, seed=seed) ** 3 + 1e-6
    return weights / weights.sum(-1, keepdim=True)


def solve(
    inputs: torch.Tensor, weights: torch.Tensor, tolerance: float = EPS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients of rows of vectors `(rows, models, d)`, their mean, uniqueness."""
    c, unique = mean_coefficients(
        inputs @ inputs.mT, weights, antipodal_tolerance=tolerance
    )
    return c, (c.unsqueeze(-1) * unit(inputs)).sum(-2), unique


def assert_means(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    unique: torch.Tensor,
    mean: torch.Tensor,
) -> None:
    """On the sphere, and pulled as much in each direction as in the opposite one."""
    inputs, weights, mean = unit(inputs[unique]), weights[unique], mean[unique]
    assert (mean.norm(dim=-1) - 1).abs().max() < 1e-9
    pull = (weights.unsqueeze(-1) * log_maps(unit(mean), inputs)).sum(-2)
    assert pull.norm(dim=-1).max() < 1e-9


@pytest.mark.parametrize(("models", "d"), SIZES)
def test_log_maps_cancel_at_the_mean_of_random_vectors(models, d):
    inputs, weights = normal(rows_for(d), models, d), uneven(rows_for(d), models)
    for w in (weights, torch.full_like(weights, 1 / models)):
        _, mean, unique = solve(inputs, w)
        assert_means(inputs, w, unique, mean)
        # In few dimensions many vectors lie all around; in many, all are orthogonal.
        assert unique.double().mean() > (0.25 if d < 16 else 0.99)


@pytest.mark.parametrize(("models", "d"), SIZES)
def test_vectors_at_acute_angles_have_a_mean_between_them(models, d):
    """With no angle over 90 degrees the mean is unique and its coefficients positive.

    The mean then lies in the cone of the vectors, so no cosine of the mean with one of
    them is negative; and as no product of two terms of |sum c_i u_i|^2 = 1 is negative
    either, no coefficient is above one.
    """
    inputs = normal(rows_for(d), models, d).abs()
    weights = uneven(rows_for(d), models)
    weights[::7, 0] = 0
    weights /= weights.sum(-1, keepdim=True)
    c, mean, unique = solve(inputs, weights)
    assert unique.all()
    assert c.min() >= 0
    assert c.max() <= 1 + 1e-12
    assert_means(inputs, weights, unique, mean)


@pytest.mark.parametrize(("models", "d"), SIZES)
def test_vectors_in_a_hemisphere_have_a_mean(models, d):
    inputs, pole = (
        normal(rows_for(d), models, d),
        unit(normal(rows_for(d), 1, d, seed=1)),
    )
    inputs = inputs * (inputs * pole).sum(-1, keepdim=True).sign()
    weights = uneven(rows_for(d), models)
    _, mean, unique = solve(inputs, weights)
    assert (~unique).double().mean() < 0.01
    assert_means(inputs, weights, unique, mean)


@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("models", [2, 3, 5, 8])
def test_clustered_vectors(models, width):
    for d in (2, 3, 16, 512):
        rows = 300
        centre = unit(normal(rows, 1, d))
        inputs = centre + width / math.sqrt(d) * normal(rows, models, d, seed=1)
        inputs *= uniform(rows, models, 1, seed=2) + 0.5
        weights = uneven(rows, models)
        c, mean, unique = solve(inputs, weights)
        assert unique.all()
        assert_means(inputs, weights, unique, mean)
        # c_i - w_i is of the order of the square of the angles.
        assert (c - weights).abs().max() <= 10 * width**2 + 8 * EPS


def cancelling(
    rows: int, models: int, d: int, height: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors whose weighted sum is short, all on one side of a plane.

    They cancel in a plane of all but one of up to 16 dimensions, and rise from it by
    about `height`, towards the mean.
    """
    weights = 2 + uniform(rows, models)  # none as heavy as all others together
    weights /= weights.sum(-1, keepdim=True)
    flat = unit(normal(rows, models, min(d, 16) - 1, seed=1))
    if models == 2:
        flat[:, 1] = -flat[:, 0]
    for _ in range(300):
        flat = unit(flat - (weights.unsqueeze(-1) * flat).sum(-2, keepdim=True))
    rise = height * (1 + 0.5 * uniform(rows, models, 1, seed=2))
    inputs = torch.cat([flat, rise], -1)
    rotation, _ = torch.linalg.qr(normal(d, inputs.shape[-1], seed=3))
    return inputs @ rotation.T, weights


@pytest.mark.parametrize("height", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("d", [3, 16, 4096])
@pytest.mark.parametrize("models", [2, 3, 5, 8])
def test_nearly_cancelling_vectors(models, d, height):
    inputs, weights = cancelling(rows_for(d) // 4, models, d, height)
    c, mean, unique = solve(inputs, weights)
    assert (~unique).double().mean() < 0.01
    assert_means(inputs, weights, unique, mean)
    # Sums this short take coefficients this large.
    assert c[unique].sum(-1).min() > 0.5 / height


@pytest.mark.parametrize("models", [3, 5, 8])
def test_no_point_near_the_mean_is_nearer_to_the_vectors(models):
    """A stationary point could as well be as far away as possible."""
    for d in (2, 3, 16):
        inputs, weights = normal(1000, models, d), uneven(1000, models)
        _, mean, unique = solve(inputs, weights)

        def spread(point, inputs=inputs, weights=weights):
            theta = angle(unit(point).unsqueeze(1), unit(inputs))
            return (weights * theta.square()).sum(-1)

        for seed in range(5):
            aside = mean + 1e-3 * normal(*mean.shape, seed=seed)
            assert (spread(aside) >= spread(mean))[unique].all()


@settings(deadline=None, max_examples=100)
@given(
    theta=st.one_of(st.floats(0, 3.1), st.sampled_from([0.0, 1e-9, 1e-5, math.pi / 2])),
    t=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])),
)
def test_of_two_vectors_it_is_slerp(theta, t):
    cosine = math.cos(theta)
    cosines = torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64)
    weights = torch.tensor([1 - t, t], dtype=torch.float64)
    c, unique = karcher_coefficients(cosines, weights, antipodal_tolerance=EPS)
    closed, _ = mean_coefficients(cosines, weights, antipodal_tolerance=EPS)
    assert unique
    # The cosine holds no more than this of an angle near 180 degrees.
    close = 1e-13 if theta < 3 else 1e-13 / (1 + cosine)
    torch.testing.assert_close(c, closed, rtol=0, atol=close)
    if theta > 0.1:
        sines = torch.sin(weights * theta) / math.sin(theta)
        torch.testing.assert_close(c, sines, rtol=0, atol=close)


@pytest.mark.parametrize("models", [3, 4, 8])
def test_orthogonal_vectors_of_equal_weight(models):
    gram = torch.diag(torch.arange(1.0, models + 1, dtype=torch.float64))
    weights = torch.full((models,), 1 / models, dtype=torch.float64)
    c, unique = mean_coefficients(gram, weights, antipodal_tolerance=EPS)
    assert unique
    expected = torch.full_like(c, 1 / math.sqrt(models))
    torch.testing.assert_close(c, expected, rtol=1e-14, atol=0)


@settings(deadline=None, max_examples=100)
@given(
    angles=st.lists(st.floats(0, 2.8), min_size=3, max_size=6),
    seed=st.integers(0, 1000),
)
def test_along_one_arc_angles_are_averaged(angles, seed):
    """Linearly dependent vectors: the mean is known, and so is each coefficient."""
    theta = torch.tensor(angles, dtype=torch.float64)
    inputs = torch.stack([theta.cos(), theta.sin()], -1)
    weights = uneven(1, len(angles), seed)
    c, mean, unique = solve(inputs[None], weights)
    assert unique
    at = (weights * theta).sum()
    expected = torch.stack([at.cos(), at.sin()])
    torch.testing.assert_close(mean[0], expected, rtol=0, atol=1e-11)
    away = theta - at
    shares = weights[0] / torch.sinc(away / math.pi)
    shares /= (shares * away.cos()).sum()
    torch.testing.assert_close(c[0], shares, rtol=1e-9, atol=1e-9)


def test_each_row_is_on_its_own():
    """As many steps as it needs, whatever the others need."""
    inputs, weights = normal(200, 4, 6), uneven(200, 4)
    inputs[::5] = inputs[::5, :1] + 1e-3 * inputs[::5]
    inputs[1::5] = cancelling(40, 4, 6, 1e-2)[0]
    together, _, unique = solve(inputs, weights)
    for n in range(200):
        alone, _, alone_unique = solve(inputs[n : n + 1], weights[n : n + 1])
        assert alone_unique == unique[n]
        torch.testing.assert_close(alone[0], together[n], rtol=1e-13, atol=1e-13)


def test_what_weighs_nothing_is_not_looked_at():
    inputs, weights = normal(300, 4, 5), uneven(300, 4)
    weights[:, 2] = 0
    weights /= weights.sum(-1, keepdim=True)
    inputs[::3, 2] = -inputs[::3, 0]
    inputs[1::3, 2] = 0
    others = [0, 1, 3]
    c, _, unique = solve(inputs, weights)
    without, _, unique_without = solve(inputs[:, others], weights[:, others])
    assert torch.equal(unique, unique_without)
    torch.testing.assert_close(c[:, others], without, rtol=1e-12, atol=1e-12)
    assert (c[:, 2] == 0).all()


# --- no unique mean --------------------------------------------------------------


def cone(height: float) -> torch.Tensor:
    """Three unit vectors around a pole, at 120 degrees from each other seen from it."""
    turns = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    radius = math.sqrt(1 - height**2)
    z = torch.full_like(turns, height)
    return torch.stack([radius * turns.cos(), radius * turns.sin(), z], -1)


@pytest.mark.parametrize("tolerance", [2.0**-7, 2.0**-10, 2.0**-23])
def test_the_tolerance_bounds_the_coefficients(tolerance):
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    largest = largest_coefficient(tolerance)
    for share, is_unique in ((0.99, True), (1.01, False)):
        height = 1 / (3 * share * largest)
        c, _, unique = solve(cone(height)[None], third, tolerance)
        assert unique.item() == is_unique
        expected = share * largest if is_unique else 1 / 3
        torch.testing.assert_close(c, torch.full_like(c, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tolerance", [2.0**-7, 2.0**-10, 2.0**-23])
def test_two_antipodal_vectors_among_others(tolerance):
    for share, is_unique in ((0.99, False), (1.01, True)):
        gap = share * tolerance
        sine = math.sqrt(gap * (2 - gap))
        inputs = torch.tensor(
            [[1.0, 0, 0], [gap - 1, sine, 0], [0, 0, 1]], dtype=torch.float64
        )
        weights = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
        _, _, unique = solve(inputs[None], weights, tolerance)
        assert unique.item() == is_unique
        for weights in ([0.4, 0.0, 0.6], [0.0, 0.4, 0.6]):
            weights = torch.tensor([weights], dtype=torch.float64)
            assert solve(inputs[None], weights, tolerance)[2]


@all_magnitudes
def test_vectors_that_cancel_are_averaged_linearly(magnitude):
    flat = cone(0.0)
    inputs = torch.stack(
        [
            flat,  # the mean could be either pole
            flat @ torch.linalg.qr(normal(3, 3))[0],
            torch.stack([flat[0], -flat[0], flat[1]]),  # a great circle of means
            torch.stack([flat[0], -2 * flat[0], -3 * flat[0]]),
        ]
    )
    weights = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    c, unique = mean_coefficients(
        inputs @ inputs.mT, weights, magnitude=magnitude, antipodal_tolerance=EPS
    )
    assert not unique.any()
    assert torch.equal(c, weights)


def three_with_faults() -> list[torch.Tensor]:
    """Rows: 2 and 5 cancel, 3 has an antipodal pair; the others are ordinary."""
    tensors = [normal(7, 16, seed=seed).abs() for seed in range(3)]
    basis = torch.linalg.qr(normal(16, 3, seed=9))[0].T
    flat = cone(0.0) @ basis
    for n, tensor in enumerate(tensors):
        tensor[2] = flat[n]
        tensor[5] = 1e-3 * flat[n - 1]
    tensors[2][3] = -2 * tensors[0][3]
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_magnitudes
def test_rows_without_a_unique_mean_are_counted_in_one_warning(dtype, magnitude):
    tensors = [tensor.to(dtype) for tensor in three_with_faults()]
    options = {"granularity": "row", "magnitude": magnitude}
    with pytest.warns(RuntimeWarning) as caught:
        result = nuslerp(tensors, [1, 1, 1], **options)
    (message,) = (str(warning.message) for warning in caught)
    assert "3 of 7" in message
    assert reference(tensors, [1, 1, 1], **options).linear == 3
    assert_rounded_once(result, tensors, [1, 1, 1], **options)
    straight = sum(tensor.double() for tensor in tensors) / 3
    for row in (2, 3, 5):
        torch.testing.assert_close(
            result[row].double(), straight[row], rtol=4e-3, atol=1e-6
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nuslerp(tensors, [1, 0, 0], **options)


def test_a_batch_counts_for_each_weight():
    tensors = [
        torch.stack([tensor, tensor.abs() + 0.1, 3 * tensor])
        for tensor in three_with_faults()
    ]
    weights = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    merged = kernel.merge_batch(tensors, weights, granularity="row")
    assert merged.vectors == 7
    assert merged.linear.tolist() == [3, 0, 3]


# --- merges: what the mean is ----------------------------------------------------


def models(
    *shape: int,
    count: int = 3,
    with_base: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Weights and, where asked for, a base near them.

    Task vectors all lie in one orthant, but for rounding, so that whatever elements
    form a vector no angle is over 90 degrees, and a unique mean exists.
    """
    signs = normal(*shape, seed=seed).sign()
    tensors = [
        (n + 1) * signs * normal(*shape, seed=seed + n + 1).abs() for n in range(count)
    ]
    if not with_base:
        return [tensor.to(dtype) for tensor in tensors], None
    base = normal(*shape, seed=seed + count + 1).to(dtype)
    return [(base + tensor).to(dtype) for tensor in tensors], base


@all_granularities
@all_magnitudes
@with_and_without_base
def test_the_merge_is_the_textbook_mean(granularity, magnitude, with_base):
    for count, weights in ((3, WEIGHTS), (5, [1, 2, 0, 3, 1]), (8, [1] * 8)):
        tensors, base = models(6, 8, count=count, with_base=with_base)
        options = {"base": base, "granularity": granularity, "magnitude": magnitude}
        result = nuslerp(tensors, weights, **options)
        expected = oracle(tensors, weights, **options)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@all_granularities
@all_magnitudes
@with_and_without_base
def test_the_order_of_the_models_does_not_matter(granularity, magnitude, with_base):
    tensors, base = models(6, 8, with_base=with_base)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS, **options)
    for order in permutations(range(3)):
        permuted = nuslerp(
            [tensors[n] for n in order], [WEIGHTS[n] for n in order], **options
        )
        torch.testing.assert_close(permuted, result, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("granularity", ["tensor", "row", "row:2"])
@all_magnitudes
@with_and_without_base
def test_a_rotation_of_the_models_rotates_the_merge(granularity, magnitude, with_base):
    rotation, _ = torch.linalg.qr(normal(8, 8, seed=5))
    tensors, base = models(6, 8, with_base=with_base)
    options = {"granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS, base=base, **options)
    rotated = nuslerp(
        [tensor @ rotation for tensor in tensors],
        WEIGHTS,
        base=None if base is None else base @ rotation,
        **options,
    )
    torch.testing.assert_close(rotated, result @ rotation, rtol=1e-13, atol=2e-13)


@all_granularities
@all_magnitudes
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@each_model
def test_a_model_of_weight_zero_leaves_slerp_of_the_others(
    granularity, magnitude, t, position
):
    tensors, base = models(6, 8)
    pair = tensors[:position] + tensors[position + 1 :]
    weights = [1 - t, t]
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    expected = nuslerp(pair, weights, **options)
    weights.insert(position, 0)
    for spare in (tensors[position], 2 * base - pair[0], base, 1e30 * base):
        inputs = list(pair)
        inputs.insert(position, spare)
        result = nuslerp(inputs, weights, **options)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_the_antipodal_rule_of_two_holds_beside_a_model_of_weight_zero():
    for gap in (0.9, 1.1):
        sine = math.sqrt(2 * gap * 2.0**-7)
        a, b, c = torch.tensor(
            [[1, 0, 0], [-1, sine, 0], [0, 0, 1]], dtype=torch.bfloat16
        )
        inputs, weights = (a[None], c[None], b[None]), torch.tensor([[0.3, 0, 0.7]])
        three = kernel.merge_batch(inputs, weights)
        two = kernel.merge_batch(inputs[::2], weights[:, ::2])
        assert three.linear.tolist() == two.linear.tolist() == [int(gap < 1)]
        torch.testing.assert_close(three.result, two.result, rtol=1e-6, atol=1e-6)


@all_granularities
@all_magnitudes
@each_model
def test_a_model_of_all_the_weight_is_the_result(granularity, magnitude, position):
    tensors, base = models(6, 8)
    weights = [0.0, 0.0, 0.0]
    weights[position] = 0.4
    result = nuslerp(
        tensors, weights, base=base, granularity=granularity, magnitude=magnitude
    )
    torch.testing.assert_close(result, tensors[position], rtol=1e-13, atol=1e-13)


@all_granularities
@all_magnitudes
def test_a_model_given_twice_counts_twice(granularity, magnitude):
    (a, b, _), base = models(6, 8)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp([a, b, a.clone()], [0.2, 0.5, 0.3], **options)
    expected = nuslerp([a, b], [0.5, 0.5], **options)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    same = nuslerp([a, a.clone(), a], WEIGHTS, **options)
    torch.testing.assert_close(same, a, rtol=1e-13, atol=1e-13)


@all_granularities
def test_parallel_vectors_are_averaged_linearly(granularity):
    base = normal(6, 8).round()
    move = normal(6, 8, seed=1).sign()
    tensors = [base + factor * move for factor in (1, 2, 0.5)]
    options = {"base": base, "granularity": granularity}
    for magnitude in ("slerp", "linear"):
        result = nuslerp(tensors, WEIGHTS, magnitude=magnitude, **options)
        expected = base + (0.5 + 2 * 0.2 + 0.5 * 0.3) * move
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    result = nuslerp(tensors, WEIGHTS, magnitude="geometric", **options)
    expected = base + 2**0.2 * 0.5**0.3 * move
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@all_granularities
def test_lengths_are_averaged(granularity):
    tensors, _ = models(6, 8, with_base=False)
    options = {"granularity": granularity}
    linear = nuslerp(tensors, WEIGHTS, magnitude="linear", **options)
    geometric = nuslerp(tensors, WEIGHTS, magnitude="geometric", **options)
    for index in vectors(linear.shape, granularity):
        lengths = [tensor[index].norm() for tensor in tensors]
        mean = sum(w * length for w, length in zip(WEIGHTS, lengths))
        product = math.prod(length**w for w, length in zip(WEIGHTS, lengths))
        torch.testing.assert_close(linear[index].norm(), mean)
        torch.testing.assert_close(geometric[index].norm(), product)
        directions = [unit(result[index].flatten()) for result in (linear, geometric)]
        torch.testing.assert_close(*directions, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("magnitude", ["linear", "geometric"])
def test_lengths_do_not_turn_the_mean(magnitude):
    tensors, _ = models(6, 8, with_base=False)
    result = nuslerp(tensors, WEIGHTS, granularity="row", magnitude=magnitude)
    for factors in ((1, 10, 0.1), (1e-8, 1, 1e8)):
        scaled = nuslerp(
            [factor * tensor for factor, tensor in zip(factors, tensors)],
            WEIGHTS,
            granularity="row",
            magnitude=magnitude,
        )
        torch.testing.assert_close(unit(scaled), unit(result), rtol=1e-12, atol=1e-12)


@all_granularities
@all_magnitudes
def test_only_the_proportion_of_the_weights_matters(granularity, magnitude):
    tensors, base = models(6, 8)
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS, **options)
    for factor in (1e-3, 7, -2):
        scaled = nuslerp(tensors, [factor * w for w in WEIGHTS], **options)
        torch.testing.assert_close(scaled, result, rtol=1e-13, atol=1e-13)


@all_magnitudes
def test_lambda_is_how_far_to_go_from_the_base(magnitude):
    tensors, base = models(6, 8)
    options = {"base": base, "granularity": "row", "magnitude": magnitude}
    whole = nuslerp(tensors, WEIGHTS, **options)
    for lambda_ in (0.3, 0.0, 1.7, -0.5):
        result = nuslerp(tensors, WEIGHTS, lambda_=lambda_, **options)
        expected = base + lambda_ * (whole - base)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


# --- zero vectors ----------------------------------------------------------------


@all_granularities
@all_magnitudes
@with_and_without_base
def test_zero_vectors_count_as_orthogonal(granularity, magnitude, with_base):
    """As if a model had moved in a direction where no other has moved."""
    tensors, base = models(6, 8, count=4, with_base=with_base)
    origin = torch.zeros_like(tensors[0]) if base is None else base
    weights = [0.2, 0.4, 0.3, 0.1]
    for frozen in ({0}, {1, 3}):
        inputs = [origin if n in frozen else x for n, x in enumerate(tensors)]
        result = nuslerp(
            inputs, weights, base=base, granularity=granularity, magnitude=magnitude
        )
        for index in vectors((6, 8), granularity):
            moved = [(tensor - origin)[index] for tensor in inputs]
            lengths = [vector.norm().item() for vector in moved]
            wider = []
            for n, vector in enumerate(moved):
                aside = torch.zeros(*vector.shape, 4, dtype=torch.float64)
                aside[..., n] = n in frozen
                scale = 1.0 if magnitude == "slerp" else lengths[n] or 1.0
                wider.append(torch.cat([vector.unsqueeze(-1) / scale, aside], -1))
            expected = nuslerp(wider, weights)[..., 0]
            if magnitude == "linear":
                length = sum(w * size for w, size in zip(weights, lengths))
                expected = expected / expected.norm() * length
            if magnitude == "geometric":
                expected = torch.zeros_like(expected)
            torch.testing.assert_close(
                (result - origin)[index], expected, rtol=1e-12, atol=1e-12
            )


@all_granularities
@each_model
@with_and_without_base
def test_what_only_one_model_changed(granularity, position, with_base):
    tensors, base = models(6, 8, with_base=with_base)
    origin = torch.zeros_like(tensors[0]) if base is None else base
    inputs = [origin.clone() for _ in range(3)]
    inputs[position] = tensors[position]
    result = nuslerp(
        inputs, WEIGHTS, base=base, granularity=granularity, magnitude="linear"
    )
    expected = origin + WEIGHTS[position] * (tensors[position] - origin)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    options = {"base": base, "granularity": granularity}
    geometric = nuslerp(inputs, WEIGHTS, magnitude="geometric", **options)
    assert torch.equal(geometric, origin)
    equally = nuslerp(inputs, [1, 1, 1], **options)
    expected = origin + (tensors[position] - origin) / math.sqrt(3)
    torch.testing.assert_close(equally, expected, rtol=1e-13, atol=1e-13)


@all_dtypes
@all_magnitudes
def test_a_weight_that_no_model_changed_is_the_base(dtype, magnitude):
    base = normal(6, 8, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for granularity in granularities(base.shape):
            options = {"granularity": granularity, "magnitude": magnitude}
            result = nuslerp(
                [base.clone() for _ in range(3)], WEIGHTS, base=base, **options
            )
            assert torch.equal(result, base)
            zeros = [torch.zeros_like(base) for _ in range(3)]
            assert torch.equal(nuslerp(zeros, WEIGHTS, **options), zeros[0])


# --- very large and very small values --------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", "column:4"])
@all_magnitudes
@out_of_range
@with_and_without_base
def test_values_whose_squares_leave_the_range(
    granularity, magnitude, dtype, factor, with_base
):
    tensors, base = models(12, 16, with_base=with_base, dtype=dtype)
    far = [(factor * tensor.double()).to(dtype) for tensor in tensors]
    far_base = None if base is None else (factor * base.double()).to(dtype)
    options = {"granularity": granularity, "magnitude": magnitude}
    result = nuslerp(far, WEIGHTS, base=far_base, **options)
    assert_rounded_once(result, far, WEIGHTS, far_base, **options)
    ordinary = nuslerp(tensors, WEIGHTS, base=base, **options)
    eps = torch.finfo(dtype).eps
    close = max(2 * eps, 1e-12)
    torch.testing.assert_close(
        result.double() / factor, ordinary.double(), rtol=close, atol=16 * close
    )


@all_magnitudes
@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [
        (torch.bfloat16, 2.0**-100, 2.0**100),
        (torch.float16, 2.0**-18, 2.0**10),
        (torch.float32, 1e-36, 1e36),
        (torch.float64, 1e-290, 1e290),
    ],
    ids=str,
)
def test_vectors_of_very_different_lengths(magnitude, dtype, small, large):
    if dtype == torch.float64 and magnitude != "slerp":
        # Coefficients that bring one length to another are in range as well.
        small, large = 1e-140, 1e140
    tensors, _ = models(6, 16, with_base=False)
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
        result = nuslerp(tensors, WEIGHTS, **options)
        assert_rounded_once(result, tensors, WEIGHTS, **options)


# --- inputs that are refused -----------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 1, -1], [3, -1, -1], [0.5, 0.6, -0.1]])
def test_more_than_two_models_refuse_negative_weights(weights):
    tensors, base = models(6, 8)
    with pytest.raises(ValueError, match="negative"):
        nuslerp(tensors, weights, base=base)
    batch = [tensor.expand(2, 6, 8) for tensor in tensors]
    with pytest.raises(ValueError, match="negative"):
        kernel.merge_batch(batch, torch.tensor([[1, 1, 1], weights]).double())


@pytest.mark.parametrize("weights", [[1, 1, -2], [0, 0, 0], [3e-7, 3e-7, 3e-7]])
def test_weights_that_sum_to_zero_count_as_equal(weights):
    tensors, base = models(6, 8)
    with pytest.warns(RuntimeWarning, match="sum to zero"):
        result = nuslerp(tensors, weights, base=base)
    assert torch.equal(result, nuslerp(tensors, [1, 1, 1], base=base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@all_granularities
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", [1, 2, None])
def test_nan_or_infinity_names_the_model(dtype, granularity, value, model):
    """Also where the model weighs nothing."""
    tensors, base = models(6, 8, dtype=dtype)
    (base if model is None else tensors[model])[2, 3] = value
    for weights in (WEIGHTS, [1, 0, 0]):
        with pytest.raises(NonFiniteError) as caught:
            nuslerp(tensors, weights, base=base, granularity=granularity)
        assert (caught.value.output, caught.value.model) == (0, model)


@pytest.mark.parametrize("model", [0, 1, 2])
def test_shapes_and_dtypes_of_every_model_are_looked_at(model):
    tensors, base = models(6, 8)
    odd = list(tensors)
    odd[model] = normal(6, 1)
    with pytest.raises(ValueError, match="shape"):
        nuslerp(odd, WEIGHTS, base=base)
    odd[model] = torch.ones(6, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        nuslerp(odd, WEIGHTS, base=base)


# --- shapes, strides, dtypes, pieces ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@with_and_without_base
@pytest.mark.parametrize(
    "shape", [(), (1,), (17,), (6, 8), (1, 8), (8, 1), (3, 4, 6), (2, 3, 4, 6)], ids=str
)
def test_any_number_of_dimensions(dtype, with_base, shape):
    tensors, base = models(*shape, with_base=with_base, dtype=dtype)
    for granularity in granularities(shape):
        result = nuslerp(tensors, WEIGHTS, base=base, granularity=granularity)
        assert (result.shape, result.dtype) == (torch.Size(shape), dtype)
        assert_rounded_once(result, tensors, WEIGHTS, base, granularity)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_empty_weights_stay_empty(shape):
    tensors, base = models(*shape, dtype=torch.bfloat16)
    for granularity in ("tensor", "matrix", "row", "column", "row:1", "column:1"):
        result = nuslerp(tensors, WEIGHTS, base=base, granularity=granularity)
        assert (result.shape, result.dtype) == (torch.Size(shape), torch.bfloat16)
        assert all(result is not tensor for tensor in tensors)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
    room[..., 1::2] = tensor
    return room[..., 1::2]


@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 6)], ids=str)
def test_strides_do_not_matter_and_inputs_stay_as_they_are(layout, shape):
    tensors, base = models(*shape, dtype=torch.float32)
    for strided in ({0}, {1, 3}, {0, 1, 2, 3}):
        inputs = [
            layout(tensor) if n in strided else tensor.clone()
            for n, tensor in enumerate([*tensors, base])
        ]
        for granularity in granularities(shape):
            options = {"granularity": granularity, "magnitude": "geometric"}
            result = nuslerp(inputs[:3], WEIGHTS, base=inputs[3], **options)
            assert_rounded_once(result, tensors, WEIGHTS, base, **options)
            result.fill_(7)
        for tensor, copy in zip(inputs, [*tensors, base]):
            assert torch.equal(tensor, copy)


@all_granularities
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (
            (torch.bfloat16, torch.float16, torch.bfloat16, torch.bfloat16),
            torch.float32,
        ),
        (
            (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
            torch.float32,
        ),
        (
            (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
            torch.float32,
        ),
        ((torch.float16, torch.float32, torch.float64, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_promoted(granularity, dtypes, expected):
    tensors, base = models(6, 8)
    *tensors, base = (x.to(dtype) for x, dtype in zip([*tensors, base], dtypes))
    result = nuslerp(tensors, WEIGHTS, base=base, granularity=granularity)
    assert result.dtype == expected
    assert_rounded_once(result, tensors, WEIGHTS, base, granularity)


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers so small that their products and sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("magnitude", ["slerp", "geometric"])
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float32, 3), (torch.bfloat16, 5)], ids=str
)
@pytest.mark.parametrize(
    ("room", "most_vectors", "strip"),
    [
        (4096, 64 * 1024, 64),  # several vectors to a piece, or a part of one
        (1511, 7, 3),  # nothing divides anything: ragged ends everywhere
        (20000, 2, 1000),  # fewer vectors at once than would fit
    ],
)
def test_the_size_of_the_pieces_does_not_matter(
    monkeypatch, magnitude, dtype, count, room, most_vectors, strip
):
    shape = (2, 2, 12, 10)
    base = whole_numbers(*shape, seed=9, dtype=dtype)
    tensors = [
        base + whole_numbers(*shape, seed=seed, dtype=dtype) for seed in range(count)
    ]
    tensors[0][0, 0] = base[0, 0]
    tensors[1][1, :, 5] = base[1, :, 5]
    weights = uneven(2, count)
    merge = dict(weights=weights, base=base, magnitude=magnitude, lambda_=0.5)
    at_once = {
        granularity: kernel.merge_batch(tensors, granularity=granularity, **merge)
        for granularity in granularities(shape[1:])
    }
    monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", room)
    monkeypatch.setattr(streaming, "_MAX_VECTORS", most_vectors)
    monkeypatch.setattr(streaming, "_STRIP_LENGTH", strip)
    for granularity, whole in at_once.items():
        pieces = kernel.merge_batch(tensors, granularity=granularity, **merge)
        # Sums are exact here; what is left is rounding once, at the ends of pieces too.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(pieces.result, whole.result, rtol=eps, atol=1e-6)
        assert pieces.vectors == whole.vectors
        assert torch.equal(pieces.linear, whole.linear)


def test_counts_do_not_depend_on_the_pieces(monkeypatch):
    # Two expert matrices of 7 rows each, three of them without a mean in both.
    tensors = [
        torch.stack([tensor, 3 * tensor])[None] for tensor in three_with_faults()
    ]
    weights = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    for room, most in ((6 * 1024 * 1024, 16 * 1024), (4096, 3), (997, 1)):
        monkeypatch.setattr(streaming, "_SCRATCH_BYTES_CPU", room)
        monkeypatch.setattr(streaming, "_MAX_VECTORS", most)
        for granularity, inputs in (
            ("row", tensors),
            ("column", [tensor.mT.contiguous() for tensor in tensors]),
        ):
            merged = kernel.merge_batch(inputs, weights, granularity=granularity)
            assert (merged.vectors, merged.linear.tolist()) == (14, [6])


# --- gradients -------------------------------------------------------------------


@pytest.mark.parametrize("granularity", granularities((4, 6)))
@all_magnitudes
@with_and_without_base
def test_gradients_agree_with_finite_differences(granularity, magnitude, with_base):
    tensors, base = models(4, 6, with_base=with_base)
    inputs = tensors if base is None else [*tensors, base]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def merge(*inputs: torch.Tensor) -> torch.Tensor:
        return nuslerp(
            inputs[:3],
            WEIGHTS,
            base=inputs[3] if with_base else None,
            granularity=granularity,
            magnitude=magnitude,
            lambda_=0.6 if with_base else 1.0,
        )

    assert torch.autograd.gradcheck(merge, inputs, fast_mode=True)


@pytest.mark.parametrize("count", [4, 8])
def test_gradients_of_more_models(count):
    tensors = [normal(3, 12, seed=seed).requires_grad_() for seed in range(count)]

    def merge(*tensors: torch.Tensor) -> torch.Tensor:
        return nuslerp(tensors, range(1, count + 1), granularity="row")

    assert torch.autograd.gradcheck(merge, tensors, fast_mode=True)


@all_magnitudes
def test_gradients_of_degenerate_vectors(magnitude):
    """Rows: ordinary, parallel, cancelling, antipodal, with one, two, three zeros."""
    tensors = [normal(7, 12, seed=seed).abs() for seed in range(3)]
    flat = cone(0.0) @ torch.linalg.qr(normal(12, 3, seed=9))[0].T
    for n, tensor in enumerate(tensors):
        tensor[1] = (1 + n) * tensors[0][1]
        tensor[2] = flat[n]
        tensor[6] = 0
    tensors[1][3] = -0.5 * tensors[0][3]
    tensors[0][4] = 0
    tensors[1][5] = tensors[2][5] = 0
    tensors = [tensor.requires_grad_() for tensor in tensors]
    nuslerp(tensors, WEIGHTS, granularity="row", magnitude=magnitude).sum().backward()
    # A zero vector counts as at a right angle whichever way it is about to go.
    for model, row in ((0, 4), (1, 5), (2, 5), (0, 6), (1, 6), (2, 6)):
        grad = tensors[model].grad[row]
        assert torch.equal(grad, grad[:1].expand_as(grad))
    for tensor, weight in zip(tensors, WEIGHTS):
        assert tensor.grad.isfinite().all()
        # Where there is no mean: exactly the coefficients of the straight line.
        linear = torch.full_like(tensor.grad[2:4], weight)
        torch.testing.assert_close(tensor.grad[2:4], linear, rtol=1e-12, atol=1e-12)
        if magnitude == "slerp":
            torch.testing.assert_close(
                tensor.grad[1], linear[0], rtol=1e-12, atol=1e-12
            )


@all_granularities
@all_magnitudes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recording_a_gradient_does_not_change_the_merge(granularity, magnitude, dtype):
    tensors, base = models(6, 8, dtype=dtype)
    tensors[0].requires_grad_()
    options = {"granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS, base=base, **options)
    assert result.requires_grad
    assert_rounded_once(result, tensors, WEIGHTS, base, **options)


# --- exactness -------------------------------------------------------------------

Case = tuple[list[torch.Tensor], list[float], dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Three weights or more, maybe a base, of any shape, dtype and layout."""
    shape = draw(st.lists(st.integers(1, 8), max_size=4).map(tuple))
    granularity = draw(st.sampled_from(granularities(shape)))
    dtype = draw(st.sampled_from(DTYPES))
    with_base = draw(st.booleans())
    count = draw(st.integers(3, 6))
    tensors, base = models(
        *shape,
        count=count,
        with_base=with_base,
        dtype=dtype,
        seed=draw(st.integers(0, 10**6)),
    )
    origin = torch.zeros_like(tensors[0]) if base is None else base
    kinds = st.sampled_from(["ordinary", "same", "parallel", "antipodal", "zero"])
    pattern = draw(st.lists(kinds, min_size=1, max_size=5))
    places = st.lists(st.integers(0, count - 1), min_size=2, max_size=3, unique=True)
    for index, kind in zip(vectors(shape, granularity), cycle(pattern)):
        first, *others = draw(places)
        moved = (tensors[first] - origin)[index]
        for other in others:
            if kind == "same":
                tensors[other][index] = tensors[first][index]
            elif kind == "parallel":
                tensors[other][index] = origin[index] + 2 * moved
            elif kind == "antipodal":
                tensors[other][index] = origin[index] - moved / 2
            elif kind == "zero":
                tensors[other][index] = origin[index]
    if shape:
        layout = draw(st.sampled_from([torch.clone, transposed, sliced]))
        tensors[0] = layout(tensors[0])
    weight = st.one_of(st.floats(0.01, 10), st.sampled_from([0.0, 1.0, 1e-3]))
    weights = draw(
        st.lists(weight, min_size=count, max_size=count).filter(lambda w: sum(w) > 0.1)
    )
    options = {
        "base": base,
        "granularity": granularity,
        "magnitude": draw(st.sampled_from(MAGNITUDES)),
        "lambda_": draw(st.floats(0, 2)) if with_base else 1.0,
    }
    return tensors, weights, options


@settings(deadline=None, max_examples=100)
@given(case=cases(), room=st.sampled_from([12 * 1024 * 1024, 4096, 1499]))
def test_the_merge_is_the_oracle_rounded_once(case, room):
    tensors, weights, options = case
    with mock.patch.object(streaming, "_SCRATCH_BYTES_CPU", room):
        result = nuslerp(tensors, weights, **options)
    assert_rounded_once(result, tensors, weights, **options)


@all_dtypes
@all_magnitudes
@with_and_without_base
@pytest.mark.parametrize("granularity", granularities((60, 50)))
def test_every_granularity_and_magnitude_rounds_once(
    dtype, magnitude, with_base, granularity
):
    """Of a model's usual numbers: task vectors of two percent of the weights."""
    tensors = [normal(60, 50, seed=seed) for seed in range(1, 4)]
    base = None
    if with_base:
        base = (50 * normal(60, 50)).to(dtype)
        tensors = [base + tensor for tensor in tensors]
    tensors = [tensor.to(dtype) for tensor in tensors]
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS, **options)
    assert_rounded_once(result, tensors, WEIGHTS, **options)
    exact = oracle(tensors, WEIGHTS, **options)
    if dtype.itemsize < 4:
        assert (result == exact.to(dtype)).double().mean() >= 0.999
    else:
        rounding = (exact.float().double() - exact).norm()
        assert (result.double() - exact).norm() <= 2.5 * rounding


# --- settings of PyTorch that make matrix products coarser ---------------------------


def fine_tunes() -> tuple[list[torch.Tensor], torch.Tensor]:
    base, *moves = (normal(64, 512, seed=seed) for seed in range(4))
    return [(base + m / 50).bfloat16() for m in moves], base.bfloat16()


@pytest.mark.parametrize("granularity", ["matrix", "row"])
def test_autocast_does_not_reach_inner_products(granularity):
    tensors, base = fine_tunes()
    given: dict[str, Any] = {"base": base, "granularity": granularity}
    merged = nuslerp(tensors, [0.5, 0.3, 0.2], **given)
    grams = kernel.gram_matrices(tensors, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nuslerp(tensors, [0.5, 0.3, 0.2], **given).equal(merged)
        assert kernel.gram_matrices(tensors, **given).equal(grams)


def test_no_matrix_products_where_they_may_be_coarse(monkeypatch):
    tensors, base = fine_tunes()
    used = []
    multiplied = streaming.Worker.multiplied
    monkeypatch.setattr(
        streaming.Worker,
        "multiplied",
        lambda *given: used.append(True) or multiplied(*given),
    )
    nuslerp(tensors, [0.5, 0.3, 0.2], base=base, granularity="row")
    assert used
    used.clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        merged = nuslerp(tensors, [0.5, 0.3, 0.2], base=base, granularity="row")
    finally:
        torch.set_float32_matmul_precision(before)
    assert not used
    assert_rounded_once(merged, tensors, [0.5, 0.3, 0.2], base, "row")
