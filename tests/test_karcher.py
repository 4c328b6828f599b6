# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Coefficients of more than two vectors: what makes them those of a Karcher mean."""

from __future__ import annotations

import math

import pytest
import torch
from cases import normal, uniform, unit
from cases import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import angle, largest_coefficient, log_maps

from mergekit_nuslerp.geometry import (
    antipodal_bound,
    karcher_coefficients,
    mean_coefficients,
)

EPS = torch.finfo(torch.float64).eps


# --- the mean --------------------------------------------------------------------

SIZES = [(n, d) for n in (2, 3, 5, 8) for d in (2, 3, 16, 4096)]


def rows_for(dimensions: int) -> int:
    return 100 if dimensions > 100 else 2000


def uneven(rows: int, models: int, seed: int = 0) -> torch.Tensor:
    """Weights from almost nothing to almost all."""
    weights = uniform(rows, models, seed=seed) ** 3 + 1e-6
    return weights / weights.sum(-1, keepdim=True)


def solve(
    inputs: torch.Tensor, weights: torch.Tensor, tolerance: float = 0.0
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
    assert (mean.norm(dim=-1) - 1).abs().max() < EPS**0.5
    pull = (weights.unsqueeze(-1) * log_maps(unit(mean), inputs)).sum(-2)
    assert pull.norm(dim=-1).max() < EPS**0.5


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


def test_vectors_that_plain_newton_steps_would_leave():
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    turns = torch.tensor([0.0, 105.0, 225.0], dtype=torch.float64).deg2rad()
    rise = torch.full_like(turns, 0.05)
    inputs = torch.stack([turns.cos(), turns.sin(), rise], -1)[None]
    _, mean, unique = solve(unit(inputs), third)
    assert unique
    assert_means(inputs, third, unique, mean)


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
    c, unique = karcher_coefficients(cosines, weights, antipodal_bound(torch.float64))
    closed, _ = mean_coefficients(cosines, weights)
    assert unique
    # The cosine holds no more than this of an angle near 180 degrees.
    close = 1e-13 if theta < 3 else 1e-13 / (1 + cosine)
    torch.testing.assert_close(c, closed, rtol=0, atol=close)
    if theta > 0.1:
        sines = torch.sin(weights * theta) / math.sin(theta)
        torch.testing.assert_close(c, sines, rtol=0, atol=close)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("others", [1, 3])
def test_of_two_with_weight_it_is_their_slerp(gap, share, others):
    """Also where they are nearly opposite and one of them hardly counts."""
    if share / gap**0.5 > 20:
        return  # coefficients are so large that it may count as without a mean
    rows = unit(normal(50, 2 + others, 6))
    across = unit(rows[:, 1] - (rows[:, 1] * rows[:, 0]).sum(-1, True) * rows[:, 0])
    rows[:, 1] = (gap - 1) * rows[:, 0] + (2 * gap - gap**2) ** 0.5 * across
    weights = torch.tensor([1 - share, share] + others * [0.0], dtype=torch.float64)
    grams = rows @ rows.mT
    closed, _ = mean_coefficients(grams[:, :2, :2], weights[:2])
    c, unique = mean_coefficients(grams, weights)
    assert unique.all()
    assert (c[:, 2:] == 0).all()
    torch.testing.assert_close(c[:, :2], closed, rtol=1e-6, atol=0)


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
        torch.testing.assert_close(alone[0], together[n], rtol=1e-12, atol=1e-13)


# --- no unique mean --------------------------------------------------------------


def cone(height: float) -> torch.Tensor:
    """Three unit vectors around a pole, at 120 degrees from each other seen from it."""
    turns = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    radius = math.sqrt(1 - height**2)
    z = torch.full_like(turns, height)
    return torch.stack([radius * turns.cos(), radius * turns.sin(), z], -1)


@pytest.mark.parametrize("tolerance", [2.0**-7, 2.0**-10, 2.0**-23, 32 * EPS])
def test_the_tolerance_bounds_the_coefficients(tolerance):
    third = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    largest = largest_coefficient(tolerance)
    for share, is_unique in ((0.99, True), (1.01, False)):
        height = 1 / (3 * share * largest)
        c, _, unique = solve(cone(height)[None], third, tolerance)
        assert unique.item() == is_unique
        expected = share * largest if is_unique else 1 / 3
        torch.testing.assert_close(c, torch.full_like(c, expected), rtol=1e-6, atol=0)


def test_a_point_where_log_maps_cancel_is_no_mean_if_others_are_nearer():
    """The direction of the sum, by symmetry, but a maximum of the distances."""
    turns = torch.tensor([0.0, 170.0, 190.0], dtype=torch.float64).deg2rad()
    inputs = torch.stack([turns.cos(), turns.sin()], -1)[None]
    weights = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)
    c, _, unique = solve(inputs, weights)
    assert not unique
    assert c.equal(weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("models", [2, 3, 5])
def test_what_is_not_finite_makes_no_linear_merge(models, opposite, value):
    inputs, weights = normal(4, models, 6), uneven(4, models)
    if opposite:
        inputs[:, 0] = -inputs[:, 1]
    inputs[1, -1, 2] = value
    c, _, _ = solve(inputs, weights)
    assert c.isnan().all(-1).tolist() == [False, True, False, False]
    assert c[[0, 2, 3]].isfinite().all()


# --- derivatives -----------------------------------------------------------------


def sum_of_coefficients(cosines: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return mean_coefficients(cosines, weights)[0].sum()


def test_derivatives_of_first_order_in_reverse_mode():
    inputs = unit(normal(3, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sum_of_coefficients(x @ x.mT), inputs)
    cosines = (inputs @ inputs.mT).detach()
    expected = torch.func.grad(sum_of_coefficients)(cosines)
    torch.testing.assert_close(
        torch.func.jacrev(sum_of_coefficients)(cosines), expected
    )


def test_other_derivatives_are_refused():
    inputs = unit(normal(3, 5))
    cosines = (inputs @ inputs.mT).requires_grad_()
    options = {"inputs": cosines, "create_graph": True}
    (gradient,) = torch.autograd.grad(sum_of_coefficients(cosines), **options)
    with pytest.raises(NotImplementedError, match="second"):
        gradient.sum().backward()
    cosines = cosines.detach()
    gradient = torch.func.grad(sum_of_coefficients)
    for refused in (
        lambda: torch.func.grad(lambda x: gradient(x).sum())(cosines),
        lambda: torch.func.hessian(sum_of_coefficients)(cosines),
        lambda: torch.func.jvp(sum_of_coefficients, (cosines,), (cosines,)),
    ):
        with pytest.raises(NotImplementedError):
            refused()


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
