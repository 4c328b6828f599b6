# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How far the plugin is from the limit: the same merge as two compiled passes.

torch.compile makes one fused loop of the inner products and one of the combination.
Each reads its inputs once, and stores nothing wide but a few sums. Needs a compiler
for C++.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from benchmarks.cases import GRANULARITIES, WEIGHTS, Case, cases
from benchmarks.speed import interleaved, median_ratio, medians
from mergekit_nuslerp.geometry import mean_coefficients
from mergekit_nuslerp.streaming import task_vectors

# Elements, or rows, whose products are added up before float64 takes over.
RUN = 4096
STRIP = 32

# Share of elements that have to equal the plugin's. The others lie so close to the
# middle between two numbers that the order of a sum decides.
EQUAL = 0.999


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the plugin computes in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def inner_products(
    granularity: str, a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """`(..., 3)` in float64: aa, ab and bb of each vector."""
    (x, y), _ = task_vectors([a, b], base, wide(a.dtype))
    sums = []
    for products in (x * x, x * y, y * y):
        if granularity == "tensor":
            sums.append(products.view(-1, RUN).sum(-1).double().sum())
        elif granularity == "row":
            sums.append(products.sum(-1).double())
        else:
            strips = products.view(-1, STRIP, products.shape[-1]).sum(1)
            sums.append(strips.double().sum(0))
    return torch.stack(sums, -1)


def combine(
    granularity: str,
    coefficients: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    base: torch.Tensor | None,
) -> torch.Tensor:
    """With coefficients `(2, ...)`."""
    if granularity == "row":
        coefficients = coefficients.unsqueeze(-1)
    (x, y), start = task_vectors([a, b], base, wide(a.dtype))
    result = coefficients[0] * x + coefficients[1] * y
    return (result if start is None else result + start).to(a.dtype)


class Fused:
    """A case's merge, compiled for its dtype, shape and granularity."""

    def __init__(self, case: Case):
        # A function that was compiled for many kinds of inputs is not for another.
        torch.compiler.reset()
        self.case = case
        self.inner_products = torch.compile(
            inner_products, dynamic=False, fullgraph=True
        )
        self.combine = torch.compile(combine, dynamic=False, fullgraph=True)

    def __call__(self) -> torch.Tensor:
        granularity, *tensors = self.arguments
        coefficients = self.coefficients(self.inner_products(granularity, *tensors))
        return self.combine(granularity, coefficients, *tensors)

    @property
    def arguments(self) -> tuple:
        return self.case.granularity, *self.case.tensors, self.case.base

    def coefficients(self, products: torch.Tensor) -> torch.Tensor:
        dtype = self.case.tensors[0].dtype
        weights = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
        values, _ = mean_coefficients(
            products[..., [[0, 1], [1, 2]]],
            weights,
            antipodal_tolerance=torch.finfo(dtype).eps,
        )
        # Each side by side in memory, so that a loop can load them together.
        return values.to(wide(dtype)).movedim(-1, 0).contiguous()

    def compile(self) -> tuple[float, float]:
        """Seconds of the first call of each pass, and a check against the plugin."""
        granularity, *tensors = self.arguments
        start = time.perf_counter()
        products = self.inner_products(granularity, *tensors)
        middle = time.perf_counter()
        result = self.combine(granularity, self.coefficients(products), *tensors)
        end = time.perf_counter()
        same = (result == self.case.ours()).sum().item() / result.numel()
        if same < EQUAL:
            raise RuntimeError(f"only {same:.2%} equal the plugin's: {self.case.label}")
        return middle - start, end - middle


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before is taken, as compiling is timed, and nothing is left."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": directory}),
    ):
        yield


def bandwidths(runs: int, size: int = 2**30) -> list[float]:
    """Bytes a second that copies read and write, into used and into fresh memory.

    The system hands out fresh memory page by page, as it is touched first.
    """
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.ones_like(source)
    rounds = interleaved((lambda: target.copy_(source), source.clone), runs)
    return [2 * size / seconds for seconds in medians(rounds)]


def limits(size: int, runs: int) -> None:
    print(f"\n### The limit: one {size} x {size} weight, median of {runs} rounds\n")
    copy, fresh = bandwidths(runs)
    print(
        f"A copy moves {copy / 1e9:.1f} GB/s, counting what is read and written, and "
        f"{fresh / 1e9:.1f} GB/s into fresh memory. `fused` is the same merge as two "
        "loops compiled by PyTorch for this one shape. The bytes are those of reading "
        "each input once and writing the result into used memory.\n"
    )
    print(
        "| dtype | vectors | base | mergekit (ms) | plugin (ms) "
        "| plugin, compiled (ms) | fused (ms) | plugin / fused | compiled / fused "
        "| mergekit / plugin | mergekit / compiled | bytes alone (ms) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    compiling = []
    for case in cases((size, size), (torch.bfloat16, torch.float32)):
        fused = Fused(case)
        compiling.append(fused.compile())
        rounds = interleaved((case.theirs, case.ours, case.compiled, fused), runs)
        cells = " | ".join(f"{seconds * 1e3:.1f}" for seconds in medians(rounds))
        print(
            f"| {case.label} | {cells} | {median_ratio(rounds, 1, 3):.2f} "
            f"| {median_ratio(rounds, 2, 3):.2f} | {median_ratio(rounds, 0, 1):.1f} "
            f"| {median_ratio(rounds, 0, 2):.1f} | {case.bytes / copy * 1e3:.1f} |",
            flush=True,
        )
    first, second = medians(compiling)
    print(
        f"\nThe first calls, which compile, took {first:.1f} s for the inner products "
        f"and {second:.1f} s for the combination, in the median."
    )


def embedding(shape: tuple[int, int], parts: int, runs: int) -> None:
    """A weight for which mergekit's own method would need more memory than is there."""
    rows, columns = shape
    print(
        f"\n### A large embedding: {rows} x {columns} in bfloat16 with a base, median "
        f"of {runs} rounds\n"
    )
    print(
        f"mergekit's own method merges {rows // parts} of the rows, for its memory.\n"
    )
    print(
        "| vectors | plugin (s) | plugin, compiled (s) | fused (s) | plugin / fused "
        "| compiled / fused | mergekit (ns per element) | plugin (ns per element) "
        "| compiled (ns per element) | mergekit / plugin | mergekit / compiled "
        "| compiling fused (s) |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    # Repeated, as making numbers takes float32 copies.
    part = next(cases((rows // parts, columns), (torch.bfloat16,)))
    whole = part.mapped(lambda tensor: tensor.repeat(parts, 1))
    for granularity in GRANULARITIES:
        small, large = (replace(c, granularity=granularity) for c in (part, whole))
        fused = Fused(large)
        compiling = sum(fused.compile())
        methods = (small.theirs, large.ours, large.compiled, fused)
        rounds = interleaved(methods, runs)
        seconds = " | ".join(f"{each:.2f}" for each in medians(rounds)[1:])
        elements = rows * columns
        each = [
            (theirs / (elements // parts), ours / elements, compiled / elements)
            for theirs, ours, compiled, _ in rounds
        ]
        nanoseconds = " | ".join(f"{each * 1e9:.2f}" for each in medians(each))
        print(
            f"| {granularity} | {seconds} | {median_ratio(rounds, 1, 3):.2f} "
            f"| {median_ratio(rounds, 2, 3):.2f} | {nanoseconds} "
            f"| {median_ratio(each, 0, 1):.1f} | {median_ratio(each, 0, 2):.1f} "
            f"| {compiling:.1f} |",
            flush=True,
        )


# Each beside a plain weight of as many elements, or almost as many.
SHAPES: tuple[tuple[str, tuple[int, ...], tuple[int, int]], ...] = (
    ("", (32001, 4096), (32000, 4096)),
    (", transposed view", (4096, 4096), (4096, 4096)),
    ("", (64, 64, 64, 64), (4096, 4096)),
    ("", (8, 2048, 1024), (4096, 4096)),
)


def odd_shapes(
    runs: int,
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, int]], ...] = SHAPES,
) -> None:
    print(f"\n### Shapes: bfloat16 with a base, median of {runs} rounds\n")
    print(
        "| shape | beside | vectors | mergekit (ns per element) "
        "| plugin (ns per element) | plugin, beside (ns per element) "
        "| plugin, to the one beside | mergekit / plugin |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for note, shape, beside in shapes:
        odd = next(cases(shape, (torch.bfloat16,)))
        if note:
            odd = odd.mapped(torch.Tensor.t)
        plain = next(cases(beside, (torch.bfloat16,)))
        sizes = [case.tensors[0].numel() for case in (odd, odd, plain)]
        for granularity in GRANULARITIES:
            one, other = (replace(c, granularity=granularity) for c in (odd, plain))
            each = [
                [seconds / size for seconds, size in zip(times, sizes)]
                for times in interleaved((one.theirs, one.ours, other.ours), runs)
            ]
            cells = " | ".join(f"{seconds * 1e9:.2f}" for seconds in medians(each))
            names = [" x ".join(map(str, sides)) for sides in (shape, beside)]
            print(
                f"| {names[0]}{note} | {names[1]} | {granularity} | {cells} "
                f"| {median_ratio(each, 1, 2):.2f} | {median_ratio(each, 0, 1):.1f} |",
                flush=True,
            )


def table(size: int = 4096, runs: int = 11) -> None:
    with fresh_compiler():
        limits(size, runs)
        embedding((128256, 8192), parts=8, runs=3)
    odd_shapes(runs)
