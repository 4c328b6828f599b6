# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements form one vector: in the view that the kernel sums over, and merged."""

import re
from math import prod

import pytest
import torch
from cases import WEIGHTS, all_magnitudes, models, two_or_three
from hypothesis import given
from hypothesis import strategies as st
from oracle import granularities, vectors

from mergekit_nuslerp import nuslerp
from mergekit_nuslerp.granularity import pieces, vector_view
from mergekit_nuslerp.parameters import choose_granularity

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
    for granularity in granularities(shape)[:-1]:  # the last has several views
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
    granularity = choose_granularity(
        {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    )
    assert viewed(weight[None], granularity) == expected.tolist()


@given(
    sizes=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    most=st.integers(1, 1500),
)
def test_pieces_cover_a_view_once_in_the_order_of_memory(sizes, most):
    whole = numbered(*sizes)
    parts = [whole[piece] for piece in pieces(sizes, most)]
    assert all(part.numel() <= most for part in parts)
    assert (
        torch.cat([part.flatten() for part in parts]).sort()[0].equal(whole.flatten())
    )
    starts = [int(part.flatten()[0]) for part in parts]
    assert starts == sorted(starts)


def test_pieces_end_where_the_dimension_does():
    assert list(pieces((7,), 3)) == [(slice(0, 3),), (slice(3, 6),), (slice(6, 7),)]
    assert list(pieces((0,), 3)) == []


# --- merges ----------------------------------------------------------------------


@two_or_three
@all_magnitudes
@pytest.mark.parametrize(("granularity", "axis"), [("row:128", -2), ("column:128", -1)])
def test_a_head_is_merged_as_if_it_were_alone(count, magnitude, granularity, axis):
    tensors, base = models(2, *((384, 16) if axis == -2 else (16, 384)), count=count)
    options = {"granularity": granularity, "magnitude": magnitude}
    merged = nuslerp(tensors, WEIGHTS[count], base=base, **options)
    for expert in range(2):
        parts = [x[expert].tensor_split(3, axis) for x in (*tensors, base, merged)]
        for *alone, origin, head in zip(*parts):
            one = nuslerp(alone, WEIGHTS[count], base=origin, magnitude=magnitude)
            torch.testing.assert_close(head, one, rtol=1e-13, atol=1e-13)


@two_or_three
def test_granularities_that_mean_the_same_for_a_matrix(count):
    tensors, base = models(6, 8, count=count)

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


def test_blocks_that_do_not_divide_are_refused_before_anything_is_merged():
    tensors, base = models(6, 8)
    tensors[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="granularity") as caught:
        nuslerp(tensors, [1, 1], base=base, granularity="row:4")
    assert "6" in str(caught.value)
