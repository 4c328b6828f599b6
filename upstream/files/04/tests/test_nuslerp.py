# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit.merge_methods import merge_tensors, spherical


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


@pytest.mark.parametrize(
    "scale,dtype", [(1e-9, torch.float64), (1e-25, torch.bfloat16)]
)
def test_short_vectors_are_merged_at_their_own_angle(scale, dtype):
    a, b, _ = random(20)
    a, b = (scale * a).to(dtype), (scale * (a + b)).to(dtype)
    expected = exact(0.7, a.double() / scale, b.double() / scale)
    result = merge([a, b], [0.3, 0.7]).double() / scale
    tolerance = {"rtol": 1e-2, "atol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(result, expected, **tolerance)


def test_small_coefficients_of_bfloat16_vectors_keep_their_digits():
    a, b = torch.tensor([[1, 0], [0, 1e18]], dtype=torch.bfloat16)
    expected = exact(1e-44, a, b).bfloat16()
    assert merge([a, b], [1, 1e-44]).equal(expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
@pytest.mark.parametrize("flatten", [False, True])
def test_empty_tensors(shape, flatten):
    tensors = random(*shape)
    result = merge(tensors[:2], [1, 1], tensors[2], nuslerp_flatten=flatten)
    assert result.shape == shape and result.dtype == tensors[0].dtype


@pytest.mark.parametrize("element", [float("nan"), float("inf")])
def test_no_number_of_a_vector_that_is_not_finite_is_written(element):
    a, b, _ = random(3, 4, dtype=torch.bfloat16)
    a[1, 2] = element
    result = merge([a, b], [1, 1], nuslerp_flatten=False)
    assert result.isnan().all(1).tolist() == [False, True, False]
    assert result[::2].equal(merge([a[::2], b[::2]], [1, 1], nuslerp_flatten=False))
    assert merge([a, b], [1, 1]).isnan().all()


def cut_small(monkeypatch):
    """Two vectors at once, and ten of their elements."""
    monkeypatch.setattr(spherical, "_BYTES_CPU", 200)
    monkeypatch.setattr(spherical, "_GRAM_ENTRIES", 8)


@pytest.mark.parametrize(
    "flatten,row_wise", [(True, False), (False, False), (False, True)]
)
@pytest.mark.parametrize("has_base", [False, True])
def test_chunks_change_nothing(monkeypatch, flatten, row_wise, has_base):
    a, b, base = random(12, 10)
    tensors, base = [a, b], base if has_base else None
    options = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    whole = merge(tensors, [0.3, 0.7], base, **options)
    cut_small(monkeypatch)
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


@pytest.mark.parametrize("flatten", [False, True])
def test_derivatives_of_base_and_inputs(flatten):
    def merged(a, b, base):
        return merge([a, b], [0.3, 0.7], base, nuslerp_flatten=flatten)

    tensors = [x.requires_grad_() for x in random(3, 4)]
    assert torch.autograd.gradcheck(merged, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merged, tensors)


class Operations(TorchDispatchMode):
    """How many there are, and the dtypes of what they make."""

    count = 0
    dtypes = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, torch.Tensor) and result.numel() >= 512:
            self.dtypes = {*self.dtypes, result.dtype}
        return result


def test_what_autograd_records_is_not_cut(monkeypatch):
    a, b, base = [x.requires_grad_() for x in random(12, 10)]
    counts = []
    for cut in (lambda _: None, cut_small):
        cut(monkeypatch)
        with Operations() as operations:
            merge([a, b], [0.3, 0.7], base, nuslerp_flatten=False)
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("flatten", [True, False])
def test_gradients_by_a_zero_vector_hold_the_coefficients(flatten):
    a, _, _ = random(4, 20)
    zero, a = (x.requires_grad_() for x in (torch.zeros_like(a), a))
    merge([zero, a], [0.3, 0.7], nuslerp_flatten=flatten).sum().backward()
    for x, t in ((zero, 0.3), (a, 0.7)):
        expected = torch.full_like(x, math.sin(t * math.pi / 2))
        torch.testing.assert_close(x.grad, expected)


def test_gradients_of_a_short_and_a_long_bfloat16_vector():
    a, b, _ = random(20, dtype=torch.bfloat16)
    a, b = 2.0**-38 * a, 2.0**61 * b
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        short = a.to(dtype, copy=True).requires_grad_()
        merge([short, b.to(dtype)], [0.3, 0.7]).sum().backward()
        gradients.append(short.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=0)


@pytest.mark.parametrize("degrees,is_wide", [(170, False), (178, True)])
def test_only_nearly_opposite_bfloat16_vectors_take_float64(degrees, is_wide):
    theta = torch.tensor(degrees).deg2rad()
    a, b, _ = random(1024)
    b -= (a @ b) / (a @ a) * a
    b = theta.cos() * a + theta.sin() * a.norm() / b.norm() * b
    with Operations() as operations:
        merge([a.bfloat16(), b.bfloat16()], [1, 1])
    assert (torch.float64 in operations.dtypes) == is_wide


def test_nearly_opposite_bfloat16_vectors_are_rounded_once():
    a, _, _ = random(4096, dtype=torch.bfloat16)
    b = -a
    b[::100] *= 1.01
    result = merge([a, b], [0.3, 0.7])
    differ = (result != exact(0.7, a, b).bfloat16()).double().mean()
    assert differ <= 0.01


@pytest.mark.parametrize("has_float64", [False, True])
def test_the_widest_dtype_of_a_device(monkeypatch, has_float64):
    properties = SimpleNamespace(has_fp64=has_float64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    expected = torch.float64 if has_float64 else torch.float32
    assert spherical.wide_dtype(torch.device("xpu")) == expected
    assert spherical.wide_dtype(torch.device("mps")) == torch.float32
    assert spherical.wide_dtype(torch.device("cpu")) == torch.float64


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        merge([torch.ones(2, dtype=torch.int64)] * 2, [1, 1])
