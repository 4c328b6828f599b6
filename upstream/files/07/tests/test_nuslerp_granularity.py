# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch
from pydantic import ValidationError

from mergekit.merge_methods import merge_tensors

BASE, A, B, C = torch.randn(4, 2, 6, 8, generator=torch.Generator().manual_seed(5))


def merge(tensors, granularity=None, **parameters):
    if granularity is not None:
        parameters["nuslerp_granularity"] = granularity
    *others, base = tensors
    weight = [0.2, 0.5, 0.3][: len(others)]
    return merge_tensors(
        [*others, base],
        "nuslerp",
        base_index=len(others),
        parameters={"weight": weight, **parameters},
    )


@pytest.mark.parametrize(
    "granularity,rows,columns",
    [
        ("matrix", 6, 8),
        ("row", 1, 8),
        ("row:3", 3, 8),
        ("column", 6, 1),
        ("column:4", 6, 4),
    ],
)
@pytest.mark.parametrize("tensors", [(A, B, BASE), (A, B, C, BASE)])
def test_each_block_is_merged_by_itself(granularity, rows, columns, tensors):
    result = merge(tensors, granularity)
    for matrix in range(2):
        for i in range(0, 6, rows):
            for j in range(0, 8, columns):
                at = matrix, slice(i, i + rows), slice(j, j + columns)
                alone = merge([tensor[at] for tensor in tensors])
                torch.testing.assert_close(result[at], alone)


def test_names_for_what_the_flags_say():
    tensors = (A[0], B[0], BASE[0])
    for granularity, flags in {
        "tensor": {},
        "row": {"nuslerp_flatten": False},
        "column": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }.items():
        expected = merge(tensors, **flags)
        assert merge(tensors, granularity).equal(expected)


def test_granularity_comes_before_the_flags():
    tensors, flags = (A, B, BASE), {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    assert not merge(tensors, **flags).equal(merge(tensors))
    assert merge(tensors, "tensor", **flags).equal(merge(tensors))


def test_vectors_are_merged_whole():
    tensors = [tensor[0, 0] for tensor in (A, B, BASE)]
    assert merge(tensors, "row:3").equal(merge(tensors))


@pytest.mark.parametrize(
    "granularity", ["rows", "row:0", "row:-1", "matrix:2", "dim0", ""]
)
def test_other_values_are_refused(granularity):
    with pytest.raises(ValidationError):
        merge((A, B, BASE), granularity)


def test_blocks_must_divide_a_weight():
    with pytest.raises(ValueError, match="granularity row:4 does not divide 6 rows"):
        merge((A, B, BASE), "row:4")
