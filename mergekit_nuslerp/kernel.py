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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations_with_replacement, compress, product
from math import ceil, gcd, isfinite, prod, sqrt
from threading import Barrier
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from mergekit_nuslerp.geometry import (
    MIN_WEIGHT_SUM,
    Magnitude,
    mean_coefficients,
    normalize_weights,
)
from mergekit_nuslerp.granularity import storage_order, vector_view

# Scratch of one thread. On a CPU, measured: small enough for the caches, large enough
# that starting an operation costs little beside running it. On an accelerator one
# thread has it all, and a piece must outlast the launch of its operations.
_SCRATCH_BYTES_CPU = 6 * 1024 * 1024
_SCRATCH_BYTES_ACCELERATOR = 192 * 1024 * 1024

# Scratch between merges. Given back to the system, all of it would have to be touched
# anew, page by page, for each of a checkpoint's weights.
_SPARE: list[torch.Tensor] = []

# Bounds the scratch of all threads; a few saturate the memory of most machines.
_MAX_THREADS = 8

# Vectors of a tile: bounds what is worked out at once for short vectors. For two
# models; with more, Gram matrices are larger.
_MAX_VECTORS = 16 * 1024

# Tiles whose coefficients are worked out at once where that pays.
_TILES_TOGETHER = 8

# Matrix products of long vectors are added up in blocks, for precision: some libraries
# sum one element after the other. Blocks shorter than the second are not worth it.
_BLOCK_LENGTH = 1024
_SHORTEST_BLOCK = 128

# Vectors that run across memory are read in strips at least this long where they have
# as many elements, so that adding up the strips' sums costs little.
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
            `"linear"` and `"geometric"` take the weighted mean of the lengths.
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
        NonFiniteError: NaN or infinity in an input.
        OverflowError: task vectors beyond the range of float64.

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
    if abs(sum(weights)) < MIN_WEIGHT_SUM:
        warnings.warn(
            "NuSLERP weights sum to zero; the models are weighted equally instead",
            RuntimeWarning,
            stacklevel=2,
        )
    merged = merge_batch(
        [tensor.unsqueeze(0) for tensor in tensors],
        torch.tensor([list(weights)], dtype=torch.float64),
        base=None if base is None else base.unsqueeze(0),
        granularity=granularity,
        magnitude=magnitude,
        lambda_=lambda_,
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
) -> Merged:
    """`nuslerp` for a batch of weights of one shape, without its warnings.

    Args:
        tensors: one tensor a model, each `(batch, *weight_shape)`.
        weights: `(batch, models)`, on any device.
        base: `(batch, *weight_shape)` or None.
        granularity: as in `nuslerp`.
        magnitude: as in `nuslerp`.
        lambda_: as in `nuslerp`.

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
    order = storage_order(tensors[0], granularity)
    job = _Job.of(
        [tensor.permute(order) for tensor in tensors],
        None if base is None else base.permute(order),
        granularity,
        weights=normalized,
        magnitude=magnitude,
        lambda_=lambda_,
    )
    vectors = job.sizes[0] * job.sizes[2] // max(1, job.batch)
    if not prod(job.sizes):
        result = tensors[0].to(job.dtype, copy=True)
        return Merged(result, vectors, torch.zeros(job.batch, dtype=torch.int64))
    result, linear = _merge(job)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    shape = [tensors[0].shape[dim] for dim in order]
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
    order = storage_order(tensors[0].unsqueeze(0), granularity)
    job = _Job.of(
        [tensor.detach().unsqueeze(0).permute(order) for tensor in tensors],
        None if base is None else base.detach().unsqueeze(0).permute(order),
        granularity,
        measures_base=base is not None,
    )
    outer, _, inner, _ = job.sizes
    shape = (outer, inner, job.vectors, job.vectors)
    grams = torch.zeros(shape, dtype=job.wide_dtype, device=job.device)
    if not prod(job.sizes):
        return grams.flatten(0, 1)

    def measure(worker: _Worker, share: Sequence[_Tile]) -> None:
        for vectors, pieces in share:
            grams[vectors, pieces[0][2]] = worker.gram(pieces, None)

    with _Crew(job, job.wide_dtype) as crew:
        tiles = list(job.tiles(crew.chunk))
        if crew.by_tiles(tiles):
            crew.share(measure, tiles)
        else:
            for vectors, pieces in tiles:
                parts = crew.share(partial(_Worker.gram, scale=None), pieces)
                grams[vectors, pieces[0][2]] = torch.stack(parts).sum(0)
    if not grams.isfinite().all():
        _refuse_nonfinite(job)
        _refuse_overflow(grams)
    return grams.flatten(0, 1)


_T = TypeVar("_T")
_R = TypeVar("_R")

_Piece = tuple[slice, slice, slice, slice]
_Tile = tuple[slice, list[_Piece]]  # outer indices, and the pieces of those vectors


@dataclass(frozen=True)
class _Job:
    """A batch of weights as vectors, each tensor `(outer, length, inner, width)`."""

    inputs: tuple[torch.Tensor, ...]  # the models, then the base if there is one
    models: int
    batch: int
    dtype: torch.dtype  # of the result
    # (batch, models), summing to one.
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: Magnitude = "slerp"
    lambda_: float = 1.0
    measures_base: bool = False  # whether Gram matrices are to hold the base, too

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        granularity: str,
        **rest: Any,
    ) -> _Job:
        """Take each tensor, `(batch, *weight_shape)`, as vectors."""
        inputs = list(tensors) if base is None else [*tensors, base]
        dtype = inputs[0].dtype
        for tensor in inputs:
            if not tensor.is_floating_point():
                raise TypeError(
                    f"NuSLERP needs floating-point tensors, not {tensor.dtype}"
                )
            dtype = torch.promote_types(dtype, tensor.dtype)
        sizes = vector_view(inputs[0].shape, granularity)
        return cls(
            inputs=tuple(tensor.reshape(sizes) for tensor in inputs),
            models=len(tensors),
            batch=inputs[0].shape[0],
            dtype=dtype,
            **rest,
        )

    @property
    def vectors(self) -> int:
        """How many vectors a Gram matrix is of."""
        return self.models + self.measures_base

    @property
    def sizes(self) -> torch.Size:
        return self.inputs[0].shape

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of models whose inner products make up a Gram matrix."""
        return list(combinations_with_replacement(range(self.vectors), 2))

    @property
    def scratch_rows(self) -> int:
        return len(self.inputs) + 1  # for products

    @cached_property
    def vector_weights(self) -> torch.Tensor:
        """The weights of every vector, `(outer, 1, models)`."""
        weights = self.weights.to(self.device, self.wide_dtype)
        each = weights.unsqueeze(1).expand(-1, self.sizes[0] // self.batch, -1)
        return each.reshape(self.sizes[0], 1, self.models)

    @cached_property
    def square(self) -> torch.Tensor:
        """Where in `pairs` each element of a Gram matrix is."""
        vectors = range(self.vectors)
        places = [
            [self.pairs.index((min(i, j), max(i, j))) for j in vectors] for i in vectors
        ]
        return torch.tensor(places, device=self.device)

    def coefficients(
        self, gram: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step 2.

        Args:
            gram: `(..., models, models)` inner products of the vectors times `scale`.
            weights: `(..., models)`.
            scale: `(..., models)`, or None for one.

        Returns:
            `(..., models)` coefficients of the vectors themselves, and `(...)`, whether
            each has a unique mean.
        """
        values, unique = mean_coefficients(
            gram,
            weights,
            scale=None if scale is None else scale.to(gram.dtype),
            magnitude=self.magnitude,
            antipodal_tolerance=torch.finfo(self.dtype).eps,
        )
        return values * self.lambda_, unique

    def linear(self, found: Sequence[tuple[slice, torch.Tensor]]) -> torch.Tensor:
        """How many vectors of each weight are not unique, `(batch,)`.

        Args:
            found: outer indices, and `(outer, inner)`, whether each is unique.
        """
        total = torch.zeros(self.sizes[0], dtype=torch.int64, device=self.device)
        if not torch.cat([unique.flatten() for _, unique in found]).all():
            for outer, unique in found:
                total[outer] += (~unique).sum(-1)
        return total.view(self.batch, -1).sum(-1)

    def tiles(self, chunk: int) -> Iterator[_Tile]:
        return _tiles(self.sizes, chunk, max(1, 4 * _MAX_VECTORS // self.vectors**2))

    @property
    def wide_dtype(self) -> torch.dtype:
        """The widest dtype of the device; Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def scratch_dtype(self) -> torch.dtype:
        """A dtype of at least twice the inputs' precision, or the widest there is."""
        return torch.float32 if self.dtype.itemsize < 4 else self.wide_dtype


def _tiles(sizes: Sequence[int], chunk: int, most: int) -> Iterator[_Tile]:
    """Cut a view into pieces of at most `chunk` elements and `most` vectors.

    Yields:
        the outer indices of some vectors, and the pieces that those vectors consist
        of: one piece where whole vectors fit, else several to be summed over.
    """
    outer, length, inner, width = sizes
    run = min(width, chunk)
    strip = min(length, _STRIP_LENGTH)
    columns = min(inner, max(1, chunk // (run * strip)), most)
    rows = min(length, max(1, chunk // (run * columns)))
    whole = rows == length and run == width
    fitting = min(chunk // (rows * columns * run), most // columns)
    vectors = min(outer, max(1, fitting)) if whole else 1
    for o in _slices(outer, vectors):
        for i in _slices(inner, columns):
            parts = product(_slices(length, rows), _slices(width, run))
            yield o, [(o, r, i, w) for r, w in parts]


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


class _Worker:
    """Takes pieces of a job through the steps, in scratch of one dtype.

    Without rows there is no scratch: operations allocate what they return, and
    autograd can record them.
    """

    def __init__(self, job: _Job, dtype: torch.dtype, rows: torch.Tensor | None):
        self.job = job
        self.dtype = dtype
        self.rows = rows
        # An accelerator widens inputs while it calculates; a CPU makes copies first.
        self.mixes = rows is not None and job.device.type != "cpu"
        self.views: dict[torch.Size, list[torch.Tensor]] = {}
        self.held: _Piece | None = None
        self.vectors: list[torch.Tensor] = []
        self.base: torch.Tensor | None = None

    def rooms(self, shape: torch.Size) -> Sequence[torch.Tensor | None]:
        """Scratch for pieces of one shape, all None where operations must allocate."""
        if self.rows is None:
            return [None] * self.job.scratch_rows
        if shape not in self.views:
            # Kept: making views takes turns with the other threads.
            self.views[shape] = list(self.rows[:, : prod(shape)].view(-1, *shape))
        return self.views[shape]

    def read(self, piece: _Piece) -> None:
        """Hold the models' vectors in one piece, and the base that they start from."""
        if self.held is piece:
            return
        parts = [tensor[piece] for tensor in self.job.inputs]
        rooms = self.rooms(parts[0].shape)
        self.held, self.base = piece, None
        if len(parts) > self.job.models:
            self.base = self.start_from(parts[-1], rooms[len(parts) - 1])
        self.vectors = [
            self.start_from(part, room)
            for part, room in zip(parts[: self.job.models], rooms)
        ]
        if self.job.measures_base and self.base is not None:
            self.vectors.append(self.base)

    def start_from(self, part: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
        """Part of an input in the scratch's dtype, less the base once that is held."""
        if self.base is not None and self.mixes:
            return torch.sub(part, self.base, out=room)
        wide = part.to(self.dtype) if room is None else room.copy_(part)
        return wide if self.base is None else torch.sub(wide, self.base, out=room)

    def peaks(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """The largest absolute element of each vector, `(outer, inner, models)`."""
        peaks: torch.Tensor | None = None
        for piece in pieces:
            self.read(piece)
            found = torch.stack([v.abs().amax((1, 3)) for v in self.vectors], dim=-1)
            peaks = found if peaks is None else torch.maximum(peaks, found)
        assert peaks is not None
        return peaks

    def gram(
        self, pieces: Sequence[_Piece], scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Step 1: Gram matrices, `(outer, inner, models, models)`.

        Sums over a piece are pairwise or in blocks, and those over pieces in the wide
        dtype, so that rounding does not grow with the length of the vectors.
        """
        total: torch.Tensor | None = None
        for piece in pieces:
            self.read(piece)
            factors = self.vectors
            if scale is not None:
                factors = [v * s for v, s in zip(factors, _over_elements(scale))]
            if scale is None and self.can_multiply(factors[0].shape):
                found = self.multiplied(factors[0].shape)
            else:
                found = self.summed(factors)
            total = found if total is None else total + found
        assert total is not None
        return total

    def summed(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Gram matrices as sums of products of pairs."""
        room = self.rooms(vectors[0].shape)[-1]
        sums = [
            torch.mul(vectors[i], vectors[j], out=room).sum((1, 3))
            for i, j in self.job.pairs
        ]
        products = torch.stack(sums, dim=-1).to(self.job.wide_dtype)
        return products[..., self.job.square]

    def can_multiply(self, shape: torch.Size) -> bool:
        """Whether `multiplied` is as exact as `summed`, and faster."""
        outer, length = shape[0], prod(shape[1:])
        if self.rows is None or shape[2] > 1:
            return False
        if _block(outer, length) < min(length, _SHORTEST_BLOCK):
            return False
        if self.dtype == torch.float64:
            return not self.mixes
        return (self.job.vectors > 2 or self.mixes) and _multiplies_exactly()

    def multiplied(self, shape: torch.Size) -> torch.Tensor:
        """Gram matrices of the vectors held, as products of matrices."""
        assert self.rows is not None
        outer, length = shape[0], prod(shape[1:])
        held = self.rows[: self.job.vectors, : prod(shape)].view(-1, outer, length)
        block = _block(outer, length)
        even = length - length % block
        parts = held[..., :even].unflatten(-1, (-1, block)).flatten(1, 2)
        products = torch.bmm(parts.transpose(0, 1), parts.permute(1, 2, 0))
        found = products.to(self.job.wide_dtype).unflatten(0, (outer, -1)).sum(1)
        if even < length:  # of a single vector
            rest = held[:, 0, even:]
            found = found + rest @ rest.mT
        return found.unsqueeze(1)

    def combine(self, piece: _Piece, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Step 3: base + sum of c_i v_i over a piece, not yet rounded."""
        self.read(piece)
        self.held = None  # overwritten now
        in_place = self.rows is not None
        result = self.base
        for vector, factor in zip(self.vectors, factors):
            if result is None:
                result = torch.mul(vector, factor, out=vector if in_place else None)
            else:
                out = result if in_place else None
                result = torch.addcmul(result, vector, factor, out=out)
        assert result is not None
        return result

    def write(
        self,
        pieces: Sequence[_Piece],
        factors: Sequence[torch.Tensor],
        result: torch.Tensor,
    ) -> None:
        """Combine pieces, and round them into the result."""
        # Backwards: the piece that was read last is still held.
        for piece in reversed(pieces):
            if self.mixes and self.held is not piece:
                self.blend(piece, factors, result[piece])
            else:
                result[piece] = self.combine(piece, factors)

    def blend(
        self, piece: _Piece, factors: Sequence[torch.Tensor], result: torch.Tensor
    ) -> None:
        """Step 3 straight from the inputs: (1 - sum of c_i) base + sum of c_i t_i."""
        parts = [tensor[piece] for tensor in self.job.inputs]
        if len(parts) > self.job.models:
            factors = [*factors, 1 - torch.stack(list(factors)).sum(0)]
        room = self.rooms(parts[0].shape)[0]
        self.held = None  # overwritten now
        total = torch.mul(parts[0], factors[0], out=room)
        for part, factor in zip(parts[1:-1], factors[1:-1]):
            torch.addcmul(total, part, factor, out=room)
        torch.addcmul(total, parts[-1], factors[-1], out=result)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of vectors `(outer, inner, ...)` as `(vectors, ...)`."""
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    return torch.cat(flat) if len(flat) > 1 else flat[0]


def _block(outer: int, length: int) -> int:
    """Length of the blocks that vectors are multiplied in, without a rest if many."""
    if length <= 2 * _BLOCK_LENGTH:
        return length
    return gcd(length, _BLOCK_LENGTH) if outer > 1 else _BLOCK_LENGTH


def _multiplies_exactly() -> bool:
    """Whether matrix products of float32 keep all its digits, as is the default."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # PyTorch's newer settings have been used beside this one
        return False


def _over_elements(values: torch.Tensor) -> Sequence[torch.Tensor]:
    """One value a vector, `(outer, inner, models)`, by model and to broadcast."""
    return values.movedim(-1, 0)[:, :, None, :, None].unbind()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from splitting operations, as for many small systems of equations.

    In several threads these take a hundred times as long where a machine is busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _scratch(size: int, device: torch.device) -> torch.Tensor:
    """Bytes for one worker: on the CPU a block that is kept, and mostly larger."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    with suppress(IndexError):
        block = _SPARE.pop()
        if block.nbytes >= size:
            return block
    with torch.inference_mode(False):  # later merges may run outside of that mode
        return _allocate((max(size, _SCRATCH_BYTES_CPU),), torch.uint8, device)


class _Crew:
    """Workers, each in a thread of its own where that is faster.

    PyTorch would split every operation over its threads and wait for all of them
    after each: thousands of times for one weight, and long where another process
    keeps one of the threads waiting. Instead, each worker runs whole pieces alone.
    """

    def __init__(self, job: _Job, dtype: torch.dtype):
        elements, on_cpu = prod(job.sizes), job.device.type == "cpu"
        room = _SCRATCH_BYTES_CPU if on_cpu else _SCRATCH_BYTES_ACCELERATOR
        chunk = max(1, room // (job.scratch_rows * dtype.itemsize))
        self.chunk = min(chunk, elements)
        self.threads = torch.get_num_threads()
        count = min(self.threads, _MAX_THREADS, ceil(elements / chunk)) if on_cpu else 1
        size = job.scratch_rows * self.chunk * dtype.itemsize
        self.blocks = [_scratch(size, job.device) for _ in range(count)]
        shape = (job.scratch_rows, self.chunk)
        rows = [block[:size].view(dtype).view(shape) for block in self.blocks]
        self.workers = [_Worker(job, dtype, each) for each in rows]
        self.alone = on_cpu and count == 1 and job.models > 2
        self.modes = ExitStack()  # to leave in the end
        self.pool: ThreadPoolExecutor | None = None
        # A mode of the calling thread, which its workers have to be given.
        self.inference = torch.is_inference_mode_enabled()

    def __enter__(self) -> _Crew:
        count = len(self.workers)
        if self.alone:
            self.modes.enter_context(one_thread())
        if count > 1:
            self.pool = ThreadPoolExecutor(count, "nuslerp")
            met = Barrier(count)

            def settle(_: _Worker) -> None:
                torch.get_num_threads()  # takes the default, which would come later
                torch.set_num_threads(1)
                met.wait()  # so that each of the threads comes here

            list(self.pool.map(settle, self.workers))
            # What a thread sets for itself is also what later threads start with.
            torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        self.modes.close()
        if self.pool is not None:
            self.pool.shutdown()
        if self.blocks[0].device.type == "cpu":
            _SPARE.extend(b for b in self.blocks if b.nbytes <= _SCRATCH_BYTES_CPU)
            del _SPARE[_MAX_THREADS:]

    def peaks(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        """`_Worker.peaks` of vectors whose pieces all workers look at."""
        return torch.stack(self.share(_Worker.peaks, pieces)).amax(0)

    def by_tiles(self, tiles: Sequence[_Tile]) -> bool:
        """Whether to share out whole tiles, rather than the pieces of each."""
        single = all(len(pieces) == 1 for _, pieces in tiles)
        return single or len(tiles) >= 4 * len(self.workers)

    def share(
        self, task: Callable[[_Worker, Sequence[_T]], _R], items: Sequence[_T]
    ) -> list[_R]:
        """Let every worker do the task for its share of the items."""
        count = min(len(self.workers), len(items))
        shares = [items[start::count] for start in range(count)]
        tasks = [partial(task, *pair) for pair in zip(self.workers, shares)]
        if self.pool is None:
            return [alone() for alone in tasks]
        return list(self.pool.map(self._quietly, tasks))

    def run(self, task: Callable[[], _R]) -> _R:
        """Do a task in one of the workers' threads."""
        return (
            task()
            if self.pool is None
            else self.pool.submit(self._quietly, task).result()
        )

    def _quietly(self, task: Callable[[], _R]) -> _R:
        with torch.inference_mode(self.inference), torch.no_grad():
            return task()


def _merge(job: _Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose how the three steps run, and look at what the inner products showed.

    Returns:
        The result in the job's view, and `(batch,)`, how many vectors of each weight
        had no unique mean.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in job.inputs):
        return _record(job)
    job = replace(job, inputs=tuple(tensor.detach() for tensor in job.inputs))
    result, squares, linear = _stream(job, job.scratch_dtype)
    short = squares[:, 0] < _smallest_square(job.dtype, job.scratch_dtype)
    finite = squares.isfinite().all()
    # One look for all pieces: an accelerator has to be waited for.
    if not short.any() and finite:
        return result, linear
    if not finite:
        _refuse_nonfinite(job)
    # Mostly this is a model that left vectors as they were, and all is well.
    if not finite or _has_tiny_vectors(job, short.tolist()):
        result, squares, linear = _stream(job, job.wide_dtype, scaled=True)
        _refuse_overflow(squares)
    return result, linear


def _stream(
    job: _Job, dtype: torch.dtype, *, scaled: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take a job through the steps piece by piece.

    Args:
        job: what to merge.
        dtype: of the scratch.
        scaled: divide each vector by the power of two of its largest element before
            taking squares. Angles stay, overflow and underflow go.

    Returns:
        The result in the job's view, `(tiles, 2)` the smallest and the largest squared
        length of a vector in each tile, and `(batch,)` the vectors merged linearly.
    """
    result = _allocate(job.sizes, job.dtype, job.device)
    with _Crew(job, dtype) as crew:
        tiles = list(enumerate(job.tiles(crew.chunk)))
        # A mean takes many small operations, which is long for those of more than two
        # models, and on an accelerator. So carry them out for several tiles at once,
        # and read these again.
        simple = job.models == 2 and job.device.type == "cpu"
        together = 1 if simple else _TILES_TOGETHER
        squares = torch.empty(len(tiles), 2, dtype=job.wide_dtype, device=job.device)
        found: dict[int, tuple[slice, torch.Tensor]] = {}

        def solve(
            group: Sequence[tuple[int, _Tile]],
            grams: Sequence[torch.Tensor],
            scales: Sequence[Any],
        ) -> list[Sequence[torch.Tensor]]:
            shapes = [gram.shape[:2] for gram in grams]
            weights = []
            for (number, (outer, _)), gram, shape in zip(group, grams, shapes):
                lowest, highest = gram.diagonal(dim1=-2, dim2=-1).aminmax()
                squares[number, 0], squares[number, 1] = lowest, highest
                weights.append(job.vector_weights[outer].expand(*shape, -1))
            values, unique = job.coefficients(
                _joined(grams), _joined(weights), _joined(scales) if scaled else None
            )
            counts = [prod(shape) for shape in shapes]
            factors = []
            for (number, (outer, _)), shape, part, known in zip(
                group, shapes, values.to(dtype).split(counts), unique.split(counts)
            ):
                found[number] = outer, known.view(shape)
                factors.append(_over_elements(part.view(*shape, -1)))
            return factors

        def merge(worker: _Worker, share: Sequence[tuple[int, _Tile]]) -> None:
            for start in range(0, len(share), together):
                group = share[start : start + together]
                scales = [
                    _scale(worker.peaks(pieces)) if scaled else None
                    for _, (_, pieces) in group
                ]
                grams = [
                    worker.gram(pieces, scale)
                    for (_, (_, pieces)), scale in zip(group, scales)
                ]
                factors = solve(group, grams, scales)
                # Backwards: what was read last is still held.
                for (_, (_, pieces)), factor in zip(reversed(group), reversed(factors)):
                    worker.write(pieces, factor, result)

        if crew.by_tiles([tile for _, tile in tiles]):
            crew.share(merge, tiles)
        else:
            for tile in tiles:
                _, (_, pieces) = tile
                scale = _scale(crew.peaks(pieces)) if scaled else None
                parts = crew.share(partial(_Worker.gram, scale=scale), pieces)
                gram = torch.stack(parts).sum(0)
                (factors,) = crew.run(partial(solve, [tile], [gram], [scale]))
                write = partial(_Worker.write, factors=factors, result=result)
                crew.share(write, pieces)
    return result, squares, job.linear(list(found.values()))


def _record(job: _Job) -> tuple[torch.Tensor, torch.Tensor]:
    """All at once and in the widest dtype, for autograd, which keeps it all anyway."""
    worker = _Worker(job, job.wide_dtype, rows=None)
    ((outer, pieces),) = _tiles(job.sizes, prod(job.sizes), prod(job.sizes))
    with torch.no_grad():
        scale = _scale(worker.peaks(pieces))
    worker.held = None  # read again, and recorded
    gram = worker.gram(pieces, scale)
    if not gram.isfinite().all():
        _refuse_nonfinite(job)
        _refuse_overflow(gram)
    with one_thread():
        factors, unique = job.coefficients(gram, job.vector_weights, scale)
    result = worker.combine(pieces[0], _over_elements(factors)).to(job.dtype)
    return result, job.linear([(outer, unique)])


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


def _has_tiny_vectors(job: _Job, suspects: Sequence[bool]) -> bool:
    """Whether a vector of the suspected tiles is not zero, but too short to square."""
    dtype = job.scratch_dtype
    shortest = sqrt(_smallest_square(job.dtype, dtype))

    def look(worker: _Worker, share: Sequence[_Tile]) -> bool:
        return any(tiny(worker.peaks(pieces)) for _, pieces in share)

    def tiny(peaks: torch.Tensor) -> bool:
        return bool(((peaks > 0) & (peaks < shortest)).any())

    with _Crew(job, dtype) as crew:
        tiles = list(compress(job.tiles(crew.chunk), suspects))
        if crew.by_tiles(tiles):
            return any(crew.share(look, tiles))
        return any(tiny(crew.peaks(pieces)) for _, pieces in tiles)


def _refuse_nonfinite(job: _Job) -> None:
    """Raise NonFiniteError for the first input that holds NaN or infinity."""
    for index, tensor in enumerate(job.inputs):
        alone = replace(job, inputs=(tensor.detach(),), models=1, measures_base=False)
        with _Crew(alone, job.scratch_dtype) as crew:
            for outer, pieces in job.tiles(crew.chunk):
                bad = ~crew.peaks(pieces).isfinite().flatten(1).all(1)
                if bad.any():
                    first = outer.start + int(bad.nonzero()[0])
                    output = first * job.batch // job.sizes[0]
                    raise NonFiniteError(output, None if index == job.models else index)


def _refuse_overflow(squares: torch.Tensor) -> None:
    if not squares.isfinite().all():
        raise OverflowError("a task vector is beyond the range of float64")
