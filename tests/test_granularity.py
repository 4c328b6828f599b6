# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Which elements form one vector, told from the view that the kernel sums over."""

from math import prod

import pytest
import torch
from oracle import vectors

from mergekit_nuslerp.granularity import from_flags, storage_order, vector_view

GRANULARITIES = ["tensor", "row", "column"]
SHAPES = [(), (5,), (1,), (3, 4), (1, 4), (3, 1), (2, 3, 4), (2, 3, 4, 5)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_view_holds_the_vectors_of_each_weight(batch, shape, granularity):
    weights = torch.arange(batch * prod(shape)).reshape(batch, *shape)
    view = weights.reshape(vector_view(weights.shape, granularity))
    outer, _, inner, _ = view.shape
    found = [
        view[o, :, i, :].flatten().tolist() for o in range(outer) for i in range(inner)
    ]
    expected = [
        weight[index].flatten().tolist()
        for weight in weights
        for index in vectors(shape, granularity)
    ]
    assert found == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 0), (2, 0, 4), (2, 3, 0), (0, 3, 4)])
def test_empty_weights_have_a_view(shape, granularity):
    weights = torch.empty(shape)
    assert weights.reshape(vector_view(shape, granularity)).numel() == 0


@pytest.mark.parametrize("granularity", ["Row", "rows", "", "matrix", None])
def test_an_unknown_granularity_is_refused(granularity):
    with pytest.raises(ValueError, match="'tensor', 'row' or 'column'"):
        vector_view((1, 3, 4), granularity)


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_flags_mean_what_they_mean_to_mergekit(flatten, row_wise):
    shape = (2, 3, 4)
    weight = torch.arange(prod(shape)).reshape(shape)
    if flatten:
        expected = weight.reshape(1, -1)
    else:
        # mergekit moves the dimension that it sums over to the end.
        dim = 0 if row_wise else -1
        expected = weight.movedim(dim, -1).flatten(0, -2)
    granularity = from_flags(flatten=flatten, row_wise=row_wise)
    found = [weight[index].flatten() for index in vectors(shape, granularity)]
    assert torch.equal(torch.stack(found), expected)


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 3, 2, 1), (0, 2, 1, 3), (0, 2, 3, 1)]
)
def test_storage_order_reads_a_permuted_batch_as_it_lies(order):
    stored = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    batch = stored.permute(order)
    assert batch.permute(storage_order(batch)).is_contiguous()


def test_storage_order_keeps_the_batch_axis_first():
    batch = torch.empty(4, 3, 2).permute(2, 1, 0)  # the batch is fastest in memory
    order = storage_order(batch)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_storage_order_takes_expanded_weights():
    batch = torch.arange(3).reshape(1, 3, 1).expand(2, 3, 4)
    order = storage_order(batch)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]
