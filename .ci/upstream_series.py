# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Apply the proposals to mergekit one by one, and look at mergekit after each.

Exits with 1 if after one of them a test of mergekit fails, or is not run, that passed
before it, if one of its own tests does not pass, if a file is not in mergekit's format,
or if mergekit then merges otherwise than the plugin. `--out FOLDER` keeps the patches.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mergekit_suite import read_report  # noqa: E402

from upstream.build import fetch, git, start  # noqa: E402
from upstream.proposals import PROPOSALS  # noqa: E402

# What mergekit itself is checked by, apart from the plugin's hook.
PLAIN = {"MERGEKIT_NUSLERP": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
HERE = Path(__file__).parent

# mergekit 0.1.5 uses Ruff, and used Black and isort before.
STYLE = (
    "ruff check --quiet",
    "ruff format --quiet --check",
    "black --quiet --check",
    "isort --quiet --check-only --profile=black",
)
# mergekit's own file is in Ruff's format, but not in Black's.
NOT_IN_BLACK_S = "mergekit/evo/genome.py"

# After which proposals the questions in `upstream_checks` are asked.
CHECKS = {"entry_point": (3, 8), "same_bytes": (4, 5, 8), "examples": (8,)}


def python(tree: Path, *words: object, **environment: str) -> int:
    """Run Python with a tree's mergekit in the place of the installed one."""
    path = os.pathsep.join([str(tree), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        cwd=tree,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment},
        check=False,
    ).returncode


def outcomes(tree: Path) -> dict[str, str]:
    """Of every test in the tree."""
    shutil.copy(HERE / "mergekit_common.py", tree / "tests" / "common.py")
    (tree / "tests" / "__init__.py").touch()
    report = tree / ".git" / "report.xml"
    pytest = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    spread = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    python(tree, *pytest, *spread, f"--junit-xml={report}", "tests", **PLAIN)
    return read_report(report)


def check(tree: Path, number: int, before: dict[str, str]) -> tuple[dict, list[str]]:
    """The tests' outcomes after a proposal, and what is wrong with it."""
    after = outcomes(tree)
    wrong = [
        name
        for name, outcome in before.items()
        if outcome == "passed" and after.get(name) != "passed"
    ]
    own = [name for name in after if name not in before]
    wrong += [name for name in own if after[name] != "passed"]
    files = git(tree, "diff", "--name-only", "HEAD~1", "--", "*.py").split()
    for words in STYLE:
        skipped = [NOT_IN_BLACK_S] if words.startswith("black") else []
        given = [file for file in files if file not in skipped]
        if python(tree, "-m", *words.split(), *given):
            wrong.append(words)
    counts = {kind: list(after.values()).count(kind) for kind in after.values()}
    print(f"after proposal {number}: {counts}, {len(own)} tests of its own", flush=True)
    checks = HERE / "upstream_checks.py"
    for name, numbers in CHECKS.items():
        if number in numbers and python(tree, checks, name, **PLAIN):
            wrong.append(f"{checks.name} {name}")
    return after, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to leave the patches")
    parser.add_argument("--last", action="store_true", help="look after all, not each")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        out = (given.out or folder / "patches").resolve()
        subprocess.run(
            [sys.executable, "-m", "upstream", str(out)], cwd=ROOT, check=True
        )
        patches = sorted(out.glob("*.patch"))
        tree = fetch(folder)
        start(tree)
        # Stand-ins for what the sdist leaves out of its tests are in no patch.
        (tree / ".git/info/exclude").write_text("common.py\n__init__.py\n__pycache__\n")
        found = outcomes(tree)
        print(f"before: {list(found.values()).count('passed')} passed", flush=True)
        wrong = []
        for proposal, patch in zip(PROPOSALS, patches, strict=True):
            git(tree, "am", "--quiet", str(patch))
            if given.last and proposal is not PROPOSALS[-1]:
                continue
            found, new = check(tree, proposal.number, found)
            wrong += [f"proposal {proposal.number}: {name}" for name in new]
    print(*wrong, sep="\n")
    return 1 if wrong or "passed" not in found.values() else 0


if __name__ == "__main__":
    sys.exit(main())
