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


def test_vectors_that_cancel_are_merged_linearly():
    angles = torch.tensor([0.0, 120.0, 240.0]).deg2rad()
    units = list(torch.stack([angles.cos(), angles.sin()], dim=1).double())
    result = merge_tensors(units, "nuslerp", parameters={"weight": [1, 1, 1]})
    torch.testing.assert_close(result, sum(units) / 3)


# Once normalised, the last two would be positive.
@pytest.mark.parametrize("weight", [[1, -1, 1], [1, -1, 0], [-1, -1, -1]])
def test_negative_weights_of_several_models_are_refused(weight):
    with pytest.raises(ValueError, match="negative"):
        merge_tensors(random(3, count=3), "nuslerp", parameters={"weight": weight})


def test_an_opposite_pair_makes_three_vectors_linear():
    a, b = random(20, count=2)
    result = merge_tensors([a, -a, b], "nuslerp", parameters={"weight": [1, 1, 2]})
    torch.testing.assert_close(result, b / 2)


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


def test_karcher_of_opposite_inputs_keeps_the_first():
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(merge_tensors([a, -a], "karcher"), a)


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
