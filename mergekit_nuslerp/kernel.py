# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A merge in three steps: Gram matrix, coefficients, combination.

One pass over the weights takes the inner products, `geometry` turns them into a
coefficient for each vector, and a second pass writes the combination, rounded once.
What a pass does on a device is in `passes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from math import isfinite, prod
from typing import NamedTuple

import torch
from torch.autograd.forward_ad import unpack_dual

from mergekit_nuslerp import passes
from mergekit_nuslerp.geometry import (
    Magnitude,
    check_magnitude,
    mean_coefficients,
    normalize_weights,
    sums_to_zero,
)
from mergekit_nuslerp.granularity import slices, vector_view
from mergekit_nuslerp.passes.portable import is_recorded, wide_dtype

# Entries of the Gram matrices that are worked out at once: so few that PyTorch does it
# in one thread. Several would wait for each other where a machine is busy.
_GRAM_ENTRIES = 2**15

# Elements of whole vectors that are worked out at once, so that they are still in the
# cache when the second pass reads them.
_GROUP_ELEMENTS = 2**22

# What float32 is enough for: squared lengths and coefficients between these, whose
# products are neither subnormal nor infinite, and vectors that are five degrees or more
# from opposite, as the inner products of nearer ones feel its rounding.
_SQUARES = 1e-24, 1e36
_COEFFICIENTS = 1e-18, 1e18
_NEAR_ANTIPODAL = 4e-3


class NonFiniteError(ValueError):
    """An input holds NaN or infinity.

    Attributes:
        output: index along the batch axis.
        model: index among the models, or None if it is the base.
    """

    def __init__(self, output: int, model: int | None):
        super().__init__(output, model)
        self.output, self.model = output, model

    def __str__(self) -> str:
        who = "the base" if self.model is None else f"model {self.model}"
        return f"weight {self.output} of {who} contains NaN or infinity"


class RangeError(OverflowError):
    """A merge of finite inputs leaves the range of a dtype.

    Attributes:
        output: index along the batch axis.
        reason: what leaves which range.
    """

    def __init__(self, output: int, reason: str):
        super().__init__(output, reason)
        self.output, self.reason = output, reason

    def __str__(self) -> str:
        return f"weight {self.output}: {self.reason}"


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
) -> torch.Tensor:
    """Merge weights on a sphere instead of on a line.

    Two are interpolated along a great circle; more are merged into their weighted
    Karcher mean, which is the same for two.

    Args:
        tensors: two or more floating-point tensors of one shape (any, also empty or
            strided) and device. Dtypes may differ. They are not modified.
        weights: one finite number a tensor; only their ratios matter. Two merge at
            t = w_1 / (w_0 + w_1), and extrapolate where t is outside [0, 1]. Of more
            than two, none may be negative. Weights whose sum is below 1e-6 count as
            equal, with a warning.
        base: merge the task vectors `tensors[i] - base` and add the base again.
        granularity: which elements form one vector on the sphere: the whole `"tensor"`,
            each `"matrix"` (the last two dimensions), each `"row"` W[i, :] or
            `"column"` W[:, j] of a matrix, `"row:N"` or `"column:N"` for N neighbours
            of them, or each run along the first dimension, `"dim0"`. A tensor of fewer
            than two dimensions is one vector.
        magnitude: length of the result. `"slerp"` applies the coefficients of the
            interpolated unit vectors to the vectors themselves, as mergekit does;
            `"linear"` and `"geometric"` take the weighted mean of the lengths. An
            extrapolated linear mean may be below zero; the result then has length 0.
        lambda_: scales the merged task vectors. Needs a base, unless 1.

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
        NonFiniteError: a ValueError; NaN or infinity in an input.
        RangeError: an OverflowError; the result leaves the range of its dtype, or
            squared lengths of float64 vectors leave that of float64.
        NotImplementedError: a derivative in forward mode.

    Warns:
        RuntimeWarning: weights that sum to zero, or vectors without a unique mean
            (opposite ones, or ones that cancel), which are merged linearly.

    Example:
        >>> import torch
        >>> from mergekit_nuslerp import nuslerp
        >>> nuslerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1])
        tensor([0.7071, 0.7071])
    """
    given = [*tensors] if base is None else [*tensors, base]
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
    )
    if given[0].device.type != "meta" and merged.linear.any():
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
) -> Merged:
    """`nuslerp` for a batch of weights of one shape, without its warnings.

    Args:
        tensors: one tensor a model, each `(batch, *weight_shape)`.
        weights: `(batch, models)`, on any device.
        base: `(batch, *weight_shape)` or None.
        granularity, magnitude, lambda_: as in `nuslerp`.

    Raises:
        As `nuslerp`.
    """
    weights = weights.detach().to("cpu", torch.float64)
    if not weights.sum(-1).isfinite().all():
        raise ValueError(f"weights and their sum must be finite: {weights.tolist()}")
    shares = normalize_weights(weights)
    if len(tensors) > 2 and (shares < 0).any():
        raise ValueError(
            f"weights of more than two models must not be negative: {weights.tolist()}"
        )
    if not isfinite(lambda_) or (base is None and lambda_ != 1):
        raise ValueError(
            f"lambda must be finite, and 1 where there is no base, not {lambda_}"
        )
    check_magnitude(magnitude)
    job = _Job([*tensors] if base is None else [*tensors, base], granularity)
    narrow = torch.float32 if job.dtype.itemsize == 2 and not job.recorded else job.wide
    shares, batch = shares.to(job.device, job.wide), len(job.given[0])
    result = torch.empty(job.sizes, dtype=job.dtype, device=job.device)
    linear = torch.zeros(batch, dtype=torch.int64, device=job.device)
    for outer, inner, outputs in job.groups(len(tensors)):
        inputs = [view[outer, :, inner] for view in job.views]
        origin = None if base is None else inputs.pop()
        for working in (narrow, job.wide):
            gram = job.chosen.gram(inputs, origin, working)
            coefficients, unique = mean_coefficients(
                gram,
                shares[outputs].unsqueeze(1),
                magnitude=magnitude,
                antipodal_tolerance=0 if working == job.wide else _NEAR_ANTIPODAL,
            )
            coefficients = lambda_ * coefficients
            if working == job.wide or _is_precise(gram, coefficients, unique):
                break
        if working == job.wide:
            job.check(inputs, origin, gram, outputs)
            _refuse_infinite(coefficients, outputs, "a coefficient")
        out = result[outer, :, inner]
        if not job.chosen.combine(inputs, origin, coefficients, out, working):
            _refuse_infinite(out, outputs, "the result")
        linear.index_add_(0, outputs, (~unique).sum(-1))
    vectors = job.sizes[0] * job.sizes[2] // max(1, batch)
    return Merged(result.view(job.given[0].shape), vectors, linear)


def gram_matrices(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    granularity: str = "tensor",
) -> torch.Tensor:
    """The inner products that a merge of some weights would depend on.

    Args:
        tensors: as in `nuslerp`, one or more.
        base, granularity: as in `nuslerp`.

    Returns:
        `(vectors, N, N)` in the widest dtype of the device, computed in it. With a
        base, N is the number of tensors and one: the last row and column are those of
        the base itself, the others of the task vectors.

    Raises:
        As `nuslerp`.
    """
    given = [*tensors] if base is None else [*tensors, base]
    job = _Job([tensor.detach().unsqueeze(0) for tensor in given], granularity)
    shape = job.sizes[0], job.sizes[2], len(given), len(given)
    grams = torch.zeros(shape, dtype=job.wide, device=job.device)
    measure = {"measure_base": base is not None}
    for outer, inner, outputs in job.groups(len(given)):
        inputs = [view[outer, :, inner] for view in job.views]
        origin = None if base is None else inputs.pop()
        grams[outer, inner] = job.chosen.gram(inputs, origin, job.wide, **measure)
        job.check(inputs, origin, grams[outer, inner], outputs)
    return grams.flatten(0, 1)


class _Job:
    """What a merge reads: batches of weights, seen as vectors.

    Args:
        given: `(batch, *weight_shape)` of the models, and of the base if there is one.
        granularity: as in `nuslerp`.
    """

    def __init__(self, given: Sequence[torch.Tensor], granularity: str):
        for tensor in given:
            if not tensor.is_floating_point():
                raise TypeError(
                    f"NuSLERP needs floating-point tensors, not {tensor.dtype}"
                )
            if unpack_dual(tensor).tangent is not None:
                raise NotImplementedError("NuSLERP has no forward-mode derivatives")
        self.given, self.device = given, given[0].device
        self.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given))
        self.wide = wide_dtype(self.device)
        self.sizes = vector_view(given[0].shape, granularity)
        self.views = [tensor.reshape(self.sizes) for tensor in given]
        self.recorded = is_recorded(given)
        self.chosen = passes.choose(self.views)

    def groups(self, models: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Vectors to work out at once: outer and inner indices, and their weights'."""
        outer, length, inner, width = self.sizes
        if not prod(self.sizes) or self.device.type == "meta":
            return
        most = max(1, _GRAM_ENTRIES // models**2)
        near = max(1, _GROUP_ELEMENTS // (length * inner * width))
        steps = min(near, max(1, most // inner)), most
        if self.recorded:  # autograd would copy the whole gradient for each group
            steps = outer, inner
        for part in slices(outer, steps[0]):
            outputs = torch.arange(part.start, part.stop, device=self.device)
            for vectors in slices(inner, steps[1]):
                yield part, vectors, outputs // (outer // len(self.given[0]))

    def check(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        gram: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """Refuse vectors that are not finite, or whose squares are not theirs."""
        if not gram.isfinite().all():
            for index, tensor in enumerate(self.given):
                for output, weight in enumerate(tensor.detach()):
                    if not torch.stack(weight.aminmax()).isfinite().all():
                        is_base = base is not None and index == len(inputs)
                        raise NonFiniteError(output, None if is_base else index)
            _refuse_infinite(gram, outputs, "a squared length")
        if self.dtype != torch.float64:
            return
        squares, number = gram.diagonal(dim1=-2, dim2=-1), torch.finfo(gram.dtype)
        short = squares[..., : len(inputs)] < number.smallest_normal / number.eps**2
        for outer, inner, model in short.nonzero().tolist():
            vector = inputs[model][outer, :, inner]
            zero = torch.zeros_like(vector) if base is None else base[outer, :, inner]
            if not vector.equal(zero):
                reason = "a squared length is too small for torch.float64"
                raise RangeError(int(outputs[outer]), reason)


def _is_precise(
    gram: torch.Tensor, coefficients: torch.Tensor, unique: torch.Tensor
) -> bool:
    """Whether float32 is enough for Gram matrices and for what comes of them."""
    smallest, largest = gram.diagonal(dim1=-2, dim2=-1).aminmax()
    sizes = coefficients.abs()
    within = (sizes >= _COEFFICIENTS[0]) & (sizes <= _COEFFICIENTS[1])
    fine = (within | (coefficients == 0)).all() & unique.all()
    return bool(fine & (smallest >= _SQUARES[0]) & (largest <= _SQUARES[1]))


def _refuse_infinite(values: torch.Tensor, outputs: torch.Tensor, what: str) -> None:
    """Raise RangeError if values `(outer, ...)` are not all finite."""
    infinite = ~values.isfinite().flatten(1).all(1)
    if infinite.any():
        reason = f"{what} is too large for {values.dtype}"
        raise RangeError(int(outputs[infinite][0]), reason)
