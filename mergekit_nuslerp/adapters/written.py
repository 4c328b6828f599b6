# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A config as it is written, before mergekit drops what it does not know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from typing import Any

from mergekit_nuslerp import parameters, plugin
from mergekit_nuslerp.messages import brief
from mergekit_nuslerp.parameters import LOG, PARAMETERS, WORDS, ConfigError


def check_written(config: Mapping[str, Any]) -> None:
    """Refuse or warn of what mergekit would drop of a config without a word."""
    in_place: list[tuple[Any, Any]] = []
    dropped: list[tuple[Mapping[str, Any], Any, Collection[str]]] = []
    for part, read in _parts(config):
        for key in part.keys() - read:
            dropped.append((part, key, read))
        settings = part.get("parameters")
        if isinstance(settings, dict):
            in_place += settings.items()
            for name in settings.keys() & PARAMETERS:
                entries = settings[name]
                if isinstance(entries, (dict, list)):
                    _check_filters(name, entries)
    misplaced = set()
    for part, key, read in dropped:
        # What YAML repeats from elsewhere is read where it is used.
        names = {item[0] for item in _below(part[key]) if item not in in_place}
        names = set(filter(parameters.is_like_a_parameter, {key, *names}))
        misplaced |= names
        # The config itself may have a key for what YAML repeats.
        near = get_close_matches(str(key), read, 1)
        if not names and (part is not config or near):
            hint = f" Did you mean `{near[0]}`?" if near else ""
            LOG.warning("config: mergekit does not read `%s`.%s", key, hint)
    for name in sorted(map(str, misplaced)):
        parameters.check_name(name, " outside of `parameters`")


def _parts(
    config: Mapping[str, Any],
) -> list[tuple[Mapping[str, Any], Collection[str]]]:
    """The parts of a config as it is written, and what keys mergekit reads there."""
    from mergekit import config as of

    kinds = {
        "modules": of.OutputModuleDefinition,
        "models": of.InputModelDefinition,
        "slices": of.OutputSliceDefinition,
        "sources": of.InputSliceDefinition,
    }
    read = {key: kind.model_fields.keys() for key, kind in kinds.items()}
    parts = [(config, of.MergeConfiguration.model_fields.keys())]
    for part, keys in parts:  # to which their own parts are added
        for key in read.keys() & keys:
            below = part.get(key)
            if key == "modules" and isinstance(below, dict):
                below = list(below.values())
            for each in below if isinstance(below, list) else ():
                if isinstance(each, dict):
                    parts.append((each, read[key]))
    return parts


def _below(value: Any) -> Iterator[tuple[Any, Any]]:
    """All keys and values in what is nested; what YAML repeats is one object."""
    visited, nodes = set(), [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (dict, list)) and id(node) not in visited:
            visited.add(id(node))
            if isinstance(node, dict):
                yield from node.items()
            nodes += node.values() if isinstance(node, dict) else node


def _check_filters(name: str, value: dict[Any, Any] | list[Any]) -> None:
    """Refuse a filter of another name, without which a value is for all tensors."""
    entries = listed(value)
    for entry in entries:
        if not isinstance(entry, dict) or "value" not in entry:
            return  # a gradient, or nothing that mergekit takes
        for key in entry.keys() - {"filter", "value"}:
            raise ConfigError(
                f"config: parameter {name!r} has an entry with {brief(key)}, which "
                "mergekit does not read. An entry has `filter` and `value`, or `value` "
                "alone for all other tensors."
            )
    filters = [str(entry.get("filter") or "*") for entry in entries]
    for count, later in enumerate(filters):
        first = next((x for x in filters[:count] if x == "*" or x in later), None)
        if first is not None:
            LOG.warning(
                "config: of %r, the entry for %s is not read, as the one for %s comes "
                "first and takes its tensors. Write it before that one.",
                name,
                *("all tensors" if x == "*" else repr(x) for x in (later, first)),
            )


# What mergekit takes under a key of a config.
_FORMS = {
    "models": "a list, with `- model: PATH` and `parameters: {weight: 0.5}` for each",
    "slices": "a list, with `- sources: [...]` for each",
    "sources": "a list, with `model`, `layer_range` and `parameters` for each",
    "modules": "a name and `models` or `slices` for each module",
    **dict.fromkeys(("model", "base_model"), "a path, or a name on the hub"),
    "layer_range": "two whole numbers, `[0, 16]`",
    "parameters": "names and values, `{weight: 0.5}`",
    **dict.fromkeys(("dtype", "out_dtype"), "a name, such as `bfloat16`"),
    "tokenizer_source": "`union`, `base` or a model",
    "tokenizer": "`{source: union}`, with `tokens` if need be",
    "chat_template": "a name or a template",
    "residual_weight": "a number",
}


def misfit(config: Any, error: Mapping[str, Any]) -> ConfigError:
    """The error about what mergekit could not read of a config, in words of ours."""
    place, value = list(error["loc"]), error["input"]
    if "parameters" in place[:-1]:
        end = place.index("parameters")
        name, owner = str(place[end + 1]), reduce(getitem, place[:end], config)
        check_word(name)
        refusal = parameters.unfit(name, value, owner.get("model"))
        return refusal.at(_path(place[:end])) if end else refusal
    # The others are names of types that were tried.
    keys = [key for key in place if isinstance(key, int) or key in _FORMS]
    if place[0] == "modules":
        keys[1:1] = place[1:2]
    state = "is missing" if error["type"] == "missing" else f"is {brief(value)}"
    known = [_FORMS[key] for key in keys if key in _FORMS]
    form = known[-1] if known else "as mergekit's documentation says"
    return ConfigError(f"config: `{_path(keys)}` {state}, but must be {form}.")


def _path(keys: Sequence[Any]) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, keys)))


def check_word(name: str) -> None:
    """Refuse a parameter whose values are words where mergekit takes only numbers."""
    if name in WORDS and not plugin.adapter().TAKES_WORDS:
        instead = ", or use `nuslerp_flatten` and `nuslerp_row_wise`"
        raise ConfigError(
            f"nuslerp: parameter {name!r} takes a word, and this mergekit takes only "
            "numbers. Install mergekit 0.1.5 (`pip install mergekit==0.1.5`)"
            f"{instead if name == WORDS[0] else ''}."
        )


def listed(value: Any) -> list[Any]:
    return (value or [None]) if isinstance(value, list) else [value]
