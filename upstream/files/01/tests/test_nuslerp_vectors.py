# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch

from mergekit.merge_methods import merge_tensors


def merge(a, b, **parameters):
    return merge_tensors([a, b], "nuslerp", parameters={"weight": [1, 2], **parameters})


@pytest.mark.parametrize("row_wise", [False, True])
def test_row_wise_vectors_run_along_the_first_dimension(row_wise):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, generator=generator) for _ in range(2))
    result = merge(a, b, nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    if row_wise:
        expected = torch.stack([merge(x, y) for x, y in zip(a.T, b.T)], dim=1)
    else:
        expected = torch.stack([merge(x, y) for x, y in zip(a, b)])
    torch.testing.assert_close(result, expected)
