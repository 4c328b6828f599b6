# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Planning takes little more time with the plugin than without it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from support import working_directory

import mergekit_nuslerp
from mergekit_nuslerp.checkpoints import write_checkpoints

PACKAGE = str(Path(mergekit_nuslerp.__file__).parent) + os.sep
LAYERS = 24

# Of one layer: the tensors that a merge is planned for.
TENSORS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many layers")
    write_checkpoints(folder, layers=LAYERS, hidden_size=32, vocabulary=272)
    return folder


def calls(folder, slices):
    """How often each function of the plugin is called, or calls another."""
    text = "merge_method: nuslerp\nbase_model: ./base\ndtype: bfloat16\nslices:\n"
    for layer in range(slices):
        text += "- sources:\n"
        for model, more in (("base", ""), ("sft", ", parameters: {weight: [0, 1]}")):
            layers = f"layer_range: [{layer}, {layer + 1}]"
            text += f"  - {{model: ./{model}, {layers}{more}}}\n"
        text += f"  - {{model: ./kd, {layers}, parameters: {{weight: 0.5}}}}\n"
    written, options = yaml.safe_load(text), MergeOptions()
    counted = Counter()

    def count(frame, event, _argument):
        if event == "call":
            for where in (frame, frame.f_back):
                if where is not None and where.f_code.co_filename.startswith(PACKAGE):
                    counted[where.f_code.co_name] += 1

    LoaderCache.loaders.clear()
    LoaderCache().setup(options)
    with working_directory(folder):
        config = MergeConfiguration.model_validate(written)
        architecture = get_architecture_info(config, options)
        out_config = _model_out_config(config, architecture)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            config = MergeConfiguration.model_validate(written)
            planner = MergePlanner(config, architecture, options, out_config)
            planner.plan_to_disk("out")
        finally:
            sys.setprofile(before)
    return counted


def test_calls_for_each_slice(folder):
    calls(folder, LAYERS)  # what is done once in a process
    few, many = calls(folder, LAYERS // 3), calls(folder, LAYERS)
    more = (many.total() - few.total()) / (LAYERS - LAYERS // 3)
    # mergekit 0.1.4 has the plugin make each task, and ask for parameters by method.
    assert more < (25 if hasattr(merge_methods, "registered_methods") else 38) * TENSORS


@pytest.mark.parametrize("name", ["resolve", "check_checkpoint", "_check_inputs"])
def test_what_takes_long_is_done_once_for_what_is_the_same(name, folder):
    few, many = calls(folder, LAYERS // 3), calls(folder, LAYERS)
    assert 0 < few[name] == many[name]
