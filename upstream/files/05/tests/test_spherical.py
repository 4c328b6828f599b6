# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch

from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.karcher import karcher_merge_tensors


def unit(x):
    return x / x.norm()


def karcher(units, weights):
    """Mean by averaging log maps, in float64."""
    mean = unit(sum(w * u for w, u in zip(weights, units)))
    for _ in range(500):
        step = torch.zeros_like(mean)
        for w, u in zip(weights, units):
            tangent = u - (u @ mean) * mean
            step += w * torch.atan2(tangent.norm(), u @ mean) * unit(tangent)
        if step.norm() < 1e-14:
            break
        mean = unit(step.norm().cos() * mean + step.norm().sin() * unit(step))
    return mean


def random(*shape, count=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).double() for _ in range(count)]


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("has_base", [False, True])
def test_nuslerp_of_several_models_is_their_weighted_mean(count, has_base):
    *tensors, base = random(20, count=count + 1)
    weights = [1.0, 2.0, 3.0, 4.0][:count]
    shares = [weight / sum(weights) for weight in weights]
    given = [unit(x) + base if has_base else unit(x) for x in tensors]
    result = merge_tensors(
        [*given, base] if has_base else given,
        "nuslerp",
        base_index=count if has_base else None,
        parameters={"weight": weights},
    )
    expected = karcher([unit(x) for x in tensors], shares)
    torch.testing.assert_close(result - base if has_base else result, expected)


def test_each_row_has_a_mean_of_its_own():
    tensors = random(5, 8, count=3)
    parameters = {"weight": [1, 1, 2], "nuslerp_flatten": False}
    result = merge_tensors(tensors, "nuslerp", parameters=parameters)
    rows = [
        merge_tensors(list(row), "nuslerp", parameters={"weight": [1, 1, 2]})
        for row in zip(*tensors)
    ]
    torch.testing.assert_close(result, torch.stack(rows))


def test_a_weight_of_zero_leaves_a_model_out():
    a, b, c = random(20, count=3)
    three = merge_tensors([a, b, c], "nuslerp", parameters={"weight": [1, 2, 0]})
    two = merge_tensors([a, b], "nuslerp", parameters={"weight": [1, 2]})
    torch.testing.assert_close(three, two)


def around_a_pole(degrees, height=0.0):
    """Unit vectors, seen from the pole in these directions."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    rise = torch.full_like(angles, height / (1 - height**2) ** 0.5)
    units = torch.stack([angles.cos(), angles.sin(), rise], dim=1)
    return [unit(x) for x in units]


@pytest.mark.parametrize(
    "degrees,height,weight",
    [
        ([0, 120, 240], 0, [1, 1, 1]),
        # The mean has coefficients of 500, which multiply rounding.
        ([0, 120, 240], 1 / 1500, [1, 1, 1]),
        # The log maps cancel at the sum's direction, but farther from most is no mean.
        ([0, 170, 190], 0, [3, 1, 1]),
    ],
)
def test_vectors_that_cancel_are_merged_linearly(degrees, height, weight):
    units = around_a_pole(degrees, height)
    result = merge_tensors(units, "nuslerp", parameters={"weight": weight})
    linear = sum(w * x for w, x in zip(weight, units)) / sum(weight)
    torch.testing.assert_close(result, linear)


def test_in_the_plane_each_row_has_a_mean_or_is_linear():
    """Steps towards a mean do not converge for all of these."""
    tensors = [x / x.norm(dim=1, keepdim=True) for x in random(2000, 2, count=5)]
    parameters = {"weight": [1] * 5, "nuslerp_flatten": False}
    result = merge_tensors(tensors, "nuslerp", parameters=parameters)
    curved = ((result - sum(tensors) / 5).abs() > 1e-12).any(1)
    assert 1000 < curved.sum() < 2000
    mean, pull = result[curved], 0
    for x in tensors:
        cosine = (x[curved] * mean).sum(1, keepdim=True)
        tangent = x[curved] - cosine * mean
        length = tangent.norm(dim=1, keepdim=True)
        pull += torch.atan2(length, cosine) * tangent / length
    torch.testing.assert_close(mean.norm(dim=1), torch.ones(len(mean)).double())
    assert pull.norm(dim=1).max() < 1e-6


def test_vectors_that_nearly_cancel_have_a_mean():
    # Plain Newton steps leave these.
    units = around_a_pole([0, 105, 225], 0.05)
    result = merge_tensors(units, "nuslerp", parameters={"weight": [1, 1, 1]})
    torch.testing.assert_close(result, karcher(units, [1 / 3] * 3))


@pytest.mark.parametrize("method", ["karcher", "nuslerp"])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("element", [float("nan"), float("inf")])
def test_no_number_of_a_vector_that_is_not_finite_is_written(method, opposite, element):
    a, b, c = random(5, count=3)
    if opposite:
        b = -a
    c[2] = element
    parameters = {"weight": [1, 2, 3]} if method == "nuslerp" else {}
    assert merge_tensors([a, b, c], method, parameters=parameters).isnan().all()


# Once normalised, the last two would be positive.
@pytest.mark.parametrize("weight", [[1, -1, 1], [1, -1, 0], [-1, -1, -1]])
def test_negative_weights_of_several_models_are_refused(weight):
    with pytest.raises(ValueError, match="negative"):
        merge_tensors(random(3, count=3), "nuslerp", parameters={"weight": weight})


def test_an_opposite_pair_makes_three_vectors_linear():
    a, b = random(20, count=2)
    result = merge_tensors([a, -a, b], "nuslerp", parameters={"weight": [1, 1, 2]})
    torch.testing.assert_close(result, b / 2)


def test_an_opposite_vector_of_weight_zero_is_left_out():
    a, b = random(20, count=2)
    result = merge_tensors([a, -a, b], "nuslerp", parameters={"weight": [1, 0, 2]})
    expected = merge_tensors([a, b], "nuslerp", parameters={"weight": [1, 2]})
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("method", ["karcher", "nuslerp"])
def test_other_derivatives_than_of_first_order_in_reverse_mode_are_refused(method):
    def merge(x):
        parameters = {"weight": [1, 2, 3]} if method == "nuslerp" else {}
        return merge_tensors([x, b, c], method, parameters=parameters).square().sum()

    a, b, c = random(4, count=3)
    torch.testing.assert_close(torch.func.jacrev(merge)(a), torch.func.grad(merge)(a))
    gradient, *_ = torch.autograd.grad(merge(a.requires_grad_()), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(merge, (a.detach(),), (b,))
    with pytest.raises(NotImplementedError):
        torch.func.hessian(merge)(a.detach())


def test_gradients_where_some_rows_have_no_mean():
    a, b, c = random(4, 3, count=3)
    b[1] = -a[1]
    a[2], b[2], c[2] = torch.tensor([[1, -1, 0], [0, 1, -1], [-1, 0, 1]])
    tensors = [x.requires_grad_() for x in (a, b, c)]
    parameters = {"weight": [1, 1, 1], "nuslerp_flatten": False}
    merge_tensors(tensors, "nuslerp", parameters=parameters).sum().backward()
    for x in tensors:
        assert x.grad.isfinite().all() and (x.grad[1:3] == 1 / 3).all()


def test_gradients_of_several_models():
    tensors = [x.requires_grad_() for x in random(2, 3, count=3)]
    for flatten in (False, True):
        parameters = {"weight": [1, 2, 3], "nuslerp_flatten": flatten}
        assert torch.autograd.gradcheck(
            lambda *x: merge_tensors(list(x), "nuslerp", parameters=parameters), tensors
        )


def test_karcher_is_the_mean_with_the_mean_length():
    tensors = random(40, count=3)
    expected = karcher([unit(x) for x in tensors], [1 / 3] * 3)
    expected *= sum(x.norm() for x in tensors) / 3
    torch.testing.assert_close(merge_tensors(tensors, "karcher"), expected)


def test_karcher_leaves_short_inputs_out_of_the_direction():
    a, b, c = random(20, count=3)
    result = merge_tensors([a, b, 1e-9 * c], "karcher")
    torch.testing.assert_close(result, merge_tensors([a, b], "karcher") * 2 / 3)


def test_karcher_of_opposite_inputs_keeps_the_first_that_is_not_short():
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(merge_tensors([a, -a], "karcher"), a)
    result = merge_tensors([0 * a, a, -a], "karcher")
    torch.testing.assert_close(result, 2 / 3 * a)


def test_karcher_of_an_opposite_pair_and_a_third_takes_the_sum():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    result = merge_tensors([a, -a, b], "karcher")
    torch.testing.assert_close(result, 7 / 3 * b / 5)


def test_karcher_has_no_max_iter_to_be_mistaken_for_tol():
    with pytest.raises(TypeError):
        karcher_merge_tensors(random(3, count=2), [0.5, 0.5], 10)
    (alone,) = random(3, count=1)
    assert karcher_merge_tensors([alone], [1.0]) is alone


def test_karcher_accepts_max_iter_in_configs():
    tensors = random(20, count=3)
    result = merge_tensors(tensors, "karcher", parameters={"max_iter": 1})
    assert result.equal(merge_tensors(tensors, "karcher"))


@pytest.mark.parametrize("method", ["karcher", "nuslerp"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_other_tensors_than_floating_point_are_refused(method, dtype):
    tensors = [torch.ones(2, dtype=dtype)] * 3
    parameters = {"weight": [1, 1, 1]} if method == "nuslerp" else {}
    with pytest.raises(TypeError, match="floating-point"):
        merge_tensors(tensors, method, parameters=parameters)
