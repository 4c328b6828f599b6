# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A merge in three steps: Gram matrix, coefficients, combination.

One pass over the weights takes the inner products, `geometry` turns them into a
coefficient for each vector, and a second pass writes the combination, rounded once.
What a pass does on a device is in `passes`. Where coefficients are compared to those of
the whole matrix (`row*column`, a contrast), all are worked out before the second pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from types import ModuleType
from typing import NamedTuple, get_args

import torch
from torch.autograd.forward_ad import unpack_dual

from mergekit_nuslerp import passes
from mergekit_nuslerp.geometry import (
    MOST_CONTRAST,
    Magnitude,
    mean_coefficients,
    normalize_weights,
    profile,
    sums_to_zero,
)
from mergekit_nuslerp.granularity import ROW_COLUMN, matrix_count, pieces, vector_view
from mergekit_nuslerp.passes.portable import is_recorded, wide_dtype

# What is merged at once: vectors, so few that PyTorch works on those of two models in
# one thread, as `geometry` says, and entries of Gram matrices, for their memory.
_VECTORS = 2**13 - 1
_GRAM_ENTRIES = 2**17

# Float32 is enough for squared lengths from this one,
_LEAST_SQUARE_FLOAT32 = 1e-24
# vectors five degrees or more from opposite, as inner products of nearer ones feel its
# rounding,
_NEAR_ANTIPODAL = 4e-3
# shares up to this one, since far beyond the models rounding is multiplied,
_LARGEST_SHARE = 4
# and coefficients up to this one, as no product is subnormal or infinite then.
_LARGEST_COEFFICIENT = 1e18
# Factors of rows multiply them, so they may only be up to this one.
_LARGEST_ROW_FACTOR = 1e6
# The least squared length in float64 whose terms are not subnormal.
_LEAST_SQUARE_FLOAT64 = 2.0**-918  # tiny / eps^2


class NonFiniteError(ValueError):
    """Weight `args[0]` of a batch is not finite in model `args[1]`, or the base."""

    def __str__(self) -> str:
        output, model = self.args  # of the base: None
        who = "the base" if model is None else f"model {model}"
        return f"{who} contains NaN or infinity, in weight {output} of the batch"


class RangeError(OverflowError):
    """Weight `args[0]` of a batch leaves a dtype's range, as `args[1]` says."""

    def __str__(self) -> str:
        return "{1}, in weight {0} of the batch".format(*self.args)


class Merged(NamedTuple):
    """A batch of merged weights, and what there is to say about it."""

    result: torch.Tensor  # (batch, *weight_shape)
    vectors: int  # in each weight
    linear: torch.Tensor  # (batch,), those without a unique mean, merged linearly


def nuslerp(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    magnitude: Magnitude = "slerp",
    contrast: float = 1.0,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """Merge weights on a sphere instead of on a line.

    Two are interpolated along a great circle; more are merged into their weighted
    Karcher mean, which is the same for two.

    Args:
        tensors: two or more floating-point tensors of one shape (any, also empty or
            strided) and device. Dtypes may differ. They are not modified.
        weights: one finite number a tensor; only their ratios matter. Two merge at
            t = w_1 / (w_0 + w_1), and extrapolate where t is outside [0, 1]. Of more
            than two, and with `"row*column"` or a contrast, none may be negative. A
            sum below 1e-6 makes all equal.
        base: merge the task vectors `tensors[i] - base` and add the base again.
        granularity: which elements form one vector on the sphere: the whole `"tensor"`,
            each `"matrix"` (the last two dimensions), each `"row"` W[i, :] or
            `"column"` W[:, j] of a matrix, `"row:N"` or `"column:N"` for N neighbours
            of them, or each run along the first dimension, `"dim0"`. A tensor of fewer
            than two dimensions is one vector. `"row*column"` multiplies an element's
            two coefficients, of its row and of its column, and divides by the matrix's;
            those of nearly opposite vectors are bounded, as in `mean_coefficients`.
        magnitude: length of the result. `"slerp"` applies the coefficients of the
            interpolated unit vectors to the vectors themselves, as mergekit does;
            `"linear"` and `"geometric"` take the weighted mean of the lengths, which is
            at least 0.
        contrast: from 0 to 100; the power of what coefficients are over those of their
            whole matrix: 0 merges it as `"matrix"` does, and above 1 its vectors differ
            more, as far as `geometry.profile` lets them.
        lambda_: scales the merged task vectors. Needs a base, unless 1.

    Returns:
        A new tensor of the inputs' shape, in their promoted dtype, computed in float32
        for narrower inputs and in float64 for others, and then rounded. Differentiable
        in reverse mode (more than two tensors: once) in `tensors` and `base`; then
        memory grows with them.

    Raises:
        ValueError: arguments that do not fit together, or are unknown; NonFiniteError
            for NaN or infinity in an input.
        TypeError: integer, boolean or complex tensors.
        RangeError: an OverflowError; the result leaves the range of its dtype, or
            squared lengths of float64 vectors leave that of float64.
        MemoryError: there is no memory for the result or for sums.
        NotImplementedError: a derivative in forward mode, or one of second order of
            more than two tensors.

    Warns:
        RuntimeWarning: weights that sum to zero, or vectors without a unique mean
            (opposite ones, or ones that cancel), which are merged linearly.
    """
    if len(tensors) < 2:
        raise ValueError(f"NuSLERP merges two models or more, not {len(tensors)}")
    if len(weights) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many weights: {weights}")
    warn = partial(warnings.warn, category=RuntimeWarning, stacklevel=2)
    if sums_to_zero(weights):
        warn("NuSLERP weights sum to zero; the models are weighted equally instead")
    merged = merge_batch(
        [tensor.unsqueeze(0) for tensor in tensors],
        torch.tensor([list(weights)], dtype=torch.float64, device="cpu"),
        base=None if base is None else base.unsqueeze(0),
        granularity=granularity,
        magnitude=magnitude,
        contrast=contrast,
        lambda_=lambda_,
    )
    if tensors[0].device.type != "meta" and merged.linear.any():
        warn(
            f"{int(merged.linear)} of {merged.vectors} vectors have no unique "
            "spherical mean; they are merged linearly instead"
        )
    return merged.result.squeeze(0)


def merge_batch(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    magnitude: Magnitude = "slerp",
    contrast: float = 1.0,
    lambda_: float = 1.0,
) -> Merged:
    """`nuslerp` for a batch of weights of one shape, without its warnings.

    Args:
        tensors, base: `(batch, *weight_shape)` each.
        weights: `(batch, models)`, on any device.
    """
    weights = weights.detach().to("cpu", torch.float64)
    shares = normalize_weights(weights)
    if not weights.sum(-1).isfinite().all():
        raise ValueError(f"weights and their sum must be finite: {weights.tolist()}")
    may_extrapolate = len(tensors) == 2 and granularity != ROW_COLUMN and contrast == 1
    if not may_extrapolate and (shares < 0).any():
        raise ValueError(
            f"weights of more than two models, and those with {ROW_COLUMN} or a "
            f"contrast, must not be negative: {weights.tolist()}"
        )
    if magnitude not in get_args(Magnitude):
        raise ValueError(f"magnitude must be one of {get_args(Magnitude)}")
    if not 0 <= contrast <= MOST_CONTRAST:
        raise ValueError(f"contrast must be in [0, {MOST_CONTRAST}], not {contrast}")
    if not math.isfinite(lambda_) or (base is None and lambda_ != 1):
        raise ValueError(
            f"lambda must be finite, and 1 where there is no base, not {lambda_}"
        )
    operands = [*tensors] if base is None else [*tensors, base]
    # Of two levels, the first is combined, and the second gives factors of its rows.
    kinds = ("column", "row") if granularity == ROW_COLUMN else (granularity,)
    levels = [_views(operands, kind) for kind in kinds]
    views, batch = levels[0], max(1, len(shares))
    dtype = reduce(torch.promote_types, (view.dtype for view in views))
    wide = wide_dtype(views[0].device)
    in_widest = is_recorded(views) or dtype.itemsize > 2 or wide == torch.float32
    in_widest |= bool((shares.abs() > _LARGEST_SHARE).any())
    dtypes = (wide,) if in_widest else (torch.float32, wide)
    shares = shares.to(views[0].device, wide).unsqueeze(1)
    near = _NEAR_ANTIPODAL if dtype.itemsize <= 2 else 0.0
    solve = partial(mean_coefficients, magnitude=magnitude)
    means = _Means(passes.choose(views), shares, solve, near, dtypes)
    counts = [len(level[0]) * level[0].shape[2] for level in levels]
    vectors, matrices = counts[0], matrix_count(tensors[0].shape, granularity)
    compared = max(counts) > matrices and (contrast != 1 or len(levels) > 1)
    if compared:
        vectors = sum(counts) + matrices
    linear = torch.zeros(len(shares), dtype=torch.int64, device=shares.device)
    result = passes.new_result(views[0].shape, dtype, shares.device)
    for group in _groups(views, len(tensors), batch, all_at_once=compared):
        if compared:
            tables, fits = means.compare(levels, matrices, contrast, linear)
        else:
            mean, fits, _ = means.of(group, linear)
            tables = [mean]
        tables[0] *= lambda_
        largest = _LARGEST_COEFFICIENT, _LARGEST_ROW_FACTOR
        fits = fits and all(map(_is_in_range, tables, largest))
        working = torch.float32 if fits else wide
        out = result[group.outer, :, group.inner]
        if not means.device_pass.combine(
            group.inputs, group.base, tables[0], out, working, *tables[1:]
        ):
            refuse_infinite(out, group.outputs, "the result")
    return Merged(result.view(tensors[0].shape), vectors // batch, linear)


class _Group(NamedTuple):
    """Vectors to merge at once: a part `[outer, :, inner]` of each view."""

    outer: slice
    inner: slice
    outputs: torch.Tensor  # which weight each outer index is of
    inputs: list[torch.Tensor]
    base: torch.Tensor | None


class _Means(NamedTuple):
    """From vectors to coefficients: the first two steps."""

    device_pass: ModuleType
    shares: torch.Tensor  # (batch, 1, N)
    solve: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # `mean_coefficients`
    near: float  # an `antipodal_tolerance` that is tried first
    dtypes: tuple[torch.dtype, ...]  # for Gram matrices, until one is precise

    def of(
        self, group: _Group, linear: torch.Tensor, bounded: bool = False
    ) -> tuple[torch.Tensor, bool, torch.Tensor]:
        """Coefficients `(outer, inner, N)` of a group's vectors, whether float32 is
        enough to combine them, and their Gram matrices. Adds to `linear` `(batch,)` how
        many vectors of each weight have no unique mean.
        """
        for working in self.dtypes:
            gram = self.device_pass.gram(group.inputs, group.base, working)
            in_widest = working == self.dtypes[-1]
            if in_widest:
                _check(group, gram)
            mean, unique, precise = self.mean(gram, group.outputs, in_widest, bounded)
            if precise:
                break
        linear.index_add_(0, group.outputs, (~unique).sum(-1))
        return mean, precise and len(self.dtypes) > 1, gram

    def compare(
        self,
        levels: Sequence[Sequence[torch.Tensor]],
        matrices: int,
        contrast: float,
        linear: torch.Tensor,
    ) -> tuple[list[torch.Tensor], bool]:
        """Compare vectors to the matrices that they are of.

        Returns coefficients `(outer, inner, N)` of the first level, then factors of
        their rows `(outer, length, N)` from the second one, if any; and whether
        float32 is enough to combine by them. Adds to `linear` as `of` does.
        """
        (batch, _, count), fits = self.shares.shape, True
        tables = []
        for views in levels:
            outer, _, inner, _ = views[0].shape
            tables.append(self.shares.new_empty(outer, inner, count))
            sums = self.shares.new_zeros(matrices, 1, count, count)  # of Gram matrices
            for group in _groups(views, count, batch):
                mean, precise, gram = self.of(group, linear, bounded=len(levels) > 1)
                tables[-1][group.outer, group.inner] = mean
                owners = _owners(group.outer, outer // matrices, gram.device)
                sums.index_add_(0, owners, gram.sum(1, keepdim=True))
                fits &= precise
        outputs = _owners(slice(0, matrices), matrices // batch, sums.device)
        refuse_infinite(sums, outputs, "a squared length")
        whole, unique, precise = self.mean(sums, outputs, in_widest=True)
        if not precise and len(self.dtypes) > 1:
            widest = self._replace(dtypes=self.dtypes[1:])
            return widest.compare(levels, matrices, contrast, linear.zero_())
        linear.index_add_(0, outputs, (~unique).sum(-1))
        for table, unit in zip(tables, (whole, torch.ones_like(whole))):
            vectors = table.view(matrices, -1, count)
            for (part,) in pieces(vectors.shape[1:2], _VECTORS // matrices):
                # A copy, as autograd keeps what it divides, and this is overwritten.
                factors = profile(vectors[:, part].clone(), whole, contrast)
                vectors[:, part] = unit * factors
        tables[1:] = [table.view(matrices, -1, count) for table in tables[1:]]
        return tables, fits

    def mean(
        self,
        gram: torch.Tensor,
        outputs: torch.Tensor,
        in_widest: bool,
        bounded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Coefficients of vectors by their Gram matrices, computed in the widest dtype
        or in float32; which of them have a unique mean; whether float32 is enough.
        """
        # Not `[...]`, which starts threads for few entries; they spin for long after.
        shares = self.shares.index_select(0, outputs)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        enough = (squares >= _LEAST_SQUARE_FLOAT32) & (squares < math.inf)
        if in_widest:
            enough |= squares == 0  # in float32, they may have vanished
        solve = partial(self.solve, gram, shares, bounded=bounded)
        coefficients, unique = solve(antipodal_tolerance=self.near)
        precise = bool(unique.all() & enough.all())
        if in_widest and self.near and not unique.all():
            coefficients, unique = solve()
        return coefficients, unique, precise


def gram_matrices(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> torch.Tensor:
    """The inner products of (task) vectors that a merge depends on.

    Arguments and errors are as in `nuslerp`, but one tensor will do. Returns
    `(vectors, N, N)` in the widest dtype of the device, computed in it. The vectors of
    `"row*column"` are all rows, then all columns, then all matrices.
    """
    if granularity == ROW_COLUMN and tensors[0].dim() > 1:
        kinds = ("row", "column", "matrix")
        return torch.cat(
            [gram_matrices(tensors, base=base, granularity=kind) for kind in kinds]
        )
    operands = [*tensors] if base is None else [*tensors, base]
    views = _views([tensor.detach().unsqueeze(0) for tensor in operands], granularity)
    device_pass, wide = passes.choose(views), wide_dtype(views[0].device)
    shape = *views[0].shape[::2], len(tensors), len(tensors)
    grams = torch.zeros(shape, dtype=wide, device=views[0].device)
    for group in _groups(views, len(tensors), 1):
        gram = device_pass.gram(group.inputs, group.base, wide)
        grams[group.outer, group.inner] = gram
        _check(group, gram)
    return grams.flatten(0, 1)


def _views(operands: Sequence[torch.Tensor], granularity: str) -> list[torch.Tensor]:
    """Batches of weights as vectors, `(outer, length, inner, width)`."""
    layouts = [(tuple(tensor.shape[1:]), str(tensor.device)) for tensor in operands]
    if len(set(layouts)) > 1:
        raise ValueError(f"tensors differ in shape or device: {layouts}")
    for tensor in operands:
        if not tensor.is_floating_point():
            raise TypeError(f"NuSLERP needs floating-point tensors, not {tensor.dtype}")
        if unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("NuSLERP has no forward-mode derivatives")
    sizes = vector_view(operands[0].shape, granularity)
    return [tensor.reshape(sizes) for tensor in operands]


def _groups(
    views: Sequence[torch.Tensor], models: int, batch: int, all_at_once: bool = False
) -> Iterator[_Group]:
    if _is_empty(views[0]):
        return
    outer, _, inner, _ = views[0].shape
    most = max(1, min(_VECTORS, _GRAM_ENTRIES // models**2))
    # Autograd would copy the whole gradient for each group.
    if all_at_once or is_recorded(views):
        most = outer * inner
    for some_outer, some_inner in pieces((outer, inner), most):
        outputs = _owners(some_outer, outer // batch, views[0].device)
        inputs = [view[some_outer, :, some_inner] for view in views]
        base = inputs.pop() if len(inputs) > models else None
        yield _Group(some_outer, some_inner, outputs, inputs, base)


def _is_empty(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or tensor.device.type == "meta"


def _owners(part: slice, size: int, device: torch.device) -> torch.Tensor:
    """Of each index in part, which run of `size` indices it is in."""
    return torch.arange(part.start, part.stop, device=device) // size


def _check(group: _Group, gram: torch.Tensor) -> None:
    """Raise NonFiniteError for NaN or infinity in an input, and RangeError where a
    squared length leaves the Gram matrix's dtype.
    """
    inputs, base, outputs = group.inputs, group.base, group.outputs
    operands = [*inputs] if base is None else [*inputs, base]
    if not gram.isfinite().all():
        for index, tensor in enumerate(operands):
            for output, vectors in zip(outputs.tolist(), tensor.detach()):
                if not torch.stack(vectors.aminmax()).isfinite().all():
                    raise NonFiniteError(output, index if index < len(inputs) else None)
        refuse_infinite(gram, outputs, "a squared length")
    if all(tensor.dtype != torch.float64 for tensor in operands):
        return  # no squares of theirs are that small
    short = gram.diagonal(dim1=-2, dim2=-1) < _LEAST_SQUARE_FLOAT64
    for outer, inner, model in short.nonzero().tolist():
        vector = inputs[model][outer, :, inner]
        if (vector != (0 if base is None else base[outer, :, inner])).any():
            reason = f"a squared length is too small for {gram.dtype}"
            raise RangeError(int(outputs[outer]), reason)


def _is_in_range(table: torch.Tensor, most: float) -> bool:
    """Whether factors are zero or between `most` and its inverse."""
    parts = (part.abs() for part in table.detach().flatten().split(_VECTORS))
    return all(bool(((x == 0) | (x >= 1 / most) & (x <= most)).all()) for x in parts)


def refuse_infinite(values: torch.Tensor, outputs: torch.Tensor, what: str) -> None:
    """Raise RangeError if values `(outer, ...)` are not all finite."""
    infinite = ~values.isfinite().flatten(1).all(1)
    if infinite.any():
        reason = f"{what} is too large for {values.dtype}"
        raise RangeError(int(outputs[infinite][0]), reason)
