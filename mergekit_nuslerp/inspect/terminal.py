# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""An inspection in a terminal: the verdict, tables, what is unchanged, warnings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import degrees
from statistics import median
from textwrap import TextWrapper, indent
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergekit_nuslerp.granularity import FIRST_DIMENSION
from mergekit_nuslerp.inspect.figures import (
    FIGURES,
    Inspection,
    TensorGeometry,
    part_of,
    value,
)
from mergekit_nuslerp.inspect.words import (
    Place,
    count_of,
    format_number,
    grouped,
    is_zero,
    kind_of,
    labels_of,
    percent,
    place_of,
    share_of,
    short_names,
    span,
    vectors,
    with_stacks,
)
from mergekit_nuslerp.messages import printable

# Longer headings of columns are cut.
_LABEL = 26

# Of each tensor, beside its angle.
_RATIOS = ("norm_ratio", "departure", "length")
_HEADINGS = {each.name: each.heading for each in FIGURES}

_NONE = "(-: a model's vector, or the result, is zero)"


def show(
    inspections: Sequence[Inspection], console: Console, *, full: bool = False
) -> None:
    """Print what one or more inspections found.

    Args:
        full: one row for each tensor and pair of models, instead of tables by layer
            and by part.
    """
    inspections = [
        Inspection.model_validate(_clean(each.model_dump())) for each in inspections
    ]
    for inspection in inspections:
        if len(inspections) > 1:
            console.print(Text(inspection.config, "bold underline"))
        for block in _blocks(inspection, console.width, full):
            console.print(block, "", sep="\n")
    if len(inspections) > 1:
        console.print(_compared(inspections))


def _clean(record: Any) -> Any:
    """A record without what a terminal would take for a command."""
    if isinstance(record, dict):
        return {name: _clean(entry) for name, entry in record.items()}
    if isinstance(record, list) and record and not isinstance(record[0], int):
        return [_clean(entry) for entry in record]
    return printable(record) if isinstance(record, str) else record


def _blocks(inspection: Inspection, width: int, full: bool) -> Iterator[RenderableType]:
    def paragraphs(lines: Iterable[str], mark: str = "", style: str = "") -> Text:
        """Texts as wide as the terminal, indented after their first line."""
        wrap = TextWrapper(
            width, initial_indent=mark, subsequent_indent="  ", break_on_hyphens=False
        )
        return Text("\n".join(map(wrap.fill, lines)), style)

    names = short_names(inspection)
    for finding in inspection.verdict:
        yield paragraphs([f"{finding.text} {finding.consider}".strip()], style="bold")
        if finding.lines:
            yield Text(indent(finding.lines, "    "), "cyan")
    yield paragraphs(_heading(inspection, names))
    if inspection.tensors:
        yield from _every_tensor(inspection) if full else _overview(inspection, width)
        unchanged = list(_on_zero(inspection, names))
        if unchanged:
            yield paragraphs(unchanged, "- ")
    if inspection.warnings:
        yield paragraphs(inspection.warnings, "warning: ", "yellow")


def _heading(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    tensors = inspection.tensors
    aim = f"merge by {inspection.method}" if inspection.method else "compare"
    yield (
        f"mergekit-nuslerp {inspection.mergekit_nuslerp}, mergekit "
        f"{inspection.mergekit}: {count_of(len(tensors), 'tensor')} to {aim}"
    )
    for number, model in enumerate(inspection.models, 1):
        parts = [part for tensor in tensors if (part := part_of(tensor, model))]
        line = f"{number}  {names[model]}"
        weights = [part.weight for part in parts if part.weight is not None]
        if weights:
            line += f"  weight {span(weights)}"
        changes = [p.relative_norm for p in parts if p.relative_norm is not None]
        if any(changes):
            among = "median" if all(changes) else "median where not zero"
            changes = list(filter(None, changes))
            line += f", task vectors {percent(median(changes))} of the base ({among})"
        yield line
    for base, count in Counter(tensor.base for tensor in tensors).items():
        if base is not None:
            where = "" if count == len(tensors) else f" of {count_of(count, 'tensor')}"
            yield f"   {names[base]}  base{where}"
    if tensors:
        yield "; ".join(
            f"{name} {text}" for name, text in _settings(inspection).items()
        )


def _settings(inspection: Inspection) -> dict[str, str]:
    """What a config chooses: granularity, magnitude; contrast and lambda unless 1."""
    settings = {}
    for field in ("granularity", "magnitude"):
        values = Counter(getattr(tensor, field) for tensor in inspection.tensors)
        if None not in values:
            settings[field] = ", ".join(
                f"{value} ({count})" if len(values) > 1 else value
                for value, count in values.most_common()
            ).replace(FIRST_DIMENSION, "nuslerp_row_wise")
    for name, field in (("contrast", "contrast"), ("lambda", "lambda_")):
        distinct = {getattr(tensor, field) for tensor in inspection.tensors} - {None}
        settings |= {name: span(distinct)} if distinct - {1} else {}
    return settings


# --- Tables ------------------------------------------------------------------------


def _table(title: str, headings: Iterable[str], rows: Iterable[list[str]]) -> Group:
    """Columns aligned right, but for the names of parts."""
    rows = list(rows)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    for heading, *cells in zip(headings, *rows):
        if heading in ("part", ""):
            table.add_column(heading, no_wrap=True, overflow="ellipsis")
        else:
            width = max(map(len, [heading, *cells]))
            table.add_column(heading, no_wrap=True, justify="right", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    lines: list[RenderableType] = [Text(title), ""] if title else []
    zero = [Text(_NONE)] if any("-" in row for row in rows) else []
    return Group(*lines, table, *zero)


def _overview(inspection: Inspection, width: int) -> Iterator[Group]:
    labels = labels_of(map(kind_of, inspection.tensors))
    yield from _by_layer(inspection, labels, width)
    yield _by_part(inspection, with_stacks(labels))


def _by_layer(
    inspection: Inspection, labels: Mapping[Place, str], width: int
) -> Iterator[Group]:
    """The layers' matrices: a row a layer, a column a projection.

    Angles, or what each model gets where the weights differ from tensor to tensor.
    """
    stacks: dict[str, list[TensorGeometry]] = defaultdict(list)
    for tensor in inspection.tensors:
        if tensor.stack is not None and len(tensor.shape) > 1:
            stacks[tensor.stack].append(tensor)
    matrices = [tensor for tensors in stacks.values() for tensor in tensors]
    weights = {tuple(part.weight for part in tensor.parts) for tensor in matrices}
    name, title = "angle", f"{_angle_title(inspection)}, degrees"
    if len(weights) > 1:
        name = "effective"
        title = "What each model really gets (effective weight), in percent"
    for stack, tensors in stacks.items():
        within = f", in {stack}" if len(stacks) > 1 else ""
        cells: dict[Place, dict[int | None, list[TensorGeometry]]] = {}
        for tensor in tensors:
            column = cells.setdefault(kind_of(tensor), defaultdict(list))
            column[tensor.layer].append(tensor)
        layers = sorted({tensor.layer or 0 for tensor in tensors})
        rows = {
            kind: [
                "" if n not in column else _median_of(column[n], name) for n in layers
            ]
            for kind, column in cells.items()
        }
        heads = {kind: _cut(labels[kind]) for kind in rows}
        widths = {k: max(map(len, [heads[k], "00.0", *rows[k]])) + 2 for k in rows}
        for place, kinds in enumerate(_fitting(widths, width - len("layer  "))):
            yield _table(
                "" if place else title + within,
                ["layer", *(heads[kind] for kind in kinds)],
                ([str(n), *c] for n, *c in zip(layers, *(rows[k] for k in kinds))),
            )


def _fitting(widths: Mapping[Place, int], width: int) -> list[list[Place]]:
    """Share columns out to as many tables as it takes."""
    groups: list[list[Place]] = []
    left = 0
    for column, needed in widths.items():
        if needed > left:
            groups.append([])
            left = width
        groups[-1].append(column)
        left -= needed
    return groups


def _by_part(inspection: Inspection, labels: Mapping[Place, str]) -> Group:
    gets = ["gets"] if _has_weights(inspection) else []
    ratios = _ratios(inspection)
    rows = []
    for kind, tensors in grouped(inspection.tensors).items():
        angles = [pair.angle for t in tensors for pair in t.pairs if pair.angle]
        least = min((degrees(angle.smallest) for angle in angles), default=None)
        most = max((degrees(angle.largest) for angle in angles), default=None)
        row = [labels[kind], str(len(tensors)), format_number(least)]
        row += [_median_of(tensors, "angle"), format_number(most)]
        row += [_median_of(tensors, "effective") for _ in gets]
        rows.append(row + [_median_of(tensors, name) for name in ratios])
    title = "By part of the model: least, median and most angle; medians of the rest"
    heads = ["part", "n", "least", "angle", "most", *gets]
    return _table(title, [*heads, *(_HEADINGS[name] for name in ratios)], rows)


def _every_tensor(inspection: Inspection) -> Iterator[Group]:
    tensors = inspection.tensors
    labels = with_stacks(labels_of(map(place_of, tensors)))
    many = len(inspection.models) > 2
    varies = len({tensor.t for tensor in tensors}) > 1
    ratios = _ratios(inspection)
    numbers = {model: str(n) for n, model in enumerate(inspection.models, 1)}
    rows = []
    for tensor in tensors:
        for pair in tensor.pairs:
            row = ["" if tensor.layer is None else str(tensor.layer)]
            row.append(labels[place_of(tensor)])
            row += [f"{numbers[pair.first]}-{numbers[pair.second]}"] * many
            row += [format_number(tensor.t)] * varies
            for name in ("p5", "p50", "p95"):
                angle = getattr(pair.angle, name, None)
                row.append(format_number(None if angle is None else degrees(angle)))
            rows.append(row + [_median_of([tensor], name) for name in ratios])
    heads = ["layer", "part", *["pair"] * many, *["t"] * varies, "5%", "angle", "95%"]
    title = f"{_angle_title(inspection, all_pairs=True)}, degrees"
    yield _table(title, [*heads, *(_HEADINGS[name] for name in ratios)], rows)


def _compared(inspections: Sequence[Inspection]) -> Group:
    rows = differences(inspections)
    title = "What differs (medians by part)" if rows else "Nothing differs."
    return _table(title, ["part", "", *(each.config for each in inspections)], rows)


def differences(inspections: Sequence[Inspection]) -> list[list[str]]:
    """Where configs differ: a part, a figure or choice, and its value in each."""
    columns: list[dict[tuple[str, str], str]] = []
    for inspection in inspections:
        names = short_names(inspection)
        column = {("", name): text for name, text in _settings(inspection).items()}
        for model in inspection.models:
            parts = [p for t in inspection.tensors if (p := part_of(t, model))]
            weights = [part.weight for part in parts if part.weight is not None]
            column["", f"weight of {names[model]}"] = span(weights) if weights else "-"
        labels = with_stacks(labels_of(map(kind_of, inspection.tensors)))
        for kind, tensors in grouped(inspection.tensors).items():
            for name in _HEADINGS:
                column[labels[kind], _HEADINGS[name]] = _median_of(tensors, name)
        columns.append(column)
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[*key, *(column.get(key, "") for column in columns)] for key in keys]
    return [row for row in rows if len(set(row[2:])) > 1]


def _has_weights(inspection: Inspection) -> bool:
    return any(part.weight is not None for t in inspection.tensors for part in t.parts)


def _ratios(inspection: Inspection) -> Sequence[str]:
    return _RATIOS if _has_weights(inspection) else _RATIOS[:1]


def _median_of(tensors: Sequence[TensorGeometry], name: str) -> str:
    """A figure's median over tensors; of what models get, percent such as 30:70."""
    if name == "effective":
        models = dict.fromkeys(part.model for t in tensors for part in t.parts)
        each = [_medians(tensors, name, model) for model in models]
        return ":".join("-" if got is None else f"{100 * got:.0f}" for got in each)
    middle = _medians(tensors, name)
    if name == "departure" and middle is not None:
        return f"{format_number(100 * middle)}%"
    return format_number(middle)


def _medians(
    tensors: Sequence[TensorGeometry], name: str, model: str = ""
) -> float | None:
    values = [v for tensor in tensors if (v := value(tensor, name, model)) is not None]
    return median(values) if values else None


def _angle_title(inspection: Inspection, *, all_pairs: bool = False) -> str:
    what = vectors(inspection.tensors)
    title = f"Angle between the {what}"
    if len(inspection.models) > 2 and not all_pairs:
        title = f"Largest angle between two models' {what}"
    if any(tensor.vectors > 1 for tensor in inspection.tensors):
        title += " (median over the vectors of a tensor)"
    return title


def _cut(name: str) -> str:
    return name if len(name) <= _LABEL else f"..{name[2 - _LABEL :]}"


# --- Words -------------------------------------------------------------------------


def _on_zero(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    kinds = grouped(inspection.tensors)
    labels = with_stacks(labels_of(kinds))
    for model, (state, has_base) in product(
        inspection.models, (("unchanged", True), ("zero", False))
    ):
        entries = [
            (part, tensor)
            for tensor in inspection.tensors
            if (part := part_of(tensor, model))
            and (tensor.base is not None) == has_base
        ]
        whole = [tensor for part, tensor in entries if is_zero(part, tensor)]
        some = [(p, t) for p, t in entries if p.zero and not is_zero(p, t)]
        if whole and len(whole) == len(entries):
            yield f"All {count_of(len(whole), 'tensor')} {state} in {names[model]}."
        elif whole:
            parts = ", ".join(
                f"{share_of(len(group), len(kinds[kind]))} {labels[kind]}"
                for kind, group in grouped(whole).items()
            )
            yield (
                f"{count_of(len(whole), 'tensor')} of {len(entries)} {state} in "
                f"{names[model]}: {parts}."
            )
        if some:
            yield (
                f"{sum(part.zero for part, _ in some)} of the "
                f"{sum(tensor.vectors for _, tensor in some)} vectors of "
                f"{count_of(len(some), 'other tensor')} {state} in {names[model]}."
            )
