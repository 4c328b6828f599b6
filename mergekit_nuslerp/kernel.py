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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from math import prod, sqrt

import numpy as np
import torch

from mergekit_nuslerp.geometry import normalize_weights, slerp_coefficients
from mergekit_nuslerp.granularity import Granularity, storage_order, vector_view

# Scratch for all inputs together. On a CPU, measured: small enough for a shared cache,
# large enough that starting PyTorch's threads for each operation costs little. On an
# accelerator a piece must outlast the launch of its operations.
_SCRATCH_BYTES_CPU = 12 * 1024 * 1024
_SCRATCH_BYTES_ACCELERATOR = 192 * 1024 * 1024

# Vectors whose coefficients are worked out at once: bounds scratch for short vectors.
_MAX_VECTORS = 64 * 1024

# Vectors that run across memory are read in strips at least this long where they have
# as many elements, so that each pass over the sums serves many of them.
_STRIP_LENGTH = 64


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


def nuslerp(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    base: torch.Tensor | None = None,
    granularity: Granularity = "tensor",
) -> torch.Tensor:
    """Interpolate two weights on a sphere instead of on a line.

    Args:
        tensors: two floating-point tensors of one shape (any, also empty or strided)
            and device. Dtypes may differ. They are not modified.
        weights: one finite number a tensor, of any scale; the interpolation runs at
            t = w_1 / (w_0 + w_1), and beyond the ends where t is outside [0, 1].
            Weights that sum to zero count as equal, with a warning.
        base: interpolate the task vectors `tensors[i] - base` and add the base again.
        granularity: which elements form one vector on the sphere: the whole
            `"tensor"`, each `"row"` W[i, :] (the last dimension) or each `"column"`
            W[:, j] (the first).

    Returns:
        A new tensor of the inputs' shape, in their promoted dtype. Sums are taken at
        least in float32, and in float64 for float32 inputs, and the result is
        rounded once. Differentiable in `tensors` and `base`; the streaming is given
        up where a gradient is recorded.

    Raises:
        ValueError: not two tensors, weights that do not match, shapes that differ.
        TypeError: integer, boolean or complex tensors.
        NonFiniteError: NaN or infinity in an input.

    Example:
        >>> import torch
        >>> from mergekit_nuslerp import nuslerp
        >>> nuslerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 1])
        tensor([0.7071, 0.7071])
    """
    tensors = list(tensors)
    given = tensors if base is None else [*tensors, base]
    if len(tensors) != 2:
        raise ValueError(f"NuSLERP interpolates exactly two models, not {len(tensors)}")
    if len(weights) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many weights: {weights}")
    if any(tensor.shape != given[0].shape for tensor in given):
        raise ValueError(f"tensors differ in shape: {[tuple(t.shape) for t in given]}")
    return merge_batch(
        [tensor.unsqueeze(0) for tensor in tensors],
        torch.tensor([list(weights)], dtype=torch.float64),
        base=None if base is None else base.unsqueeze(0),
        granularity=granularity,
    ).squeeze(0)


def merge_batch(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    granularity: Granularity = "tensor",
) -> torch.Tensor:
    """`nuslerp` for a batch of weights of one shape.

    Args:
        tensors: one tensor a model, each `(batch, *weight_shape)`.
        weights: `(batch, models)`, on any device.
        base: `(batch, *weight_shape)` or None.
        granularity: as in `nuslerp`.

    Returns:
        `(batch, *weight_shape)` in the inputs' promoted dtype.

    Raises:
        TypeError: integer, boolean or complex tensors.
        NonFiniteError: NaN or infinity in an input.
    """
    inputs = list(tensors) if base is None else [*tensors, base]
    dtype = inputs[0].dtype
    for tensor in inputs:
        if not tensor.is_floating_point():
            raise TypeError(f"NuSLERP needs floating-point tensors, not {tensor.dtype}")
        dtype = torch.promote_types(dtype, tensor.dtype)
    weights, vanishing = normalize_weights(weights)
    if vanishing.any():
        warnings.warn(
            "NuSLERP weights sum to zero; the models are weighted equally instead",
            RuntimeWarning,
            stacklevel=2,
        )
    if not inputs[0].numel():
        return inputs[0].to(dtype, copy=True)

    order = list(range(inputs[0].ndim))
    if granularity == "tensor":
        # One vector a weight: its elements may come in any order, so also as stored.
        order = storage_order(inputs[0])
        inputs = [tensor.permute(order) for tensor in inputs]
    shape = inputs[0].shape
    sizes = vector_view(shape, granularity)
    models = len(tensors)
    per_vector = weights.unsqueeze(1).expand(-1, sizes[0] // shape[0], -1)
    job = _Job(
        inputs=tuple(tensor.reshape(sizes) for tensor in inputs),
        models=models,
        batch=shape[0],
        weights=per_vector.reshape(sizes[0], 1, models),
        dtype=dtype,
    )
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return _merge(job).reshape(shape).permute(inverse)


@dataclass(frozen=True)
class _Job:
    """A batch of weights as vectors, each tensor `(outer, length, inner, width)`."""

    inputs: tuple[torch.Tensor, ...]  # the models, then the base if there is one
    models: int
    batch: int
    weights: torch.Tensor  # (outer, 1, models), summing to one
    dtype: torch.dtype  # of the result

    @property
    def sizes(self) -> torch.Size:
        return self.inputs[0].shape

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def wide_dtype(self) -> torch.dtype:
        """The widest dtype of the device; Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def scratch_dtype(self) -> torch.dtype:
        """A dtype of at least twice the inputs' precision, or the widest there is."""
        return torch.float32 if self.dtype.itemsize < 4 else self.wide_dtype


_Piece = tuple[slice, slice, slice, slice]


def _tiles(sizes: Sequence[int], chunk: int) -> Iterator[tuple[slice, list[_Piece]]]:
    """Cut a view into pieces of at most `chunk` elements.

    Yields:
        the outer indices of some vectors, and the pieces that those vectors consist
        of: one piece where whole vectors fit, else several to be summed over.
    """
    outer, length, inner, width = sizes
    run = min(width, chunk)
    strip = min(length, _STRIP_LENGTH)
    columns = min(inner, max(1, chunk // (run * strip)), _MAX_VECTORS)
    rows = min(length, max(1, chunk // (run * columns)))
    whole = rows == length and run == width
    fitting = min(chunk // (rows * columns * run), _MAX_VECTORS // columns)
    vectors = min(outer, max(1, fitting)) if whole else 1
    for o in _slices(outer, vectors):
        for i in _slices(inner, columns):
            parts = product(_slices(length, rows), _slices(width, run))
            yield o, [(o, r, i, w) for r, w in parts]


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


class _Scratch:
    """Room for pieces of a job in one dtype, and the steps that work in it.

    Every operation runs over the elements of a piece in the same order, so that each
    of PyTorch's threads finds in its own cache what it wrote there before. Where
    `streaming` is off there is no room: operations allocate, and autograd records.
    """

    def __init__(self, job: _Job, dtype: torch.dtype, *, streaming: bool):
        self.job = job
        self.dtype = dtype
        self.chunk = prod(job.sizes)
        self.pairs = list(combinations_with_replacement(range(job.models), 2))
        models = range(job.models)
        self.square = torch.tensor(
            [
                [self.pairs.index((min(i, j), max(i, j))) for j in models]
                for i in models
            ],
            device=job.device,
        )
        self.rows: torch.Tensor | None = None
        if streaming:
            rows = len(job.inputs) + len(self.pairs)
            on_cpu = job.device.type == "cpu"
            room = _SCRATCH_BYTES_CPU if on_cpu else _SCRATCH_BYTES_ACCELERATOR
            self.chunk = min(self.chunk, room // (rows * dtype.itemsize))
            self.rows = _allocate((rows, self.chunk), dtype, job.device)

    def room(self, row: int, piece: torch.Tensor) -> torch.Tensor | None:
        """Scratch in the shape of a piece, None where operations must allocate."""
        if self.rows is None:
            return None
        return self.rows[row, : piece.numel()].view(piece.shape)

    def read(self, piece: _Piece) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The models' vectors in one piece, and the base that they start from."""
        values = []
        for row, tensor in enumerate(self.job.inputs):
            part = tensor[piece]
            room = self.room(row, part)
            values.append(part.to(self.dtype) if room is None else room.copy_(part))
        vectors, rest = values[: self.job.models], values[self.job.models :]
        if not rest:
            return vectors, None
        (base,) = rest
        return [
            torch.sub(vector, base, out=None if self.rows is None else vector)
            for vector in vectors
        ], base

    def peaks(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """The largest absolute element of each vector, `(outer, inner, models)`."""
        peaks: torch.Tensor | None = None
        with torch.no_grad():
            for piece in pieces:
                vectors, _ = self.read(piece)
                found = torch.stack([v.abs().amax((1, 3)) for v in vectors], dim=-1)
                peaks = found if peaks is None else torch.maximum(peaks, found)
        assert peaks is not None
        return peaks

    def gram(
        self, pieces: Sequence[_Piece], scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """Step 1: inner products of all vectors, `(outer, inner, models, models)`.

        Products are accumulated elementwise over the pieces and summed pairwise in
        the end, so that rounding does not grow with the length of the vectors.

        Returns:
            the Gram matrices in the wide dtype, and the last piece as read.
        """
        sums: list[torch.Tensor] = []
        for piece in pieces:
            vectors, base = self.read(piece)
            factors = vectors
            if scale is not None:
                factors = [
                    vector * _over_elements(scale[..., n])
                    for n, vector in enumerate(vectors)
                ]
            if not sums:
                for row, (i, j) in enumerate(self.pairs, len(self.job.inputs)):
                    room = self.room(row, vectors[0])
                    sums.append(torch.mul(factors[i], factors[j], out=room))
                continue
            _, length, _, width = vectors[0].shape
            for total, (i, j) in zip(sums, self.pairs):
                total[:, :length, :, :width].addcmul_(factors[i], factors[j])

        products = torch.stack([total.sum((1, 3)) for total in sums], dim=-1)
        return products.to(self.job.wide_dtype)[..., self.square], vectors, base

    def combine(
        self,
        vectors: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        coefficients: torch.Tensor,
    ) -> torch.Tensor:
        """Step 3: base + sum of c_i v_i over a piece, not yet rounded."""
        in_place = self.rows is not None
        result = base
        for n, vector in enumerate(vectors):
            factor = _over_elements(coefficients[..., n].to(self.dtype))
            if result is None:
                result = torch.mul(vector, factor, out=vector if in_place else None)
            else:
                out = result if in_place else None
                result = torch.addcmul(result, vector, factor, out=out)
        assert result is not None
        return result


def _over_elements(values: torch.Tensor) -> torch.Tensor:
    """One value a vector, `(outer, inner)`, in a shape that broadcasts over pieces."""
    return values[:, None, :, None]


def _allocate(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised tensor, on Linux in huge pages where it is large.

    NumPy asks the system for huge pages and PyTorch does not. First touching a result
    page by page would take a quarter of the time of a whole merge.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    storage = np.empty(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(storage).view(dtype).view(shape)


def _merge(job: _Job) -> torch.Tensor:
    """Choose how the three steps run, and look at what the Gram matrices showed."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in job.inputs):
        # Autograd keeps every intermediate, so there is no scratch to bound.
        result, regular = _stream(job, job.wide_dtype, streaming=False, scaled=True)
        if not regular:
            _refuse_nonfinite(job)
        return result
    result, regular = _stream(job, job.scratch_dtype, streaming=True)
    if not regular:
        _refuse_nonfinite(job)
        # Mostly this is a model that left the weight as it was, and all is well.
        if _extreme(job):
            wide = job.wide_dtype
            result, _ = _stream(job, wide, streaming=True, scaled=True)
    return result


def _stream(
    job: _Job, dtype: torch.dtype, *, streaming: bool, scaled: bool = False
) -> tuple[torch.Tensor, bool]:
    """Run Gram, coefficients and combination over all pieces of a job.

    Args:
        job: what to merge.
        dtype: of the scratch.
        streaming: piece by piece; else all at once, so that autograd can record it.
        scaled: divide each vector by the power of two of its largest element before
            taking squares. Angles stay, overflow and underflow go.

    Returns:
        The result in the job's view, and whether all squared lengths were in range.
    """
    scratch = _Scratch(job, dtype, streaming=streaming)
    if streaming:
        result = _allocate(job.sizes, job.dtype, job.device)
    regular = torch.ones((), dtype=torch.bool, device=job.device)
    smallest = 0.0 if scaled else _smallest_square(job.dtype, dtype)
    for outer, pieces in _tiles(job.sizes, scratch.chunk):
        scale = None
        if scaled:
            exponents = torch.frexp(scratch.peaks(pieces)).exponent
            scale = torch.exp2(-exponents.to(dtype)).clamp(max=torch.finfo(dtype).max)
        gram, vectors, base = scratch.gram(pieces, scale)
        squared = gram.detach().diagonal(dim1=-2, dim2=-1)
        regular &= ((squared >= smallest) & squared.isfinite()).all()
        coefficients = slerp_coefficients(
            gram,
            job.weights[outer].to(gram),
            antipodal_tolerance=torch.finfo(job.dtype).eps,
        )
        if not streaming:
            result = scratch.combine(vectors, base, coefficients).to(job.dtype)
            break
        for piece in reversed(pieces):
            # The last piece is still in scratch, and often it is the only one.
            if piece is not pieces[-1]:
                vectors, base = scratch.read(piece)
            result[piece] = scratch.combine(vectors, base, coefficients)
    return result, bool(regular)


def _smallest_square(inputs: torch.dtype, scratch: torch.dtype) -> float:
    """The smallest squared length that can be trusted, in scratch of a given dtype.

    Zero where the inputs' range is so narrow that no square of theirs vanishes.
    """
    narrow, wide = torch.finfo(inputs), torch.finfo(scratch)
    if (narrow.smallest_normal * narrow.eps) ** 2 >= wide.smallest_normal:
        return 0.0
    return wide.smallest_normal / wide.eps**2


def _extreme(job: _Job) -> bool:
    """Whether any vector, not all zero, is too short or too long to be squared."""
    dtype = job.scratch_dtype
    shortest = sqrt(_smallest_square(job.dtype, dtype))
    longest = sqrt(torch.finfo(dtype).max / prod(job.sizes))
    scratch = _Scratch(job, dtype, streaming=True)
    found = torch.zeros((), dtype=torch.bool, device=job.device)
    for _, pieces in _tiles(job.sizes, scratch.chunk):
        peaks = scratch.peaks(pieces)
        found |= (((peaks > 0) & (peaks < shortest)) | (peaks > longest)).any()
    return bool(found)


def _refuse_nonfinite(job: _Job) -> None:
    """Raise NonFiniteError for the first input that holds NaN or infinity."""
    batch = job.batch
    for index, tensor in enumerate(job.inputs):
        for output, weight in enumerate(tensor.detach().unflatten(0, (batch, -1))):
            if not all(bound.isfinite() for bound in torch.aminmax(weight)):
                raise NonFiniteError(output, None if index == job.models else index)
