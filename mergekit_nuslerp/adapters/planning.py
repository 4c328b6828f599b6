# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What mergekit knows while it plans, but does not hand to a merge method.

Looked up in the frames of its planner. Where a mergekit has moved these, checks are
left out or come later; no merge depends on them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors, LoaderCache
from pydantic import BaseModel
from safetensors import safe_open

from mergekit_nuslerp.geometry import Magnitude
from mergekit_nuslerp.parameters import check_config
from mergekit_nuslerp.plugin import announce


@dataclass(frozen=True)
class Planned:
    """How one tensor is to be merged, whichever mergekit planned it."""

    name: str
    tensors: Any  # the task that gathers them
    weights: ImmutableMap[ModelReference, float]
    base: ModelReference | None
    granularity: str
    magnitude: Magnitude
    lambda_: float
    info: Any  # mergekit's WeightInfo


def caller() -> FrameType:
    """The frame that called the merge method, seen from that method."""
    return sys._getframe(2)


def config_of(frame: FrameType) -> BaseModel | None:
    """The merge configuration of a planner that called the merge method."""
    # `mergekit-pytorch` plans in a function, the other commands in a class.
    local = frame.f_locals
    config = local.get("config", getattr(local.get("self"), "config", None))
    return config if hasattr(config, "merge_method") else None


def check(config: BaseModel) -> None:
    """Check a configuration that is being planned, and say that the plugin merges.

    Raises:
        ConfigError: as `check_config`.
    """
    source = _source()
    if source is not None:  # a merge, and progress is not shown yet
        announce()
    check_config(config, source)


def _source() -> str | None:
    """The YAML that one of mergekit's commands has read, if one plans."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "mergekit":
            text = frame.f_locals.get("config_source")
            if isinstance(text, str):
                return text
        frame = frame.f_back
    return None


def resolved_for() -> dict[str, Any]:
    """The model and tensor that mergekit is resolving a parameter for, if it is."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if (
            frame.f_code.co_name == "resolve_parameter"
            and frame.f_globals.get("__name__") == "mergekit.parameter_resolver"
        ):
            names = {"model": "model", "tensor": "tensor_name"}
            return {key: frame.f_locals.get(name) for key, name in names.items()}
    return {}


def sources(tensors: Any) -> list[Any]:
    """The models that mergekit's task gathers a weight from, in its order."""
    gather = getattr(tensors, "gather_tensors", tensors)
    return list(getattr(gather, "weight_info", None) or gather.tensors)


def has_vocabulary(info: Any) -> bool:
    """Whether mergekit's WeightInfo says that a weight has a row for each token."""
    axis = getattr(info, "vocabulary_axis", None)  # of mergekit 0.1.5
    return axis is not None or bool(getattr(info, "is_embed", False))


def agree(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether integers or booleans are the same in all models, and may be copied."""
    first, *rest = tensors
    return all(t.dtype == first.dtype and torch.equal(t, first) for t in rest)


def stored_shape(tensors: Any) -> tuple[int, ...] | None:
    """The shape of a weight that is still to be read, from its file's header.

    Args:
        tensors: mergekit's task that gathers it.

    Returns:
        The shape, or None where it is not to be had: with a tokenizer that changes
        embeddings, or without safetensors.
    """
    if not isinstance(tensors, GatherTensors):
        return None
    weights: Mapping[Any, Any] = tensors.weight_info
    model, info = next(iter(weights.items()))
    index = LoaderCache().get(model).index
    file = index.tensor_paths.get(info.name)
    if not index.is_safetensors or file is None:
        return None
    path = os.path.join(index.base_path, file)
    return _shapes(path, os.stat(path).st_mtime_ns).get(info.name)


@lru_cache(maxsize=64)
def _shapes(path: str, _modified: int) -> Mapping[str, tuple[int, ...]]:
    """Shapes of all weights in a file: one header is read, not one for each weight."""
    with safe_open(path, framework="pt") as opened:
        names = opened.keys()
        return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
