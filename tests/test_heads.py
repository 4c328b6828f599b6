# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`nuslerp_granularity: head` is what one would write by hand, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mergekit.merge_methods
import pytest
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from oracle import oracle
from support import load_tensors, merge_here, working_directory

from mergekit_nuslerp import heads
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.inspect import measure
from mergekit_nuslerp.parameters import ConfigError

TAKES_NAMES = hasattr(mergekit.merge_methods, "merge_tensors")
only_names = pytest.mark.skipif(not TAKES_NAMES, reason="new in mergekit 0.1.5")

MODELS = ("base", "sft", "kd")

# Of most families.
_SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENDS = {"embed_tokens": "row", "lm_head": "row"}
_MLP = {"gate_proj": "row", "up_proj": "row", "down_proj": "column"}


def _attention(size: int) -> dict[str, str]:
    rows = dict.fromkeys(("q_proj", "k_proj", "v_proj"), f"row:{size}")
    return {**rows, "o_proj": f"column:{size}"}


# Of each family its config's class and sizes, and what `head` is there by hand.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "llama": ("LlamaConfig", {}, {**_attention(8), **_MLP}),
    "mistral": ("MistralConfig", {"head_dim": 16}, {**_attention(16), **_MLP}),
    "qwen2": ("Qwen2Config", {}, {**_attention(8), **_MLP}),
    "gemma": (
        "GemmaConfig",
        {"head_dim": 16},
        {**_attention(16), **_MLP},
    ),
    "phi3": (
        "Phi3Config",
        {},
        {
            "qkv_proj": "row:8",
            "o_proj": "column:8",
            "gate_up_proj": "row",
            "down_proj": "column",
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 2, "head_dim": 8},
        {
            **_attention(8),
            "experts.gate_up_proj": "row",
            "experts.down_proj": "column",
            "gate.weight": "row",
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 16},
        {
            "c_attn": "column:8",
            "attn.c_proj": "row:8",
            "c_fc": "column",
            "mlp.c_proj": "row",
            "wte": "row",
            "wpe": "row",
        },
    ),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """mergekit remembers by its path what it has opened."""
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


def write_models(folder: Path, family: str, **more: Any) -> Path:
    """A base and two fine-tunes of it, all of them random."""
    name, sizes, _ = FAMILIES.get(family, (family, {}, {}))
    given = {**_SIZES, **sizes, **more}
    if family == "gpt2":
        given = {key: value for key, value in given.items() if key[:2] != "nu"}
    config = getattr(transformers, name)(**given)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    first = {
        name: torch.randn_like(weight) for name, weight in model.named_parameters()
    }
    for place, name in enumerate(MODELS):
        for key, weight in model.named_parameters():
            change = 0.1 * torch.randn_like(weight) if place else 0
            weight.data = first[key] + change
        model.save_pretrained(folder / name)
    return folder


def config_of(granularity: Any) -> dict[str, Any]:
    return {
        "merge_method": "nuslerp",
        "base_model": "./base",
        "models": [
            {"model": "./sft", "parameters": {"weight": 0.3}},
            {"model": "./kd", "parameters": {"weight": 0.7}},
        ],
        "parameters": {"nuslerp_granularity": granularity},
    }


def by_hand(parts: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        *({"filter": text, "value": value} for text, value in parts.items()),
        {"value": "tensor"},
    ]


def merged(granularity: Any, out: Path, folder: Path) -> dict[str, torch.Tensor]:
    merge_here(yaml.dump(config_of(granularity)), out, cwd=folder)
    return load_tensors(out)


def assert_same(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> None:
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@only_names
@pytest.mark.parametrize("is_known", [True, False], ids=["shape", "no shape"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_what_one_would_write_by_hand(
    family: str, is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where mergekit's plan does not know the shapes, as with pickles."""
    folder = write_models(tmp_path, family)
    parts = {**FAMILIES[family][2], **_ENDS}
    hand = merged(by_hand(parts), tmp_path / "hand", folder)
    if not is_known:
        monkeypatch.setattr(planning, "stored_shape", lambda _: None)
    head = merged("head", tmp_path / "head", folder)
    assert_same(head, hand)
    whole = merged("tensor", tmp_path / "whole", folder)
    assert all(
        whole[name].equal(head[name]) == (head[name].dim() < 2) for name in whole
    )
    # What `inspect` says is what is merged.
    with working_directory(folder):
        config = MergeConfiguration.model_validate(config_of("head"))
        tensors = measure.inspect(config).tensors
    found = {tensor.name: tensor.granularity for tensor in tensors}
    for tensor in tensors:
        expected = [kind for part, kind in parts.items() if part in tensor.name]
        if len(tensor.shape) < 2:
            assert found[tensor.name] == "tensor"
        else:
            assert found[tensor.name] == expected[0], tensor.name


@only_names
def test_head_in_a_part_of_the_model(tmp_path: Path) -> None:
    folder = write_models(tmp_path, "llama")
    some = [{"filter": "mlp", "value": "head"}, {"value": "column"}]
    hand = [*by_hand(_MLP)[:-1], {"value": "column"}]
    assert_same(
        merged(some, tmp_path / "head", folder), merged(hand, tmp_path / "hand", folder)
    )


@only_names
def test_a_name_that_is_not_known_written_by_hand(tmp_path: Path) -> None:
    """As the message says."""
    folder = write_models(tmp_path, "Starcoder2Config")
    with pytest.raises(ConfigError) as caught:
        merged("head", tmp_path / "none", folder)
    assert "filter: mlp.c_fc, value: " in str(caught.value)
    hand = {"mlp.c_fc": "row", "mlp.c_proj": "column"}
    mixed = [*by_hand(hand)[:-1], {"value": "head"}]
    spelled = {**hand, **_attention(8), **_ENDS}
    assert_same(
        merged(mixed, tmp_path / "mixed", folder),
        merged(by_hand(spelled), tmp_path / "hand", folder),
    )


@only_names
def test_state_dicts_without_a_config() -> None:
    """Neurons need no sizes. Weights of one shape are not merged as one kind."""
    names = ("mlp.up_proj.weight", "mlp.down_proj.weight", "norm.weight")
    states = [
        {name: torch.randn(*(4, 4)[: 1 if "norm" in name else 2]) for name in names}
        for _ in range(2)
    ]
    options = {"weight": [0.3, 0.7], "nuslerp_granularity": "head"}
    found = mergekit.merge_methods.merge_state_dicts(
        states, "nuslerp", parameters=options
    )
    for name, kind in zip(names, ("row", "column", "tensor")):
        exact = oracle([state[name] for state in states], (0.3, 0.7), None, kind)
        torch.testing.assert_close(found[name], exact.float())
    states = [{"self_attn.q_proj.weight": torch.randn(4, 4)} for _ in range(2)]
    with pytest.raises(ConfigError, match="how many heads it has"):
        mergekit.merge_methods.merge_state_dicts(states, "nuslerp", parameters=options)
    with pytest.raises(ConfigError, match="its name is none of those"):
        mergekit.merge_methods.merge_tensors(
            [*torch.randn(2, 4, 4)], "nuslerp", parameters=options
        )


# --- What is refused ---------------------------------------------------------------


def edited(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content |= changes
        for key in [key for key, value in content.items() if value == "none"]:
            del content[key]

    return edit


# Of an edit of each model's config.json, what the message says.
REFUSED: dict[str, tuple[dict[str, Callable[[dict[str, Any]], None]], str]] = {
    "no sizes": (
        {"base": edited(head_dim="none", num_attention_heads="none")},
        r"model \./base: no config.json says how many heads it has",
    ),
    "another size": (
        dict.fromkeys(MODELS, edited(head_dim=4)),
        r"q_proj.weight of model \./\w+: it has 32 rows, where config.json tells of "
        "4 heads of 4",
    ),
    "another number of keys": (
        dict.fromkeys(MODELS, edited(num_key_value_heads=4)),
        r"k_proj.weight of model \./\w+: it has 16 rows, where .* 4 heads of 8",
    ),
    "models that differ": (
        {"kd": edited(head_dim=16, num_attention_heads=2, num_key_value_heads=1)},
        r"in all models alike: it is row:\d+ in \./\w+, but row:\d+ in \./\w+\.",
    ),
    "a model that sees": (
        dict.fromkeys(
            MODELS,
            edited(vision_config={"num_attention_heads": 2, "hidden_size": 32}),
        ),
        r"model \./\w+: its config.json has heads of several kinds",
    ),
}


@only_names
@pytest.mark.parametrize("case", REFUSED)
def test_refused_while_mergekit_plans(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a tensor was read")

    edits, message = REFUSED[case]
    folder = write_models(tmp_path, "llama")
    for name, edit in edits.items():
        path = folder / name / "config.json"
        content = json.loads(path.read_text("utf-8"))
        edit(content)
        path.write_text(json.dumps(content), "utf-8")
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", read)
    with pytest.raises(ConfigError, match=message) as caught:
        merged("head", tmp_path / "out", folder)
    said = str(caught.value)
    assert len(said) <= 600
    assert "`nuslerp_granularity: [{filter: self_attn." in said and "row:" in said
    assert not (tmp_path / "out").exists()


@only_names
def test_a_block_that_does_not_divide_names_the_head(tmp_path: Path) -> None:
    folder = write_models(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"row:7.*A head of these models has 8 num"):
        merged([{"filter": "q_proj", "value": "row:7"}], tmp_path / "out", folder)


LLAMA = {"num_attention_heads": 4, "hidden_size": 32, "model_type": "llama"}


@pytest.mark.parametrize(
    "name, shape, config",
    [
        ("self_attn.gate_proj.weight", (32, 32), LLAMA),  # of attention, not the MLP
        ("self_attn.W_pack.weight", (96, 32), LLAMA),
        ("mlp.experts.gate_up_proj", (2, 96, 32), LLAMA),
        ("mlp.c_fc.weight", (32, 96), LLAMA),
        ("visual.patch_embed.proj.weight", (8, 3, 2, 2), LLAMA),
        ("self_attn.q_proj.weight", (64, 32), LLAMA),  # with a gate beside each head
        ("self_attn.o_proj.weight", (32, 64), LLAMA),
        ("self_attn.q_proj.weight", (32, 32), {**LLAMA, "vision_config": {}}),
        ("self_attn.q_proj.weight", None, {**LLAMA, "head_dim": "wide", "n": [1]}),
        ("self_attn.q_proj.weight", None, {"num_attention_heads": 0, "head_dim": 8}),
    ],
)
def test_what_is_not_guessed(name: str, shape: Any, config: dict[str, Any]) -> None:
    if config.get("head_dim") == "wide":
        config = {**config, "hidden_size": 30}
    with pytest.raises(ConfigError, match=f"head` does not fit tensor {name} of"):
        heads.granularity_of(name, {"a model": config}, shape)


@pytest.mark.skipif(TAKES_NAMES, reason="of mergekit 0.1.4")
def test_a_word_is_refused_where_mergekit_takes_only_numbers(tmp_path: Path) -> None:
    folder = write_models(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"pip install mergekit==0\.1\.5"):
        merged("head", tmp_path / "out", folder)
