# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Models of many small weights, which mergekit hands over in batches."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from mergekit.merge_methods import merge_state_dicts
from mergekit.merge_methods.nuslerp import nuslerp_merge_method

from benchmarks.cases import WEIGHTS, cases
from benchmarks.speed import interleaved, median_ratio, medians
from mergekit_nuslerp.plugin import adapter

SHAPES = ((64,), (1024,), (64, 64), (256, 256))


def table(count: int = 300, runs: int = 11) -> None:
    print(
        f"\n### Small weights: `merge_state_dicts` of {count}, median of {runs} "
        "rounds\n"
    )
    print("| weights | dtype | base | mergekit (ms) | plugin (ms) | times faster |")
    print("|---|---|---|---|---|---|")
    # The plugin takes mergekit's own method out of the registry and leaves it as it is.
    methods = (nuslerp_merge_method, adapter().make())
    for shape in SHAPES:
        for dtype, with_base in ((torch.bfloat16, True), (torch.float32, False)):
            # One large weight, cut up.
            case = next(cases((count, prod(shape)), (dtype,)))
            tensors = dict(zip(("sft", "kd"), case.tensors))
            if with_base and case.base is not None:
                tensors["base"] = case.base
            models = {
                name: {
                    f"layers.{number}.weight": part.view(shape)
                    for number, part in enumerate(tensor)
                }
                for name, tensor in tensors.items()
            }
            merges = [
                partial(
                    merge_state_dicts,
                    models,
                    method,
                    parameters={"weight": dict(zip(("sft", "kd"), WEIGHTS))},
                    base="base" if with_base else None,
                )
                for method in methods
            ]
            rounds = interleaved(merges, runs)
            theirs, ours = medians(rounds)
            print(
                f"| {' x '.join(map(str, shape))} "
                f"| {str(dtype).removeprefix('torch.')} "
                f"| {'yes' if with_base else 'no'} | {theirs * 1e3:.1f} "
                f"| {ours * 1e3:.1f} | {median_ratio(rounds, 0, 1):.1f} |",
                flush=True,
            )
