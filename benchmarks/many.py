# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Against mergekit's other spherical methods; growth and exactness with the models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from mergekit.merge_methods import merge_tensors

from benchmarks.cases import WEIGHTS
from benchmarks.speed import interleaved, median_ratio, medians
from mergekit_nuslerp import nuslerp

GRANULARITIES = ("tensor", "row", "column", "row:128", "column:128")
MAGNITUDES = ("slerp", "linear", "geometric")


def models(size: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Fine-tunes of one base, which comes last, with task vectors of 2 %."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(size, size, generator=generator)

    base = 0.02 * normal()
    tuned = [(base + 0.02 * 0.02 * normal()).to(dtype) for _ in range(count)]
    return [*tuned, base.to(dtype)]


def unrelated(size: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, size, generator=generator).to(dtype) for _ in range(count)
    ]


def compare(label: str, theirs: Callable, ours: Callable, runs: int) -> None:
    """One row."""
    rounds = interleaved((theirs, ours, partial(ours, compiled=True)), runs)
    cells = " | ".join(f"{seconds * 1e3:.0f}" for seconds in medians(rounds))
    print(
        f"| {label} | {cells} | {median_ratio(rounds, 0, 1):.1f} "
        f"| {median_ratio(rounds, 0, 2):.1f} |",
        flush=True,
    )


def two(size: int = 4096, runs: int = 11) -> None:
    """mergekit's `slerp`, which takes each tensor as one vector, without a base."""
    print(
        f"\n### mergekit's `slerp`: two {size} x {size} weights, median of {runs} "
        "rounds\n"
    )
    print(
        "| weights | dtype | mergekit (ms) | plugin (ms) | plugin, compiled (ms) "
        "| times faster | times faster, compiled |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        *tuned, _ = models(size, dtype, 2)
        for label, inputs in (
            ("unrelated", unrelated(size, dtype, 2)),
            ("fine-tunes", tuned),
        ):
            theirs = partial(
                merge_tensors,
                inputs,
                "slerp",
                parameters={"t": WEIGHTS[1] / sum(WEIGHTS)},
                base_index=0,  # what it calls the base is the model where t is zero
            )
            ours = partial(nuslerp, inputs, WEIGHTS)
            name = str(dtype).removeprefix("torch.")
            compare(f"{label} | {name}", theirs, ours, runs)


def others(size: int = 2048, runs: int = 5) -> None:
    """mergekit's methods for more than two models, which have no granularity."""
    print(f"\n### Three {size} x {size} float32 weights, median of {runs} rounds\n")
    print(
        "| weights | method of mergekit | mergekit (ms) | plugin (ms) "
        "| plugin, compiled (ms) | times faster | times faster, compiled |"
    )
    print("|---|---|---|---|---|---|---|")
    *tuned, base = models(size, torch.float32, 3)
    for label, inputs, start in (
        ("unrelated", unrelated(size, torch.float32, 3), None),
        ("fine-tunes, as they are", tuned, None),
        ("fine-tunes, task vectors", tuned, base),
    ):
        for method, parameters in (
            ("karcher", {}),
            ("multislerp", {"weight": [1.0] * 3}),
        ):
            if method == "karcher" and start is not None:
                continue  # it would take the base for a fourth model
            given = inputs if start is None else [*inputs, start]
            theirs = partial(
                merge_tensors,
                given,
                method,
                parameters=parameters,
                base_index=None if start is None else 3,
            )
            ours = partial(nuslerp, inputs, [1.0] * 3, base=start, magnitude="linear")
            compare(f"{label} | {method}", theirs, ours, runs)


def growth(size: int = 2048, runs: int = 7) -> None:
    """Time with the number of models, as a multiple of that of two."""
    counts = (2, 3, 4, 8)
    print(f"\n### Growth with the models: {size} x {size}, with a base\n")
    print(
        "Time as a multiple of that of two models, and of half that for each model.\n"
    )
    heads = " | ".join(f"{count} models" for count in counts[1:])
    print(f"| dtype | vectors | 2 models (ms) | {heads} |")
    print("|---|---|---|" + "---|" * len(counts[1:]))
    for dtype in (torch.bfloat16, torch.float32):
        *tuned, base = models(size, dtype, max(counts))
        for granularity in GRANULARITIES[:4]:

            def merge(
                count: int, granularity: str = granularity, tuned=tuned, base=base
            ) -> torch.Tensor:
                weights = [1 + 0.2 * index for index in range(count)]
                inputs = tuned[:count]
                return nuslerp(inputs, weights, base=base, granularity=granularity)

            cells = []
            for count in counts[1:]:
                rounds = interleaved((partial(merge, count), partial(merge, 2)), runs)
                _, pair = medians(rounds)
                ratio = median_ratio(rounds, 0, 1)
                cells.append(f"{ratio:.1f} ({2 * ratio / count:.1f} each)")
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {granularity} | {pair * 1e3:.0f} | {' | '.join(cells)} |",
                flush=True,
            )


def exactness(size: int = 1536) -> None:
    """Against the same merge of float64 inputs, which the tests hold to an oracle."""
    print(f"\n### Exactness of three models: {size * size:,} elements, with a base\n")
    print(
        "Elements that equal the float64 result rounded once; for float32 the error "
        "relative to that of rounding the float64 result once.\n"
    )
    print("| vectors | magnitude | bfloat16 | float16 | float32 |")
    print("|---|---|---|---|---|")
    weights = (0.5, 0.3, 0.2)
    for granularity in GRANULARITIES:
        for magnitude in MAGNITUDES:
            cells = []
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                *tuned, base = models(size, dtype, 3)
                merge = partial(nuslerp, weights=weights, granularity=granularity)
                exact = merge(
                    [tensor.double() for tensor in tuned],
                    base=base.double(),
                    magnitude=magnitude,
                )
                found = merge(tuned, base=base, magnitude=magnitude)
                rounded = exact.to(dtype)
                if dtype == torch.float32:
                    error = (found.double() - exact).norm()
                    cells.append(f"{error / (rounded.double() - exact).norm():.2f}x")
                else:
                    cells.append(f"{(found == rounded).double().mean():.3%}")
            print(f"| {granularity} | {magnitude} | {' | '.join(cells)} |", flush=True)


def table() -> None:
    two()
    others()
    growth()
    exactness()
