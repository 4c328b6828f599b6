# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What the figures of an inspection mean: the verdict, and warnings.

The thresholds below are those that docs/inspect.md states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from mergekit_nuslerp.inspect.figures import (
    Finding,
    Inspection,
    Pair,
    Skipped,
    TensorGeometry,
    part_of,
    widest,
)
from mergekit_nuslerp.inspect.words import (
    count_of,
    format_number,
    is_zero,
    listed,
    name_of,
    norm_of,
    percent,
    short_names,
    span,
    vectors,
    weighted_parts,
)

# A departure from the linear merge that no evaluation is likely to show.
NEARLY_LINEAR = 0.01

# Degrees: below the first vectors are nearly parallel; between the others they have
# next to nothing to do with each other; above the last they work against each other.
PARALLEL, UNRELATED, OPPOSED = 10, 75, 105

# A model dominates if it gets so much more than its weight says.
DOMINATES = 0.1

# A model that left this share of its tensors unchanged is told of.
UNCHANGED = 0.1

# Above this ratio of lengths, `slerp` turns much further than the weights say.
RATIO = 2

# Of shares: less is rounding.
_ROUNDING = 1e-3

_LINEAR_MAGNITUDE = "parameters:\n  nuslerp_magnitude: linear"


# --- Verdict -----------------------------------------------------------------------


def verdict(inspection: Inspection) -> list[Finding]:
    """What matters about a merge, and what to consider, in two or three sentences.

    Matrices decide, as they hold nearly all parameters.
    """
    tensors = [tensor for tensor in inspection.tensors if tensor.pairs]
    tensors = [tensor for tensor in tensors if len(tensor.shape) > 1] or tensors
    if not tensors:
        text = "There is nothing to interpolate."
        return [Finding(kind="nothing", models=[], text=text)]
    names = short_names(inspection)
    unchanged = list(_unchanged(inspection, names))
    directions = _directions(inspection, tensors, names)
    findings = [*directions, *unchanged, *_weights(inspection, tensors, names)]
    for place, finding in enumerate(findings):
        # The same advice once, where it is said last.
        if finding.lines and finding.lines in (
            each.lines for each in findings[place + 1 :]
        ):
            finding.consider = finding.lines = ""
    return findings


def _directions(
    inspection: Inspection, tensors: Sequence[TensorGeometry], names: Mapping[str, str]
) -> Iterator[Finding]:
    models = inspection.models
    who = " and ".join(names[model] for model in models)
    if len(models) > 2:
        who = f"the {len(models)} models"
    angles = [angle for tensor in tensors if (angle := widest(tensor)) is not None]
    departures = [
        tensor.departure
        for tensor in tensors
        if tensor.departure is not None and len(weighted_parts(tensor)) > 1
    ]
    if not angles or 1 in {len(weighted_parts(tensor)) for tensor in tensors}:
        return  # one model is taken as it is
    angle, what = median(angles), vectors(tensors)
    largest = format_number(max(angles))
    apart = f"{format_number(angle)} degrees apart (median; {largest} at most)"
    departure = median(departures) if departures else None
    linear = angle < PARALLEL if departure is None else departure <= NEARLY_LINEAR
    consider = lines = ""
    if len(models) == 2 and all(_same(t, pair) for t in tensors for pair in t.pairs):
        kind, text = "identical", f"{who} are the same: any merge of them is either."
        consider = "Check their paths."
    elif angle > OPPOSED:
        kind, text = "opposed", f"{who} work against each other: the {what} are {apart}"
        text += ", and cancel for a good part."
        consider = (
            "Give one a small weight, or let each have parts of the model of its own."
        )
    elif linear:
        kind, text = "nearly_linear", f"the {what} of {who} are only {apart}"
        text += ": a linear merge is nearly the same"
        text += "." if departure is None else f" ({percent(departure)} off)."
        if not any(tensor.base for tensor in tensors):
            consider = "Of fine-tunes, merge the task vectors: name their base."
            lines = "merge_method: nuslerp\nbase_model: ./base"
    elif angle >= UNRELATED:
        kind, text = (
            "unrelated",
            f"{who} have little in common: the {what} are {apart}.",
        )
    else:
        kind, text = "related", f"{who} agree in part: the {what} are {apart}."
    if departure is not None and kind in ("unrelated", "related"):
        text += f" A linear merge would be {percent(departure)} off."
    text = text[0].upper() + text[1:] if len(models) > 2 or linear else text
    yield Finding(kind=kind, models=models, text=text, consider=consider, lines=lines)


def _unchanged(inspection: Inspection, names: Mapping[str, str]) -> Iterator[Finding]:
    """Models that are the base in many tensors."""
    for model in inspection.models:
        entries = [
            (part, tensor)
            for tensor in inspection.tensors
            if tensor.base is not None and (part := part_of(tensor, model))
        ]
        zero = [is_zero(part, tensor) for part, tensor in entries]
        if sum(zero) < max(1, UNCHANGED * len(zero)):
            continue
        slerp = any(part.weight and t.magnitude == "slerp" for part, t in entries)
        text = f"{names[model]} left {sum(zero)} of {len(zero)} tensors unchanged"
        text += "; slerp takes more of the others there." if slerp else "."
        consider = f"To take what the weights say{_needs(inspection)}:" if slerp else ""
        if all(zero):
            text = f"{names[model]} is the base: it changed nothing."
            consider = f"Check its path, or leave {names[model]} out."
        yield Finding(
            kind="unchanged",
            models=[model],
            text=text,
            consider=consider,
            lines=_LINEAR_MAGNITUDE if slerp and not all(zero) else "",
        )


def _weights(
    inspection: Inspection, tensors: Sequence[TensorGeometry], names: Mapping[str, str]
) -> Iterator[Finding]:
    """What each model gets, against what its weight says, where all have a vector."""
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    full = [t for t in tensors if not any(is_zero(part, t) for part in t.parts)]
    for tensor in full:
        for part in tensor.parts:
            if part.effective is not None and part.weight is not None:
                parts[part.model].append((part.weight, part.effective))
    if not parts:
        return
    gains = {
        model: median(got - weight for weight, got in entries)
        for model, entries in parts.items()
    }
    most = max(gains, key=lambda model: gains[model])
    weight, got = (median(column) for column in zip(*parts[most]))
    shares = ", ".join(
        f"{names[model]} {span(weight for weight, _ in entries)}"
        for model, entries in parts.items()
    )
    if gains[most] <= DOMINATES:
        yield Finding(
            kind="as_weighted",
            models=list(parts),
            text="In the median each model counts for about as much as its weight says "
            f"({shares}).",
        )
        return
    ratio = median(tensor.norm_ratio or 1 for tensor in full)
    yield Finding(
        kind="dominates",
        models=[most],
        text=f"{names[most]} dominates: at a weight of {weight:.2g} it gets {got:.2g}, "
        f"since {vectors(full)} differ in length (by a factor of "
        f"{format_number(ratio)}) and slerp gives longer ones more.",
        consider=f"To give each what its weight says{_needs(inspection)}:",
        lines=_LINEAR_MAGNITUDE,
    )


# --- Warnings ----------------------------------------------------------------------


def warnings(inspection: Inspection) -> Iterator[str]:
    """Sentences about what one should know before the merge is run."""
    names = short_names(inspection)
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
        yield f"the weights of {listed(zero_sum)} sum to zero. All count the same."
    unscaled = [tensor for tensor in inspection.tensors if tensor.lambda_ == 0]
    if unscaled:
        yield f"lambda is 0 for {listed(unscaled)}. The base stays as it is there."
    for wanted in inspection.unmatched:
        yield f"no tensor's name contains the filter {wanted!r}."
    for module in inspection.left_out:
        yield (
            f"the config has no module {module!r}. The merged model will lack its "
            "tensors."
        )


def _warn_of_same(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    differs: dict[tuple[str, str], bool] = {}
    for tensor in inspection.tensors:
        for pair in tensor.pairs:
            key = pair.first, pair.second
            differs[key] = differs.get(key, False) or not _same(tensor, pair)
    for (first, second), some in differs.items():
        if not some:
            yield (
                f"{names[first]} and {names[second]} do not differ in any tensor. Are "
                "they the checkpoints that you mean?"
            )


def _same(tensor: TensorGeometry, pair: Pair) -> bool:
    first, second = (norm_of(tensor, model) for model in (pair.first, pair.second))
    angle = 0.0 if pair.angle is None else pair.angle.largest
    return abs(first - second) <= 1e-9 * first and angle < 1e-6


def _warn_of_absent(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    without: dict[str, list[TensorGeometry]] = defaultdict(list)
    for tensor in inspection.tensors:
        for model in tensor.absent:
            without[model].append(tensor)
    for model, tensors in without.items():
        yield (
            f"{names[model]} does not have {listed(tensors)}. The others' weights "
            "decide alone there."
        )


def _warn_of_linear(inspection: Inspection) -> Iterator[str]:
    affected = [tensor for tensor in inspection.tensors if tensor.linear]
    if affected:
        yield (
            f"{sum(tensor.linear for tensor in affected)} of the "
            f"{sum(tensor.vectors for tensor in affected)} vectors of "
            f"{listed(affected)} have no unique mean, as they are opposite or cancel. "
            "They are merged linearly."
        )


def _warn_of_zero(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    """Where only one model has a vector, the length that the others leave it."""
    alone: dict[tuple[str, str, str], list[tuple[float, TensorGeometry]]]
    alone = defaultdict(list)
    for tensor in inspection.tensors:
        present = [part for part in tensor.parts if not is_zero(part, tensor)]
        if len(present) == 1 and tensor.length is not None and present[0].weight:
            key = (present[0].model, tensor.magnitude or "", vectors([tensor], 1))
            alone[key].append((present[0].weight, tensor))
    for (model, magnitude, what), entries in alone.items():
        shares = [weight * (tensor.length or 0) for weight, tensor in entries]
        weights = [weight for weight, _ in entries]
        if all(abs(s - w) <= _ROUNDING * abs(w) for s, w in zip(shares, weights)):
            continue
        where = listed([tensor for _, tensor in entries])
        yield (
            f"in {where} only {names[model]} has a "
            f"{what} that is not zero. Magnitude {magnitude} takes {span(shares)} of "
            f"it, where its weight is {span(weights)}."
            + _remedy(inspection, "takes as much as the weight says")
        )


def _warn_of_ratio(inspection: Inspection, names: Mapping[str, str]) -> Iterator[str]:
    affected = [
        tensor
        for tensor in inspection.tensors
        if tensor.magnitude == "slerp" and _uneven(tensor) > RATIO
    ]
    if not affected:
        return
    worst = max(affected, key=_uneven)
    # Beyond the models the mean of the lengths may be next to nothing.
    outside = any(map(_is_outside, affected))
    short, *_, long = sorted(weighted_parts(worst), key=lambda part: part.norm)
    example = ""
    if long.effective is not None and not outside:
        example = (
            f" There {names[long.model]} gets {long.effective:.2g}, where its weight "
            f"is {long.weight:.2g}."
        )
    yield (
        f"in {count_of(len(affected), 'tensor')} of {len(inspection.tensors)} one "
        f"model's {vectors(affected, 1)} is more than twice as long as another's: "
        f"most in {name_of(worst)}, {names[long.model]}'s "
        f"{format_number(_uneven(worst))} times as long as {names[short.model]}'s. "
        "Magnitude slerp turns further towards the longer one than the weights say."
        f"{example}"
        + ("" if outside else _remedy(inspection, "turns as far as they say"))
    )


def _uneven(tensor: TensorGeometry) -> float:
    """Largest over smallest norm of the models that have a weight; 0 without two."""
    norms = [part.norm for part in weighted_parts(tensor)]
    return max(norms) / min(norms) if len(norms) > 1 and min(norms) else 0.0


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
            f"in {listed(tensors)} the weights put the merge beyond the models, at "
            f"t = {span(t.t for t in tensors if t.t is not None)} (0 is {first}, 1 "
            f"is {second}). It extrapolates."
        )
    short = [t for t in outside if t.magnitude == "linear" and t.length is None]
    if short:
        left = "zeros" if any(t.base is None for t in short) else "the base"
        yield (
            f"in {listed(short)} the weighted mean of the lengths is not above zero. "
            f"Magnitude linear leaves {left} there."
        )


def _warn_of_skipped(inspection: Inspection) -> Iterator[str]:
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for entry in inspection.skipped:
        reasons[entry.reason].append(entry)
    for reason, entries in reasons.items():
        yield f"not interpolated, as {reason}: {listed(entries)}."


def _remedy(inspection: Inspection, effect: str) -> str:
    return f" `nuslerp_magnitude: linear`{_needs(inspection)} {effect}."


def _needs(inspection: Inspection) -> str:
    return " (mergekit 0.1.5)" if inspection.mergekit.startswith("0.1.4") else ""
