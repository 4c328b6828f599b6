# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Steps 1 and 3 as loops that `torch.compile` makes, for those who merge a lot.

PyTorch's own operations write wide numbers to scratch and read them again. A compiled
loop keeps them in registers, and runs in all of PyTorch's threads. It costs seconds of
compiling in each process, and a compiler for C++ (on a GPU, Triton).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from math import gcd, prod
from types import FunctionType
from typing import Any

import torch

from mergekit_nuslerp.streaming import (
    Crew,
    Job,
    Piece,
    Worker,
    one_thread,
    symmetric,
    task_vectors,
)

# Elements of a weight that outlast the start of a loop, and those of a piece, which
# bound its sums.
_FEWEST_ELEMENTS = 2**20
_CHUNK = 2**23

# Elements of a vector whose products are added up before a wider dtype takes over: ones
# side by side in memory, and ones below each other, which are added one by one. Several
# vectors along memory that have no such divisor are added up whole, up to the last.
_RUN, _STRIP = 512, 128
_SHORTEST_RUN, _LONGEST_RUN = 32, 4096

# Elements of what is left over to be merged at once without a compiled loop.
_LARGEST_REST = 2**16

# The least elements side by side in vectors that run across memory.
_NARROWEST = 64

# Set when a loop could not be compiled: the others could not, either.
_GIVEN_UP = False


class CompileError(RuntimeError):
    """PyTorch could not compile a loop."""


def give_up(error: CompileError) -> None:
    """Do without loops in this process from now on."""
    global _GIVEN_UP
    _GIVEN_UP = True
    warnings.warn(
        f"merging without compiled loops, as PyTorch could not compile them: {error}",
        RuntimeWarning,
        stacklevel=2,
    )


def suits(job: Job) -> bool:
    """Whether compiled loops can take a job, and are worth it."""
    if _GIVEN_UP:
        return False
    if job.device.type == "mps" or prod(job.sizes) < _FEWEST_ELEMENTS:
        return False
    if not all(tensor.is_contiguous() for tensor in job.inputs):
        return False
    first = next(job.groups(_CHUNK)).pieces[0][0]
    outer, length, inner, width = _sizes(first)
    columns = inner * width
    run = _run(outer, length, columns)
    return (
        (columns == 1 or columns >= _NARROWEST)
        and _SHORTEST_RUN <= run <= (_LONGEST_RUN if columns == 1 else _STRIP)
        and 2 * run <= outer * length
    )


class CompiledCrew(Crew):
    """One worker, whose operations use all threads."""

    # Nothing is held. And a loop that is compiled for the small piece at the end would
    # be one for a single thread, and not for where other pieces begin.
    backwards = False

    def staff(self, dtype: torch.dtype) -> tuple[int, list[Worker]]:
        return _CHUNK, [CompiledWorker(self.job, dtype, rows=None)]

    def __enter__(self) -> CompiledCrew:
        return self

    def means(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with one_thread():
            return super().means(*given)


class CompiledWorker(Worker):
    """Takes pieces of a job that `suits` through step 1 and step 3."""

    def gram(
        self, piece: Piece, scales: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        assert scales is None, "only the other workers scale"
        outer, _, inner, width = _sizes(piece[0])
        total: Any = 0
        for parts in zip(*map(_runs, piece)):
            sums = _call(_products, *self.split(parts), self.dtype, self.job.wide_dtype)
            each = sums.view(outer, -1, inner, width, sums.shape[-1])
            total = total + each.sum((1, 3))
        return symmetric(total.unbind(-1), self.job.models)

    def write(
        self, piece: Piece, factors: Sequence[torch.Tensor], result: torch.Tensor
    ) -> None:
        outer, _, inner, width = _sizes(piece[0])
        for *parts, room in zip(*map(_runs, (*piece, result))):
            runs, _, *columns = room.shape
            each = [
                factor.view(outer, 1, inner, 1)
                .expand(outer, runs // outer, inner, width)
                .reshape(runs, 1, *columns)
                .contiguous()
                for factor in factors
            ]
            _call(_combination, *self.split(parts), self.dtype, each, room)


def _sizes(piece: torch.Tensor) -> tuple[int, int, int, int]:
    """Sizes of a view, where vectors along memory have all elements in their length."""
    outer, length, inner, width = piece.shape
    if inner == 1 and piece.is_contiguous():
        return outer, length * width, 1, 1
    return outer, length, inner, width


def _run(outer: int, length: int, columns: int) -> int:
    """How many elements of a vector to add up at first."""
    run = _RUN if columns == 1 else _STRIP
    if outer == 1:
        return run  # and a remainder
    even = gcd(length, run)
    return even if even >= _SHORTEST_RUN else length


def _runs(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A piece as `(runs, elements of a run)` or `(runs, elements of a run, columns)`.

    The last ones, of a single run, are what is left.
    """
    outer, length, inner, width = _sizes(tensor)
    columns = (inner * width,) if inner * width > 1 else ()
    run = _run(outer, length, inner * width)
    even = length - length % run
    # A single run would be compiled for on its own.
    even = 0 if outer * even < 2 * run else even
    rows = tensor.view(outer, length, *columns)
    if even:
        yield rows[:, :even].view(-1, run, *columns)
    if even < length:
        yield from rows[:, even:].split(max(1, _LARGEST_REST // prod(columns)), 1)


def _call(
    loop: Callable[..., Any],
    parts: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    *rest: Any,
) -> Any:
    """Run a loop, compiled unless it is one over a remainder."""
    if parts[0].shape[0] == 1:
        return loop(parts, base, *rest)
    first = parts[0]
    kind = (
        (first.ndim, first.is_contiguous(), first.device),
        tuple(part.dtype for part in parts),
        None if base is None else base.dtype,
        # And what is set in the calling thread.
        (torch.get_num_threads(), torch.is_grad_enabled()),
        torch.is_inference_mode_enabled(),
    )
    try:
        return _compiled(loop, kind)(parts, base, *rest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds, as many programs take part in it
        first_line = str(error).strip().partition("\n")[0]
        raise CompileError(f"{type(error).__name__}: {first_line}") from error


@cache
def _compiled(loop: Callable[..., Any], _kind: Hashable) -> Callable[..., Any]:
    """A loop for one kind of inputs, of any size."""
    # PyTorch compiles the same code eight times at most. So each kind has a copy.
    copy = FunctionType(loop.__code__.replace(), loop.__globals__)
    return torch.compile(copy, dynamic=True, fullgraph=True)


def _products(
    parts: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    wide_dtype: torch.dtype,
) -> torch.Tensor:
    """Inner products over each run, `(runs, pairs)` or `(runs, columns, pairs)`."""
    vectors, _ = task_vectors(parts, base, dtype)
    sums = [(v * w).sum(1) for i, v in enumerate(vectors) for w in vectors[i:]]
    return torch.stack(sums, -1).to(wide_dtype)


def _combination(
    parts: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype,
    factors: Sequence[torch.Tensor],
    result: torch.Tensor,
) -> None:
    """The base + sum of c_i v_i, rounded into the result."""
    vectors, start = task_vectors(parts, base, dtype)
    total: Any = 0 if start is None else start
    for vector, factor in zip(vectors, factors):
        total = total + vector * factor
    result.copy_(total)
