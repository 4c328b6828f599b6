# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Names and numbers as people read them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mergekit_nuslerp.inspect.figures import (
    Inspection,
    Part,
    Skipped,
    TensorGeometry,
    part_of,
)

# Of long lists, as many are named.
_NAMED = 3

# A stack of layers, if in one, and a tensor's or several tensors' name there.
Place = tuple[str, str]


# --- Names -------------------------------------------------------------------------


def place_of(tensor: TensorGeometry) -> Place:
    return tensor.stack or "", tensor.projection


def kind_of(tensor: TensorGeometry) -> Place:
    """The part of the model, the same for all layers and experts."""
    stack, projection = place_of(tensor)
    return stack, re.sub(r"\.\d+(?=\.)", ".*", projection)


def grouped(
    tensors: Iterable[TensorGeometry],
) -> dict[Place, list[TensorGeometry]]:
    groups: dict[Place, list[TensorGeometry]] = defaultdict(list)
    for tensor in tensors:
        groups[kind_of(tensor)].append(tensor)
    return groups


def labels_of(places: Iterable[Place]) -> dict[Place, str]:
    """For each the shortest end of its name that it alone has and that says enough.

    Where there are several stacks of layers, it alone in its stack.
    """
    places = list(dict.fromkeys(places))
    several = len(_stacks(places)) > 1
    groups: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        groups[place[0] if several else ""].append(place)
    labels: dict[Place, str] = {}
    for group in groups.values():
        short = shortest({part for _, part in group}, ".", never=r"bias|\*.*")
        labels |= {place: short[place[1]] for place in group}
    return labels


def with_stacks(labels: Mapping[Place, str]) -> dict[Place, str]:
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


def _stacks(places: Iterable[Place]) -> list[str]:
    return list(dict.fromkeys(stack for stack, _ in places if stack))


def short_names(inspection: Inspection) -> dict[str, str]:
    bases = (tensor.base for tensor in inspection.tensors if tensor.base)
    return shortest(dict.fromkeys([*inspection.models, *bases]), "/")


def shortest(names: Iterable[str], separator: str, never: str = "") -> dict[str, str]:
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


def listed(entries: Sequence[TensorGeometry | Skipped]) -> str:
    """How many, and the names of the first."""
    named = ", ".join(map(name_of, entries[:_NAMED]))
    if len(entries) == 1:
        return f"tensor {named}"
    more = "" if len(entries) <= _NAMED else ", ..."
    return f"{len(entries)} tensors ({named}{more})"


def name_of(entry: TensorGeometry | Skipped) -> str:
    return entry.name.removesuffix(".weight")


# --- Tensors -----------------------------------------------------------------------


def weighted_parts(tensor: TensorGeometry) -> list[Part]:
    """The models that have a weight."""
    return [part for part in tensor.parts if part.weight]


def norm_of(tensor: TensorGeometry, model: str) -> float:
    part = part_of(tensor, model)
    return 0.0 if part is None else part.norm


def is_zero(part: Part, tensor: TensorGeometry) -> bool:
    return part.zero == tensor.vectors


def vectors(tensors: Iterable[TensorGeometry], count: int = 2) -> str:
    """What is merged: of task vectors and weights the word for both."""
    with_base = {tensor.base is not None for tensor in tensors}
    what = "vector"
    if len(with_base) == 1:
        what = "task vector" if with_base.pop() else "weight"
    return what if count == 1 else f"{what}s"


# --- Numbers -----------------------------------------------------------------------


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def share_of(count: int, total: int) -> str:
    if count == total:
        return f"all {total}" if total > 1 else "the"
    return f"{count} of {total}"


def format_number(value: float | None) -> str:
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.{int(size < 999.95)}f}"


def percent(share: float) -> str:
    if abs(share) < 1e-6:
        return "0 %"  # rounding
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def span(values: Iterable[float]) -> str:
    texts = [f"{value:.3g}" for value in sorted(values)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"
