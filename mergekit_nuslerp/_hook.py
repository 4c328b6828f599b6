# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Installs the plugin as soon as mergekit's registry has been executed.

PyTorch runs this at the end of `import torch`, in every process that has the plugin
installed, whether it merges models or not. So it imports the standard library alone,
does nothing until mergekit is imported, and never raises.
"""

import copy
import os
import sys

REGISTRY = "mergekit.merge_methods.registry"
SWITCH = "MERGEKIT_NUSLERP"

_OFF = ("0", "false", "off", "no")
# "compile" asked for loops that are not needed any more.
_ON = ("", "1", "true", "on", "yes", "compile", "compiled")
_PORTABLE = ("portable",)


def switched_off():
    """Whether the user wants mergekit's own method."""
    return _switch() in _OFF


def portable():
    """Whether the user wants PyTorch's operations and no C++."""
    return _switch() in _PORTABLE


def misspelt():
    """What to say about a value of the switch that means nothing, or nothing."""
    if _switch() in ("compile", "compiled"):
        return f"{SWITCH}={os.environ[SWITCH]} is not needed any more: it has no effect"
    if _switch() in (*_OFF, *_ON, *_PORTABLE):
        return ""
    return f"{SWITCH}={os.environ[SWITCH]} has no effect; it may be 0, 1 or portable"


def _switch():
    return os.environ.get(SWITCH, "").strip().lower()


def arm():
    """Install the plugin now if mergekit is there, or else when it comes."""
    try:
        if switched_off():
            return
        registry = sys.modules.get(REGISTRY)
        if registry is not None:
            install(registry)
        elif not any(type(f).__module__ == __name__ for f in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception:
        # Whatever it is, it must not break `import torch`. `mergekit-nuslerp status`
        # tells that the plugin is not in place.
        pass


def install(registry):
    """Install the plugin, or make `nuslerp` fail with the reason why it cannot be."""
    try:
        from mergekit_nuslerp import plugin

        plugin.install(registry)
    except Exception as error:
        _refuse(registry, error)


def _refuse(registry, error):
    # Merging with mergekit's own method instead would go unnoticed.
    message = (
        "mergekit-nuslerp is installed but could not be loaded "
        f"({type(error).__name__}: {error}). Reinstall or uninstall it, or set "
        f"{SWITCH}=0 to merge with mergekit's own nuslerp."
    )

    def fail(*_args, **_kwargs):
        raise RuntimeError(message) from error

    for name in ("_METHODS", "REGISTERED_MERGE_METHODS"):
        methods = getattr(registry, name, {})
        if "nuslerp" in methods:
            method = copy.copy(methods["nuslerp"])
            # What mergekit 0.1.5 and 0.1.4 call first when they plan a merge.
            method.validate_inputs = method.make_task = fail
            method.mergekit_nuslerp_failure = message
            methods["nuslerp"] = method


class _Finder:
    """Lets the registry be found as always, and acts after its execution."""

    busy = False

    def find_spec(self, name, path=None, target=None):
        # Others may ask all finders too, and so come back here.
        if name != REGISTRY or self.busy:
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
    """The registry's own loader, with one more step at the end."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        if name.startswith("_"):  # a copy asks before it has anything
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if not switched_off():  # perhaps since `import torch`
            install(module)
