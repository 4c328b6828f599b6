# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""mergekit's sources, changed proposal by proposal, as commits and patches."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from upstream.sources import filled, function_lines

VERSION = "0.1.5"
HERE = Path(__file__).parent
_OURS = (
    "# Copyright (C) 2026 The mergekit-nuslerp authors\n"
    "# SPDX-License-Identifier: LGPL-3.0-only\n\n"
)
_THEIRS = _OURS.replace("The mergekit-nuslerp authors", "Arcee AI")

# What a change does to mergekit's tree.
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Proposal:
    """One commit. Its text and its new files are found by its number."""

    number: int
    changes: Sequence[Change]

    @property
    def text(self) -> str:
        (path,) = HERE.glob(f"{self.number:02d}-*.md")
        return path.read_text("utf-8")

    @property
    def files(self) -> list[Path]:
        """Its new files, as paths in mergekit's tree."""
        folder = HERE / "files" / f"{self.number:02d}"
        return sorted(p.relative_to(folder) for p in folder.rglob("*.py"))

    def apply(self, tree: Path) -> None:
        for path in self.files:
            text = (HERE / "files" / f"{self.number:02d}" / path).read_text("utf-8")
            # mergekit's tests have no header.
            header = "" if path.parts[0] == "tests" else _THEIRS
            new = tree / path
            if new.exists():
                raise FileExistsError(f"mergekit {VERSION} has a file {path} already")
            new.write_text(filled(text.replace(_OURS, header)), "utf-8")
        for change in self.changes:
            change(tree)


def edit(path: str, old: str, new: str, *, within: str = "") -> Change:
    """Change a line or two of a file, within a function if it is named."""

    def change(tree: Path) -> None:
        source = (tree / path).read_text("utf-8")
        lines = source.splitlines(keepends=True)
        start, end = 0, len(lines)
        if within:
            start, _, end = function_lines(source, within)
        part = "".join(lines[start:end])
        if part.count(old) != 1:
            raise LookupError(f"{path} {within} has {part.count(old)} times {old!r}")
        lines[start:end] = [part.replace(old, filled(new))]
        (tree / path).write_text("".join(lines), "utf-8")

    return change


def cut(path: str, first: str, behind: str, *, within: str) -> Change:
    """Leave out lines of a function: from one text up to another."""

    def change(tree: Path) -> None:
        source = (tree / path).read_text("utf-8")
        start, _, end = function_lines(source, within)
        part = "".join(source.splitlines(keepends=True)[start:end])
        old = part[part.index(first) : part.index(behind)]
        edit(path, old, "", within=within)(tree)

    return change


def edit_docs(path: str, old: str, new: str) -> Change:
    """Change a page that mergekit's repository has and its sdist may leave out."""

    def change(tree: Path) -> None:
        if (tree / path).exists():
            edit(path, old, new)(tree)

    return change


def replace(path: str, function: str, new: str, *, whole: bool = True) -> Change:
    """Put other source in the place of a function, or of its body alone."""

    def change(tree: Path) -> None:
        source = (tree / path).read_text("utf-8")
        lines = source.splitlines(keepends=True)
        start, after_head, end = function_lines(source, function)
        lines[start if whole else after_head : end] = [filled(new)]
        (tree / path).write_text("".join(lines), "utf-8")

    return change


def body(path: str, function: str, new: str) -> Change:
    """Give a function another body."""
    return replace(path, function, new, whole=False)


def append(path: str, new: str) -> Change:
    """Add source at the end of a file."""

    def change(tree: Path) -> None:
        text = (tree / path).read_text("utf-8")
        (tree / path).write_text(f"{text}\n\n{filled(new)}", "utf-8")

    return change


def fetch(folder: Path) -> Path:
    """The tree of mergekit's source distribution."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    source = f"mergekit=={VERSION}"
    subprocess.run(
        [*pip, "--no-binary=mergekit", "--dest", str(folder), source], check=True
    )
    with tarfile.open(folder / f"mergekit-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"mergekit-{VERSION}"


def git(tree: Path, *words: str, given: str | None = None) -> str:
    identity = [
        "-c",
        "user.name=The mergekit-nuslerp authors",
        "-c",
        "user.email=authors@mergekit-nuslerp.invalid",
    ]
    # A checkout may have settings and hooks of its own.
    quiet = ["-c", "commit.gpgsign=false", "-c", "core.autocrlf=false"]
    quiet += ["-c", "core.hooksPath=/dev/null"]
    return subprocess.run(
        ["git", *identity, *quiet, *words],
        cwd=tree,
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def start(tree: Path) -> None:
    """Make a tree without history a repository of one commit."""
    git(tree, "init", "--quiet", "--initial-branch=main")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", f"--message=mergekit {VERSION}")


def build(tree: Path, proposals: Sequence[Proposal], out: Path) -> list[Path]:
    """Commit the proposals onto a clean repository, and write them as patches.

    It is left as it was where one of them does not fit.
    """
    before = git(tree, "rev-parse", "HEAD").strip()
    try:
        for proposal in proposals:
            proposal.apply(tree)
            git(tree, "add", "--all")
            message = ["--cleanup=verbatim", "--file=-"]
            text = proposal.text.removeprefix("# ")
            git(tree, "commit", "--quiet", *message, given=text)
    except Exception:
        git(tree, "add", "--all")
        git(tree, "reset", "--quiet", "--hard", before)
        raise
    out.mkdir(parents=True, exist_ok=True)
    options = ["--no-signature", f"--output-directory={out.resolve()}"]
    written = git(tree, "format-patch", *options, before)
    return [Path(line) for line in written.splitlines()]
