# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit.merge_methods import merge_tensors


def exact(t, a, b):
    """SLERP by the textbook, in float64."""
    a, b = a.double(), b.double()
    u, v = a / a.norm(), b / b.norm()
    theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / theta.sin()


def merge(tensors, weight, base=None, **parameters):
    given = tensors if base is None else [*tensors, base]
    return merge_tensors(
        given,
        "nuslerp",
        base_index=None if base is None else len(tensors),
        parameters={"weight": weight, **parameters},
    )


def random(*shape, count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_once(dtype):
    a, b, base = random(64, 96, dtype=dtype)
    a, b = base + 0.02 * a, base + 0.02 * b
    result = merge([a, b], [0.3, 0.7], base)
    a, b, base = a.double(), b.double(), base.double()
    expected = (base + exact(0.7, a - base, b - base)).to(dtype)
    # Float32 sums may move a result across the middle between two numbers.
    differ = (result != expected).double().mean()
    assert differ <= (0.002 if dtype.itemsize == 2 else 0)


def test_angles_keep_their_digits_near_both_ends():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for theta in (1e-6, 1e-4, 3.0, 3.1):
        theta = torch.tensor(theta, dtype=torch.float64)
        b = torch.stack([theta.cos(), theta.sin()])
        middle = torch.stack([(theta / 2).cos(), (theta / 2).sin()])
        torch.testing.assert_close(merge([a, b], [1, 1]), middle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degrees", [172.7, 172.9, 175.0, 179.0])
def test_nearly_opposite_bfloat16_vectors_are_not_merged_linearly(degrees):
    theta = torch.tensor(degrees).deg2rad()
    a = torch.zeros(512)
    b = torch.zeros(512)
    a[:256], b[:256], b[256:] = 1, theta.cos(), theta.sin()
    a, b = a.bfloat16(), b.bfloat16()
    assert merge([a, b], [1, 1]).norm().item() == pytest.approx(16, rel=0.02)


def test_opposite_and_zero_vectors():
    a = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(merge([a, -a], [0.25, 0.75]), -0.5 * a)
    zero = torch.zeros(2)
    torch.testing.assert_close(merge([a, zero], [1, 1]), 0.5**0.5 * a)
    torch.testing.assert_close(merge([zero, zero], [1, 1]), zero)


def test_short_vectors_are_merged_at_their_own_angle():
    a, b, _ = random(20)
    result = merge([1e-9 * a, 1e-9 * b], [0.3, 0.7])
    torch.testing.assert_close(1e9 * result, exact(0.7, a, b))


@pytest.mark.parametrize(
    "flatten,row_wise", [(True, False), (False, False), (False, True)]
)
@pytest.mark.parametrize("has_base", [False, True])
def test_chunks_change_nothing(monkeypatch, flatten, row_wise, has_base):
    a, b, base = random(12, 10)
    tensors, base = [a, b], base if has_base else None
    options = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    whole = merge(tensors, [0.3, 0.7], base, **options)
    monkeypatch.setattr("mergekit.merge_methods.spherical._BYTES_CPU", 200)
    monkeypatch.setattr("mergekit.merge_methods.spherical._GROUP_ELEMENTS", 24)
    torch.testing.assert_close(merge(tensors, [0.3, 0.7], base, **options), whole)


class LargestNew(TorchDispatchMode):
    """The most bytes of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.nbytes)
        return result


@pytest.mark.parametrize("flatten", [False, True])
def test_no_copy_of_an_input_is_made(flatten):
    tensors = random(1024, 2048, dtype=torch.bfloat16)
    a, b, base = tensors
    with LargestNew() as largest:
        merge([a, b], [0.3, 0.7], base, nuslerp_flatten=flatten)
    # The result itself has 4 MiB; an input in float32 has 8.
    assert largest.most == a.nbytes


def test_gradients_of_base_and_inputs():
    tensors = [x.requires_grad_() for x in random(3, 4)]
    for flatten in (False, True):
        assert torch.autograd.gradcheck(
            lambda a, b, base: merge([a, b], [0.3, 0.7], base, nuslerp_flatten=flatten),
            tensors,
        )


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        merge([torch.ones(2, dtype=torch.int64)] * 2, [1, 1])
