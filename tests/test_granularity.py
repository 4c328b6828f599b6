# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements form one vector: in the view that the kernel sums over, and merged."""

import re
from math import prod

import pytest
import torch
from oracle import assert_rounded_once, granularities, vectors

from mergekit_nuslerp import nuslerp
from mergekit_nuslerp.granularity import as_stored, from_flags, vector_view

# Where vectors happen to have no unique mean, that is looked at as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*no unique spherical mean")

GRANULARITIES = ["tensor", "matrix", "row", "column", "dim0"]
SHAPES = [(), (5,), (1,), (3, 4), (1, 4), (3, 1), (2, 3, 4), (2, 3, 4, 5)]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


def viewed(weights: torch.Tensor, granularity: str) -> list[list[int]]:
    """The vectors of a batch of weights as the kernel sees them."""
    view = weights.reshape(vector_view(weights.shape, granularity))
    outer, _, inner, _ = view.shape
    return [
        view[o, :, i, :].flatten().tolist() for o in range(outer) for i in range(inner)
    ]


# --- the view --------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_view_holds_the_vectors_of_each_weight(batch, shape):
    weights = numbered(batch, *shape)
    for granularity in granularities(shape):
        expected = [
            weight[index].flatten().tolist()
            for weight in weights
            for index in vectors(shape, granularity)
        ]
        assert viewed(weights, granularity) == expected


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("tensor", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("matrix", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("row", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("column", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("row:1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("row:2", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("column:1", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("column:2", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("dim0", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_two_experts_of_two_by_two(granularity, expected):
    assert viewed(numbered(1, 2, 2, 2), granularity) == expected


@pytest.mark.parametrize("shape", [(), (1,), (6,)])
def test_a_bias_is_one_vector_even_where_blocks_would_not_divide_it(shape):
    for granularity in (*GRANULARITIES, "row:128", "column:4"):
        assert viewed(numbered(1, *shape), granularity) == [list(range(prod(shape)))]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 4), (2, 3, 0), (0, 3, 4)])
def test_empty_weights_have_a_view(shape, granularity):
    weights = torch.empty(shape)
    assert weights.reshape(vector_view(shape, granularity)).numel() == 0


@pytest.mark.parametrize(
    "granularity",
    [
        "Row",
        "rows",
        "",
        "row:",
        "row:0",
        "row:-1",
        "row:1.5",
        "row:x",
        "matrix:2",
    ],
)
def test_an_unknown_granularity_is_refused(granularity):
    for shape in ((1, 3, 4), (1, 4)):
        with pytest.raises(ValueError, match="granularity"):
            vector_view(shape, granularity)


@pytest.mark.parametrize(
    ("granularity", "size", "neighbours"),
    [
        ("row:100", 768, (96, 128)),
        ("row:1000", 768, (768,)),
        ("column:128", 1344, (112, 168)),
        ("column:2", 7, (1, 7)),
    ],
)
def test_blocks_that_do_not_divide_name_the_size_and_the_divisors_around(
    granularity, size, neighbours
):
    shape = (1, 2, size, 5) if granularity.startswith("row") else (1, 2, 5, size)
    with pytest.raises(ValueError) as caught:
        vector_view(shape, granularity)
    assert {size, *neighbours} <= set(map(int, re.findall(r"\d+", str(caught.value))))


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_flags_mean_what_they_mean_to_mergekit(flatten, row_wise):
    weight = numbered(2, 3, 4)
    if flatten:
        expected = weight.reshape(1, -1)
    else:
        # mergekit moves the dimension that it sums over to the end.
        dim = 0 if row_wise else -1
        expected = weight.movedim(dim, -1).flatten(0, -2)
    granularity = from_flags(flatten=flatten, row_wise=row_wise)
    assert viewed(weight[None], granularity) == expected.tolist()


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 3, 2, 1), (0, 2, 1, 3), (0, 2, 3, 1)]
)
def test_a_permuted_batch_is_read_as_it_lies(order):
    batch = numbered(2, 3, 4, 5).permute(order)
    assert batch.permute(as_stored([batch], "tensor")[0]).is_contiguous()
    matrices = numbered(2, 3, 4, 5).transpose(2, 3)
    assert matrices.permute(as_stored([matrices], "matrix")[0]).is_contiguous()


def test_vectors_are_kept_apart():
    batch = torch.empty(6, 4, 3, 2).permute(3, 2, 1, 0)  # the batch is fastest
    assert as_stored([batch], "tensor")[0][0] == 0
    assert as_stored([batch], "matrix")[0][:2] == [0, 1]
    for granularity in ("row", "column", "row:2", "column:2"):
        assert as_stored([batch], granularity)[0][:2] == [0, 1]
    assert as_stored([batch], "dim0") == ([0, 1, 2, 3], "dim0")


@pytest.mark.parametrize("granularity", ["column", "column:2", "row", "row:2"])
def test_nothing_is_copied_to_read_it_as_it_lies(granularity):
    """As slices, expanded weights and weights that lie differently would have to be."""
    lies, plain = torch.zeros(2, 6, 4).mT, torch.zeros(2, 4, 6)
    slices = torch.zeros(2, 7, 9)[:, :6, :4].mT
    expanded = torch.zeros(2, 4, 1).expand(2, 4, 6)
    for tensors in ([lies, lies], [lies, plain], [slices], [lies, slices], [expanded]):
        order, stored = as_stored(tensors, granularity)
        assert order in ([0, 1, 2], [0, 2, 1])
        for tensor in tensors:
            if order == [0, 2, 1]:
                tensor.permute(order).view(
                    vector_view(tensor.permute(order).shape, stored)
                )
    assert as_stored([lies, lies], granularity)[0] == [0, 2, 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_stored_vectors_are_those_of_the_weight(batch, shape):
    """Also in their order, but for elements within a vector."""
    weights = numbered(batch, *shape)
    if len(shape) > 1:
        weights = numbered(batch, *shape[:-2], shape[-1], shape[-2]).mT
    for granularity in granularities(shape):
        order, stored = as_stored([weights], granularity)
        found = viewed(weights.permute(order), stored)
        expected = viewed(weights, granularity)
        assert [sorted(vector) for vector in found] == [sorted(v) for v in expected]


def test_a_block_is_refused_in_the_words_it_was_given_in():
    with pytest.raises(ValueError, match=r"'row:4' does not divide 6 rows"):
        nuslerp([torch.zeros(3, 6).t()] * 2, [1, 1], granularity="row:4")


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_expanded_weights_are_taken(shape):
    batch = torch.zeros(1, *(1 for _ in shape[1:])).expand(shape)
    for granularity in GRANULARITIES:
        order, _ = as_stored([batch], granularity)
        assert order[0] == 0
        assert sorted(order) == list(range(len(shape)))


# --- merges ----------------------------------------------------------------------

WEIGHTS = {2: [0.3, 0.7], 3: [0.5, 0.2, 0.3]}
any_number = pytest.mark.parametrize("count", WEIGHTS)
all_magnitudes = pytest.mark.parametrize("magnitude", ["slerp", "linear", "geometric"])


def models(count: int, *shape: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Weights and a base near them, all of whose vectors differ in length."""
    generator = torch.Generator().manual_seed(0)
    base, *others = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(count + 1)
    )
    stretch = torch.rand(shape, generator=generator, dtype=torch.float64)
    others = [base + other * stretch**n for n, other in enumerate(others)]
    return others, base


@any_number
@all_magnitudes
@pytest.mark.parametrize(
    ("granularity", "heads", "axis"),
    [("row:128", 3, -2), ("column:128", 3, -1), ("row", 384, -2)],
)
@pytest.mark.parametrize("experts", [(), (2,)])
def test_a_head_is_merged_as_if_it_were_alone(
    count, magnitude, granularity, heads, axis, experts
):
    sizes = (384, 16) if axis == -2 else (16, 384)
    tensors, base = models(count, *experts, *sizes)
    merged = nuslerp(
        tensors,
        WEIGHTS[count],
        base=base,
        granularity=granularity,
        magnitude=magnitude,
    )
    # A few of them, cut out of every model, merged as whole tensors.
    for head in {0, heads // 2, heads - 1}:
        for expert in range(2) if experts else [...]:
            *alone, origin = (
                tensor[expert].tensor_split(heads, axis)[head]
                for tensor in (*tensors, base)
            )
            expected = nuslerp(alone, WEIGHTS[count], base=origin, magnitude=magnitude)
            found = merged[expert].tensor_split(heads, axis)[head]
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@any_number
@all_magnitudes
def test_experts_are_merged_each_on_its_own(count, magnitude):
    tensors, base = models(count, 4, 6, 8)
    for granularity in granularities((6, 8)):
        if granularity in ("tensor", "dim0"):
            continue
        kwargs = {"granularity": granularity, "magnitude": magnitude}
        merged = nuslerp(tensors, WEIGHTS[count], base=base, **kwargs)
        for expert in range(4):
            alone = nuslerp(
                [tensor[expert] for tensor in tensors],
                WEIGHTS[count],
                base=base[expert],
                **kwargs,
            )
            torch.testing.assert_close(merged[expert], alone, rtol=1e-13, atol=1e-13)


@any_number
def test_granularities_that_mean_the_same_for_a_matrix(count):
    tensors, base = models(count, 6, 8)

    def merged(granularity: str) -> torch.Tensor:
        return nuslerp(tensors, WEIGHTS[count], base=base, granularity=granularity)

    groups = [
        ("tensor", "matrix", "row:6", "column:8"),
        ("row", "row:1"),
        ("column", "column:1", "dim0"),
        ("row:2",),
        ("row:3",),
        ("column:2",),
        ("column:4",),
    ]
    for first, *others in groups:
        for other in others:
            torch.testing.assert_close(
                merged(other), merged(first), rtol=1e-13, atol=1e-13
            )
    for n, (first, *_) in enumerate(groups):
        for other, *_ in groups[:n]:
            assert not torch.allclose(merged(first), merged(other))


@any_number
def test_transposing_a_matrix_swaps_rows_and_columns(count):
    tensors, base = models(count, 6, 8)
    for size in ("", ":2"):
        rows = nuslerp(tensors, WEIGHTS[count], base=base, granularity=f"row{size}")
        columns = nuslerp(
            [tensor.T for tensor in tensors],
            WEIGHTS[count],
            base=base.T,
            granularity=f"column{size}",
        )
        torch.testing.assert_close(columns.T, rows, rtol=1e-13, atol=1e-13)


@any_number
@pytest.mark.parametrize("shape", [(), (7,), (1, 12), (12, 1), (6, 8), (2, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_granularity_is_the_oracle_rounded_once(count, shape, dtype):
    tensors, base = models(count, *shape)
    *tensors, base = (tensor.to(dtype) for tensor in (*tensors, base))
    for granularity in granularities(shape):
        merged = nuslerp(tensors, WEIGHTS[count], base=base, granularity=granularity)
        assert (merged.shape, merged.dtype) == (torch.Size(shape), dtype)
        assert_rounded_once(merged, tensors, WEIGHTS[count], base, granularity)


def test_blocks_that_do_not_divide_are_refused_before_anything_is_merged():
    tensors, base = models(2, 6, 8)
    tensors[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="granularity") as caught:
        nuslerp(tensors, [1, 1], base=base, granularity="row:4")
    assert "6" in str(caught.value)
