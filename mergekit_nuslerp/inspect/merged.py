# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A merge by its inner products, also where coefficients are compared to a matrix's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from mergekit_nuslerp.geometry import mean_coefficients, profile
from mergekit_nuslerp.granularity import ROW_COLUMN, matrix_count, pieces
from mergekit_nuslerp.kernel import gram_matrices
from mergekit_nuslerp.parameters import Values
from mergekit_nuslerp.passes.portable import wide_dtype

_ELEMENTS = 2**17  # of a weight that are merged at once


class MergeGeometry(NamedTuple):
    """Inner products of vectors, and which sum of them the merge is."""

    grams: torch.Tensor  # (..., K, K), the models last
    coefficients: torch.Tensor  # (..., K)
    models: torch.Tensor  # (..., N, N), inner products of the models alone
    projection: (
        torch.Tensor
    )  # (..., N), of the sum of models that is nearest to the merge
    vectors: int  # with the matrices that they are compared to
    linear: int  # those without a unique mean
    profile: tuple[float, float] | None = None  # the smallest and the largest


def merge(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    grams: torch.Tensor,
    weights: torch.Tensor,
    values: Values,
) -> MergeGeometry:
    """The merge of one tensor, by its inner products.

    Args:
        inputs, base: as in `nuslerp`.
        grams: `(vectors, N, N)`, from `gram_matrices`.
        weights: `(N,)`, summing to one.
        values: of its parameters.
    """
    means = partial(mean_coefficients, weights=weights, magnitude=values.magnitude)
    matrices = matrix_count((1, *inputs[0].shape), values.granularity)
    both = values.granularity == ROW_COLUMN and inputs[0].dim() > 1
    # Of rows and columns at once the matrices come last.
    parts = grams[: len(grams) - matrices * both]
    coefficients, unique = means(parts, bounded=both)
    vectors, linear = len(parts), int((~unique).sum())
    if both:
        sizes = [matrices * size for size in inputs[0].shape[-2:]]
        levels, wholes = coefficients.split(sizes), grams[len(parts) :]
    elif values.contrast == 1 or vectors == matrices:
        return MergeGeometry(grams, coefficients, grams, coefficients, vectors, linear)
    else:
        levels = (coefficients,)
        wholes = grams.unflatten(0, (matrices, -1)).sum(1)
    whole, unique = means(wholes)
    vectors, linear = vectors + matrices, linear + int((~unique).sum())
    whole = whole.unsqueeze(1)
    profiles = [
        profile(level.unflatten(0, (matrices, -1)), whole, values.contrast)
        for level in levels
    ]
    low, high = torch.cat(profiles, 1)[..., weights != 0].aminmax()
    ends = float(low), float(high)
    factors = whole * profiles[0]
    if not both:
        factors = factors.flatten(0, 1)
        return MergeGeometry(grams, factors, grams, factors, vectors, linear, ends)
    # Coefficients differ from element to element: measure the merge itself.
    products = _with_merged(inputs, base, factors, profiles[1])
    first = torch.eye(1, len(inputs) + 1, dtype=weights.dtype)
    projection = _projected(products, weights)
    models = products[:, 1:, 1:]
    return MergeGeometry(products, first, models, projection, vectors, linear, ends)


def _with_merged(
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """Inner products of the merged (task) vector and the models', `(M, N + 1, N + 1)`.

    Args:
        inputs, base: of M matrices.
        rows, columns: `(M, rows or columns, N)`, whose products are coefficients.
    """
    dtype, device = wide_dtype(inputs[0].device), inputs[0].device
    matrices = [tensor.reshape(-1, columns.shape[1]) for tensor in inputs]
    origin = None if base is None else base.reshape(matrices[0].shape)
    size = len(inputs) + 1
    grams = rows.new_zeros(len(rows), size, size)
    owners = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    for (part,) in pieces(owners.shape, _ELEMENTS // columns.shape[1]):
        vectors = [x[part].to(dtype) for x in matrices]
        if origin is not None:
            vectors = [x - origin[part].to(dtype) for x in vectors]
        factors = rows.flatten(0, 1)[part].unsqueeze(1) * columns[owners[part]]
        terms = zip(vectors, factors.to(device, dtype).unbind(-1))
        merged = sum(
            (x * factor for x, factor in terms), start=torch.zeros_like(vectors[0])
        )
        products = gram_matrices([merged, *vectors], granularity="row")
        grams.index_add_(0, owners[part], products.to(grams))
    return grams


def _projected(grams: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Coefficients `(M, N)` of the sum of models that is nearest to the merge.

    Models without a weight have no part in it.
    """
    lengths = grams.diagonal(dim1=-2, dim2=-1)[:, 1:].sqrt()
    lengths = torch.where((lengths > 0) & (weights != 0), lengths, torch.inf)
    cosines = grams[:, 1:, 1:] / lengths.unsqueeze(1) / lengths.unsqueeze(2)
    inverse = torch.linalg.pinv(cosines, rtol=1e-9, hermitian=True)
    products = (grams[:, 1:, 0] / lengths).unsqueeze(-1)
    return (inverse @ products).squeeze(-1) / lengths
