# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""An inspection as text: tables and sentences for a terminal, and CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import atan2, ceil, cos, degrees, floor, log10, sin
from statistics import median
from typing import Any

from mergekit_nuslerp.granularity import FIRST_DIMENSION
from mergekit_nuslerp.inspection import (
    Distribution,
    Inspection,
    Pair,
    Part,
    Skipped,
    TensorGeometry,
)

_WIDTH = 80

# A merge that departs less from the linear one, relative to its length, is as good as
# linear: bfloat16 weights round by more.
_LINEAR = 1e-3

# Above this ratio of lengths, `slerp` turns much further than the weights say.
_RATIO = 2

# Longer headings of columns are cut.
_LABEL = 26

# Of long lists, as many are named.
_NAMED = 3

# A stack of layers, if in one, and a tensor's or several tensors' name there.
_Place = tuple[str, str]


def text(inspection: Inspection, *, full: bool = False) -> str:
    """What a terminal shows: tables, then what they say in words, then warnings.

    No line of a table is wider than 80 characters.

    Args:
        inspection: what to show.
        full: one row for each tensor and pair of models, instead of tables by layer
            and by part.
    """
    names = _short_names(inspection)
    blocks = [_heading(inspection, names)]
    if inspection.tensors:
        tables = _every_tensor if full else _overview
        blocks += tables(inspection)
        blocks.append(_paragraphs("- ", _sentences(inspection, names)))
    blocks.append(_paragraphs("warning: ", warnings(inspection)))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _heading(inspection: Inspection, names: Mapping[str, str]) -> str:
    tensors = inspection.tensors
    lines = [
        f"mergekit-nuslerp {inspection.mergekit_nuslerp}, mergekit "
        f"{inspection.mergekit}: {_count(len(tensors), 'tensor')} to merge"
    ]
    for number, model in enumerate(inspection.models, 1):
        parts = [part for tensor in tensors if (part := _part(tensor, model))]
        line = f"{number}  {names[model]}"
        if parts:
            line += f"  weight {_range(part.weight for part in parts)}"
        changes = [p.relative_norm for p in parts if p.relative_norm is not None]
        if any(changes):
            among = "median" if all(changes) else "median where not zero"
            changes = list(filter(None, changes))
            line += f", task vectors {_percent(median(changes))} of the base ({among})"
        lines.append(line)
    for base, count in Counter(tensor.base for tensor in tensors).items():
        if base is not None:
            where = "" if count == len(tensors) else f" of {_count(count, 'tensor')}"
            lines.append(f"   {names[base]}  base{where}")
    if tensors:
        scales = [tensor.lambda_ for tensor in tensors]
        chosen = [] if set(scales) == {1} else [f"lambda {_range(scales)}"]
        for field in ("magnitude", "granularity"):
            values = Counter(_written(getattr(tensor, field)) for tensor in tensors)
            listed = ", ".join(
                value if len(values) == 1 else f"{value} ({count})"
                for value, count in values.most_common()
            )
            chosen.insert(0, f"{field} {listed}")
        lines.append("; ".join(chosen))
    return "\n".join(_wrapped(line) for line in lines)


# --- Tables ------------------------------------------------------------------------


def _overview(inspection: Inspection) -> list[str]:
    tensors = inspection.tensors
    labels = _labels(map(_kind, tensors))
    return [*_by_layer(inspection, labels), _by_part(inspection, labels)]


def _by_layer(inspection: Inspection, labels: Mapping[_Place, str]) -> Iterator[str]:
    """The angles of the layers' matrices: a row a layer, a column a projection."""
    stacks: dict[str, list[TensorGeometry]] = defaultdict(list)
    for tensor in inspection.tensors:
        if tensor.stack is not None and len(tensor.shape) > 1:
            stacks[tensor.stack].append(tensor)
    for stack, tensors in stacks.items():
        title = f"{_angle_title(inspection)}, degrees"
        if len(stacks) > 1:
            title += f", in {stack}"
        yield from _layers(title, tensors, labels)


def _layers(
    title: str, tensors: Sequence[TensorGeometry], labels: Mapping[_Place, str]
) -> Iterator[str]:
    angles: dict[_Place, dict[int, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for tensor in tensors:
        assert tensor.layer is not None
        angle = _widest(tensor)
        angles[_kind(tensor)][tensor.layer] += [] if angle is None else [angle]
    labels = {kind: _cut(labels[kind], _LABEL) for kind in angles}
    layers = sorted({layer for column in angles.values() for layer in column})

    def cell(kind: _Place, layer: int) -> str:
        """Empty where the layer has no such weight."""
        found = angles[kind].get(layer)
        return "" if found is None else _figure(_median(found))

    for kinds in _fitting({kind: max(len(labels[kind]), 5) for kind in angles}):
        heading = ["layer", *(labels[kind] for kind in kinds)]
        rows = [
            [str(layer), *(cell(kind, layer) for kind in kinds)] for layer in layers
        ]
        yield _table(title, heading, rows)
        title = ""  # is above the first


def _fitting(widths: Mapping[_Place, int]) -> list[list[_Place]]:
    """Share columns out to as many tables as it takes."""
    groups: list[list[_Place]] = []
    left = 0
    for column, width in widths.items():
        if width + 2 > left:
            groups.append([])
            left = _WIDTH - len("layer")
        groups[-1].append(column)
        left -= width + 2
    return groups


def _by_part(inspection: Inspection, labels: Mapping[_Place, str]) -> str:
    labels = _with_stacks(labels)
    rows = []
    for kind, tensors in _grouped(inspection.tensors).items():
        angles = [pair.angle for t in tensors for pair in t.pairs if pair.angle]
        least, most = (
            [degrees(getattr(angle, end)) for angle in angles]
            for end in ("smallest", "largest")
        )
        widest = [angle for t in tensors if (angle := _widest(t)) is not None]
        row = [
            labels[kind],
            str(len(tensors)),
            _figure(min(least, default=None)),
            _figure(_median(widest)),
            _figure(max(most, default=None)),
        ]
        for field in ("norm_ratio", "departure", "length"):
            values = [getattr(tensor, field) for tensor in tensors]
            row.append(_field(field, _median([v for v in values if v is not None])))
        rows.append(row)
    heading = ["part", "n", "least", "angle", "most", "ratio", "departs", "length"]
    title = (
        "By part of the model: least, median and most angle; medians of the ratio of "
        "longest to shortest vector, of the departure from a linear merge, and of the "
        "length against the inputs'"
    )
    return _table(title, heading, rows)


def _every_tensor(inspection: Inspection) -> list[str]:
    tensors = inspection.tensors
    labels = _with_stacks(_labels(map(_place, tensors)))
    many = len(inspection.models) > 2
    varies = len({tensor.t for tensor in tensors}) > 1
    heading = ["layer", "part", *["pair"] * many, *["t"] * varies]
    heading += ["5%", "angle", "95%", "ratio", "departs", "length"]
    numbers = {model: str(n) for n, model in enumerate(inspection.models, 1)}
    rows = []
    for tensor in tensors:
        for pair in tensor.pairs:
            angle = pair.angle
            row = ["" if tensor.layer is None else str(tensor.layer)]
            row.append(labels[_place(tensor)])
            row += [f"{numbers[pair.first]}-{numbers[pair.second]}"] * many
            row += [_figure(tensor.t)] * varies
            for quantile in ("p5", "p50", "p95"):
                row.append(_figure(_degrees(angle, quantile)))
            for field in ("norm_ratio", "departure", "length"):
                row.append(_field(field, getattr(tensor, field)))
            rows.append(row)
    title = (
        f"{_angle_title(inspection, all_pairs=True)}, degrees; ratio of longest to "
        "shortest vector, departure from a linear merge, length against the inputs'"
    )
    return [_table(title, heading, rows)]


def _angle_title(inspection: Inspection, *, all_pairs: bool = False) -> str:
    what = _vectors(inspection.tensors)
    title = f"Angle between the {what}"
    if len(inspection.models) > 2 and not all_pairs:
        title = f"Largest angle between two models' {what}"
    if any(tensor.vectors > 1 for tensor in inspection.tensors):
        title += " (median over the vectors of a tensor)"
    return title


def _table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned right, but for names, which are cut where the table is too wide.

    Args:
        title: a line or more above it.
        heading: of the columns.
        rows: cells.
    """
    table = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    if "part" in heading:
        place = heading.index("part")
        widths[place] -= max(0, sum(widths) + 2 * (len(widths) - 1) - _WIDTH)
    lines = [textwrap.fill(title, _WIDTH), ""] if title else []
    for row in table:
        cells = [
            _cut(cell, width).ljust(width) if name == "part" else cell.rjust(width)
            for cell, width, name in zip(row, widths, heading)
        ]
        lines.append("  ".join(cells).rstrip())
    if any(cell == "-" for row in rows for cell in row):
        lines.append("(-: a model's vector, or the result, is zero)")
    return "\n".join(lines)


# --- Words -------------------------------------------------------------------------


def _sentences(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    yield from _on_angles(inspection, names)
    yield from _on_zero(inspection, names)
    yield from _on_departure(inspection)


def _on_angles(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    found: dict[tuple[str, str, str], list[tuple[float, TensorGeometry, float]]]
    found = defaultdict(list)
    for tensor in inspection.tensors:
        for pair in tensor.pairs:
            if pair.angle is not None:
                ends = (pair.first, pair.second)
                first, second = (_norm(tensor, model) for model in ends)
                entry = (degrees(pair.angle.p50), tensor, second / first)
                found[pair.first, pair.second, _vectors([tensor])].append(entry)
    for (one, other, what), entries in found.items():
        smallest, largest = (
            pick(entries, key=lambda entry: entry[0]) for pick in (min, max)
        )
        middle = _figure(median(angle for angle, _, _ in entries))
        line = f"{names[one]} and {names[other]}: "
        if len(entries) == 1:
            line += f"at {middle} degrees in {_name(smallest[1])}"
        else:
            line += (
                f"{middle} degrees apart (median of {len(entries)} tensors), from "
                f"{_figure(smallest[0])} in {_name(smallest[1])} to "
                f"{_figure(largest[0])} in {_name(largest[1])}"
            )
        ratio = median(ratio for _, _, ratio in entries)
        yield (
            f"{line}; the latter's {what} are {_figure(ratio)} times as long (median)."
        )


def _on_zero(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    kinds = _grouped(inspection.tensors)
    labels = _with_stacks(_labels(kinds))
    for model, (state, has_base) in product(
        inspection.models, (("unchanged", True), ("zero", False))
    ):
        whole: list[TensorGeometry] = []
        some: list[TensorGeometry] = []
        held = 0
        for tensor in inspection.tensors:
            part = _part(tensor, model)
            if part is None or (tensor.base is not None) != has_base:
                continue
            held += 1
            if part.zero:
                (whole if _is_zero(part, tensor) else some).append(tensor)
        if whole and len(whole) == held:
            yield f"All {_count(held, 'tensor')} {state} in {names[model]}."
        elif whole:
            listed = [
                f"{_of(len(group), len(kinds[kind]))} {labels[kind]}"
                for kind, group in _grouped(whole).items()
            ]
            yield (
                f"{_count(len(whole), 'tensor')} of {held} {state} in {names[model]}: "
                f"{', '.join(listed)}."
            )
        if some:
            zero = sum(part.zero for t in some if (part := _part(t, model)))
            yield (
                f"{zero} of the {sum(tensor.vectors for tensor in some)} vectors of "
                f"{_count(len(some), 'other tensor')} {state} in {names[model]}."
            )


def _on_departure(inspection: Inspection) -> Iterator[str]:
    apart = [
        (tensor.departure, tensor)
        for tensor in inspection.tensors
        if tensor.departure is not None and len(_blended(tensor)) > 1
    ]
    if not apart:
        return
    least, most = (pick(apart, key=lambda entry: entry[0]) for pick in (min, max))
    close = [
        (departure, tensor)
        for departure, tensor in apart
        # Opposite vectors are merged linearly, whatever their angle.
        if departure <= _LINEAR and _widest(tensor) is not None and not tensor.linear
    ]
    if close:
        widest = max(_largest(tensor) for _, tensor in close)
        everywhere = len(close) == len(apart)
        where = "everywhere" if everywhere else f"in {_of(len(close), len(apart))}"
        yield (
            f"Angles up to {_rounded_up(widest)} degrees: spherical and linear agree "
            f"to {_power_of_ten(max(d for d, _ in close))} {where}"
            f"{'' if everywhere else ' tensors'}."
        )
        if everywhere:
            return
    middle = median(departure for departure, _ in apart)
    yield (
        f"Departure from the linear merge with the same weights: {_percent(middle)} of "
        f"its length (median), from {_percent(least[0])} in {_name(least[1])} to "
        f"{_percent(most[0])} in {_name(most[1])}."
    )


def warnings(inspection: Inspection) -> Iterator[str]:
    """Sentences about what one should know before the merge is run."""
    names = _short_names(inspection)
    yield from _warn_of_same(inspection, names)
    yield from _warn_of_absent(inspection, names)
    yield from _warn_of_linear(inspection)
    yield from _warn_of_zero(inspection, names)
    yield from _warn_of_ratio(inspection, names)
    yield from _warn_of_outside(inspection, names)
    yield from _warn_of_skipped(inspection)
    yield from _warn_of_config(inspection)
    if not inspection.tensors:
        yield "there is nothing to interpolate."


def _warn_of_config(inspection: Inspection) -> Iterator[str]:
    zero_sum = [tensor for tensor in inspection.tensors if tensor.zero_sum]
    if zero_sum:
        yield f"the weights of {_listed(zero_sum)} sum to zero. All count the same."
    unscaled = [tensor for tensor in inspection.tensors if tensor.lambda_ == 0]
    if unscaled:
        yield f"lambda is 0 for {_listed(unscaled)}. The base stays as it is there."
    for wanted in inspection.unmatched:
        yield f"no tensor's name contains the filter {wanted!r}."
    for module in inspection.left_out:
        yield (
            f"the config has no module {module!r}. The merged model will lack its "
            "tensors."
        )


def _warn_of_same(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    differs: Counter[tuple[str, str]] = Counter()
    for tensor in inspection.tensors:
        for pair in tensor.pairs:
            differs[pair.first, pair.second] += int(not _same(tensor, pair))
    for (first, second), count in differs.items():
        if not count:
            yield (
                f"{names[first]} and {names[second]} do not differ in any tensor. Are "
                "they the checkpoints that you mean?"
            )


def _same(tensor: TensorGeometry, pair: Pair) -> bool:
    first, second = (_norm(tensor, model) for model in (pair.first, pair.second))
    angle = 0.0 if pair.angle is None else pair.angle.largest
    return abs(first - second) <= 1e-9 * first and angle < 1e-6


def _warn_of_absent(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    without: dict[str, list[TensorGeometry]] = defaultdict(list)
    for tensor in inspection.tensors:
        for model in tensor.absent:
            without[model].append(tensor)
    for model, tensors in without.items():
        yield (
            f"{names[model]} does not have {_listed(tensors)}. The others' weights "
            "decide alone there."
        )


def _warn_of_linear(inspection: Inspection) -> Iterator[str]:
    affected = [tensor for tensor in inspection.tensors if tensor.linear]
    if affected:
        yield (
            f"{sum(tensor.linear for tensor in affected)} of the "
            f"{sum(tensor.vectors for tensor in affected)} vectors of "
            f"{_listed(affected)} have no unique mean, as they are opposite or cancel. "
            "They are merged linearly."
        )


def _warn_of_zero(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    """Where only one model has a vector, the length that the others leave it."""
    alone: dict[tuple[str, str, str], list[tuple[Part, TensorGeometry]]]
    alone = defaultdict(list)
    for tensor in inspection.tensors:
        present = [part for part in tensor.parts if not _is_zero(part, tensor)]
        if len(present) == 1 and tensor.length is not None and present[0].weight:
            what = _vectors([tensor], 1)
            key = (present[0].model, tensor.magnitude, what)
            alone[key].append((present[0], tensor))
    for (model, magnitude, what), entries in alone.items():
        shares = [part.weight * (tensor.length or 0) for part, tensor in entries]
        weights = [part.weight for part, _ in entries]
        if all(abs(s - w) <= _LINEAR * abs(w) for s, w in zip(shares, weights)):
            continue
        where = _listed([tensor for _, tensor in entries])
        yield (
            f"in {where} only {names[model]} has a "
            f"{what} that is not zero. Magnitude {magnitude} takes {_range(shares)} of "
            f"it, where its weight is {_range(weights)}."
            + _remedy(inspection, "takes as much as the weight says")
        )


def _warn_of_ratio(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    affected = [
        tensor
        for tensor in inspection.tensors
        if tensor.magnitude == "slerp" and _uneven(tensor) > _RATIO
    ]
    if not affected:
        return
    worst = max(affected, key=_uneven)
    # Beyond the models the mean of the lengths may be next to nothing.
    outside = any(map(_is_outside, affected))
    short, *_, long = sorted(_blended(worst), key=lambda part: part.norm)
    turned = _turned(worst)
    example = ""
    if turned is not None and worst.t is not None:
        example = (
            f" There it turns {_percent(turned)} of the angle, where the weights say "
            f"{_percent(worst.t)}."
        )
    yield (
        f"in {_count(len(affected), 'tensor')} of {len(inspection.tensors)} one "
        f"model's {_vectors(affected, 1)} is more than twice as long as another's: "
        f"most in {_name(worst)}, {names[long.model]}'s {_figure(_uneven(worst))} "
        f"times as long as {names[short.model]}'s. Magnitude slerp turns further "
        f"towards the longer one than the weights say.{example}"
        + ("" if outside else _remedy(inspection, "turns as far as they say"))
    )


def _uneven(tensor: TensorGeometry) -> float:
    """Largest over smallest norm of the models that have a weight; 0 without two."""
    norms = [part.norm for part in _blended(tensor)]
    return max(norms) / min(norms) if len(norms) > 1 and min(norms) else 0.0


def _turned(tensor: TensorGeometry) -> float | None:
    """How far magnitude slerp turns from the first of two, as a share of the angle."""
    (pair, *others), t = tensor.pairs, tensor.t
    if others or tensor.vectors > 1 or pair.angle is None or tensor.linear:
        return None
    angle = pair.angle.p50
    if t is None or not 0 <= t <= 1 or sin(angle) < 1e-6:
        return None
    first, second = (part.norm for part in tensor.parts)
    first, second = first * sin((1 - t) * angle), second * sin(t * angle)
    return atan2(second * sin(angle), first + second * cos(angle)) / angle


def _is_outside(tensor: TensorGeometry) -> bool:
    """Whether two models are merged into one beyond them."""
    return tensor.t is not None and not 0 <= tensor.t <= 1


def _warn_of_outside(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    outside = list(filter(_is_outside, inspection.tensors))
    by_pair: dict[tuple[str, ...], list[TensorGeometry]] = defaultdict(list)
    for tensor in outside:  # each slice may have models of its own
        by_pair[tuple(names[part.model] for part in tensor.parts)].append(tensor)
    for (first, second), tensors in by_pair.items():
        yield (
            f"in {_listed(tensors)} the weights put the merge beyond the models, at "
            f"t = {_range(t.t for t in tensors if t.t is not None)} (0 is {first}, 1 "
            f"is {second}). It extrapolates."
        )
    short = [t for t in outside if t.magnitude == "linear" and t.length is None]
    if short:
        left = "zeros" if any(t.base is None for t in short) else "the base"
        yield (
            f"in {_listed(short)} the weighted mean of the lengths is not above zero. "
            f"Magnitude linear leaves {left} there."
        )


def _warn_of_skipped(inspection: Inspection) -> Iterator[str]:
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for entry in inspection.skipped:
        reasons[entry.reason].append(entry)
    for reason, entries in reasons.items():
        yield f"not interpolated, as {reason}: {_listed(entries)}."


def _remedy(inspection: Inspection, effect: str) -> str:
    needs = "" if not inspection.mergekit.startswith("0.1.4") else " (mergekit 0.1.5)"
    return f" `nuslerp_magnitude: linear`{needs} {effect}."


# --- CSV ---------------------------------------------------------------------------


def table(inspection: Inspection) -> str:
    """An inspection as CSV: a heading, and a row for each tensor and pair of models.

    Angles are in degrees. What there is none of is empty.
    """
    out = io.StringIO()
    rows = [
        _csv_row(tensor, pair) for tensor in inspection.tensors for pair in tensor.pairs
    ]
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(
        {name: _cell(value) for name, value in row.items()} for row in rows
    )
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A value that a spreadsheet does not take for a formula."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t"))
    return f"'{value}" if is_formula else value


# Of the CSV, in order, and what they mean.
COLUMNS = {
    "tensor": "its name",
    "layer": "its number; empty outside of layers",
    "projection": "the name without layer number and 'weight'",
    "shape": "such as 4096x4096",
    "dtype": "that the merge reads",
    "granularity": "what one vector is",
    "magnitude": "the rule for the length",
    "lambda": "as resolved",
    "vectors": "how many the tensor consists of",
    "first": "a model",
    "second": "another model",
    "weight_first": "divided by the sum of all models' weights",
    "weight_second": "the same",
    "norm_first": "length over the whole tensor, of the task vector if there is a base",
    "norm_second": "the same",
    "relative_norm_first": "that length over the base weight's",
    "relative_norm_second": "the same",
    "zero_first": "vectors that are zero",
    "zero_second": "the same",
    "angle_smallest_degrees": "least of the angles between the two models' vectors",
    "angle_p5_degrees": "5 % of the angles are smaller",
    "angle_p25_degrees": "25 % of the angles are smaller",
    "angle_p50_degrees": "their median",
    "angle_p75_degrees": "75 % of the angles are smaller",
    "angle_p95_degrees": "95 % of the angles are smaller",
    "angle_largest_degrees": "most of the angles",
    "parallel": "vectors at less than a millionth of a radian",
    "antipodal": "vectors that are opposite",
    "no_unique_mean": "vectors of all models together that are merged linearly",
    "departure_from_linear": "distance from the linear merge over its length",
    "length": "of the merged vector over the weighted mean of all models'",
}


def _csv_row(tensor: TensorGeometry, pair: Pair) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": tensor.name,
        "shape": "x".join(map(str, tensor.shape)),
        "lambda": tensor.lambda_,
        "no_unique_mean": tensor.linear,
        "departure_from_linear": tensor.departure,
    }
    for field in (
        *("layer", "projection", "dtype", "granularity", "magnitude", "vectors"),
        "length",
    ):
        row[field] = getattr(tensor, field)
    for place in ("first", "second"):
        row[place] = getattr(pair, place)
        part = _part(tensor, row[place])
        for field in ("weight", "norm", "relative_norm", "zero"):
            row[f"{field}_{place}"] = getattr(part, field)
    for field in ("smallest", "p5", "p25", "p50", "p75", "p95", "largest"):
        row[f"angle_{field}_degrees"] = _degrees(pair.angle, field)
    row["parallel"], row["antipodal"] = pair.parallel, pair.antipodal
    return row


# --- Records -----------------------------------------------------------------------


def _part(tensor: TensorGeometry, model: str) -> Part | None:
    return next((part for part in tensor.parts if part.model == model), None)


def _blended(tensor: TensorGeometry) -> list[Part]:
    """The models that have a weight."""
    return [part for part in tensor.parts if part.weight]


def _norm(tensor: TensorGeometry, model: str) -> float:
    part = _part(tensor, model)
    return 0.0 if part is None else part.norm


def _is_zero(part: Part, tensor: TensorGeometry) -> bool:
    return part.zero == tensor.vectors


def _place(tensor: TensorGeometry) -> _Place:
    return tensor.stack or "", tensor.projection


def _kind(tensor: TensorGeometry) -> _Place:
    """The part of the model, the same for all layers and experts."""
    stack, projection = _place(tensor)
    return stack, re.sub(r"\.\d+(?=\.)", ".*", projection)


def _grouped(
    tensors: Iterable[TensorGeometry],
) -> dict[_Place, list[TensorGeometry]]:
    groups: dict[_Place, list[TensorGeometry]] = defaultdict(list)
    for tensor in tensors:
        groups[_kind(tensor)].append(tensor)
    return groups


def _widest(tensor: TensorGeometry) -> float | None:
    """The largest of the pairs' median angles, in degrees."""
    angles = [pair.angle.p50 for pair in tensor.pairs if pair.angle]
    return degrees(max(angles)) if angles else None


def _largest(tensor: TensorGeometry) -> float:
    return degrees(max(pair.angle.largest for pair in tensor.pairs if pair.angle))


# --- Wording -----------------------------------------------------------------------


def _labels(places: Iterable[_Place]) -> dict[_Place, str]:
    """For each the shortest end of its name that it alone has and that says enough.

    Where there are several stacks of layers, it alone in its stack.
    """
    places = list(dict.fromkeys(places))
    several = len(_stacks(places)) > 1
    groups: dict[str, list[_Place]] = defaultdict(list)
    for place in places:
        groups[place[0] if several else ""].append(place)
    labels: dict[_Place, str] = {}
    for group in groups.values():
        short = _shortest({part for _, part in group}, ".", never=r"bias|\*.*")
        labels |= {place: short[place[1]] for place in group}
    return labels


def _with_stacks(labels: Mapping[_Place, str]) -> dict[_Place, str]:
    """Labels that also name the stack of layers, where there are several."""
    stacks = _stacks(labels)
    if len(stacks) < 2:
        return dict(labels)
    # Such as encoder of model.encoder.layers, by the first word that differs.
    words = [stack.split(".") for stack in stacks]
    differs = (n for n, same in enumerate(zip(*words)) if len(set(same)) > 1)
    first = next(differs, 0)
    named = {".".join(parts): parts[first] for parts in words}
    if len(set(named.values())) < len(named):
        named = {stack: stack for stack in stacks}
    return {
        place: f"{named[place[0]]}: {label}" if place[0] else label
        for place, label in labels.items()
    }


def _stacks(places: Iterable[_Place]) -> list[str]:
    return list(dict.fromkeys(stack for stack, _ in places if stack))


def _short_names(inspection: Inspection) -> dict[str, str]:
    bases = (tensor.base for tensor in inspection.tensors if tensor.base)
    return _shortest(dict.fromkeys([*inspection.models, *bases]), "/")


def _shortest(names: Iterable[str], separator: str, never: str = "") -> dict[str, str]:
    names = list(names)
    ends = {
        name: [separator.join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        for name in names
        for parts in [name.rstrip(separator).split(separator)]
    }
    having = Counter(end for name in names for end in ends[name])
    return {
        name: next(
            (
                end
                for end in ends[name]
                if having[end] == 1 and not re.fullmatch(never, end)
            ),
            name,
        )
        for name in names
    }


def _vectors(tensors: Iterable[TensorGeometry], count: int = 2) -> str:
    """What is merged: of task vectors and weights the word for both."""
    with_base = {tensor.base is not None for tensor in tensors}
    what = "vector"
    if len(with_base) == 1:
        what = "task vector" if with_base.pop() else "weight"
    return what if count == 1 else f"{what}s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _of(count: int, total: int) -> str:
    if count == total:
        return f"all {total}" if total > 1 else "the"
    return f"{count} of {total}"


def _listed(entries: Sequence[TensorGeometry | Skipped]) -> str:
    """How many, and the names of the first."""
    named = ", ".join(map(_name, entries[:_NAMED]))
    if len(entries) == 1:
        return f"tensor {named}"
    more = "" if len(entries) <= _NAMED else ", ..."
    return f"{len(entries)} tensors ({named}{more})"


def _written(choice: str) -> str:
    """A granularity or magnitude as users write it."""
    return "nuslerp_row_wise" if choice == FIRST_DIMENSION else choice


def _name(entry: TensorGeometry | Skipped) -> str:
    return entry.name.removesuffix(".weight")


def _degrees(angles: Distribution | None, field: str) -> float | None:
    return None if angles is None else degrees(getattr(angles, field))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.{int(size < 999.95)}f}"


def _field(field: str, value: float | None) -> str:
    if field == "departure" and value is not None:
        return f"{_figure(100 * value)}%"
    return _figure(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _range(values: Iterable[float]) -> str:
    texts = [f"{value:.3g}" for value in sorted(values)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _rounded_up(value: float) -> str:
    """To two digits, so that it is still a bound."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (floor(log10(value)) - 1)
    bound = ceil(value / unit) * unit
    return f"{bound:.0f}" if bound >= 100 else f"{bound:.2g}"


def _power_of_ten(value: float) -> str:
    return f"1e{ceil(log10(value))}" if value > 0 else "the last digit"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"..{name[len(name) - width + 2 :]}"


def _wrapped(line: str, first: str = "", rest: str = "   ") -> str:
    return textwrap.fill(
        line,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _paragraphs(mark: str, lines: Iterable[str]) -> str:
    return "\n".join(_wrapped(line, mark, "  ") for line in lines)
