# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`nuslerp_granularity: head`: what one vector is in each weight, by its name.

Attention is merged head by head, the MLP neuron by neuron, embeddings token by token.
What the name, the shape and the model's config.json do not settle is refused: another
guess would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_nuslerp.granularity import HEAD
from mergekit_nuslerp.parameters import ConfigError

# The end of a weight's name; whether its rows or columns are heads or neurons; and, of
# attention, how many times it has each head of q and each head of k and v.
_Part = tuple[str, str, int, int]

# A linear layer has a row for each output and a column for each input.
_LINEAR: tuple[_Part, ...] = (
    (r"q_proj\.weight", "row", 1, 0),
    (r"[kv]_proj\.weight", "row", 0, 1),
    (r"o_proj\.weight", "column", 1, 0),
    (r"qkv_proj\.weight", "row", 1, 2),  # all heads of q, then of k, then of v
    (r"(gate|up|gate_up)_proj\.weight", "row", 0, 0),
    (r"down_proj\.weight", "column", 0, 0),
    (r"experts\.\d+\.w[13]\.weight", "row", 0, 0),
    (r"experts\.\d+\.w2\.weight", "column", 0, 0),
    (r"(shared_expert_)?gate\.weight", "row", 0, 0),  # each row scores one expert
    (r"(embed_tokens|lm_head|wte|wpe)\.weight", "row", 0, 0),
)

# By model_type, as others have weights of these names that are laid out otherwise.
_OF_TYPE: dict[str, tuple[_Part, ...]] = {
    # Conv1D is a linear layer whose weight is stored transposed.
    "gpt2": (
        (r"attn\.c_attn\.weight", "column", 1, 2),
        (r"attn\.c_proj\.weight", "row", 1, 0),
        (r"mlp\.c_fc\.weight", "column", 0, 0),
        (r"mlp\.c_proj\.weight", "row", 0, 0),
    ),
    # All experts of a layer in one tensor: matrices of linear layers.
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "glm4_moe"),
        (
            (r"mlp\.experts\.gate_up_proj", "row", 0, 0),
            (r"mlp\.experts\.down_proj", "column", 0, 0),
        ),
    ),
}

_OTHER_MODALITIES = frozenset(("vision_config", "audio_config"))

# One vector, where the shape is not known while mergekit plans.
_VECTORS = re.compile(r"\.bias$|(norm|ln_\w+)\.weight$")


class _Attention(NamedTuple):
    """What a model's config.json says of its attention."""

    heads: int
    key_value_heads: int
    size: int  # of a head


def granularity_of(
    tensor: str,
    configs: Mapping[Hashable, Mapping[str, Any]],
    shape: Sequence[int] | None,
) -> str:
    """The granularity that `head` means for one weight.

    Args:
        configs: of each model, what its config.json says.
        shape: of the weight, None where it is not known yet.

    Raises:
        ConfigError: it cannot be told, or not for all models alike.
    """
    models: dict[str, Hashable] = {}
    for model, config in configs.items():
        try:
            models.setdefault(_granularity(tensor, config, shape), model)
        except ValueError as error:
            raise _refused(tensor, f"of model {model}: {error}", configs) from None
    if len(models) > 1:
        reason = ", but ".join(f"{kind} in {model}" for kind, model in models.items())
        raise _refused(tensor, f"in all models alike: it is {reason}", configs)
    (granularity,) = models
    return granularity


def head_size(configs: Mapping[Hashable, Mapping[str, Any]]) -> int | None:
    """The size of a head, if all models have one and the same."""
    sizes = {each.size for config in configs.values() for each in _attentions(config)}
    return sizes.pop() if len(sizes) == 1 else None


def _granularity(
    tensor: str, config: Mapping[str, Any], shape: Sequence[int] | None
) -> str:
    is_vector = _VECTORS.search(tensor) if shape is None else len(shape) < 2
    if is_vector:
        return "tensor"
    known = (*_LINEAR, *_OF_TYPE.get(str(config.get("model_type")), ()))
    entries = [part for part in known if re.search(rf"(^|\.)({part[0]})$", tensor)]
    if not entries:
        raise ValueError("its name is none of those that `head` knows")
    ((_, kind, query, key),) = entries
    if not (query or key):
        if "attn" in tensor or "attention" in tensor:
            raise ValueError("its name is one of an MLP, but it is in attention")
        return kind
    attentions = _attentions(config)
    if not attentions:
        raise ValueError("no config.json says how many heads it has, and of what size")
    # A vision or audio config may leave its number of heads to a default.
    if len(attentions) > 1 or not _OTHER_MODALITIES.isdisjoint(config):
        raise ValueError("its config.json has heads of several kinds")
    (each,) = attentions
    count = query * each.heads + key * each.key_value_heads
    size = None if shape is None else shape[-2 if kind == "row" else -1]
    if size not in (None, count * each.size):
        raise ValueError(
            f"it has {size} {kind}s, where config.json tells of {count} heads of "
            f"{each.size}"
        )
    return f"{kind}:{each.size}"


def _attentions(config: Mapping[str, Any]) -> set[_Attention]:
    """The kinds of attention that a config has, also in its parts.

    Multimodal models have a part for each modality.
    """
    kinds = set()
    for part in (config, *config.values()):
        if not isinstance(part, Mapping):
            continue
        heads = _count(part.get("num_attention_heads", part.get("n_head")))
        width = _count(part.get("hidden_size", part.get("n_embd")))
        divides = heads and width % heads == 0
        size = _count(part.get("head_dim")) or (width // heads if divides else 0)
        if heads and size:
            key_value_heads = _count(part.get("num_key_value_heads")) or heads
            kinds.add(_Attention(heads, key_value_heads, size))
    return kinds


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _refused(
    tensor: str, reason: str, configs: Mapping[Hashable, Mapping[str, Any]]
) -> ConfigError:
    end = ".".join(tensor.removesuffix(".weight").split(".")[-2:])
    size = head_size(configs) or 128
    return ConfigError(
        f"nuslerp: `nuslerp_granularity: {HEAD}` does not fit tensor {tensor} {reason}."
        f" Write by hand what one vector is there: `nuslerp_granularity: [{{filter: "
        f"{end}, value: tensor}}, {{value: {HEAD}}}]`. In place of tensor: row, "
        f"column, matrix, or, say, row:{size} or column:{size} for heads of {size} "
        "numbers."
    )
