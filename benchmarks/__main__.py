# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks`: print all tables, or those named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click

from benchmarks import (
    accelerator,
    batches,
    exactness,
    inspecting,
    limit,
    many,
    memory,
    speed,
    startup,
    whole,
)
from benchmarks.cases import machine

TABLES: dict[str, Callable[[], None]] = {
    "speed": speed.table,
    "limit": limit.table,
    "exactness": exactness.table,
    "exactness-large": exactness.large,
    "memory": memory.table,
    "many": many.table,
    "batches": batches.table,
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
@click.option(
    "--largest",
    is_flag=True,
    help="Whole merges of 7 B parameters, too: half an hour and 70 GB of disk more.",
)
def main(
    names: tuple[str, ...], interpreters: tuple[str, str] | None, largest: bool
) -> None:
    """Print tables of what the plugin does against mergekit's own nuslerp.

    Without names: all of them, in about three quarters of an hour, with 16 GB of
    memory, 12 GB of disk and a C++ compiler.
    """
    print(f"Measured on {machine()}.")
    if interpreters:
        startup.table(*interpreters)
        if not names:
            return
    tables = TABLES | {"whole": partial(whole.table, largest=largest)}
    for name in names or tables:
        tables[name]()


if __name__ == "__main__":
    main()
