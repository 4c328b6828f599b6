# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Finds the adapter for the installed mergekit and puts it into the registry."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any

import mergekit_nuslerp

LOG = logging.getLogger(mergekit_nuslerp.__name__)

# The registry's dict of methods in each mergekit, and the adapter for its interface.
_ADAPTERS = {
    "_METHODS": "batch",  # 0.1.5
    "REGISTERED_MERGE_METHODS": "task",  # 0.1.4
}


def install(registry: ModuleType) -> None:
    """Replace mergekit's own `nuslerp` in its registry. Harmless when repeated.

    A mergekit with another interface keeps its own method, with a warning.

    Args:
        registry: the module `mergekit.merge_methods.registry`, executed.
    """
    found = [name for name in _ADAPTERS if hasattr(registry, name)]
    methods: dict[str, Any] = getattr(registry, found[0]) if found else {}
    if "nuslerp" not in methods:
        _leave("it has no registry of methods with a nuslerp in it that we know")
        return
    package = f"{mergekit_nuslerp.__name__}.adapters"
    if type(methods["nuslerp"]).__module__.startswith(package):
        return
    try:
        adapter = importlib.import_module(f"{package}.{_ADAPTERS[found[0]]}")
    except ImportError as error:
        # What the adapter builds on is not where it was.
        if error.name is None or error.name.split(".")[0] != "mergekit":
            raise
        _leave(str(error))
        return
    methods["nuslerp"] = adapter.make()


def _leave(reason: str) -> None:
    LOG.warning(
        "mergekit-nuslerp %s does not know this mergekit, whose own nuslerp stays in "
        "place: %s",
        mergekit_nuslerp.__version__,
        reason,
    )


@cache
def announce() -> None:
    """Say once in a process that it is this plugin that merges.

    mergekit shows nothing below WARNING, and which code made a model must be seen.
    """
    LOG.warning(
        "mergekit-nuslerp %s merges here in place of mergekit's own nuslerp "
        "(MERGEKIT_NUSLERP=0 switches it off)",
        mergekit_nuslerp.__version__,
    )
