# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Against mergekit's other spherical methods; growth with the number of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from mergekit.merge_methods import merge_tensors

from benchmarks.cases import ALL_GRANULARITIES, PAIRS, WEIGHTS, Case, cases, name
from benchmarks.measure import Function, compare
from mergekit_nuslerp import nuslerp

DTYPES = (torch.bfloat16, torch.float32)


def unrelated(case: Case) -> list[torch.Tensor]:
    """Task vectors, which have nothing in common."""
    return [tensor - case.base for tensor in case.tensors]


def against(
    method: str, inputs: Sequence[torch.Tensor], base: torch.Tensor | None = None
) -> dict[str, Function]:
    """A method of mergekit, and what comes next to it."""
    weights, magnitude = [1.0] * len(inputs), "linear"
    given, base_index, parameters = list(inputs), None, {}
    if base is not None:
        given, base_index = [*inputs, base], len(inputs)
    if method == "slerp":
        weights, magnitude = list(WEIGHTS[:2]), "slerp"
        # What it calls the base is the model where t is zero.
        base_index, parameters = 0, {"t": WEIGHTS[1] / sum(WEIGHTS[:2])}
    elif method == "multislerp":
        parameters = {"weight": weights}
    options = {"parameters": parameters, "base_index": base_index}
    return {
        "mergekit": partial(merge_tensors, given, method, **options),
        "plugin": partial(nuslerp, inputs, weights, base=base, magnitude=magnitude),
    }


def others(size: int, small: int) -> Iterator[tuple]:
    for dtype in DTYPES:
        case = next(cases((size, size), (dtype,)))
        yield ("slerp", 2, "unrelated", name(dtype)), against("slerp", unrelated(case))
        yield ("slerp", 2, "fine-tunes", name(dtype)), against("slerp", case.tensors)
    case = next(cases((small, small), (torch.float32,), models=3))
    for method in ("karcher", "multislerp"):
        yield (method, 3, "unrelated", "float32"), against(method, unrelated(case))
        yield (method, 3, "fine-tunes", "float32"), against(method, case.tensors)
    # karcher would take the base for a fourth model.
    label = ("multislerp", 3, "task vectors", "float32")
    yield label, against("multislerp", case.tensors, case.base)


def growth(size: int) -> Iterator[tuple]:
    options = {"models": 8, "bases": (True,), "granularities": ALL_GRANULARITIES}
    for case in cases((size, size), DTYPES, **options):
        some = {n: replace(case, tensors=case.tensors[:n]) for n in (2, 3, 4, 8)}
        yield case.label[:2], {f"{n} models": some[n].ours for n in some}


def table(size: int = 4096, small: int = 2048, runs: int = 9) -> None:
    compare(
        f"mergekit's other spherical methods: {size} x {size} weights of two models, "
        f"{small} x {small} of three",
        "method of mergekit | models | weights | dtype",
        others(size, small),
        PAIRS[:1],
        runs,
        note="They take each tensor as one vector.",
    )
    compare(
        f"Growth with the models: {small} x {small}, with a base",
        "dtype | vectors",
        growth(small),
        [(f"{n} models", "2 models") for n in (3, 4, 8)],
        runs,
    )
