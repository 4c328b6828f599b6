# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The command `mergekit-nuslerp`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from mergekit_nuslerp import __version__, _hook, register

# Run in a fresh interpreter, which has not imported this package by hand.
_PROBE = """
import json, sys
sys.path[:] = [path for path in sys.path if path]  # not what lies in this directory
from importlib.metadata import entry_points, version
answer = {"entry": [e.value for e in entry_points(group="torch.backends")]}
try:
    answer["mergekit"] = version("mergekit")
    answer["torch"] = version("torch")
    import mergekit.merge_methods as methods
    method = methods.get("nuslerp")
    answer["module"] = type(method).__module__
    answer["failure"] = getattr(method, "mergekit_nuslerp_failure", None)
except Exception as error:
    answer["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(answer))
"""


@click.group()
@click.version_option(__version__, prog_name="mergekit-nuslerp")
def main() -> None:
    """NuSLERP for mergekit: spherical interpolation of language models."""


@main.command()
def status() -> None:
    """Say whether mergekit uses this plugin, and if not, why.

    Asks a fresh interpreter. Exits with 0 if it does and 1 if it does not.
    """
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False
    )
    lines = probe.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        answer = {"error": probe.stderr.strip() or "the interpreter printed nothing"}
    reason = why_not(answer)
    if reason is not None:
        click.echo(f"off: `merge_method: nuslerp` is not this plugin. {reason}")
        sys.exit(1)
    click.echo(
        f"on: mergekit {answer['mergekit']} merges `merge_method: nuslerp` with "
        f"mergekit-nuslerp {__version__} (torch {answer['torch']})."
    )


def why_not(answer: dict[str, Any]) -> str | None:
    """The reason why a probed interpreter does not use the plugin, None if it does."""
    if answer.get("failure"):
        return str(answer["failure"])
    if str(answer.get("module", "")).startswith("mergekit_nuslerp."):
        return None
    if _hook.switched_off():
        return f"{_hook.SWITCH}={os.environ[_hook.SWITCH]} switches it off."
    if "error" in answer:
        return f"mergekit could not be imported ({answer['error']})."
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return (
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from starting it: "
            "`import mergekit_nuslerp` first, or use `mergekit-nuslerp run`."
        )
    if "mergekit_nuslerp:_autoload" not in answer.get("entry", []):
        return "The package is not installed in this environment: pip install it."
    major, minor = (int(part) for part in answer["torch"].split(".")[:2])
    if (major, minor) < (2, 5):
        return f"torch {answer['torch']} starts no plugins: install 2.5 or newer."
    return (
        f"It does not know mergekit {answer['mergekit']} (it knows 0.1.4 and 0.1.5), "
        "or its installation is damaged."
    )


@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="Run mergekit-yaml where PyTorch's autoloading is switched off.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with the plugin, passing on all arguments.

    For where PyTorch's autoloading is switched off. Elsewhere `mergekit-yaml` itself
    does the same.
    """
    if _hook.switched_off():
        raise click.UsageError(
            f"{_hook.SWITCH}={os.environ[_hook.SWITCH]} switches the plugin off; unset "
            "it, or run mergekit-yaml"
        )
    register()
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    mergekit_yaml(args=list(arguments), prog_name="mergekit-nuslerp run")


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def demo(out: Path) -> None:
    """Make three small checkpoints in OUT, merge them, and show the result."""
    from mergekit_nuslerp.demo import run as run_demo

    sys.exit(run_demo(out))


if __name__ == "__main__":
    main()
