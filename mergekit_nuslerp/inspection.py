# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The geometry of a merge, measured before it is carried out.

mergekit plans and loads as it would for the merge; instead of merging a weight, the
Gram matrices of its vectors are taken, on which all else depends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import AliasChoices, BaseModel, Field
from safetensors import safe_open

import mergekit_nuslerp
from mergekit_nuslerp import plugin, register
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.adapters.planning import Planned
from mergekit_nuslerp.geometry import (
    antipodal_bound,
    mean_coefficients,
    normalize_weights,
    sums_to_zero,
)
from mergekit_nuslerp.kernel import NonFiniteError, RangeError, gram_matrices
from mergekit_nuslerp.parameters import (
    ConfigError,
    check_block,
    check_models,
    named,
)
from mergekit_nuslerp.plugin import mergekit_version

# Bins of the angles' histograms.
_BINS = 40

# Vectors at a smaller angle, in radians, are counted as parallel.
_PARALLEL = 1e-6


class Distribution(BaseModel):
    """Angles between the vectors of two models, in radians."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    smallest: float
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
        description="of the vectors that neither model has as zero; null without any"
    )
    parallel: int = Field(description="vectors at less than a millionth of a radian")
    antipodal: int = Field(description="vectors that are opposite, so merged linearly")


class Part(BaseModel):
    """One model's share in a tensor."""

    model: str
    weight: float = Field(description="as resolved, divided by the sum of the weights")
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
    shape: list[int]
    dtype: str
    granularity: str
    magnitude: str
    zero_sum: bool = Field(description="the weights sum to zero, so all are equal")
    lambda_: float = Field(
        validation_alias=AliasChoices("lambda", "lambda_"), serialization_alias="lambda"
    )
    t: float | None = Field(description="of two models: 0 is the first, 1 the second")
    vectors: int
    base: str | None = Field(description="null where no task vectors are merged")
    parts: list[Part]
    absent: list[str] = Field(description="models that do not have the tensor")
    pairs: list[Pair]
    norm_ratio: float | None = Field(
        description="largest over smallest norm of a part; null where that is zero"
    )
    base_norm: float | None
    linear: int = Field(description="vectors without a unique mean, merged linearly")
    departure: float | None = Field(
        description="distance between this merge and the linear one with the same "
        "weights, over the linear one's length (of task vectors where there is a base, "
        "and without lambda); null where that is zero"
    )
    length: float | None = Field(
        description="length of the merged (task) vector, without lambda, over the "
        "weighted mean of the parts' norms; null where that is not above zero"
    )


class Skipped(BaseModel):
    """A tensor that the merge does not interpolate."""

    name: str
    reason: str


class Inspection(BaseModel):
    """The geometry of a merge. Angles are in radians."""

    schema_version: int = 1
    mergekit_nuslerp: str
    mergekit: str
    models: list[str]
    tensors: list[TensorGeometry]
    skipped: list[Skipped]
    left_out: list[str] = Field(
        description="modules of the models that the config does not mention, so that "
        "the merged model will not have them"
    )
    unmatched: list[str] = Field(description="filters that no tensor's name contains")


def inspect(
    config: MergeConfiguration,
    options: MergeOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure the geometry of a merge, as mergekit would run it.

    Tensors are loaded one after the other, and nothing is written.

    Args:
        config: mergekit's configuration of a merge by `nuslerp`.
        options: mergekit's options, as for the merge.
        progress: called with the tensors done and their number, before the first
            tensor and after each.

    Raises:
        ConfigError: a config of another method, or one that cannot be run.
        ValueError: NaN or infinity in a checkpoint, with the tensor's and model's name.
        OverflowError: squared lengths that leave float64, with the tensor's name.
    """
    if config.merge_method != "nuslerp":
        raise ConfigError(
            f"this config merges by `{config.merge_method}`. `inspect` shows merges by "
            "`nuslerp`: write `merge_method: nuslerp` and a `weight` under each model "
            "to see these models' geometry"
        )
    register()
    if mergekit_nuslerp.failure:
        raise ConfigError(mergekit_nuslerp.failure)
    config = config.model_copy(deep=True)  # mergekit rewrites it while it plans
    options = options or MergeOptions()
    models = config.referenced_models()  # in any order
    loaders = LoaderCache()
    loaders.setup(options=options)
    for model in models:
        _check_files(loaders, model)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=_model_out_config(
            config, architecture, trust_remote_code=options.trust_remote_code
        ),
    )
    planner.is_inspection = True
    wanted = planning.filters(planning.parts_of(config))
    adapter = plugin.adapter()
    targets = [
        target
        for target in planner.plan_to_disk(out_path="")  # only plans
        if isinstance(target, SaveTensor)
    ]
    tasks, copied = [], []
    for target in targets:
        asked = adapter.asked(target.tensor_task)
        if asked is None:
            copied.append(
                Skipped(name=target.tensor_name, reason="one model is listed")
            )
        else:
            tasks.append(_Measure(planned=planning.planned(asked)))
    found: dict[str, TensorGeometry | Skipped] = {}
    if progress:
        progress(0, len(tasks))
    executor = Executor(targets=tasks, math_device=options.device, storage_device="cpu")
    for task, measured in executor.run(quiet=True):
        found[task.planned.name] = measured
        if progress:
            progress(len(found), len(tasks))
    names = {name for task in tasks for name in planning.names_of(task.planned)}
    in_order = [found[task.planned.name] for task in tasks]
    tensors = [entry for entry in in_order if isinstance(entry, TensorGeometry)]
    return Inspection(
        mergekit_nuslerp=mergekit_nuslerp.__version__,
        mergekit=mergekit_version(),
        models=list(dict.fromkeys(name for t in tensors for name in _models(t))),
        tensors=tensors,
        skipped=[*copied, *(entry for entry in in_order if isinstance(entry, Skipped))],
        left_out=planning.left_out(planner),
        unmatched=planning.unmatched(wanted, names),
    )


def _models(tensor: TensorGeometry) -> list[str]:
    return [*(part.model for part in tensor.parts), *tensor.absent]


def _check_files(loaders: LoaderCache, model: ModelReference) -> None:
    """Open a model's files, as the merge does one after the other, to see them whole.

    Raises:
        ConfigError: a checkpoint that is missing or damaged.
    """
    path, file = str(model.model.path), ""
    try:
        loaders.get(model)
        for file, keys in planning.shards(model):
            with safe_open(file, framework="pt") as opened:
                missing = set(keys) - set(opened.keys())
            if missing:
                raise ConfigError(f"{min(missing)} is not in it")
    except Exception as error:  # of files, of formats, of networks
        reason = str(error)
        if not os.path.exists(path):
            # Of what looks like a path, a hub only says that it is no name.
            is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)
            file = f"there is no folder {path}"
            if is_name:
                file += ", and the hub has no such model or cannot be asked"
            else:
                reason = ""
        where = " ".join(f"{file}: {reason}".strip(": ").split())
        raise ConfigError(f"model {model} cannot be read: {where}") from error


class _Measure(Task[Any]):
    """Stands in for a merge task, and looks at its tensors instead."""

    planned: Planned

    def arguments(self) -> dict[str, Task]:
        return {"tensors": self.planned.tensors}

    def group_label(self) -> str | None:
        return self.planned.tensors.group_label()

    def uses_accelerator(self) -> bool:
        return True

    def execute(  # type: ignore[override]
        self, tensors: dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> TensorGeometry | Skipped:
        planned = self.planned
        if len(tensors) < 2:
            return Skipped(name=planned.name, reason="only one model has it")
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            if not planning.agree(tensors.values()):
                raise ConfigError(planning.integers_differ(planned.name))
            return Skipped(name=planned.name, reason="its numbers are not fractional")
        check_models(list(tensors), planned.base, tensor=planned.name)
        tensors = plugin.adapter().aligned(planned, tensors)
        planning.check_shapes(planned.name, planned.info, tensors)
        shape = next(iter(tensors.values())).shape
        check_block(planned.granularity, planned.name, shape)
        try:
            return measure(planned, tensors)
        except (OverflowError, ValueError):
            if not planning.agree(tensors.values()):
                raise
            reason = "it is the same in all models, and has no angles"
            return Skipped(name=planned.name, reason=reason)


def measure(
    planned: Planned, tensors: Mapping[ModelReference, torch.Tensor]
) -> TensorGeometry:
    """Measure the geometry of one tensor's merge.

    Args:
        planned: how it is to be merged.
        tensors: of the models and the base, all of one shape.
    """
    models = [model for model in planned.weights if model in tensors]
    base = None if planned.base is None else tensors[planned.base]
    inputs = [tensors[model] for model in models]
    try:
        grams = gram_matrices(inputs, base=base, granularity=planned.granularity)
    except (NonFiniteError, RangeError) as error:
        raise named(error, planned.name, models, planned.base) from None
    return _described(planned, models, inputs, base, grams)


def _described(
    planned: Planned,
    models: Sequence[ModelReference],
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    grams: torch.Tensor,
) -> TensorGeometry:
    """What Gram matrices say about a tensor's merge."""
    given = inputs if base is None else [*inputs, base]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given))
    count = len(models)
    grams = grams.cpu()
    base_norm = None if base is None else float(gram_matrices([base]).sqrt())
    given_weights = [planned.weights[model] for model in models]
    weights = normalize_weights(torch.tensor(given_weights, dtype=grams.dtype))
    coefficients, unique = mean_coefficients(
        grams, weights, magnitude=planned.magnitude
    )
    squares = grams.diagonal(dim1=-2, dim2=-1)
    norms = squares.sum(0).sqrt()
    linear = _length(weights.expand_as(coefficients), grams)
    departure = _length(coefficients - weights, grams)
    mean_norm = float((weights * norms).sum())
    stem = planned.name.removesuffix(".weight")
    layer = re.search(r"\.(\d+)\.", stem)
    return TensorGeometry(
        name=planned.name,
        stack=stem[: layer.start()] if layer else None,
        layer=int(layer[1]) if layer else None,
        projection=stem[layer.end() :] if layer else stem,
        shape=list(inputs[0].shape),
        dtype=str(dtype).removeprefix("torch."),
        granularity=planned.granularity,
        magnitude=planned.magnitude,
        zero_sum=sums_to_zero(given_weights),
        lambda_=planned.lambda_,
        t=float(weights[1]) if count == 2 else None,
        vectors=len(grams),
        base=None if planned.base is None else str(planned.base),
        parts=[
            Part(
                model=str(model),
                weight=float(weights[index]),
                norm=float(norms[index]),
                relative_norm=_ratio(float(norms[index]), base_norm),
                zero=int((squares[:, index] == 0).sum()),
            )
            for index, model in enumerate(models)
        ],
        absent=[str(model) for model in planned.weights if model not in models],
        pairs=[
            _pair(models, grams, first, second, antipodal_bound(grams.dtype))
            for first, second in combinations(range(count), 2)
        ],
        norm_ratio=_ratio(float(norms.max()), float(norms.min())),
        base_norm=base_norm,
        linear=int((~unique).sum()),
        departure=_ratio(departure, linear),
        length=_ratio(_length(coefficients, grams), max(mean_norm, 0)),
    )


def _length(coefficients: torch.Tensor, grams: torch.Tensor) -> float:
    """Length over the whole tensor of sums of its vectors."""
    products = (grams @ coefficients.unsqueeze(-1)).squeeze(-1)
    return float((coefficients * products).sum().clamp(min=0).sqrt())


def _ratio(value: float, unit: float | None) -> float | None:
    return value / unit if unit else None


def _pair(
    models: Sequence[ModelReference],
    grams: torch.Tensor,
    first: int,
    second: int,
    tolerance: float,
) -> Pair:
    lengths = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    present = (lengths[:, first] > 0) & (lengths[:, second] > 0)
    products = lengths[:, first] * lengths[:, second]
    cosines = (grams[:, first, second] / products)[present].clamp(-1, 1)
    angles = cosines.acos().numpy()
    return Pair(
        first=str(models[first]),
        second=str(models[second]),
        angle=_distribution(angles) if len(angles) else None,
        parallel=int((angles < _PARALLEL).sum()),
        antipodal=int((cosines <= tolerance - 1).sum()),
    )


def _distribution(angles: np.ndarray) -> Distribution:
    smallest, largest = float(angles.min()), float(angles.max())
    bins = _BINS if largest > smallest else 1
    p5, p25, p50, p75, p95 = np.quantile(angles, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
    histogram, _ = np.histogram(angles, bins, (smallest, largest))
    return Distribution(
        p5=p5,
        p25=p25,
        p50=p50,
        p75=p75,
        p95=p95,
        smallest=smallest,
        largest=largest,
        histogram=histogram.tolist(),
    )
