# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Helpers that mergekit's tests import from `tests.common`.

mergekit's source distribution leaves that module out, and six of its seventeen test
modules cannot be collected without it. This is one of our own, with the same names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import MergeOptions, run_merge

_PICO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 2,
}


def _save(model: transformers.PreTrainedModel, path: Path | str) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path: Path | str, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(vocab_size=vocab_size, **_PICO)
    return _save(transformers.LlamaForCausalLM(config), path)


def make_gpt2size(path: Path | str) -> str:
    config = transformers.GPT2Config(
        n_ctx=128, n_embd=72, n_head=12, n_layer=12, n_positions=128, vocab_size=50257
    )
    return _save(transformers.GPT2LMHeadModel(config), path)


def make_picogranite(path: Path | str) -> str:
    config = transformers.GraniteConfig(vocab_size=64, **_PICO)
    return _save(transformers.GraniteForCausalLM(config), path)


def make_picoLlaVa(path: Path | str) -> str:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_hidden_layers=2,
        ),
        image_token_index=63,
        image_seq_length=16,
    )
    return _save(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a fresh directory, look at every weight, then run `validate`."""
    del auto_arch  # run_merge finds the architecture itself
    with tempfile.TemporaryDirectory() as out:
        run_merge(config, out_path=out, options=MergeOptions())
        assert (Path(out) / "config.json").exists()
        if check_tensors or check_nan:
            loader = LazyTensorLoader.from_disk(out)
            assert loader.index.tensor_paths
            for name in loader.index.tensor_paths:
                weight = loader.get_tensor(name)
                assert not (check_nan and torch.isnan(weight).any()), name
        if validate is not None:
            validate(out)
