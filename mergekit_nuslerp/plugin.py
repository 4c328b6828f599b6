# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Finds the adapter for the installed mergekit and puts it into the registry."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from types import ModuleType
from typing import Any

import mergekit_nuslerp
from mergekit_nuslerp import REGISTRY, misspelt

LOG = logging.getLogger(__package__)

# For each of mergekit's interfaces the dict in its registry, and our adapter.
ADAPTERS = {"_METHODS": "batch", "REGISTERED_MERGE_METHODS": "task"}

_PACKAGE = f"{mergekit_nuslerp.__name__}.adapters"


def install(registry: ModuleType) -> None:
    """Replace mergekit's own `nuslerp` in its registry. Harmless when repeated."""
    attribute = _interface(registry)
    methods: dict[str, Any] = getattr(registry, attribute)
    if not type(methods.get("nuslerp")).__module__.startswith(_PACKAGE):
        methods["nuslerp"] = adapter().make()
    importlib.import_module(f"{_PACKAGE}.planning").attach()


@cache
def adapter() -> ModuleType:
    """The adapter for the interface that the installed mergekit has.

    Raises:
        ImportError: a mergekit with none of the interfaces that are known.
    """
    name = ADAPTERS[_interface(importlib.import_module(REGISTRY))]
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _interface(registry: ModuleType) -> str:
    for attribute in ADAPTERS:
        if isinstance(getattr(registry, attribute, None), dict):
            return attribute
    raise ImportError(
        f"mergekit {mergekit_version()} keeps its merge methods in another way than "
        "0.1.4 and 0.1.5 do"
    )


@cache
def mergekit_version() -> str:
    try:
        return version("mergekit")
    except PackageNotFoundError:
        return "of unknown version"


# Whether mergekit has been tried, and whether it is being tried now.
_tried = _trying = False


def try_merge() -> None:
    """Once in a process, merge two tiny tensors in mergekit's way, and see what comes.

    What looks like an interface that is known may be another one.
    """
    global _tried, _trying
    if _tried or _trying:
        return
    _trying = True
    try:
        import torch
        from mergekit.architecture import WeightInfo
        from mergekit.common import ImmutableMap, ModelReference
        from mergekit.io.tasks import GatherTensors

        models = [ModelReference.model_validate(name) for name in ("a", "b", "base")]
        # Half of the arc from (1, 0) to (0, 1), off the base (4, 4).
        tensors = torch.tensor([(5.0, 4.0), (4.0, 5.0), (4.0, 4.0)])
        info, weight = WeightInfo(name="tiny"), ImmutableMap({"weight": 1.0})
        gather = GatherTensors(weight_info=ImmutableMap(dict.fromkeys(models, info)))
        task = adapter().make_task(
            output_weight=info,
            tensors=gather,
            parameters=ImmutableMap({"lambda": 0.5}),
            tensor_parameters=ImmutableMap(dict.fromkeys(models, weight)),
            base_model=models[2],
        )
        merged = task.execute(tensors=dict(zip(models, tensors))).tolist()
        reason = f"it merges to {merged}"
        half = 4 + 0.5 * sqrt(0.5)
        _tried = all(abs(number - half) < 1e-6 for number in merged)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    finally:
        _trying = False
    if not _tried:
        raise RuntimeError(
            f"mergekit-nuslerp {mergekit_nuslerp.__version__} does not fit mergekit "
            f"{mergekit_version()}, as a merge of two tiny tensors shows ({reason}). "
            f"Update either of them, or set {mergekit_nuslerp.SWITCH}=0 to merge with "
            "mergekit's own nuslerp."
        )


def announce_merge() -> None:
    """Try mergekit and announce the plugin, unless this is the trial."""
    if not _trying:
        try_merge()
        announce()


@cache
def announce() -> None:
    """Say once in a process that it is this plugin that merges."""
    message = (
        f"mergekit-nuslerp {mergekit_nuslerp.__version__} merges here in place of "
        "mergekit's own nuslerp (MERGEKIT_NUSLERP=0 switches it off)"
    )
    # mergekit lets no logger show what is below a warning, which this is not. But which
    # code made a model must be seen, so it goes to the handlers at once.
    if LOG.isEnabledFor(logging.WARNING):
        record = LOG.makeRecord(LOG.name, logging.INFO, __file__, 0, message, (), None)
        LOG.handle(record)
    if misspelt():
        LOG.warning("mergekit-nuslerp: %s", misspelt())
