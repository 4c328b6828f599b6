# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Generated Llama checkpoints, to merge where no real ones are at hand.

A base and fine-tunes of it, with random weights of a realistic size and realistic
task vectors. For the demo, the tests and the benchmarks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# Enough text for a tokenizer that knows whole words of its subject.
_SENTENCES = (
    "The patient reports a mild fever and a dry cough for three days.",
    "Blood pressure is normal and the heart rate is regular.",
    "The doctor asks when the pain began and what makes it better.",
    "Take one tablet in the morning and one in the evening, with water.",
    "An answer from a model is not advice from a doctor.",
    "Two models were trained from the same base and then merged into one.",
)

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

# A byte-level tokenizer has a token for each byte beside the special ones.
_SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)

# How far apart fine-tunes of one base are: this share of the variance of their task
# vectors is common to all, which makes the angle between any two 60 degrees.
_COMMON_SHARE = 0.5


def write_checkpoints(
    directory: Path,
    *,
    base: str = "base",
    fine_tunes: Sequence[str] = ("sft", "kd"),
    layers: int = 4,
    hidden_size: int = 64,
    head_size: int | None = None,
    vocabulary: int = 320,
    dtype: str = "bfloat16",
    seed: int = 0,
    change: float = 0.02,
    shards: int = 3,
) -> list[Path]:
    """Write a base and fine-tunes of it, each with its config and a tokenizer.

    The last fine-tune has the base's layer norms, as where training leaves a part of
    the model frozen: its task vectors are zero there. The same arguments give the
    same weights.

    Args:
        directory: gets one folder a checkpoint; made if it is not there.
        base: name of the base's folder.
        fine_tunes: names of the fine-tunes' folders.
        layers: number of transformer layers.
        hidden_size: width, a multiple of 32, or of 128 from 512 on.
        head_size: of two attention heads that share a key, instead of heads that
            make up the width.
        vocabulary: number of embedding rows, 259 at least. The tokenizer may know
            fewer tokens.
        dtype: PyTorch's name of the weights' dtype.
        seed: of all random numbers.
        change: length of a task vector relative to the base's weight.
        shards: about how many safetensors files make up a checkpoint.

    Returns:
        The folders, the base's first.

    Raises:
        ValueError: a vocabulary or a hidden size that does not work out.
    """
    if vocabulary < _SMALLEST_VOCABULARY:
        raise ValueError(f"vocabulary must be {_SMALLEST_VOCABULARY} at least")
    narrow = 64 if hidden_size >= 512 else 16
    if hidden_size % (2 * narrow):
        raise ValueError(f"hidden_size must be a multiple of {2 * narrow}")

    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    heads = 2 if head_size else hidden_size // narrow
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=ceil(hidden_size * 8 / 3 / 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_size or narrow,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype=dtype,
    )
    with torch.device("meta"):  # the names and shapes, without the weights
        outline = LlamaForCausalLM(config).state_dict()
    generation = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    tokenizer = _tokenizer(vocabulary)

    weights = {
        name: values.to(getattr(torch, dtype))
        for name, values in _base_weights(outline, seed)
    }
    size = sum(weight.nbytes for weight in weights.values())
    folders = []
    for model in (base, *fine_tunes):
        changed = weights
        if model != base:
            frozen = "norm" if model == fine_tunes[-1] else None
            changed = {
                name: weight
                if frozen and frozen in name
                else _fine_tuned(weight, name, model, change, seed)
                for name, weight in weights.items()
            }
        folder = Path(directory) / model
        folder.mkdir(parents=True)
        save_torch_state_dict(changed, folder, max_shard_size=ceil(size / shards))
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


def _base_weights(
    outline: dict[str, torch.Tensor], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights as Llama starts them, with layer norms that are not all the same."""
    for name, weight in outline.items():
        noise = _noise(weight, name, "base", seed)
        yield name, 1 + 0.1 * noise if "norm" in name else 0.02 * noise


def _fine_tuned(
    weight: torch.Tensor, name: str, model: str, change: float, seed: int
) -> torch.Tensor:
    """The base's weight plus a task vector of a given relative length."""
    import torch

    length = torch.linalg.vector_norm(weight, dtype=torch.float32).item()
    size = change * length / weight.numel() ** 0.5
    task = _noise(weight, name, "all fine-tunes", seed)
    task.mul_(size * _COMMON_SHARE**0.5)
    own = _noise(weight, name, f"fine-tune {model}", seed)
    task.add_(own, alpha=size * (1 - _COMMON_SHARE) ** 0.5)
    return task.add_(weight).to(weight.dtype)


def _noise(weight: torch.Tensor, name: str, purpose: str, seed: int) -> torch.Tensor:
    """Standard normal numbers in a weight's shape, different for each purpose."""
    import torch

    key = f"{seed}, {purpose}, {name}"
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(weight.shape, generator=generator)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: it can encode any text, and decodes to the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    unknown, start, end = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
