# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""NuSLERP for mergekit: spherical interpolation of language models.

Importing this package makes mergekit use it. PyTorch imports it at the end of `import
torch`, in every process that has it installed, whether it merges models or not. So this
module imports the standard library alone, and nothing happens until mergekit's registry
of merge methods has been executed, or one of the names below is asked for.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["NonFiniteError", "__version__", "nuslerp", "register"]

# Names of the merge method: mergekit's own, and that of `entry_point`.
METHODS = ("nuslerp", "mergekit_nuslerp")

REGISTRY = "mergekit.merge_methods.registry"
PLAN = "mergekit.plan"
SWITCH = "MERGEKIT_NUSLERP"
_OFF = ("0", "false", "off", "no")
_ON = ("", "1", "true", "on", "yes")

# Why `nuslerp` merges are refused, if they are.
failure = ""

if TYPE_CHECKING:
    from mergekit_nuslerp.kernel import NonFiniteError, nuslerp


def __getattr__(name: str) -> Any:
    if name in {"NonFiniteError", "nuslerp"}:
        from mergekit_nuslerp import kernel

        return getattr(kernel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _switch() -> str:
    return os.environ.get(SWITCH, "").strip().lower()


def switched_off() -> bool:
    """Whether the user wants mergekit's own method."""
    return _switch() in _OFF


def portable() -> bool:
    """Whether the user wants PyTorch's operations and no C++."""
    return _switch() == "portable"


def misspelt() -> str:
    """What to say about a value of the switch that means nothing, or nothing."""
    if portable() or _switch() in (*_OFF, *_ON):
        return ""
    if _switch() in ("compile", "compiled"):
        return f"{SWITCH}={os.environ[SWITCH]} is not needed any more: it has no effect"
    return f"{SWITCH}={os.environ[SWITCH]} has no effect; it may be 0, 1 or portable"


def register() -> None:
    """Put the plugin into mergekit's registry now. Harmless when repeated.

    Does nothing where MERGEKIT_NUSLERP=0 switches the plugin off. Where the plugin does
    not fit mergekit, merges by `nuslerp` are refused, with the reason.

    Raises:
        ImportError: mergekit is not installed.
    """
    import importlib

    if not switched_off():
        importlib.import_module("mergekit.merge_methods")  # and its registry
        _install()


def _autoload() -> None:
    """What PyTorch calls at the end of `import torch`. Never raises."""
    try:
        if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        _install()
    except Exception:  # whatever it is, it must not break `import torch`
        pass


def _install(executed: Any = None) -> None:
    """Install the plugin as far as mergekit has been imported, or have it refuse.

    Args:
        executed: a module of mergekit that has been executed right now.
    """
    registry: Any = sys.modules.get(REGISTRY)
    plan: Any = sys.modules.get(PLAN)
    first = registry or plan
    if switched_off() and plan is executed is not None:
        _ask_first(plan, _check_own)
    if switched_off() or first is None:
        return
    if first is not executed and getattr(first.__spec__, "_initializing", False):
        return
    try:
        from mergekit_nuslerp import plugin

        plugin.install(registry)
    except Exception as error:
        _refuse(error, registry, plan)


def _refuse(error: Exception, registry: Any, plan: Any) -> None:
    """Make `nuslerp` fail: mergekit's own method would write another model."""
    global failure
    failure = (
        f"mergekit-nuslerp {__version__} is installed but cannot be used here "
        f"({type(error).__name__}: {error}). Reinstall, update or uninstall it, or set "
        f"{SWITCH}=0 to merge with mergekit's own nuslerp."
    )

    def fail(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError(failure) from error

    for methods in list(vars(registry or sys).values()):
        if isinstance(methods, dict) and "nuslerp" in methods:
            methods["nuslerp"] = _Refused(methods["nuslerp"], fail)
    _ask_first(plan, fail)


def _check_own(config: Any) -> None:
    """Refuse what mergekit's own `nuslerp` would ignore, so write another model."""
    own = sys.modules["mergekit.merge_methods"].get("nuslerp")
    listed = own.spec.parameters if hasattr(own, "spec") else own.parameters()
    new = ("granularity", "magnitude", "contrast")
    names = {"lambda", *(f"nuslerp_{name}" for name in new)}
    for name in sorted(names - {parameter.name for parameter in listed}):
        if repr(name) in repr(config):
            raise RuntimeError(
                f"mergekit's own nuslerp, which {SWITCH}={os.environ[SWITCH]} asks "
                f"for, has no parameter {name!r}. Remove it, or unset {SWITCH}."
            )


def _ask_first(plan: Any, refuse: Any) -> None:
    """Have mergekit's planner ask before it plans a merge by `nuslerp`."""
    planner = getattr(plan, "MergePlanner", None)
    own = getattr(planner, "_plan", None)
    if planner is not None and own is not None:

        def _plan(self: Any) -> Any:
            if self.config.merge_method in METHODS:
                refuse(self.config)
            return own(self)

        planner._plan = _plan


class _Refused:
    """In place of a method that cannot be used: tells its name, and does nothing."""

    def __init__(self, method: Any, fail: Any) -> None:
        self._method, self._fail = method, fail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._method, name)
        harmless = ("name", "pretty_name", "reference_url")
        return self._fail if callable(value) and name not in harmless else value

    def __call__(self, *_args: Any, **_options: Any) -> Any:
        return self._fail()


class _Finder:
    """Lets mergekit's modules be found as always, and acts after their execution."""

    busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        # Others may ask all finders too, and so come back here.
        if name not in (REGISTRY, PLAN) or self.busy:
            return None
        self.busy = True
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = find_spec and find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        finally:
            self.busy = False
        return None


class _Loader:
    """A module's own loader, with one more step at the end."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy asks before it has anything
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _install(module)


_autoload()
