# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks`: print all tables, or those named."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import click

from benchmarks import whole
from benchmarks.cases import machine

# Each table, and the module and function that print it.
TABLES = {
    "limit": "limit.table",
    "busy": "busy.table",
    "threads": "limit.threads",
    "embedding": "limit.embedding",
    "shapes": "limit.shapes",
    "many": "many.table",
    "exactness": "exactness.table",
    "exactness-large": "exactness.large",
    "memory": "memory.table",
    "batches": "busy.batches",
    "whole": "whole.table",
    "inspecting": "inspecting.table",
    "planning": "planning.table",
    "accelerator": "limit.accelerator",
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TABLES)))
@click.option(
    "--startup",
    nargs=2,
    metavar="WITH WITHOUT",
    help="Compare the start of two interpreters, with the plugin and without.",
)
@click.option(
    "--largest",
    is_flag=True,
    help="Whole merges of 7 B parameters, too: half an hour and 70 GB of disk more.",
)
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="A folder with another mergekit_nuslerp, for busy, batches and whole.",
)
@click.option("--profile", is_flag=True, help="Profile whole merges, too.")
def main(names: tuple[str, ...], **options: Any) -> None:
    """Print tables of what the plugin does against mergekit's own nuslerp.

    Without names: all of them, in about an hour, with 16 GB of memory, 12 GB of disk
    and a C++ compiler.
    """
    print(f"Measured on {machine()}.")
    if options["startup"]:
        whole.startup(options["startup"])
        if not names:
            return
    for name in names or TABLES:
        module, function = TABLES[name].split(".")
        table = getattr(import_module(f"benchmarks.{module}"), function)
        table(**{n: options[n] for n in signature(table).parameters if n in options})


if __name__ == "__main__":
    main()
