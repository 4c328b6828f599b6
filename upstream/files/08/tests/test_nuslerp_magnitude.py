# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch
from pydantic import ValidationError

from mergekit import merge_methods
from mergekit.merge_methods import TensorGroup, merge_method, merge_tensors

BASE, A, B, C = torch.randn(4, 30, generator=torch.Generator().manual_seed(5)).double()
WEIGHTS = [0.2, 0.5, 0.3]


def merge(tensors, base=None, **parameters):
    shares = [
        weight / sum(WEIGHTS[: len(tensors)]) for weight in WEIGHTS[: len(tensors)]
    ]
    return merge_tensors(
        tensors if base is None else [*tensors, base],
        "nuslerp",
        base_index=None if base is None else len(tensors),
        parameters={"weight": shares, **parameters},
    )


@pytest.mark.parametrize("tensors", [[A, 5 * B], [A, 5 * B, 0.1 * C]])
def test_lengths_are_means(tensors):
    shares = [weight / sum(WEIGHTS[: len(tensors)]) for weight in WEIGHTS]
    lengths = [tensor.norm() for tensor in tensors]
    linear = sum(w * length for w, length in zip(shares, lengths))
    geometric = torch.stack([length**w for w, length in zip(shares, lengths)]).prod()
    for magnitude, length in {"linear": linear, "geometric": geometric}.items():
        result = merge(tensors, nuslerp_magnitude=magnitude)
        torch.testing.assert_close(result.norm(), length)
        # Its direction is that of the unit vectors' mean.
        mean = merge([tensor / tensor.norm() for tensor in tensors])
        torch.testing.assert_close(result / length, mean)


def test_a_mean_length_below_zero_is_zero():
    assert 5 * A.norm() - 4 * (5 * B).norm() < 0
    result = merge([A, 5 * B], weight=[5, -4], nuslerp_magnitude="linear")
    assert result.equal(torch.zeros(30).double())


def test_zero_vectors_count_in_the_length_alone():
    zero = torch.zeros_like(A)
    for magnitude, expected in {"linear": 2 / 7 * A, "geometric": zero}.items():
        result = merge([A, zero], nuslerp_magnitude=magnitude)
        torch.testing.assert_close(result, expected)


def test_a_zero_vector_of_weight_zero_does_not_count():
    result = merge([A, 0 * A], weight=[1, 0], nuslerp_magnitude="geometric")
    torch.testing.assert_close(result, A)


def test_other_magnitudes_are_refused():
    with pytest.raises(ValidationError, match="nuslerp_magnitude|geometric"):
        merge([A, B], nuslerp_magnitude="euclidean")


def test_coefficients_beyond_float32_of_bfloat16_vectors():
    a, b = torch.tensor([[1e8, 0], [0, 1e-12]], dtype=torch.bfloat16)
    result = merge([a, b], weight=[2, -1], nuslerp_magnitude="geometric")
    # SLERP a quarter turn beyond a, so opposite to b.
    length = a.double().norm() ** 2 / b.double().norm()
    expected = torch.tensor([0, -length])
    torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-6 * length)


@pytest.mark.parametrize("magnitude", ["slerp", "linear", "geometric"])
def test_vectors_without_a_mean_are_merged_linearly(magnitude):
    result = merge([A, -2 * A], nuslerp_magnitude=magnitude)
    torch.testing.assert_close(result, (2 - 2 * 5) / 7 * A)
    zero = torch.zeros_like(A)
    assert merge([zero, zero], nuslerp_magnitude=magnitude).equal(zero)


def test_karcher_is_nuslerp_of_linear_magnitude():
    parameters = {"weight": [1, 1, 1], "nuslerp_magnitude": "linear"}
    result = merge_tensors([A, B, C], "nuslerp", parameters=parameters)
    torch.testing.assert_close(result, merge_tensors([A, B, C], "karcher"))


def test_lambda_scales_the_merged_task_vector():
    whole = merge([A, B], BASE)
    scaled = merge([A, B], BASE, **{"lambda": 0.3})
    torch.testing.assert_close(scaled - BASE, 0.3 * (whole - BASE))


def test_lambda_needs_a_base():
    with pytest.raises(ValueError, match="lambda.*base"):
        merge([A, B], **{"lambda": 0.3})


def test_an_argument_lambda_with_an_underscore_is_parameter_lambda():
    @merge_method(name="scaled")
    def scaled(
        group: TensorGroup, lambda_: float, other_: float = 1, form: float = 1
    ) -> torch.Tensor:
        return lambda_ * other_ * form * group.tensors[0]

    assert [p.name for p in scaled.spec.parameters] == ["lambda", "other_", "form"]
    parameters = {"lambda": 2, "other_": 3, "form": 5}
    (result,) = scaled([TensorGroup.from_tensors([A])], parameters=parameters)
    torch.testing.assert_close(result, 30 * A)
    assert "lambda" in {p.name for p in merge_methods.get("nuslerp").spec.parameters}
