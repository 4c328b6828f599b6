# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Finds the adapter for the installed mergekit and puts it into the registry."""

from __future__ import annotations

import importlib
import logging
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import mergekit_nuslerp
from mergekit_nuslerp import _hook

LOG = logging.getLogger(__package__)

# For each mergekit that is known: the adapter, and the dict in its registry.
ADAPTERS = {
    "0.1.5": ("batch", "_METHODS"),
    "0.1.4": ("task", "REGISTERED_MERGE_METHODS"),
}

_PACKAGE = f"{mergekit_nuslerp.__name__}.adapters"


def install(registry: ModuleType) -> None:
    """Replace mergekit's own `nuslerp` in its registry. Harmless when repeated.

    A mergekit of another version keeps its own method, with a warning: a merge that
    fails half-way, because something has moved, would be worse.

    Args:
        registry: the module `mergekit.merge_methods.registry`, executed.
    """
    _, attribute = _known()
    methods: dict[str, Any] = getattr(registry, attribute, {}) if attribute else {}
    if "nuslerp" not in methods:
        LOG.warning("%s; mergekit's own nuslerp stays in place", _unknown())
        return
    if not type(methods["nuslerp"]).__module__.startswith(_PACKAGE):
        methods["nuslerp"] = adapter().make()


def adapter() -> ModuleType:
    """The adapter for the installed mergekit.

    Raises:
        ImportError: a mergekit that is not known.
    """
    name, _ = _known()
    if not name:
        raise ImportError(_unknown())
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _unknown() -> str:
    return (
        f"mergekit-nuslerp {mergekit_nuslerp.__version__} does not know mergekit "
        f"{mergekit_version()}; it knows {' and '.join(ADAPTERS)}"
    )


def _known() -> tuple[str, str]:
    release = re.match(r"\d+\.\d+\.\d+", mergekit_version())
    return ADAPTERS.get(release[0] if release else "", ("", ""))


@cache
def mergekit_version() -> str:
    try:
        return version("mergekit")
    except PackageNotFoundError:
        return "of unknown version"


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
    if _hook.misspelt():
        LOG.warning("mergekit-nuslerp: %s", _hook.misspelt())
