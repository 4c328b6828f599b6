# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The figures of an inspection, each described once.

The records are what JSON holds. The columns of CSV, the headings in a terminal, the
maps of the page and the help take names and descriptions from their fields.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from math import degrees
from typing import Any, NamedTuple

from pydantic import AliasChoices, BaseModel, Field

# Quantiles of the angles, and their shares.
QUANTILES = {
    "smallest": 0,
    **{f"p{share}": share / 100 for share in (5, 25, 50, 75, 95)},
    "largest": 1,
}


class Distribution(BaseModel):
    """Angles between the vectors of two models, in radians."""

    smallest: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    largest: float
    histogram: list[int] = Field(
        description="how many angles fall into each of equal bins from smallest to "
        "largest; a single bin where these are equal"
    )


class Pair(BaseModel):
    """Two models' vectors in one tensor."""

    first: str
    second: str
    angle: Distribution | None = Field(
        title="Angle",
        description="between two models' vectors: the median where a tensor is many "
        "vectors, of the widest pair where there are more than two models",
    )
    parallel: int = Field(description="vectors at less than a millionth of a radian")
    antipodal: int = Field(description="vectors that are opposite, so merged linearly")


class Part(BaseModel):
    """One model's share in a tensor."""

    model: str
    weight: float | None = Field(
        description="as the config's gradients and filters have it for this tensor, "
        "over the sum of the weights"
    )
    effective: float | None = Field(
        title="Effective weight",
        description="the weight that the model really has in the direction of the "
        "merge: `slerp` gives a longer vector more than its weight says; null where "
        "only one model has a vector",
    )
    norm: float = Field(description="length of its (task) vector over the whole tensor")
    relative_norm: float | None = Field(
        description="that length over the base weight's; null without a base"
    )
    zero: int = Field(description="vectors that are zero: unchanged from the base")


class TensorGeometry(BaseModel):
    """What decides the merge of one tensor."""

    name: str
    stack: str | None = Field(description="the name up to the layer's number, or null")
    layer: int | None = Field(description="the layer's number, null outside of layers")
    projection: str = Field(description="the name without layer number and 'weight'")
    shape: list[int] = Field(description="such as 4096x4096")
    dtype: str = Field(description="that the merge reads")
    granularity: str = Field(description="what one vector is")
    magnitude: str | None = Field(description="the rule for the length")
    contrast: float | None = Field(default=None, description="as resolved")
    profile: tuple[float, float] | None = Field(
        default=None,
        description="the smallest and largest of what coefficients are over the whole "
        "matrix's, to the power of the contrast; null where nothing is compared",
    )
    zero_sum: bool = Field(description="the weights sum to zero, so all are equal")
    lambda_: float | None = Field(
        validation_alias=AliasChoices("lambda", "lambda_"),
        serialization_alias="lambda",
        description="as resolved",
    )
    t: float | None = Field(description="of two models: 0 is the first, 1 the second")
    vectors: int = Field(description="how many the tensor consists of")
    base: str | None = Field(description="null where no task vectors are merged")
    parts: list[Part]
    absent: list[str] = Field(description="models that do not have the tensor")
    pairs: list[Pair]
    norm_ratio: float | None = Field(
        title="Norm ratio",
        description="the longest model's (task) vector over the shortest's, over the "
        "whole tensor; null where that is zero",
    )
    base_norm: float | None = Field(description="length of the base's weight")
    linear: int = Field(description="vectors without a unique mean, merged linearly")
    departure: float | None = Field(
        title="Departure from linear",
        description="distance between this merge and the linear one with the same "
        "weights, over the linear one's length (of task vectors where there is a base, "
        "and without lambda); null where that is zero",
    )
    length: float | None = Field(
        title="Length",
        description="of the merged (task) vector, without lambda, over the weighted "
        "mean of the models' lengths; null where that is not above zero",
    )


class Skipped(BaseModel):
    """A tensor that the merge does not interpolate."""

    name: str
    reason: str


class Finding(BaseModel):
    """A sentence of the verdict, and what to do about it."""

    kind: str = Field(
        description="identical, nearly_linear, related, unrelated or opposed of "
        "directions; as_weighted, dominates or unchanged of models; nothing"
    )
    models: list[str] = Field(description="that it is about")
    text: str
    consider: str = ""
    lines: str = Field(default="", description="YAML for the config")


class Inspection(BaseModel):
    """The geometry of a merge. Angles are in radians."""

    schema_version: int = 2
    mergekit_nuslerp: str
    mergekit: str
    config: str = Field(
        default="", description="the file, or how the models were given"
    )
    method: str = Field(default="nuslerp", description="the config's merge_method")
    verdict: list[Finding] = Field(
        default=[], description="what matters, in few sentences"
    )
    warnings: list[str] = Field(default=[], description="what to know before the merge")
    models: list[str]
    tensors: list[TensorGeometry]
    skipped: list[Skipped]
    left_out: list[str] = Field(
        description="modules of the models that the config does not mention, so that "
        "the merged model will not have them"
    )
    unmatched: list[str] = Field(description="filters that no tensor's name contains")


class Figure(NamedTuple):
    """How a figure is shown, wherever it is."""

    name: str
    heading: str  # of a column in a terminal
    title: str
    meaning: str
    unit: str
    low: float | None  # colours begin here, or at the least value
    span: float  # and stretch over this at least, so that noise looks like noise


def _figure(
    record: type[BaseModel],
    name: str,
    heading: str,
    unit: str,
    low: float | None,
    span: float,
) -> Figure:
    field = record.model_fields[name]
    meaning = field.description or ""
    return Figure(name, heading, field.title or name, meaning, unit, low, span)


# Of a tensor. Those after the first two are fields of its record.
FIGURES = (
    _figure(Pair, "angle", "angle", "°", None, 10),
    _figure(Part, "effective", "gets", "", None, 0.2),
    _figure(TensorGeometry, "norm_ratio", "ratio", "times", 1, 0.5),
    _figure(TensorGeometry, "departure", "departs", "%", 0, 0.05),
    _figure(TensorGeometry, "length", "length", "", None, 0.2),
)


def widest(tensor: TensorGeometry) -> float | None:
    """The largest of the pairs' median angles, in degrees."""
    angles = [pair.angle.p50 for pair in tensor.pairs if pair.angle]
    return degrees(max(angles)) if angles else None


def part_of(tensor: TensorGeometry, model: str) -> Part | None:
    return next((part for part in tensor.parts if part.model == model), None)


def value(tensor: TensorGeometry, figure: str, model: str = "") -> float | None:
    """A figure of a tensor, the angle in degrees, the effective weight of a model."""
    if figure == "angle":
        return widest(tensor)
    part = part_of(tensor, model) if figure == "effective" else None
    result: float | None = getattr(part or tensor, figure, None)
    return result


# --- CSV ---------------------------------------------------------------------------

_OF_PARTS = ("weight", "effective", "norm", "relative_norm", "zero")
_NESTED = ("parts", "absent", "pairs")


def _columns() -> Iterator[tuple[str, str]]:
    yield "config", "the file"
    for name, field in TensorGeometry.model_fields.items():
        if name not in _NESTED:
            yield name.rstrip("_"), field.description or "its name"
    for place in ("first", "second"):
        yield place, "a model"
        for name in _OF_PARTS:
            yield f"{name}_{place}", f"its {Part.model_fields[name].description}"
    for name in QUANTILES:
        meaning = f"{name[1:]} % of the angles between the two are smaller"
        yield f"angle_{name}_degrees", meaning if name[0] == "p" else f"{name} angle"
    for name in ("parallel", "antipodal"):
        yield name, Pair.model_fields[name].description or ""


# Of the CSV, in order, and what they mean.
COLUMNS = dict(_columns())


def table(inspections: Sequence[Inspection]) -> str:
    """CSV: a heading, and a row for each tensor and pair of models.

    Angles are in degrees. What there is none of is empty.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    for inspection in inspections:
        for tensor in inspection.tensors:
            for row in _rows(tensor):
                row["config"] = inspection.config
                writer.writerow({name: _cell(cell) for name, cell in row.items()})
    return out.getvalue()


def _rows(tensor: TensorGeometry) -> Iterable[dict[str, Any]]:
    shared = tensor.model_dump(by_alias=True, exclude=set(_NESTED))
    shared["shape"] = "x".join(map(str, tensor.shape))
    for pair in tensor.pairs:
        row = shared | pair.model_dump(exclude={"angle"})
        for place in ("first", "second"):
            part = part_of(tensor, row[place])
            row |= {f"{name}_{place}": getattr(part, name) for name in _OF_PARTS}
        for name in QUANTILES if pair.angle else ():
            row[f"angle_{name}_degrees"] = degrees(getattr(pair.angle, name))
        yield row


def _cell(cell: Any) -> Any:
    """A value that a spreadsheet does not take for a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t"))
    return f"'{cell}" if is_formula else cell
