# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the plugin adds to the time in which mergekit plans a merge."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.merge_methods import nuslerp, registry
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from benchmarks.measure import head, row
from mergekit_nuslerp import plugin
from mergekit_nuslerp.checkpoints import write_checkpoints

LAYERS = 80
_OWN = "mergekit's own"  # by another name, which the plugin passes by


def _own_method() -> None:
    """Put mergekit's own method into its registry once more."""
    method = getattr(nuslerp, "nuslerp_merge_method", None)  # of 0.1.5
    if method is None:
        method = nuslerp.NuSlerpMerge()
    else:
        method = copy.copy(method)
        method.spec = dataclasses.replace(method.spec, name=_OWN)
    getattr(registry, plugin._interface(registry))[_OWN] = method


def _config(layers_each: int, gradient: bool) -> dict:
    weight = "[0.3, 0.7]" if gradient else "0.5"
    text = "base_model: ./base\ndtype: bfloat16\nslices:\n"
    for start in range(0, LAYERS, layers_each):
        layers = f"layer_range: [{start}, {start + layers_each}]"
        text += (
            f"- sources:\n  - {{model: ./base, {layers}}}\n"
            f"  - {{model: ./sft, {layers}, parameters: {{weight: {weight}}}}}\n"
            f"  - {{model: ./kd, {layers}, parameters: {{weight: 0.5}}}}\n"
        )
    return yaml.safe_load(text + "parameters: {nuslerp_flatten: false}\n")


def _milliseconds(written: dict, method: str) -> float:
    """From a config that has been read to all tasks, without the garbage collector."""
    options = MergeOptions()
    LoaderCache().setup(options)
    written = copy.deepcopy({**written, "merge_method": method})
    config = MergeConfiguration.model_validate(copy.deepcopy(written))
    for model in config.referenced_models():  # which the merge opens in any case
        LoaderCache().get(model)
    architecture = get_architecture_info(config, options)
    out_config = _model_out_config(config, architecture)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    config = MergeConfiguration.model_validate(written)
    MergePlanner(config, architecture, options, out_config).plan_to_disk("out")
    end = time.perf_counter()
    gc.enable()
    return (end - start) * 1e3


def table(runs: int = 15) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), layers=LAYERS, hidden_size=32, vocabulary=272)
        os.chdir(folder)
        _own_method()
        head(
            f"Planning three models of {LAYERS} layers with mergekit "
            f"{plugin.mergekit_version()}, median of {runs} rounds",
            "slices | mergekit (ms) | plugin (ms) | difference within a round (ms) "
            "| first time (ms)",
        )
        for slices, gradient in ((LAYERS, False), (LAYERS, True), (1, True)):
            config = _config(LAYERS // slices, gradient)
            first = _milliseconds(config, "nuslerp")
            _milliseconds(config, _OWN)
            rounds = [
                [_milliseconds(config, name) for name in (_OWN, "nuslerp")]
                for _ in range(runs)
            ]
            own, ours = map(median, zip(*rounds))
            more = median(ours - own for own, ours in rounds)
            row(slices, *(f"{cell:.1f}" for cell in (own, ours, more, first)))
        os.chdir(before)
