# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Python source as text: what is taken from the plugin, and where to change a file.

Nothing that the plugin has stands a second time in this folder. A line `# take MODULE:
NAME, NAME as OTHER` in one of its files stands for these functions, classes or
constants, the second under another name; `# take whole MODULE: NAME` keeps all of the
docstring, of which mergekit's have little more than the first paragraph.
"""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from textwrap import indent

_TAKE = re.compile(r"^# take (whole )?([\w.]+): (.+)\n", re.MULTILINE)


def filled(text: str) -> str:
    """A text with what it takes from the plugin in place."""

    def taken(found: re.Match[str]) -> str:
        taken = []
        for words in found[3].split(","):
            name, _, other = words.strip().partition(" as ")
            text = take(found[2], name, whole=bool(found[1]))
            taken.append(re.sub(rf"\b{name}\b", other, text) if other else text)
        gap = "\n" * (2 if taken[0].startswith(("def ", "class ")) else 0)
        return gap.join(taken)

    return _TAKE.sub(taken, text)


def take(module: str, name: str, *, whole: bool = False) -> str:
    """The source of something at a module's top level.

    Of docstrings the first paragraph is kept, if not the whole.
    """
    source = inspect.getsource(import_module(f"mergekit_nuslerp.{module}"))
    lines = source.splitlines(keepends=True)
    node = _top_level(source, name)
    first = node.lineno
    if isinstance(node, ast.Assign):  # a constant's reason stands above it
        while lines[first - 2].startswith("#"):
            first -= 1
        return "".join(lines[first - 1 : node.end_lineno])
    owners = [
        inner
        for inner in ast.walk(node)
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef))
        and ast.get_docstring(inner)
        and not whole
    ]
    for owner in sorted(owners, key=lambda owner: -owner.lineno):
        docstring = owner.body[0]
        text = (ast.get_docstring(owner) or "").split("\n\n")[0]
        quoted = f'"""{text}"""' if "\n" not in text else f'"""{text}\n"""'
        new = indent(quoted, " " * docstring.col_offset)
        lines[docstring.lineno - 1 : docstring.end_lineno] = [new + "\n"]
        removed = (docstring.end_lineno or 0) - docstring.lineno
        lines[docstring.lineno : docstring.lineno] = [""] * removed
    return "".join(lines[first - 1 : node.end_lineno])


def function_lines(source: str, name: str) -> tuple[int, int, int]:
    """Where a function or `Class.method` begins, its body begins, and it ends.

    Lines are counted from zero, and the end is the line after it.
    """
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        (node,) = [
            inner
            for inner in getattr(node, "body", ())
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and inner.name == part
        ]
    assert isinstance(node, ast.FunctionDef)
    return node.lineno - 1, node.body[0].lineno - 1, node.end_lineno or 0


def _top_level(source: str, name: str) -> ast.stmt:
    for node in ast.parse(source).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            targets = [inner for target in node.targets for inner in ast.walk(target)]
            names = [inner.id for inner in targets if isinstance(inner, ast.Name)]
        if name in names:
            return node
    raise LookupError(f"no {name} at the top level of this source")
