# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the headers of a model's files say of its weights, before one is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from safetensors import SafetensorError, safe_open

from mergekit_nuslerp.parameters import ConfigError

# Of each weight the dtype, by safetensors' name, and the shape.
Header = dict[str, tuple[str, tuple[int, ...]]]


def shards(model: ModelReference) -> Iterator[tuple[str, Sequence[str]]]:
    """The safetensors files of a model, and what its index says is in them."""
    index = LoaderCache().get(model).index
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
    index = LoaderCache().get(model).index
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
