# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A check while mergekit plans: tokens for which a model has no embedding."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from mergekit_nuslerp.messages import brief
from mergekit_nuslerp.parameters import ConfigError


def check(source: Any, base: Any, models: Mapping[Any, tuple[str, Any]]) -> None:
    """Refuse a tokenizer with tokens that one of the models has no embedding for.

    Of such a merge mergekit says nothing but the number of the first of them.

    Args:
        source: "union", "base", or the model whose tokenizer the merge gets.
        base: of the config; without one, mergekit takes the first model.
        models: of each its folder, and the `vocab_size` of its config.json.
    """
    vocabularies = {model: _tokens(folder) for model, (folder, _) in models.items()}
    sizes = {m: size for m, (_, size) in models.items() if isinstance(size, int)}
    embedded = {
        model: {token for token, number in vocabularies[model].items() if number < size}
        for model, size in sizes.items()
    }
    if source == "union":
        merged = set().union(*embedded.values())
    elif source == "base":
        merged = embedded.get(base or next(iter(models)), set())
    else:
        merged = {*vocabularies.get(source, _tokens(str(source.model.path)))}
    for model, size in sizes.items():
        beyond = merged & vocabularies[model].keys() - embedded[model]
        if beyond:
            number, token = min((vocabularies[model][token], token) for token in beyond)
            last = max(vocabularies[model].values())
            raise ConfigError(
                f"config: the tokenizer of model {model} has the token {brief(token)} "
                f"at {number}, but its config.json has `vocab_size` {size}, so there "
                f"are embeddings of 0 to {size - 1} only. Write another "
                "`tokenizer_source`, or give the model embeddings first: "
                f"`model.resize_token_embeddings({last + 1})` in transformers."
            )


def _tokens(folder: str) -> dict[str, int]:
    """The tokens of a tokenizer.json and their numbers, none where it is another file.

    Where it is damaged, what loads it says so.
    """
    try:
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            content = json.load(file)
        added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        return {**content["model"]["vocab"], **added}
    except (LookupError, OSError, TypeError, ValueError):
        return {}
