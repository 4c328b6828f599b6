# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a checkpoint's files say of it, before a weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mergekit_nuslerp.parameters import ConfigError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Of each weight the dtype, by safetensors' name, and the shape.
Header = dict[str, tuple[str, tuple[int, ...]]]


def loader(model: Hashable) -> Any:
    """What mergekit reads a checkpoint with, from its cache."""
    # Not above: it imports transformers, which takes seconds, and this module is
    # imported with mergekit's registry, which does not.
    from mergekit.io.tasks import LoaderCache

    return LoaderCache().get(model)


def shards(model: ModelReference) -> Iterator[tuple[str, Sequence[str]]]:
    """The safetensors files of a model, and what its index says is in them."""
    index = loader(model).index
    for shard in index.shards if index.is_safetensors else ():
        file = os.path.normpath(shard.filename)
        if os.path.isabs(file) or file.startswith(os.pardir):
            raise ConfigError(
                f"nuslerp: the index of model {model} names {shard.filename}, a file "
                "outside of its folder. Do not use this checkpoint."
            )
        yield os.path.join(index.base_path, file), shard.contained_keys


def weights(model: ModelReference) -> Header:
    """All weights in a model's safetensors files."""
    headers: Header = {}
    for path, _ in shards(model):
        headers |= header(path)
    return headers


def shape(model: ModelReference, name: str) -> tuple[int, ...] | None:
    """The shape of one weight, None where it is not in a safetensors file."""
    index = loader(model).index
    file = index.tensor_paths.get(name) if index.is_safetensors else None
    if file is None:
        return None
    return header(os.path.join(index.base_path, file)).get(name, ("", None))[1]


def header(path: str) -> Header:
    return _header(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=256)
def _header(path: str, _modified: int) -> Header:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise ConfigError(
            f"nuslerp: {path} is not a safetensors file, or not all of one ({error}). "
            "If it is the pointer of a file that Git keeps elsewhere, run `git lfs "
            "pull`."
        ) from None


def name_of(model: ModelReference, info: Any) -> str | None:
    """The name by which a checkpoint has a weight, if it has it."""
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    paths = loader(model).index.tensor_paths
    return next((name for name in names if name in paths), None)


# In the names of tensors, each followed by a line break, of quantised checkpoints.
_SCALES = (
    *("weight_scale_inv\n", "_scale_inv\n", ".weight_scale", ".weight.quant_state"),
    *(".weight.absmax\n", ".qweight\n", ".SCB\n"),
)


def check_checkpoint(model: ModelReference) -> tuple[Any, set[str]]:
    """Refuse a quantised checkpoint: else its config.json, and tensors of integers."""
    index, headers = loader(model).index, weights(model)
    config = config_of(model)
    dtypes = {dtype for dtype, _ in headers.values()}
    integers = {dtype for dtype in dtypes if dtype[0] in "IUB" and dtype != "BF16"}
    names = "".join(f"{name}\n" for name in index.tensor_paths)
    signs = [
        f"tensors named *{ending.strip()}" for ending in _SCALES if ending in names
    ]
    signs += [f"float8 ({dtype})" for dtype in dtypes if dtype[:2] == "F8"]
    if config.get("quantization_config"):
        signs.append("quantization_config in its config.json")
    if signs:
        raise ConfigError(
            f"nuslerp: model {model} is quantised: it has {signs[0]}. Quantised "
            "weights cannot be interpolated. Use the checkpoint that it was made from, "
            "or load it with transformers, call `model.dequantize()`, and save that."
        )
    of_integers = headers.items() if integers else ()
    return config, {name for name, (dtype, _) in of_integers if dtype in integers}


def config_of(model: Hashable) -> Mapping[str, Any]:
    """What the config.json of a model says, nothing where there is none to be read."""
    from mergekit.io.tasks import LoaderCache

    # Only checkpoints that are open: callers of mergekit's functions may have none.
    is_open = model in LoaderCache.loaders
    path = os.path.join(folder(model), "config.json") if is_open else ""
    return _config_at(path, os.stat(path).st_mtime_ns) if os.path.exists(path) else {}


def folder(model: Any) -> str:
    """Where a checkpoint lies."""
    return loader(model).index.base_path


@lru_cache(maxsize=64)
def _config_at(path: str, _modified: int) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except (OSError, ValueError):  # transformers says so where it matters
        config = None
    return config if isinstance(config, dict) else {}
