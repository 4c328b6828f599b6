# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Weights of any size taken through a few operations in scratch that does not grow.

A `Job` is a batch of weights as vectors. Its vectors are worked out a `Group` at a
time, each cut into pieces that fit scratch. A `Crew` of workers, a thread each, takes
the pieces through step 1 or step 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import combinations_with_replacement, product
from math import ceil, gcd, prod
from threading import Barrier, RLock
from typing import Any, TypeVar

import torch

from mergekit_nuslerp.geometry import Magnitude, mean_coefficients
from mergekit_nuslerp.granularity import as_stored, vector_view

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

# Vectors of a group: bounds what is worked out at once for short vectors. For two
# models; with more, Gram matrices are larger.
_MAX_VECTORS = 16 * 1024

# Vectors whose means one thread works out; fewer are not worth sharing.
_FEWEST_MEANS = 64

# Gram matrices of parts of vectors that may wait to be added up.
_GATHERED_BYTES = 4 * 1024 * 1024

# Matrix products of long vectors are added up in blocks, for precision: some libraries
# sum one element after the other. Blocks shorter than the second are not worth it.
_BLOCK_LENGTH = 512
_SHORTEST_BLOCK = 128

# Vectors that run across memory are read in strips at least this long where they have
# as many elements, so that adding up the strips' sums costs little.
_STRIP_LENGTH = 16

# Longer strips are of a multiple of this, so that loops over them come out even.
_ROUND_LENGTH = 128

# Longest run across memory that an accelerator reduces at once. PyTorch has several
# blocks of CUDA threads share longer ones (from 1024 on), and takes 100 MiB and more to
# do so: an element for each of their threads and each output.
_LONGEST_REDUCTION = 256

# How many threads PyTorch had before it was kept to one, for each merge that does so.
# What one thread sets, others start with: they must neither see nor restore it.
_LOWERED: list[int] = []
_SETTING = RLock()

_T = TypeVar("_T")
_R = TypeVar("_R")

Piece = tuple[torch.Tensor, ...]  # a part of each input, of one shape


@dataclass(frozen=True)
class Job:
    """A batch of weights as vectors, each tensor `(outer, length, inner, width)`."""

    inputs: tuple[torch.Tensor, ...]  # the models, then the base if there is one
    models: int
    batch: int
    dtype: torch.dtype  # of the result
    order: tuple[int, ...]  # of the weights' dimensions, batch first, in the view
    # (batch, models), summing to one.
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: Magnitude = "slerp"
    lambda_: float = 1.0
    measures_base: bool = False  # whether Gram matrices are to hold the base, too
    compiled: bool = False  # whether compiled loops are wanted

    @classmethod
    def of(
        cls,
        tensors: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        granularity: str,
        **rest: Any,
    ) -> Job:
        """Take each tensor, `(batch, *weight_shape)`, as vectors."""
        inputs = list(tensors) if base is None else [*tensors, base]
        order, stored = as_stored(inputs, granularity)
        inputs = [tensor.permute(order) for tensor in inputs]
        dtype = inputs[0].dtype
        for tensor in inputs:
            if not tensor.is_floating_point():
                raise TypeError(
                    f"NuSLERP needs floating-point tensors, not {tensor.dtype}"
                )
            dtype = torch.promote_types(dtype, tensor.dtype)
        sizes = vector_view(inputs[0].shape, stored)
        return cls(
            inputs=tuple(tensor.reshape(sizes) for tensor in inputs),
            models=len(tensors),
            batch=inputs[0].shape[0],
            dtype=dtype,
            order=tuple(order),
            **rest,
        )

    @property
    def has_base(self) -> bool:
        return len(self.inputs) > self.models

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

    @property
    def scratch_rows(self) -> int:
        return len(self.inputs) + 1  # for products

    @cached_property
    def vector_weights(self) -> torch.Tensor:
        """The weights of every vector, `(outer, 1, models)`."""
        weights = self.weights.to(self.device, self.wide_dtype)
        each = weights.unsqueeze(1).expand(-1, self.sizes[0] // self.batch, -1)
        return each.reshape(self.sizes[0], 1, self.models)

    def coefficients(
        self,
        gram: torch.Tensor,
        weights: torch.Tensor,
        scale: torch.Tensor | None = None,
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

    def groups(self, chunk: int) -> Iterator[Group]:
        """The job's vectors, a bounded number at a time."""
        outer, _, inner, _ = self.sizes
        most = max(1, 4 * _MAX_VECTORS // self.vectors**2)
        for o in _slices(outer, max(1, most // inner)):
            for i in _slices(inner, most):
                yield Group(self, o, i, chunk)

    @property
    def wide_dtype(self) -> torch.dtype:
        """The widest dtype of the device; Apple's GPUs have no float64."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def scratch_dtype(self) -> torch.dtype:
        """A dtype of at least twice the inputs' precision, or the widest there is."""
        return torch.float32 if self.dtype.itemsize < 4 else self.wide_dtype


class Group:
    """Vectors whose means are worked out together, cut into pieces.

    A tile is some of these vectors, whole. It is one piece where they fit, or else
    several, to be summed over.

    Args:
        job: what the vectors are of.
        outer: outer indices of the vectors.
        inner: inner indices of the vectors.
        chunk: elements of a piece, at most.
    """

    def __init__(self, job: Job, outer: slice, inner: slice, chunk: int):
        self.outer, self.inner = outer, inner
        within = [tensor[outer, :, inner] for tensor in job.inputs]
        self.sizes = within[0].shape
        self.steps = _steps(self.sizes, chunk)
        self.pieces: list[Piece] = list(zip(*map(self.cut, within)))
        _, length_step, _, width_step = self.steps
        length, width = self.sizes[1], self.sizes[3]
        self.per_tile = ceil(length / length_step) * ceil(width / width_step)

    def cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Cut a tensor like the inputs into pieces, those of a tile side by side.

        One value a vector, `(outer, 1, inner, 1)`, is cut into tiles.
        """
        parts = [tensor]
        for dim in (0, 2, 1, 3):
            step = self.steps[dim]
            if step < self.sizes[dim]:
                parts = [piece for part in parts for piece in part.split(step, dim)]
        return parts

    def tiles(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Cut values of vectors, `(outer, inner, ...)`, into tiles."""
        outer, _, inner, _ = self.steps
        return [tile for part in values.split(outer) for tile in part.split(inner, 1)]

    def joined(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of all vectors, `(outer, inner, ...)`, from those of the tiles."""
        if len(found) == 1:
            return found[0]
        outer, _, inner, _ = self.sizes
        whole = found[0].new_empty((outer, inner, *found[0].shape[2:]))
        for room, part in zip(self.tiles(whole), found):
            room.copy_(part)
        return whole

    def factors(self, values: torch.Tensor) -> list[Sequence[torch.Tensor]]:
        """Values of vectors, `(outer, inner, models)`, for each of the pieces."""
        tiles = zip(*map(self.cut, over_elements(values)))
        return [tile for tile in tiles for _ in range(self.per_tile)]


def _steps(sizes: Sequence[int], chunk: int) -> tuple[int, int, int, int]:
    """Sizes of pieces of at most `chunk` elements: whole vectors, or parts of some."""
    outer, length, inner, width = sizes
    run = min(width, chunk)
    strip = min(length, _STRIP_LENGTH)
    columns = min(inner, max(1, chunk // (run * strip)))
    rows = min(length, max(1, chunk // (run * columns)))
    if _ROUND_LENGTH < rows < length:
        rows -= rows % _ROUND_LENGTH
    whole = rows == length and run == width
    vectors = min(outer, max(1, chunk // (rows * columns * run))) if whole else 1
    return vectors, rows, columns, run


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


class _Rooms:
    """Scratch for pieces of one shape, and the views that operations take of it.

    Kept, since making views takes turns with the other threads.
    """

    def __init__(self, job: Job, rows: torch.Tensor, shape: torch.Size):
        outer, length = shape[0], prod(shape[1:])
        within = rows[:, : outer * length]
        self.each = list(within.view(-1, *shape))
        self.models = within[: job.models].view(job.models, *shape)
        self.product = self.each[-1]
        # Vectors one after the other, in blocks to multiply and what is left of them.
        held = within[: job.vectors].view(-1, outer, length)
        block = _block(outer, length)
        even = length - length % block
        blocks = held[..., :even].unflatten(-1, (-1, block)).flatten(1, 2)
        self.blocks = blocks.transpose(0, 1), blocks.permute(1, 2, 0)
        self.rest = held[:, 0, even:] if even < length else None


class Worker:
    """Takes pieces of a job through step 1 and step 3, in scratch of one dtype.

    Without rows there is no scratch: operations allocate what they return, and
    autograd can record them.
    """

    def __init__(self, job: Job, dtype: torch.dtype, rows: torch.Tensor | None):
        self.job = job
        self.dtype = dtype
        self.rows = rows
        # An accelerator widens inputs while it calculates; a CPU makes copies first.
        self.mixes = rows is not None and job.device.type != "cpu"
        self.known: dict[torch.Size, _Rooms] = {}
        self.held: Piece | None = None
        self.vectors: Sequence[torch.Tensor] = ()
        self.base: torch.Tensor | None = None

    def rooms(self, shape: torch.Size) -> _Rooms:
        assert self.rows is not None
        if shape not in self.known:
            self.known[shape] = _Rooms(self.job, self.rows, shape)
        return self.known[shape]

    def split(
        self, parts: Sequence[torch.Tensor]
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
        """The models' parts, and that of the base."""
        models = self.job.models
        return parts[:models], parts[models] if self.job.has_base else None

    def read(self, piece: Piece) -> None:
        """Hold the models' vectors in one piece, and the base that they start from."""
        if self.held is piece:
            return
        self.held, models = piece, self.job.models
        if self.rows is None:
            self.vectors, self.base = task_vectors(*self.split(piece), self.dtype)
        else:
            rooms = self.rooms(piece[0].shape)
            self.base = rooms.each[models] if self.job.has_base else None
            first = models if self.base is not None and self.mixes else 0
            for part, room in zip(piece[first:], rooms.each[first:]):
                room.copy_(part)
            if first and self.base is not None:
                for part, room in zip(piece[:models], rooms.each):
                    torch.sub(part, self.base, out=room)
            elif self.base is not None:
                rooms.models.sub_(self.base)
            self.vectors = rooms.each[:models]
        if self.job.measures_base and self.base is not None:
            self.vectors = [*self.vectors, self.base]

    def peaks(self, piece: Piece) -> torch.Tensor:
        """The largest absolute element of each vector, `(outer, inner, models)`."""
        self.read(piece)
        room = None if self.rows is None else self.rooms(piece[0].shape).product
        peaks = [
            self.reduced(torch.amax, torch.abs(vector, out=room))
            for vector in self.vectors
        ]
        return torch.stack(peaks, dim=-1)

    def gram(
        self, piece: Piece, scales: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Step 1: Gram matrices, `(outer, inner, models, models)`.

        Sums over a piece are pairwise or in blocks, and those over pieces in the wide
        dtype, so that rounding does not grow with the length of the vectors.
        """
        self.read(piece)
        shape, vectors, room = piece[0].shape, self.vectors, None
        in_place = self.rows is not None
        if in_place:
            if scales is None and self.can_multiply(shape):
                return self.multiplied(shape)
            room = self.rooms(shape).product
        if scales is not None:
            vectors = [
                torch.mul(vector, scale, out=vector if in_place else None)
                for vector, scale in zip(vectors, scales)
            ]
            if in_place:
                self.held = None  # overwritten now

        pairs = combinations_with_replacement(vectors, 2)
        found = [self.reduced(torch.sum, torch.mul(v, w, out=room)) for v, w in pairs]
        return symmetric(found, len(vectors)).to(self.job.wide_dtype)

    def reduced(
        self, reduction: Callable[..., torch.Tensor], elements: torch.Tensor
    ) -> torch.Tensor:
        """One value a vector, `(outer, inner)`, of its elements."""
        _, length, inner, _ = elements.shape
        even = length - length % _LONGEST_REDUCTION
        if not self.mixes or inner == 1 or even == 0:
            return reduction(elements, (1, 3))
        runs = elements[:, :even].unflatten(1, (-1, _LONGEST_REDUCTION))
        found = [reduction(runs, (2, 4))]
        if even < length:
            found.append(reduction(elements[:, even:], (1, 3)).unsqueeze(1))
        return reduction(torch.cat(found, 1), 1)

    def can_multiply(self, shape: torch.Size) -> bool:
        """Whether `multiplied` is as exact as sums of products, and faster."""
        outer, length = shape[0], prod(shape[1:])
        if shape[2] > 1:
            return False
        if _block(outer, length) < min(length, _SHORTEST_BLOCK):
            return False
        if self.dtype == torch.float64:
            return not self.mixes
        return (self.job.vectors > 2 or self.mixes) and _multiplies_exactly()

    def multiplied(self, shape: torch.Size) -> torch.Tensor:
        """Gram matrices of the vectors held, as products of matrices."""
        rooms, wide = self.rooms(shape), self.job.wide_dtype
        products = torch.bmm(*rooms.blocks).unflatten(0, (shape[0], -1))
        found = products.sum(1, dtype=wide)
        if rooms.rest is not None:  # of a single vector
            found += rooms.rest @ rooms.rest.mT
        return found.unsqueeze(1)

    def combine(self, piece: Piece, factors: Sequence[torch.Tensor]) -> torch.Tensor:
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
        self, piece: Piece, factors: Sequence[torch.Tensor], result: torch.Tensor
    ) -> None:
        """Combine a piece, and round it into its part of the result."""
        if self.mixes and self.held is not piece and not self.job.has_base:
            self.blend(piece, factors, result)
        else:
            # With a base, task vectors come first. Taking its share off in the end
            # would all but cancel where coefficients are large, as lengths differ.
            result.copy_(self.combine(piece, factors))

    def blend(
        self, piece: Piece, factors: Sequence[torch.Tensor], result: torch.Tensor
    ) -> None:
        """Step 3 straight from the inputs, without a base: the sum of c_i v_i."""
        room = self.rooms(piece[0].shape).each[0]
        self.held = None  # overwritten now
        total = torch.mul(piece[0], factors[0], out=room)
        for part, factor in zip(piece[1:-1], factors[1:-1]):
            torch.addcmul(total, part, factor, out=room)
        torch.addcmul(total, piece[-1], factors[-1], out=result)


def task_vectors(
    parts: Sequence[torch.Tensor], base: torch.Tensor | None, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The vectors to merge, and the base that they start from, in a wider dtype."""
    wide = [part.to(dtype) for part in parts]
    if base is None:
        return wide, None
    base = base.to(dtype)
    return [part - base for part in wide], base


def over_elements(values: torch.Tensor) -> Sequence[torch.Tensor]:
    """One value a vector, `(outer, inner, models)`, by model and to broadcast."""
    # Side by side: operations on elements of a strided factor take four times as long.
    return values.movedim(-1, 0).contiguous()[:, :, None, :, None].unbind()


def symmetric(entries: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Matrices `(..., size, size)` from their upper triangles, `(...)` each entry."""
    pairs = combinations_with_replacement(range(size), 2)
    known = dict(zip(pairs, entries))
    order = product(range(size), repeat=2)
    whole = torch.stack([known[min(ij), max(ij)] for ij in order], dim=-1)
    return whole.unflatten(-1, (size, size))


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


def num_threads() -> int:
    """PyTorch's threads, whatever merges in other threads have lowered them to."""
    with _SETTING:
        return _LOWERED[0] if _LOWERED else torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from splitting operations, as for many small systems of equations.

    In several threads these take a hundred times as long where a machine is busy.
    """
    with _SETTING:
        _LOWERED.append(num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _SETTING:
            torch.set_num_threads(_LOWERED.pop())


def _scratch(size: int, device: torch.device) -> torch.Tensor:
    """Bytes for one worker: on the CPU a block that is kept, and mostly larger."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    with suppress(IndexError):
        block = _SPARE.pop()
        if block.nbytes >= size:
            return block
    with torch.inference_mode(False):  # later merges may run outside of that mode
        size = max(size, _SCRATCH_BYTES_CPU)
        return torch.empty(size, dtype=torch.uint8, device=device)


class Crew:
    """Workers, each in a thread of its own where that is faster.

    PyTorch would split every operation over its threads and wait for all of them
    after each: thousands of times for one weight, and long where another process
    keeps one of the threads waiting. Instead, each worker runs whole pieces alone.
    """

    # Whether to write the pieces first that were read last and are still held.
    backwards = True

    def __init__(self, job: Job, dtype: torch.dtype):
        self.job, self.dtype = job, dtype
        self.threads = num_threads()
        self.blocks: list[torch.Tensor] = []  # of scratch, one a worker
        self.chunk, self.workers = self.staff(dtype)
        self.modes = ExitStack()  # to leave in the end
        self.pool: ThreadPoolExecutor | None = None
        # A mode of the calling thread, which its workers have to be given.
        self.inference = torch.is_inference_mode_enabled()

    def staff(self, dtype: torch.dtype) -> tuple[int, list[Worker]]:
        """Elements of a piece, and workers with scratch for pieces."""
        job, elements = self.job, prod(self.job.sizes)
        on_cpu = job.device.type == "cpu"
        room = _SCRATCH_BYTES_CPU if on_cpu else _SCRATCH_BYTES_ACCELERATOR
        chunk = max(1, room // (job.scratch_rows * dtype.itemsize))
        count = min(self.threads, _MAX_THREADS, ceil(elements / chunk)) if on_cpu else 1
        chunk = min(chunk, elements)
        size = job.scratch_rows * chunk * dtype.itemsize
        self.blocks = [_scratch(size, job.device) for _ in range(count)]
        shape = (job.scratch_rows, chunk)
        rows = [block[:size].view(dtype).view(shape) for block in self.blocks]
        return chunk, [Worker(job, dtype, each) for each in rows]

    def __enter__(self) -> Crew:
        count = len(self.workers)
        if count == 1 and self.job.models > 2 and self.job.device.type == "cpu":
            self.modes.enter_context(one_thread())
        if count > 1:
            self.pool = ThreadPoolExecutor(count, "nuslerp")
            met = Barrier(count)

            def settle(_: Worker) -> None:
                torch.get_num_threads()  # takes the default, which would come later
                torch.set_num_threads(1)
                met.wait()  # so that each of the threads comes here

            with _SETTING:
                try:
                    list(self.pool.map(settle, self.workers))
                except BaseException:  # no more threads to be had, say
                    met.abort()  # or those that were would wait forever
                    raise
                finally:
                    torch.set_num_threads(self.threads)  # for this one, and later ones
        return self

    def __exit__(self, *_: object) -> None:
        self.modes.close()
        if self.pool is not None:
            self.pool.shutdown()
        if self.job.device.type == "cpu":
            _SPARE.extend(b for b in self.blocks if b.nbytes <= _SCRATCH_BYTES_CPU)
            del _SPARE[_MAX_THREADS:]

    def groups(self) -> Iterator[Group]:
        return self.job.groups(self.chunk)

    def share(self, task: Callable[[Worker, _T], _R], items: Sequence[_T]) -> list[_R]:
        """Have the workers do a task for each item, whoever is free the next one."""
        left, found = deque(enumerate(items)), {}

        def work(worker: Worker) -> None:
            while left:
                try:
                    index, item = left.popleft()
                except IndexError:  # another worker has taken the last one
                    return
                try:
                    found[index] = task(worker, item)
                except BaseException:
                    left.clear()  # for the others, too
                    raise

        def quietly(worker: Worker) -> None:
            with torch.inference_mode(self.inference), torch.no_grad():
                work(worker)

        if self.pool is None:
            work(self.workers[0])
        else:
            list(self.pool.map(quietly, self.workers[: len(items)]))
        return [found[index] for index in range(len(items))]

    def gathered(
        self,
        group: Group,
        task: Callable[[Worker, _T], torch.Tensor],
        items: Sequence[_T],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Values of all vectors, `(outer, inner, ...)`, found piece by piece.

        Args:
            group: whose vectors.
            task: what a worker finds for an item, `(outer, inner, ...)`.
            items: one for each of the group's pieces.
            join: makes one of what two pieces of a tile show.
        """
        # Each worker joins runs of pieces: kept for all of them, what was found for
        # many short vectors would grow with the weight.
        outer, _, inner, _ = group.sizes
        each = 8 * outer * inner * self.job.vectors**2
        runs = max(len(self.workers), _GATHERED_BYTES // each)
        step = ceil(group.per_tile / runs)
        starts = range(0, group.per_tile, step)
        shares = [
            items[first + start : first + min(start + step, group.per_tile)]
            for first in range(0, len(items), group.per_tile)
            for start in starts
        ]
        found = self.share(
            lambda worker, some: reduce(join, (task(worker, item) for item in some)),
            shares,
        )
        tiles = (found[k : k + len(starts)] for k in range(0, len(found), len(starts)))
        return group.joined([reduce(join, tile) for tile in tiles])

    def peaks(self, group: Group) -> torch.Tensor:
        """The largest absolute element of each vector, `(outer, inner, models)`."""
        return self.gathered(group, Worker.peaks, group.pieces, torch.maximum)

    def gram(self, group: Group, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Gram matrices `(outer, inner, models, models)` of a group's vectors.

        Args:
            group: what to read.
            scale: `(outer, inner, models)`, what to multiply the vectors by.
        """
        if scale is None:
            return self.gathered(
                group, lambda worker, piece: worker.gram(piece), group.pieces, torch.add
            )
        pairs = list(zip(group.pieces, group.factors(scale)))
        return self.gathered(
            group, lambda worker, pair: worker.gram(*pair), pairs, torch.add
        )

    def means(
        self, group: Group, gram: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step 2 for a group's vectors, as `Job.coefficients`."""
        weights = self.job.vector_weights[group.outer].expand(gram.shape[:3])
        given = [gram, weights] if scale is None else [gram, weights, scale]
        vectors = gram.shape[:2]
        step = max(_FEWEST_MEANS, ceil(prod(vectors) / len(self.workers)))
        shares = list(zip(*(values.flatten(0, 1).split(step) for values in given)))
        found = self.share(lambda _, some: self.job.coefficients(*some), shares)
        values, unique = map(torch.cat, zip(*found))
        return values.unflatten(0, vectors), unique.unflatten(0, vectors)

    def write(self, group: Group, factors: torch.Tensor, result: torch.Tensor) -> None:
        """Step 3 for a group's vectors, into their part of the result.

        Args:
            group: what to combine.
            factors: `(outer, inner, models)`, in the scratch's dtype.
            result: in the same view as the inputs.
        """
        items = list(zip(group.pieces, group.factors(factors), group.cut(result)))
        if self.backwards:
            items.reverse()
        self.share(lambda worker, item: worker.write(*item), items)
