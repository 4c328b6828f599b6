# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from upstream.build import build, fetch, git, start
from upstream.proposals import PROPOSALS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m upstream",
        description="Write the changes proposed to mergekit as patches.",
    )
    parser.add_argument("out", type=Path, help="folder for the patches")
    parser.add_argument(
        "--onto",
        type=Path,
        help="a clean checkout of mergekit to commit them to, on its branch; without "
        "it, they are made for the source distribution, which has no docs folder",
    )
    given = parser.parse_args()
    if given.onto:
        if git(given.onto, "status", "--porcelain"):
            parser.error(f"{given.onto} has changes that are not committed")
        patches = build(given.onto, PROPOSALS, given.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tree = fetch(Path(folder))
            start(tree)
            patches = build(tree, PROPOSALS, given.out)
    print(*patches, sep="\n")


if __name__ == "__main__":
    main()
