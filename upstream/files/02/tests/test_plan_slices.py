# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import pytest
import torch
from safetensors.torch import load_file

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from tests.common import make_picollama


@pytest.mark.parametrize("first,last", [(1, 2), (2, 1), (2, 2)])
def test_post_layer_weights_take_the_models_of_the_last_slice(tmp_path, first, last):
    models = [make_picollama(tmp_path / name) for name in ("a", "b")]

    def output_slice(count, layer):
        sources = [
            {"model": model, "layer_range": [layer, layer + 1]}
            for model in models[:count]
        ]
        return {"sources": sources, "parameters": {"weight": 1.0}}

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "slices": [output_slice(first, 0), output_slice(last, 1)],
            "dtype": "float32",
        }
    )
    run_merge(config, str(tmp_path / "out"), MergeOptions())
    merged, *inputs = (
        load_file(f"{folder}/model.safetensors")
        for folder in (tmp_path / "out", *models)
    )
    for name, count in {"model.embed_tokens": first, "lm_head": last}.items():
        tensors = [tensors[f"{name}.weight"] for tensors in inputs[:count]]
        expected = torch.stack(tensors).mean(0)
        torch.testing.assert_close(merged[f"{name}.weight"], expected)
