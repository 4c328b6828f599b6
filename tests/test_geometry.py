# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Coefficients from inner products: what makes them those of a great circle."""

from __future__ import annotations

import math

import pytest
import torch
from cases import all_magnitudes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_nuslerp.geometry import Magnitude, mean_coefficients, normalize_weights

EPS = torch.finfo(torch.float64).eps
ANGLES = [1e-6, 0.1, 1.0, math.pi / 2, 2.0, 3.0, math.pi - 1e-3]
FRACTIONS = [0.0, 0.25, 0.5, 0.7, 1.0, 2.0, -1.0]

quickly = settings(deadline=None, max_examples=100)


def gram_of(cosine: float, lengths: tuple[float, float] = (1.0, 1.0)) -> torch.Tensor:
    a, b = lengths
    return torch.tensor(
        [[a * a, a * b * cosine], [a * b * cosine, b * b]], dtype=torch.float64
    )


def weights_of(t: float) -> torch.Tensor:
    return torch.tensor([1 - t, t], dtype=torch.float64)


def solve(
    gram: torch.Tensor,
    weights: torch.Tensor,
    tolerance: float = 0.0,
    magnitude: Magnitude = "slerp",
) -> torch.Tensor:
    options = {"magnitude": magnitude, "antipodal_tolerance": tolerance}
    return mean_coefficients(gram, weights, **options)[0]


def coefficients(
    gram: torch.Tensor,
    t: float,
    tolerance: float = 0.0,
    magnitude: Magnitude = "slerp",
) -> torch.Tensor:
    return solve(gram, weights_of(t), tolerance, magnitude)


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("t", FRACTIONS)
def test_the_point_is_on_the_sphere_at_its_fraction_of_the_angle(theta, t):
    gram = gram_of(math.cos(theta))
    c = coefficients(gram, t)
    # Inner products of the result with both ends, and with itself.
    rounding = 8 * EPS / (1 + math.cos(theta))
    expected = torch.tensor(
        [math.cos(t * theta), math.cos((1 - t) * theta)], dtype=torch.float64
    )
    torch.testing.assert_close(gram @ c, expected, rtol=0, atol=rounding)
    assert (c @ gram @ c).item() == pytest.approx(1, abs=rounding)


@quickly
@given(
    theta=st.floats(1e-3, 3.1),
    t=st.floats(-2, 3),
    s=st.floats(0, 1),
)
def test_interpolating_again_stays_on_the_arc(theta, t, s):
    """From v_0 to the point at t, a fraction s of the way is the point at s t."""
    gram = gram_of(math.cos(theta))
    # Beyond half a turn the shorter arc is another one.
    assume(1e-3 < abs(t) * theta < 3.1)
    c = coefficients(gram, t)
    basis = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), c])
    inner = coefficients(basis @ gram @ basis.T, s)
    torch.testing.assert_close(
        inner @ basis, coefficients(gram, s * t), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("t", FRACTIONS)
def test_agrees_with_the_formula(theta, t):
    expected = torch.tensor(
        [math.sin((1 - t) * theta), math.sin(t * theta)], dtype=torch.float64
    ) / math.sin(theta)
    c = coefficients(gram_of(math.cos(theta)), t)
    # A cosine that is rounded once is as much as the Gram matrix can say.
    rounding = 8 * EPS / (1 + math.cos(theta))
    torch.testing.assert_close(c, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("gap", [2.0**-10, 2.0**-20, 2.0**-30, 2.0**-40])
@pytest.mark.parametrize("t", [0.3, 0.5, 2.0])
def test_a_cosine_near_minus_one_is_not_rounded_any_further(gap, t):
    # 1 + cos(theta) = gap, without rounding; the angle from its distance to pi.
    rest = 2 * math.asin(math.sqrt(gap / 2))
    theta = math.pi - rest
    expected = torch.tensor(
        [math.sin((1 - t) * theta), math.sin(t * theta)], dtype=torch.float64
    ) / math.sin(rest)
    c = coefficients(gram_of(-1 + gap), t)
    torch.testing.assert_close(c, expected, rtol=1e-13, atol=1e-9)


def test_parallel_is_the_limit_of_the_formula():
    for theta in (1e-1, 1e-2, 1e-3, 1e-5):
        gap = coefficients(gram_of(math.cos(theta)), 0.3) - weights_of(0.3)
        # c_i - w_i = w_i (1 - w_i^2) theta^2 / 6 + ...
        assert gap.abs().max() <= theta**2 / 6 + 4 * EPS


@pytest.mark.parametrize("tolerance", [2.0**-7, 2.0**-10, 2.0**-23, 0.0])
def test_the_tolerance_separates_antipodal_from_wide(tolerance):
    linear = weights_of(0.3)
    bound = max(tolerance, 32 * EPS)
    within = coefficients(gram_of(-1 + 0.9 * bound), 0.3, tolerance)
    beyond = coefficients(gram_of(-1 + 1.1 * bound), 0.3, tolerance)
    torch.testing.assert_close(within, linear, rtol=0, atol=0)
    assert (beyond > 2 * linear).all()  # 1 / sin(theta) has grown large by then


@pytest.mark.parametrize("t", FRACTIONS)
@pytest.mark.parametrize("lengths", [(0.0, 2.0), (2.0, 0.0), (0.0, 0.0)])
def test_a_zero_vector_counts_as_orthogonal(t, lengths):
    c = coefficients(gram_of(0.0, lengths), t)
    torch.testing.assert_close(c, coefficients(gram_of(0.0), t), rtol=0, atol=0)
    quarter = torch.sin(weights_of(t) * math.pi / 2)
    torch.testing.assert_close(c, quarter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_of_the_gram_matrix(dtype):
    c = solve(gram_of(0.4).to(dtype), weights_of(0.3).to(dtype))
    assert c.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        c.double(), coefficients(gram_of(0.4), 0.3), rtol=4 * eps, atol=4 * eps
    )


@pytest.mark.parametrize(
    "gram",
    [
        gram_of(1.0, (1.0, 3.0)),
        gram_of(-1.0, (1.0, 3.0)),
        gram_of(0.0, (0.0, 3.0)),
        gram_of(0.0, (1.0, 0.0)),
        gram_of(0.0, (0.0, 0.0)),
        gram_of(math.cos(1e-7)),
        gram_of(0.5),
    ],
    ids=["parallel", "antipodal", "zero-0", "zero-1", "zeros", "close", "ordinary"],
)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, -1.0])
@all_magnitudes
def test_derivatives_are_finite(gram, t, magnitude):
    gram = gram.clone().requires_grad_()
    weights = weights_of(t).requires_grad_()
    solve(gram, weights, magnitude=magnitude).sum().backward()
    assert gram.grad.isfinite().all()
    assert weights.grad.isfinite().all()


def unique(cosine: float, weights: list[float], tolerance: float = 0.0) -> bool:
    _, found = mean_coefficients(
        gram_of(cosine, (2.0, 3.0)),
        torch.tensor(weights, dtype=torch.float64),
        antipodal_tolerance=tolerance,
    )
    return found.item()


def test_only_antipodal_vectors_that_both_count_have_no_unique_arc():
    for cosine in (1.0, 0.5, -0.9, -1 + 2.0**-9):
        assert unique(cosine, [0.3, 0.7], 2.0**-10)
    for cosine in (-1.0, -1 + 2.0**-11):
        assert not unique(cosine, [0.3, 0.7], 2.0**-10)
        assert not unique(cosine, [2.0, -1.0], 2.0**-10)
        assert unique(cosine, [1.0, 0.0], 2.0**-10)
        assert unique(cosine, [0.0, 1.0], 2.0**-10)


# --- the length of the result ----------------------------------------------------


def length_of(gram: torch.Tensor, c: torch.Tensor) -> float:
    return (c @ gram @ c).sqrt().item()


@pytest.mark.parametrize("theta", [0.0, *ANGLES[:-1]])
@pytest.mark.parametrize("t", FRACTIONS)
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 4.0), (3.0, 0.1)])
def test_lengths_are_interpolated_and_directions_as_between_unit_vectors(
    theta, t, lengths
):
    a, b = lengths
    gram = gram_of(math.cos(theta), lengths)
    direction = coefficients(gram_of(math.cos(theta)), t)
    wanted = {
        "linear": max(0.0, (1 - t) * a + t * b),
        "geometric": a ** (1 - t) * b**t,
    }
    for magnitude, length in wanted.items():
        c = coefficients(gram, t, magnitude=magnitude)
        tolerance = 1e-11 * (abs(1 - t) * a + abs(t) * b + length)
        of_units = c * torch.tensor(lengths, dtype=torch.float64)
        torch.testing.assert_close(
            of_units, length * direction, rtol=1e-12, atol=tolerance
        )
        assert length_of(gram, c) == pytest.approx(length, abs=tolerance)


@pytest.mark.parametrize("gap", [2.0**-10, 2.0**-20, 2.0**-30])
def test_linear_is_never_longer_than_its_inputs(gap):
    gram = gram_of(-1 + gap, (1.0, 1.5))
    for t in (0.1, 0.5, 0.9):
        c = coefficients(gram, t, magnitude="linear")
        length = length_of(gram, c)
        assert length == pytest.approx(1 + 0.5 * t, abs=16 * EPS / gap)
        assert length < 1.5
    assert length_of(gram, coefficients(gram, 0.5)) > 1.5  # by mergekit's rule


@pytest.mark.parametrize("lengths", [(1e-60, 1e60), (1e-150, 1e-150), (1e140, 1e140)])
def test_lengths_of_any_scale(lengths):
    a, b = lengths
    gram = gram_of(0.3, lengths)
    logs = 0.4 * math.log(a) + 0.6 * math.log(b)
    for magnitude, length in (("linear", 0.4 * a + 0.6 * b), ("geometric", None)):
        length = math.exp(logs) if length is None else length
        c = coefficients(gram, 0.6, magnitude=magnitude)
        expected = coefficients(gram_of(0.3), 0.6) * length
        expected /= torch.tensor(lengths, dtype=torch.float64)
        torch.testing.assert_close(c, expected, rtol=1e-12, atol=0)


# --- weights ---------------------------------------------------------------------


@quickly
@given(
    weights=st.lists(st.floats(-100, 100), min_size=1, max_size=5).filter(
        lambda weights: abs(sum(weights)) > 1e-3
    ),
    factor=st.floats(1e-2, 1e6),
)
def test_normalised_weights_sum_to_one_in_proportion(weights, factor):
    given_weights = torch.tensor(weights, dtype=torch.float64)
    normal = normalize_weights(given_weights)
    size = normal.abs().sum().item()
    assert normal.sum().item() == pytest.approx(1, abs=1e-14 * size)
    torch.testing.assert_close(normal * given_weights.sum(), given_weights)
    scaled = normalize_weights(factor * given_weights)
    torch.testing.assert_close(scaled, normal, rtol=1e-9, atol=1e-14 * size)


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [5e-7, 4e-7], [3, -1, -2]])
def test_weights_that_sum_to_zero_are_made_equal(weights):
    normal = normalize_weights(torch.tensor(weights, dtype=torch.float64))
    assert (normal == 1 / len(weights)).all()


def test_small_weights_are_not_taken_for_zero():
    normal = normalize_weights(torch.tensor([3e-6, 7e-6], dtype=torch.float64))
    torch.testing.assert_close(normal, weights_of(0.7))


def test_weights_of_a_batch_are_normalised_each_on_its_own():
    weights = torch.tensor([[1.0, 3.0], [1.0, -1.0], [2.0, -1.0]], dtype=torch.float64)
    normal = normalize_weights(weights)
    assert normal.tolist() == [[0.25, 0.75], [0.5, 0.5], [2.0, -1.0]]
