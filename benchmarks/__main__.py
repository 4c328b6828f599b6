# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks`: print all tables, or those named."""

from __future__ import annotations

import click

from benchmarks import (
    accelerator,
    exactness,
    inspecting,
    many,
    memory,
    speed,
    startup,
    whole,
)
from benchmarks.cases import machine

TABLES = {
    "speed": speed.table,
    "exactness": exactness.table,
    "exactness-large": exactness.large,
    "memory": memory.table,
    "many": many.table,
    "whole": whole.table,
    "inspecting": inspecting.table,
    "accelerator": accelerator.table,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TABLES)))
@click.option(
    "--startup",
    "interpreters",
    nargs=2,
    metavar="WITH WITHOUT",
    help="Compare the start of two interpreters, with the plugin and without.",
)
def main(names: tuple[str, ...], interpreters: tuple[str, str] | None) -> None:
    """Print tables of what the plugin does against mergekit's own nuslerp.

    Without names: all of them, in about a quarter of an hour, with 8 GB of memory and
    5 GB of disk.
    """
    print(f"Measured on {machine()}.")
    if interpreters:
        startup.table(*interpreters)
        if not names:
            return
    for name in names or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
