# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The two functions of each pass, whether they agree, and what only one can do."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cases import (
    DTYPES,
    WEIGHTS,
    Subclass,
    all_dtypes,
    all_granularities,
    all_magnitudes,
    fit,
    models,
    need_native,
    negated,
    normal,
    rows_or_columns,
    rows_with_faults,
    sliced,
    transposed,
    two_or_three,
    whole_numbers,
    with_and_without_base,
)
from cases import one_thread as one_thread
from oracle import assert_rounded_once

from mergekit_nuslerp import nuslerp, passes
from mergekit_nuslerp.granularity import ROW_COLUMN
from mergekit_nuslerp.kernel import merge_batch
from mergekit_nuslerp.passes import native, portable

pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

# Stored and working dtypes that a merge uses.
NARROW = [(dtype, torch.float32) for dtype in DTYPES[:2]]
TYPES = NARROW + [(dtype, torch.float64) for dtype in DTYPES]
all_types = pytest.mark.parametrize(("stored", "working"), TYPES, ids=str)


@pytest.fixture(params=[native, portable], ids=["native", "portable"])
def one_pass(request: pytest.FixtureRequest) -> ModuleType:
    if request.param is native:
        need_native()
    return request.param


# --- which of them serves --------------------------------------------------------


@all_dtypes
def test_the_native_pass_serves_contiguous_weights_on_the_cpu(dtype):
    need_native()
    tensors = [normal(6, 8, dtype=dtype), normal(13, 8, dtype=dtype)[7:]]
    assert passes.choose(tensors) is native
    assert passes.choose([tensors[0], torch.nn.Parameter(tensors[1]).data]) is native
    with torch.no_grad():
        assert passes.choose([torch.nn.Parameter(x) for x in tensors]) is native


def test_the_portable_pass_serves_all_others(monkeypatch):
    plain = normal(6, 8)
    others = [layout(plain) for layout in (transposed, sliced, negated)]
    others += [plain.float(), plain.to("meta"), plain.as_subclass(Subclass)]
    for other in (*others, torch.nn.Parameter(plain)):
        assert passes.choose([plain, other]) is portable
        assert passes.choose([other, plain]) is portable
    monkeypatch.setenv("MERGEKIT_NUSLERP", "portable")
    assert passes.choose([plain, plain]) is portable


# --- what they return ------------------------------------------------------------


def exact_gram(vectors: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.stack([vector.double() for vector in vectors])
    return torch.einsum("molid,nolid->oimn", wide, wide)


# Views that end just before, at and just after what native.cpp cuts them at: registers,
# tiles (64 to 1024 elements, 16 rows), blocks (2^16 elements, 64 rows, 16 parts).
TAILS = [0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129]
VIEWS = {
    "short": [(1, 1, 1, n) for n in range(1, 71)],
    "tile": [(1, 1, 1, n + d) for n in (512, 896, 1024, 1344) for d in (-1, 0, 1)],
    "block": [(1, 1, 1, m * 2**16 + d) for m in (1, 2) for d in (-1, 0, 1, 64)],
    "blocks of rows": [(2 * 936 + 1, 1, 1, 70), (65, 1, 1, 1025), (3, 2, 1, 33000)],
    "rows": [(1, n, 5, 1) for n in TAILS[1:]],
    "parts": [(2, 64 * n + d, 3, 1) for n in (3, 4, 16, 17) for d in (-1, 0, 1)],
    "columns": [(1, 18, n, 1) for n in (*TAILS[5:], 191, 193, 1023, 1024, 1025, 2050)],
    "widths": [(2, 18, 3, n) for n in (*TAILS[2:], 1023, 1024, 1025, 2050)],
    "many widths": [(1, 130, 200, n) for n in (3, 7, 50)],
}


@all_types
@pytest.mark.parametrize("kind", VIEWS)
def test_any_size_of_view_is_summed_and_written_in_full(
    one_pass, stored, working, kind
):
    """Of whole numbers, which no order of sums can round; also as inner slices."""
    for n, shape in enumerate(VIEWS[kind]):
        count, with_base = (2, 3, 8, 2)[n % 4], n % 3 > 0
        outer, length, inner, width = shape
        whole = [
            whole_numbers(outer, length, inner + 2, width, seed=seed, dtype=stored)
            for seed in range(count + 1)
        ]
        for part in (None, slice(0, inner), slice(1, inner + 1)):
            inputs = [x[:, :, :inner].contiguous() for x in whole]
            out = torch.full(whole[0].shape, math.nan, dtype=stored)
            if part is not None:  # not contiguous as a whole
                inputs = [x[:, :, part] for x in whole]
            target = out[:, :, part] if part is not None else inputs[0] * math.nan
            base = inputs.pop() if with_base else None
            inputs, origin = inputs[:count], 0 if base is None else base.double()
            moved = [x.double() - origin for x in inputs]
            gram = one_pass.gram(inputs, base, working)
            assert gram.equal(exact_gram(moved)), shape
            coefficients = whole_numbers(outer, inner, count, seed=9).double() / 4
            expected = origin + sum(
                coefficients[..., m].unsqueeze(1).unsqueeze(-1) * x
                for m, x in enumerate(moved)
            )
            assert one_pass.combine(inputs, base, coefficients, target, working)
            assert target.equal(expected.to(stored)), shape
            if part is not None:
                rest = [n for n in range(inner + 2) if not part.start <= n < part.stop]
                assert out[:, :, rest].isnan().all()


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 2**25 + 3),
        (2**13 + 1, 1, 1, 2**12),
        (2**13 + 1, 1, 2**12, 1),
        (1, 2**15 + 1, 2**10, 1),
        (1, 2**12 + 1, 4, 2**11),
        (1, 1, 3, 2**24),
    ],
)
def test_views_of_more_elements_than_one_call_takes(one_pass, shape):
    ones = torch.ones(shape, dtype=torch.bfloat16)
    last = torch.zeros_like(ones)
    last.view(-1)[-2:] = torch.tensor([3.0, 4.0])
    gram = one_pass.gram([ones, last], None, torch.float32)
    outer, length, inner, width = shape
    assert (gram[..., 0, 0] == length * width).all()
    together = width > 1
    assert gram[-1, -1, 1].tolist() == ([7, 25] if together else [4, 16])
    assert gram.count_nonzero() == outer * inner + (3 if together else 6)
    coefficients = torch.full((outer, inner, 2), 2.0, dtype=torch.float64)
    out = torch.empty_like(ones)
    assert one_pass.combine([ones, last], None, coefficients, out, torch.float32)
    assert out.view(-1)[-2:].tolist() == [8, 10]
    out.view(-1)[-2:] = 2
    assert (out == 2).all()


RANDOM = [(1, 1, 1, 70001), (300, 1, 1, 257), (2, 300, 97, 1), (1, 100, 7, 130)]


@all_types
@with_and_without_base
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 5, 7),
        (3, 1, 4, 70),
        (1, 1, 3, 1030),
        (1, 1, 1, 65),
        (2, 7, 5, 1),
        (1, 40, 1030, 1),
        (1, 130, 1, 1),
        (2, 3, 1, 1),
    ],
    ids=str,
)
def test_factors_of_rows_multiply_coefficients(
    one_pass, stored, working, with_base, shape
):
    """Of whole numbers, which nothing rounds; also of every other row or column."""
    outer, length, inner, width = shape
    whole = [
        whole_numbers(outer, length, inner + 1, width, seed=seed, dtype=stored)
        for seed in range(4)
    ]
    coefficients = whole_numbers(outer, inner, 3, seed=8).double() / 2
    rows = whole_numbers(outer, length, 3, seed=9).double() / 2
    given = (coefficients[:, None, :, None], rows[:, :, None, None])
    for inputs, out in (
        ([x[:, :, 1:].contiguous() for x in whole], torch.empty(shape, dtype=stored)),
        ([x[:, :, 1:] for x in whole], torch.empty_like(whole[0])[:, :, 1:]),
    ):
        base = inputs.pop() if with_base else None
        inputs, origin = inputs[:3], 0 if base is None else base.double()
        expected = origin + sum(
            given[0][..., m] * given[1][..., m] * (x.double() - origin)
            for m, x in enumerate(inputs)
        )
        assert one_pass.combine(inputs, base, coefficients, out, working, rows)
        assert out.equal(expected.to(stored))


@all_types
@pytest.mark.parametrize("shape", RANDOM, ids=str)
@with_and_without_base
def test_the_passes_agree(stored, working, shape, with_base):
    need_native()
    tensors, base = models(*shape, count=3, with_base=with_base, dtype=stored)
    ours = native.gram(tensors, base, working)
    theirs = portable.gram(tensors, base, working)
    assert ours.equal(ours.mT)
    lengths = theirs.diagonal(dim1=-2, dim2=-1).sqrt()
    off = (ours - theirs) / lengths.unsqueeze(-1) / lengths.unsqueeze(-2)
    assert off.abs().max() <= (1e-6 if working == torch.float32 else 1e-13)
    coefficients = normal(shape[0], shape[2], 3, seed=9)
    results = [torch.empty_like(tensors[0]) for _ in range(2)]
    for one, out in zip((native, portable), results):
        assert one.combine(tensors, base, coefficients, out, working)
    ours, theirs = (result.double() for result in results)
    terms = 30 * torch.finfo(working).eps
    rounding = torch.finfo(stored).eps * theirs.abs()
    assert ((ours - theirs).abs() <= rounding + terms).all()
    if stored.itemsize < working.itemsize:
        assert (ours != theirs).double().mean() < 1e-3


# --- float16 and bfloat16, in and out --------------------------------------------


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype)


# Each number a vector, or an element of one, along memory and across it.
LAYOUTS = [(-1, 1, 1, 1), (1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 64, 1)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("working", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_narrow_number_is_read_and_written_as_it_is(
    one_pass, dtype, working, layout
):
    numbers = all_numbers(dtype).reshape(layout)
    outer, _, inner, _ = numbers.shape
    ones = torch.ones(outer, inner, 1, dtype=torch.float64)
    out = torch.empty_like(numbers)
    assert not one_pass.combine([numbers], None, ones, out, working)
    finite = numbers.isfinite()
    assert out[finite].equal(numbers[finite])
    nonzero = finite & (numbers != 0)
    assert out.view(torch.int16)[nonzero].equal(numbers.view(torch.int16)[nonzero])
    assert out[~finite].isnan().equal(numbers[~finite].isnan())
    assert (out.isinf() == numbers.isinf()).all()
    if numbers.numel() == outer * inner:
        gram = one_pass.gram([numbers], None, torch.float64)[..., 0, 0]
        squares = numbers.double().view(gram.shape).square()
        torch.testing.assert_close(gram, squares, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", [(-1, 1, 1, 1), (1, 1, -1, 1)], ids=str)
def test_results_are_rounded_to_the_nearest_number_and_ties_to_even(
    one_pass, dtype, layout
):
    """Between all neighbours, subnormal ones and the largest included."""
    numbers = all_numbers(dtype)
    numbers = numbers[numbers.isfinite()].double().unique()
    middle = (numbers[:-1] + numbers[1:]) / 2
    even = (numbers[:-1].to(dtype).view(torch.int16) & 1 == 0) & (numbers[:-1] != 0)
    even |= numbers[1:].to(dtype).view(torch.int16) & 1 == 1
    ties = torch.where(even, numbers[:-1], numbers[1:])
    below, above = (
        middle.float().nextafter(torch.tensor(x)) for x in (-math.inf, math.inf)
    )
    wanted = [(middle, ties), (below, numbers[:-1]), (above, numbers[1:])]
    for values, expected in wanted:
        ones = torch.ones(len(values), dtype=dtype).view(layout)
        factors = values.double().view(ones.shape[0], ones.shape[2], 1)
        out = torch.empty_like(ones)
        assert one_pass.combine([ones], None, factors, out, torch.float32)
        assert out.double().flatten().equal(expected)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_what_is_beyond_the_largest_number_is_reported(one_pass, dtype, layout):
    number = torch.finfo(dtype)
    limit = number.max * (1 + number.eps / 4 / (1 - number.eps / 2))
    ones = torch.ones(130, dtype=dtype).reshape(layout)
    outer, _, inner, _ = ones.shape
    out = torch.empty_like(ones)
    for factor, fits in ((1 - number.eps / 99, True), (1 + number.eps / 99, False)):
        for sign in (1, -1):
            size = sign * limit * factor
            factors = torch.ones(outer, inner, 1, dtype=torch.float64)
            factors.view(-1)[-1] = size
            finite = one_pass.combine([ones], None, factors, out, torch.float64)
            assert finite == fits
            assert out.view(-1)[-1] == (sign * number.max if fits else sign * math.inf)


@pytest.mark.parametrize("place", [0, 2**20, -1])
def test_a_result_that_is_infinite_is_reported_wherever_it_is(one_pass, place):
    """Of a view that is worked on in several parts."""
    ones = torch.ones(1, 2**11, 1, 2**10, dtype=torch.bfloat16)
    factors, out = torch.full((1, 1, 1), 2.0, dtype=torch.float64), ones.clone()
    assert one_pass.combine([ones], None, factors, out, torch.float32)
    ones.view(-1)[place] = torch.finfo(ones.dtype).max
    assert not one_pass.combine([ones], None, factors, out, torch.float32)


# --- memory ----------------------------------------------------------------------


def kibibytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.fixture(scope="module")
def large_models() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2**20, generator=generator).bfloat16()
    return [base.repeat(32), base.flip(0).repeat(32)]


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no large pages to ask for",
)
def test_large_results_are_in_memory_for_large_pages(one_pass, monkeypatch):
    if one_pass is portable:
        monkeypatch.setenv("MERGEKIT_NUSLERP", "portable")
    result = nuslerp([torch.ones(2**25, dtype=torch.bfloat16)] * 2, [1, 1])
    maps = Path("/proc/self/smaps").read_text()
    for start, stop, flags in re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", maps, re.M | re.S
    ):
        if int(start, 16) <= result.data_ptr() + result.nbytes // 2 < int(stop, 16):
            assert "hg" in flags.split()
            return
    pytest.fail("the result is in no mapping")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory counters"
)
@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        ("tensor", (4096, 8192)),
        ("row", (4096, 8192)),
        ("column", (4096, 8192)),
        ("column:4", (4096, 8192)),
        ("matrix", (2048, 128, 128)),
        ("row", (2**22, 8)),
        ("column", (8, 2**22)),
        ("row*column", (4096, 8192)),
        ("row*column", (8192, 4096)),
        ("row*column", (2048, 128, 128)),
        ("row*column", (2**18, 128)),
        ("row*column", (128, 2**18)),
        ("row^2", (2**18, 128)),
        ("row*column^2", (4096, 8192)),
        ("row^2", (4096, 8192)),
        ("column^2", (4096, 8192)),
    ],
)
def test_memory_beyond_the_result_is_bounded(
    one_pass, large_models, granularity, shape, monkeypatch
):
    """By 16 MiB, and the coefficients of all vectors where they are compared."""
    if one_pass is portable:
        monkeypatch.setenv("MERGEKIT_NUSLERP", "portable")
    granularity, _, contrast = granularity.partition("^")
    options = {"granularity": granularity, "contrast": float(contrast or 1)}
    tensors = [tensor.view(shape) for tensor in large_models]
    nuslerp([torch.ones(2, 2)] * 2, [1, 1])  # what a process needs once
    Path("/proc/self/clear_refs").write_text("5")
    before = kibibytes("VmRSS")
    result = nuslerp(tensors, [0.3, 0.7], **options)
    most = result.nbytes + 16 * 2**20
    if granularity == ROW_COLUMN or contrast:
        *matrices, rows, columns = shape
        vectors = math.prod(matrices) * (rows + columns)
        most += 8 * len(tensors) * vectors
    assert 1024 * (kibibytes("VmHWM") - before) <= most


# --- gradients, which the portable pass records ----------------------------------


@pytest.mark.parametrize(
    ("count", "weights"),
    [(2, (0.3, 0.7)), (2, (2, -1)), (3, WEIGHTS[3]), (8, WEIGHTS[8])],
    ids=str,
)
@all_granularities
@all_magnitudes
@with_and_without_base
def test_gradients_agree_with_finite_differences(
    count, weights, granularity, magnitude, with_base
):
    weights = fit(weights, granularity)
    tensors, base = models(4, 8, count=count, with_base=with_base)
    if count == 2 and magnitude != "slerp" and weights[1] < 0:
        tensors[1] *= 0.3  # or the length would be cut off at zero
    inputs = tensors if base is None else [*tensors, base]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def merge(*inputs: torch.Tensor) -> torch.Tensor:
        return nuslerp(
            inputs[:count],
            weights,
            base=inputs[count] if with_base else None,
            granularity=granularity,
            magnitude=magnitude,
            lambda_=0.6 if with_base else 1.0,
        )

    assert torch.autograd.gradcheck(merge, inputs, fast_mode=True)


@all_granularities
@two_or_three
def test_a_gradient_for_one_input_alone(granularity, count):
    tensors, base = models(4, 8, count=count)
    for place in range(count + 1):

        def merge(x, place=place):
            inputs = [*tensors, base]
            inputs[place] = x
            options = {"base": inputs.pop(), "granularity": granularity}
            return nuslerp(inputs, WEIGHTS[count], **options)

        wanted = [*tensors, base][place].clone().requires_grad_()
        assert torch.autograd.gradcheck(merge, [wanted], fast_mode=True)


@all_granularities
@all_magnitudes
@two_or_three
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recording_a_gradient_does_not_change_the_merge(
    granularity, magnitude, count, dtype
):
    tensors, base = models(6, 8, count=count, dtype=dtype)
    tensors[0].requires_grad_()
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    result = nuslerp(tensors, WEIGHTS[count], **options)
    assert result.requires_grad
    assert_rounded_once(result, tensors, WEIGHTS[count], **options)


@rows_or_columns
def test_gradients_of_more_vectors_than_are_merged_at_once(granularity):
    shape = (9000, 3) if granularity == "row" else (3, 9000)
    tensors, base = models(2, *shape)
    inputs = [tensor.requires_grad_() for tensor in (*tensors, base)]
    weights = torch.tensor([[0.3, 0.7], [1, 1]])
    options = {"base": base, "granularity": granularity}
    merge_batch(inputs[:2], weights, **options).result.sum().backward()
    assert all((tensor.grad != 0).any(dim=0).all() for tensor in inputs)


@all_magnitudes
@rows_or_columns
@with_and_without_base
@two_or_three
def test_gradients_of_vectors_with_faults(magnitude, granularity, with_base, count):
    tensors = rows_with_faults(count)
    base = whole_numbers(7, 12, seed=9).double() if with_base else None
    if base is not None:
        tensors = [base + tensor for tensor in tensors]
    if granularity == "column":
        tensors = [tensor.T.contiguous() for tensor in tensors]
        base = None if base is None else base.T.contiguous()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    options = {"base": base, "granularity": granularity, "magnitude": magnitude}
    nuslerp(tensors, WEIGHTS[count], **options).sum().backward()
    for n, tensor in enumerate(tensors):
        grad = tensor.grad if granularity == "row" else tensor.grad.T
        assert grad.isfinite().all()
        # Where there is no mean: exactly the coefficients of the straight line.
        linear = torch.full_like(grad[[2, 6]], WEIGHTS[count][n])
        torch.testing.assert_close(grad[[2, 6]], linear, rtol=1e-12, atol=1e-12)
        if magnitude == "slerp":
            torch.testing.assert_close(grad[1], linear[0], rtol=1e-12, atol=1e-12)
        # A zero vector counts as at a right angle whichever way it is about to go.
        for row in (5, 3 if n == 0 else 4):
            assert grad[row].equal(grad[row, :1].expand(12))
        if count == 2 and magnitude == "slerp":
            right = torch.full_like(grad[3:6], math.sin(WEIGHTS[2][n] * math.pi / 2))
            torch.testing.assert_close(grad[3:6], right, rtol=1e-12, atol=1e-12)


@all_granularities
def test_gradients_reach_narrow_inputs(granularity):
    tensors, base = models(6, 8, dtype=torch.bfloat16)
    narrow = [tensor.requires_grad_() for tensor in (*tensors, base)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    for a, b, origin in (narrow, wide):
        result = nuslerp([a, b], [0.3, 0.7], base=origin, granularity=granularity)
        result.double().square().sum().backward()
    for tensor, exact in zip(narrow, wide):
        assert tensor.grad.dtype == torch.bfloat16
        difference = (tensor.grad.double() - exact.grad).norm()
        assert difference <= 2**-7 * exact.grad.norm()


@all_granularities
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.bfloat16, -100), (torch.bfloat16, 100), (torch.float32, -100)],
    ids=str,
)
def test_gradients_do_not_depend_on_the_scale(granularity, dtype, exponent):
    gradients = []
    for scale in (1, 2.0**exponent):
        tensors, base = models(6, 8, dtype=dtype)
        inputs = [(scale * tensor).requires_grad_() for tensor in (*tensors, base)]
        options = {"base": inputs[2], "granularity": granularity}
        nuslerp(inputs[:2], [0.3, 0.7], **options).sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for ordinary, scaled in zip(*gradients):
        torch.testing.assert_close(scaled, ordinary)


@all_granularities
def test_function_transforms_in_reverse_mode_are_right(granularity):
    (a, b), base = models(6, 8)

    def merge(x: torch.Tensor) -> torch.Tensor:
        return nuslerp([x, b], [0.3, 0.7], base=base, granularity=granularity)

    x = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(merge(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: merge(x).sum())(a), expected)
    value, pull = torch.func.vjp(merge, a)
    torch.testing.assert_close(value, merge(a))
    torch.testing.assert_close(pull(torch.ones_like(a))[0], expected)


@pytest.mark.parametrize("has_float64", [False, True])
def test_the_widest_dtype_of_a_device(monkeypatch, has_float64):
    properties = SimpleNamespace(has_fp64=has_float64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    expected = torch.float64 if has_float64 else torch.float32
    assert portable.wide_dtype(torch.device("xpu")) == expected
    assert portable.wide_dtype(torch.device("mps")) == torch.float32
    assert portable.wide_dtype(torch.device("cpu")) == torch.float64


def test_derivatives_of_second_order():
    """Of two models they are right, and of three refused."""
    a, b, c = (x.requires_grad_() for x in normal(3, 2, 3))
    assert torch.autograd.gradgradcheck(lambda *x: nuslerp(x, [0.3, 0.7]), (a, b))
    result = nuslerp([a, b, c], [0.3, 0.7, 0.5]).square().sum()
    (gradient,) = torch.autograd.grad(result, a, create_graph=True)
    with pytest.raises(NotImplementedError, match="second"):
        gradient.sum().backward()


def test_derivatives_in_forward_mode_are_refused():
    a, b = normal(2, 6, 8)
    for merge in (
        lambda x: nuslerp([x, b], [0.3, 0.7]),
        lambda x: nuslerp([a, b, x], [0.3, 0.7, 0.5]),
        lambda x: nuslerp([a, b], [0.3, 0.7], base=x),
    ):
        with pytest.raises(NotImplementedError, match="forward"):
            torch.func.jvp(merge, (a,), (b,))
