# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Gram matrix, coefficients, combination: large weights streamed through three steps.

Weights are read piece by piece into scratch of a wider dtype. One pass takes the
inner products, `geometry` turns them into a coefficient for each vector, and a
second pass writes the combination, rounded once. Scratch does not grow with the
weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from math import isfinite, prod, sqrt
from typing import NamedTuple

import torch

from mergekit_nuslerp import loops
from mergekit_nuslerp.geometry import (
    Magnitude,
    check_magnitude,
    normalize_weights,
    sums_to_zero,
)
from mergekit_nuslerp.streaming import (
    Crew,
    Job,
    Worker,
    one_thread,
    over_elements,
)


class NonFiniteError(ValueError):
    """An input holds NaN or infinity.

    Attributes:
        output: index along the batch axis.
        model: index among the models, or None if it is the base.
    """

    def __init__(self, output: int, model: int | None):
        self.output, self.model = output, model
        who = "the base" if model is None else f"model {model}"
        super().__init__(f"weight {output} of {who} contains NaN or infinity")

    def __reduce__(self) -> tuple[type, tuple[int, int | None]]:
        return type(self), (self.output, self.model)


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
    lambda_: float = 1.0,
    compiled: bool = False,
) -> torch.Tensor:
    """Merge weights on a sphere instead of on a line.

    Two are interpolated along a great circle; more are merged into their weighted
    Karcher mean, which is the same for two.

    Args:
        tensors: two or more floating-point tensors of one shape (any, also empty or
            strided) and device. Dtypes may differ. They are not modified.
        weights: one finite number a tensor; only their ratios matter. Two merge at
            t = w_1 / (w_0 + w_1), and beyond the ends where t is outside [0, 1]. Of
            more than two, none may be negative. Weights whose sum is below 1e-6 count
            as equal, with a warning.
        base: merge the task vectors `tensors[i] - base` and add the base again.
        granularity: which elements form one vector on the sphere: the whole `"tensor"`,
            each `"matrix"` (the last two dimensions), each `"row"` W[i, :] or
            `"column"` W[:, j] of a matrix, `"row:N"` or `"column:N"` for N neighbours
            of them, or each run along the first dimension, `"dim0"`. A tensor of fewer
            than two dimensions is one vector.
        magnitude: length of the result. `"slerp"` applies the coefficients of the
            interpolated unit vectors to the vectors themselves, as mergekit does;
            `"linear"` and `"geometric"` take the weighted mean of the lengths. Beyond
            the ends the linear one may be below zero; the result is then zero long.
        lambda_: scales the merged task vectors. Needs a base, unless 1.
        compiled: merge contiguous tensors of a million elements or more in loops that
            `torch.compile` makes: faster, but for seconds of compiling in a process.
            Sums are in another order, so that a last digit may differ.

    Returns:
        A new tensor of the inputs' shape, in their promoted dtype. It is computed in
        float32 for narrower inputs and in float64 for float32 and float64, and then
        rounded. Differentiable (in reverse mode, once) in `tensors` and `base`; then
        all is computed at once, and memory grows with the tensors.

    Raises:
        ValueError: fewer than two tensors, weights that do not match, are not finite or
            negative, shapes or devices that differ, a granularity that is unknown or
            does not divide the shape, an unknown magnitude, lambda without a base.
        TypeError: integer, boolean or complex tensors.
        NonFiniteError: NaN or infinity in an input.
        OverflowError: task vectors beyond the range of float64, or lengths, where the
            magnitude depends on them.

    Warns:
        RuntimeWarning: weights that sum to zero, or vectors without a unique mean
            (opposite ones, or ones that cancel), which are merged linearly.

    Example:
        >>> import torch
        >>> from mergekit_nuslerp import nuslerp
        >>> nuslerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1])
        tensor([0.7071, 0.7071])
    """
    tensors = list(tensors)
    given = tensors if base is None else [*tensors, base]
    if len(tensors) < 2:
        raise ValueError(f"NuSLERP merges two models or more, not {len(tensors)}")
    if len(weights) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many weights: {weights}")
    if any(tensor.shape != given[0].shape for tensor in given):
        raise ValueError(f"tensors differ in shape: {[tuple(t.shape) for t in given]}")
    if any(tensor.device != given[0].device for tensor in given):
        raise ValueError(f"tensors differ in device: {[str(t.device) for t in given]}")
    if sums_to_zero(weights):
        warnings.warn(
            "NuSLERP weights sum to zero; the models are weighted equally instead",
            RuntimeWarning,
            stacklevel=2,
        )
    merged = merge_batch(
        [tensor.unsqueeze(0) for tensor in tensors],
        torch.tensor([list(weights)], dtype=torch.float64, device="cpu"),
        base=None if base is None else base.unsqueeze(0),
        granularity=granularity,
        magnitude=magnitude,
        lambda_=lambda_,
        compiled=compiled,
    )
    if merged.linear.any():
        warnings.warn(
            f"{int(merged.linear)} of {merged.vectors} vectors have no unique "
            "spherical mean; they are merged linearly instead",
            RuntimeWarning,
            stacklevel=2,
        )
    return merged.result.squeeze(0)


def merge_batch(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
    magnitude: Magnitude = "slerp",
    lambda_: float = 1.0,
    compiled: bool = False,
) -> Merged:
    """`nuslerp` for a batch of weights of one shape, without its warnings.

    Args:
        tensors: one tensor a model, each `(batch, *weight_shape)`.
        weights: `(batch, models)`, on any device.
        base: `(batch, *weight_shape)` or None.
        granularity: as in `nuslerp`.
        magnitude: as in `nuslerp`.
        lambda_: as in `nuslerp`.
        compiled: as in `nuslerp`.

    Returns:
        The merged weights, in the inputs' promoted dtype, with how many of their
        vectors had no unique mean.

    Raises:
        As `nuslerp`.
    """
    weights = weights.detach().to("cpu", torch.float64)
    if not weights.sum(-1).isfinite().all():
        raise ValueError(f"weights and their sum must be finite: {weights.tolist()}")
    normalized = normalize_weights(weights)
    models = len(tensors)
    if models > 2 and (normalized < 0).any():
        raise ValueError(
            f"weights of more than two models must not be negative: {weights.tolist()}"
        )
    if not isfinite(lambda_) or (base is None and lambda_ != 1):
        raise ValueError(
            f"lambda must be finite, and 1 where there is no base, not {lambda_}"
        )
    check_magnitude(magnitude)
    job = Job.of(
        tensors,
        base,
        granularity,
        weights=normalized,
        magnitude=magnitude,
        lambda_=lambda_,
        compiled=compiled,
    )
    vectors = job.sizes[0] * job.sizes[2] // max(1, job.batch)
    if not prod(job.sizes):
        result = tensors[0].to(job.dtype, copy=True)
        return Merged(result, vectors, result.new_zeros(job.batch, dtype=torch.int64))
    with torch.autocast(job.device.type, enabled=False):  # it rounds matrix products
        result, linear = _merge(job)
    inverse = sorted(range(len(job.order)), key=job.order.__getitem__)
    shape = [tensors[0].shape[dim] for dim in job.order]
    return Merged(result.reshape(shape).permute(inverse), vectors, linear)


def gram_matrices(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> torch.Tensor:
    """The inner products that a merge of some weights would depend on.

    Args:
        tensors: as in `nuslerp`, one or more.
        base: as in `nuslerp`.
        granularity: as in `nuslerp`.

    Returns:
        `(vectors, N, N)` in the widest dtype of the device, computed in it. With a
        base, N is the number of tensors and one: the last row and column are those of
        the base itself, the others of the task vectors.

    Raises:
        As `nuslerp`. OverflowError for squares beyond the range of that dtype.
    """
    job = Job.of(
        [tensor.detach().unsqueeze(0) for tensor in tensors],
        None if base is None else base.detach().unsqueeze(0),
        granularity,
        measures_base=base is not None,
    )
    outer, _, inner, _ = job.sizes
    shape = (outer, inner, job.vectors, job.vectors)
    grams = torch.zeros(shape, dtype=job.wide_dtype, device=job.device)
    if not prod(job.sizes):
        return grams.flatten(0, 1)
    with (
        torch.autocast(job.device.type, enabled=False),
        Crew(job, job.wide_dtype) as crew,
    ):
        for group in crew.groups():
            grams[group.outer, group.inner] = crew.gram(group)
    if not grams.isfinite().all():
        _refuse_nonfinite(job)
        _refuse_overflow(grams)
    return grams.flatten(0, 1)


def _merge(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose how the three steps run, and look at what the inner products showed.

    Returns:
        The result in the job's view, and `(batch,)`, how many vectors of each weight
        had no unique mean.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in job.inputs):
        return _record(job)
    job = replace(job, inputs=tuple(tensor.detach() for tensor in job.inputs))
    result, squares, linear = _first(job)
    short = squares[:, 0] < _smallest_square(job.dtype, job.scratch_dtype)
    finite = squares.isfinite().all()
    # One look for all pieces: an accelerator has to be waited for.
    if not short.any() and finite:
        return result, linear
    if not finite:
        _refuse_nonfinite(job)
    # Mostly this is a model that left vectors as they were, and all is well.
    if not finite or _has_tiny_vectors(job, short.tolist()):
        result, squares, linear = _stream(Crew(job, job.wide_dtype), scaled=True)
        _refuse_overflow(squares)
    return result, linear


def _first(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_stream` in compiled loops where they are wanted and work, or else without."""
    if job.compiled and loops.suits(job):
        try:
            return _stream(loops.CompiledCrew(job, job.scratch_dtype))
        except loops.CompileError as error:
            loops.give_up(error)
    return _stream(Crew(job, job.scratch_dtype))


def _stream(
    crew: Crew, *, scaled: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take a job through the steps.

    Args:
        crew: who does it.
        scaled: divide each vector by the power of two of its largest element before
            taking squares. Angles stay, overflow and underflow go.

    Returns:
        The result in the job's view, `(groups, 2)` the smallest and the largest squared
        length of a vector in each group, and `(batch,)` the vectors merged linearly.
    """
    job, squares = crew.job, []
    result = torch.empty(job.sizes, dtype=job.dtype, device=job.device)
    linear = torch.zeros(job.sizes[0], dtype=torch.int64, device=job.device)
    with crew:
        for group in crew.groups():
            scale = _scale(crew.peaks(group)) if scaled else None
            gram = crew.gram(group, scale)
            values, unique = crew.means(group, gram, scale)
            if scaled:
                _refuse_overflow(values)
            crew.write(
                group, values.to(crew.dtype), result[group.outer, :, group.inner]
            )
            lengths = gram.diagonal(dim1=-2, dim2=-1)
            squares.append(torch.stack(lengths.aminmax()))
            linear[group.outer] += (~unique).sum(-1)
    return result, torch.stack(squares), linear.view(job.batch, -1).sum(-1)


def _record(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """All at once and in the widest dtype, for autograd, which keeps it all anyway."""
    worker, piece = Worker(job, job.wide_dtype, rows=None), job.inputs
    with torch.no_grad():
        scale = _scale(worker.peaks(piece))
    worker.held = None  # read again, and recorded
    gram = worker.gram(piece, over_elements(scale))
    if not gram.isfinite().all():
        _refuse_nonfinite(job)
        _refuse_overflow(gram)
    with one_thread():
        factors, unique = job.coefficients(gram, job.vector_weights, scale)
    _refuse_overflow(factors)
    result = worker.combine(piece, over_elements(factors)).to(job.dtype)
    return result, (~unique).sum(-1).view(job.batch, -1).sum(-1)


def _scale(peaks: torch.Tensor) -> torch.Tensor:
    """The power of two that brings each vector's largest element close to one.

    Limited by the range of the dtype, which is close enough.
    """
    exponents = torch.frexp(peaks).exponent.to(peaks.dtype)
    return torch.exp2(-exponents).clamp(max=torch.finfo(peaks.dtype).max)


def _smallest_square(inputs: torch.dtype, scratch: torch.dtype) -> float:
    """The smallest squared length that can be trusted, in scratch of a given dtype.

    Zero where the inputs' range is so narrow that no square of theirs vanishes.
    """
    narrow, wide = torch.finfo(inputs), torch.finfo(scratch)
    if (narrow.smallest_normal * narrow.eps) ** 2 >= wide.smallest_normal:
        return 0.0
    return wide.smallest_normal / wide.eps**2


def _has_tiny_vectors(job: Job, suspects: Sequence[bool]) -> bool:
    """Whether a vector of the suspected groups is not zero, but too short to square."""
    shortest = sqrt(_smallest_square(job.dtype, job.scratch_dtype))
    with Crew(job, job.scratch_dtype) as crew:
        peaks = map(crew.peaks, compress(crew.groups(), suspects))
        return any(bool(((peak > 0) & (peak < shortest)).any()) for peak in peaks)


def _refuse_nonfinite(job: Job) -> None:
    """Raise NonFiniteError for the first input that holds NaN or infinity."""
    for index, tensor in enumerate(job.inputs):
        alone = replace(job, inputs=(tensor.detach(),), models=1, measures_base=False)
        with Crew(alone, job.scratch_dtype) as crew:
            for group in crew.groups():
                bad = ~crew.peaks(group).isfinite().flatten(1).all(1)
                if bad.any():
                    first = group.outer.start + int(bad.nonzero()[0])
                    output = first * job.batch // job.sizes[0]
                    raise NonFiniteError(output, None if index == job.models else index)


def _refuse_overflow(found: torch.Tensor) -> None:
    if not found.isfinite().all():
        raise OverflowError("a vector, or its length, is beyond the range of float64")
