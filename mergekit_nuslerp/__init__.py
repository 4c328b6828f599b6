# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""NuSLERP for mergekit: spherical interpolation of language models.

Importing this package makes mergekit use it. Nothing is imported beside the standard
library until mergekit is, or until one of the names below is asked for: PyTorch
imports this package wherever PyTorch itself is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["NonFiniteError", "__version__", "nuslerp", "register"]

if TYPE_CHECKING:
    from mergekit_nuslerp.kernel import NonFiniteError, nuslerp


def __getattr__(name: str) -> Any:
    if name in {"NonFiniteError", "nuslerp"}:
        from mergekit_nuslerp import kernel

        return getattr(kernel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Put the plugin into mergekit's registry now. Harmless when repeated.

    Does nothing where MERGEKIT_NUSLERP=0 switches the plugin off.

    Raises:
        ImportError: mergekit is not installed.
    """
    import importlib

    from mergekit_nuslerp import _hook

    if not _hook.switched_off():
        _hook.install(importlib.import_module(_hook.REGISTRY))


def _autoload() -> None:
    """What PyTorch calls at the end of `import torch`. Never raises."""
    try:
        from mergekit_nuslerp import _hook

        _hook.arm()
    except Exception:  # a damaged installation
        pass


_autoload()
