# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Run mergekit's own tests with and without the plugin, and compare.

The tests come from mergekit's source distribution. Exits with 1 if any test fails
with the plugin that does not fail without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from upstream.build import VERSION, fetch


def fetch_tests(folder: Path) -> Path:
    """mergekit's tests, from its source distribution, with `tests.common` added."""
    tree = fetch(folder)
    # Apart from mergekit's sources, so that the installed mergekit is what is tested.
    tests = shutil.move(tree / "tests", folder / "tests")
    shutil.copy(Path(__file__).with_name("mergekit_common.py"), tests / "common.py")
    (tests / "__init__.py").touch()
    return folder


def run(folder: Path, *, plugin: bool) -> dict[str, str]:
    """The outcome of every test."""
    report = folder / f"report-{plugin}.xml"
    environment = {**os.environ, "MERGEKIT_NUSLERP": "1" if plugin else "0"}
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(
        [*pytest, "-W", "ignore", f"--junit-xml={report}", "tests"],
        cwd=folder,
        env=environment,
        check=False,
    )
    return read_report(report)


def read_report(report: Path) -> dict[str, str]:
    """The outcome of every test, from pytest's XML."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = "failed" if bad else "skipped" if skipped else "passed"
    return outcomes


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        folder = fetch_tests(Path(directory))
        without, with_plugin = run(folder, plugin=False), run(folder, plugin=True)
    for label, outcomes in (("without", without), ("with", with_plugin)):
        counts = {
            kind: list(outcomes.values()).count(kind) for kind in outcomes.values()
        }
        print(f"mergekit {VERSION}'s tests {label} the plugin: {counts}")
    new = [
        name
        for name, outcome in with_plugin.items()
        if outcome == "failed" and without.get(name) != "failed"
    ]
    lost = sorted(set(without) - set(with_plugin))
    for name in [*new, *lost]:
        print(f"only with the plugin, failed or not run: {name}")
    if not any(
        outcome == "passed" and "nuslerp" in n for n, outcome in with_plugin.items()
    ):
        print("no test of nuslerp passed: something is wrong with this run")
        return 1
    return 1 if new or lost else 0


if __name__ == "__main__":
    sys.exit(main())
