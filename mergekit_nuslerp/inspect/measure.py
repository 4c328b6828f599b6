# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The geometry of a merge, measured before it is carried out.

mergekit plans and loads as it would for the merge; instead of merging a weight, the
Gram matrices of its vectors are taken, on which all else depends.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

import mergekit_nuslerp
from mergekit_nuslerp import METHODS, plugin, register, stored
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.adapters.planning import Planned
from mergekit_nuslerp.geometry import (
    antipodal_bound,
    normalize_weights,
    sums_to_zero,
)
from mergekit_nuslerp.inspect.figures import (
    QUANTILES,
    Distribution,
    Inspection,
    Pair,
    Part,
    Skipped,
    TensorGeometry,
)
from mergekit_nuslerp.inspect.merged import merge
from mergekit_nuslerp.inspect.verdict import verdict, warnings
from mergekit_nuslerp.kernel import NonFiniteError, RangeError, gram_matrices
from mergekit_nuslerp.parameters import (
    ConfigError,
    check_block,
    check_models,
    user_error,
)
from mergekit_nuslerp.plugin import mergekit_version

# Bins of the angles' histograms.
_BINS = 40

# Vectors at a smaller angle, in radians, are counted as parallel.
_PARALLEL = 1e-6

# Methods to which the base is one of the models. To all others it is the origin of
# task vectors.
_WITHOUT_TASKS = ("linear", "slerp", "karcher", "nearswap", "arcee_fusion")

# Of whose errors we can say that the input is to blame.
_FOREIGN = ("mergekit", "transformers", "tokenizers", "safetensors", "huggingface_hub")


def inspect(
    config: MergeConfiguration,
    options: MergeOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure the geometry of a merge, as mergekit would run it.

    Tensors are loaded one after the other, and nothing is written.

    Args:
        config: mergekit's configuration of a merge. Of another method than `nuslerp`
            only the models' geometry is measured.
        options: mergekit's options, as for the merge.
        progress: called with the tensors done and their number, before the first
            tensor and after each.

    Raises:
        ConfigError: a config that cannot be run, a checkpoint that cannot be read.
        ValueError: NaN or infinity in a checkpoint, with the tensor's and model's name.
        OverflowError: squared lengths that leave float64, with the tensor's name.
    """
    register()
    if mergekit_nuslerp.failure:
        raise ConfigError(mergekit_nuslerp.failure)
    method = config.merge_method
    is_ours = method in METHODS
    with blaming_input():
        # A copy, as mergekit rewrites it while it plans.
        own = config.model_copy(update={"merge_method": METHODS[0]}, deep=True)
        config = own if is_ours else _as_ours(config)
        options = options or MergeOptions()
        planner, tasks, copied, unmatched = _plan(config, options)
        if progress:
            progress(0, len(tasks))
        by_name: dict[str, TensorGeometry | Skipped] = {}
        executor = Executor(
            targets=tasks, math_device=options.device, storage_device="cpu"
        )
        for task, measured in executor.run(quiet=True):
            by_name[task.planned.name] = measured
            if progress:
                progress(len(by_name), len(tasks))
    in_order = [by_name[task.planned.name] for task in tasks]
    tensors = [entry for entry in in_order if isinstance(entry, TensorGeometry)]
    if not is_ours:
        tensors = [_without_weights(tensor) for tensor in tensors]
    inspection = Inspection(
        mergekit_nuslerp=mergekit_nuslerp.__version__,
        mergekit=mergekit_version(),
        method=method,
        models=list(dict.fromkeys(name for t in tensors for name in _models(t))),
        tensors=tensors,
        skipped=[*copied, *(entry for entry in in_order if isinstance(entry, Skipped))],
        left_out=planning.left_out(planner),
        unmatched=unmatched,
    )
    inspection.verdict = verdict(inspection)
    inspection.warnings = list(warnings(inspection))
    return inspection


def _plan(
    config: MergeConfiguration, options: MergeOptions
) -> tuple[MergePlanner, list[_Measure], list[Skipped], list[str]]:
    """What mergekit would do: tensors to measure, others, filters without tensors."""
    loaders = LoaderCache()
    loaders.setup(options=options)
    for model in config.referenced_models():
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
    settings = list(planning.settings_of(config))
    tasks, copied = [], []
    for target in planner.plan_to_disk(out_path=""):  # only plans
        if not isinstance(target, SaveTensor):
            continue
        planned = plugin.adapter().planned(target.tensor_task)
        if planned is None:
            copied.append(
                Skipped(name=target.tensor_name, reason="one model is listed")
            )
        else:
            tasks.append(_Measure(planned=planned))
    unmatched = planning.unmatched(settings, [task.planned for task in tasks])
    return planner, tasks, copied, unmatched


@contextmanager
def blaming_input() -> Iterator[None]:
    """Turn errors of mergekit and of what it loads with into errors about the input.

    Ours stay as they are: those of bugs must keep their traceback.
    """
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception as error:
        files = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
        packages = [names.get("__name__", "").partition(".")[0] for names in files]
        known = [name for name in packages if name in (*_FOREIGN, "mergekit_nuslerp")]
        if known and known[-1] in _FOREIGN:
            what = type(error).__name__ if not isinstance(error, RuntimeError) else ""
            reason = f"{what}: {error}".strip(": ")
            raise ConfigError(f"mergekit cannot read this: {reason}") from error
        raise


def _as_ours(config: MergeConfiguration) -> MergeConfiguration:
    """A config of another method as one by which `nuslerp` would merge its models."""
    content = config.model_dump(mode="json", exclude_none=True)
    nodes = list(_nodes(content, None))
    lists = [
        (name, node[name], base)
        for node, base in nodes
        for name in ("models", "sources")
        if node.get(name)
    ]
    has_tasks = config.merge_method not in _WITHOUT_TASKS and all(
        sum(entry["model"] != base for entry in inputs) > 1 for _, inputs, base in lists
    )
    for node, _ in nodes:
        node.pop("parameters", None)
        if not has_tasks:
            node.pop("base_model", None)
    for name, inputs, base in lists:
        listed = [entry["model"] for entry in inputs]
        if not has_tasks and base and base not in listed and name == "models":
            inputs.insert(0, {"model": base})  # which mergekit itself adds there
        for entry in inputs:
            is_origin = has_tasks and entry["model"] == base
            entry["parameters"] = {} if is_origin else {"weight": 1}
    return MergeConfiguration.model_validate({**content, "merge_method": METHODS[0]})


def _nodes(
    node: dict[str, Any], base: str | None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The config, its modules and slices, each with the base that goes with it."""
    base = node.get("base_model", base)
    yield node, base
    for part in (*node.get("slices", ()), *node.get("modules", {}).values()):
        yield from _nodes(part, base)


def _without_weights(tensor: TensorGeometry) -> TensorGeometry:
    """Without what only a merge by `nuslerp` has."""
    none = dict.fromkeys(
        ("magnitude", "contrast", "profile", "lambda_", "t", "departure", "length")
    )
    parts = [
        part.model_copy(update={"weight": None, "effective": None})
        for part in tensor.parts
    ]
    more = {"parts": parts, "zero_sum": False, "linear": 0}
    return tensor.model_copy(update={**none, **more})


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
        for file, keys in stored.shards(model):
            missing = set(keys) - stored.header(file).keys()
            if missing:
                raise ConfigError(f"{min(missing)} is not in it")
    except Exception as error:  # of files, of formats, of networks
        reason = str(error) or "a file is empty or cut short"
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
        tensors = plugin.adapter().aligned(planned.info, tensors)
        planning.check_shapes(planned.name, tensors)
        shape = next(iter(tensors.values())).shape
        check_block(planned.values.granularity, planned.name, shape)
        try:
            return measure(planned, tensors)
        except (OverflowError, ValueError):
            if not planning.agree(tensors.values()):
                raise
            reason = "it is the same in all models, and has no angles"
            return Skipped(name=planned.name, reason=reason)


def _weights(planned: Planned) -> dict[ModelReference, float]:
    """Of each model but the base, in the config's order."""
    # mergekit's mappings of parameters do not keep it.
    models = [model for model, _ in planned.weights]
    weights = dict(zip(models, planned.values.weights))
    return {m: weights[m] for m in planning.sources(planned.tensors) if m in weights}


def measure(
    planned: Planned, tensors: Mapping[ModelReference, torch.Tensor]
) -> TensorGeometry:
    """Measure the geometry of one tensor's merge.

    Args:
        planned: how it is to be merged.
        tensors: of the models and the base, all of one shape.
    """
    models = [model for model in _weights(planned) if model in tensors]
    base = None if planned.base is None else tensors[planned.base]
    inputs = [tensors[model] for model in models]
    try:
        grams = gram_matrices(inputs, base=base, granularity=planned.values.granularity)
    except (NonFiniteError, RangeError) as error:
        raise user_error(error, planned.name, models, planned.base) from None
    operands = inputs if base is None else [*inputs, base]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in operands))
    count, values = len(models), planned.values
    grams = grams.cpu()
    base_norm = None if base is None else float(gram_matrices([base]).sqrt())
    config_weights = [_weights(planned)[model] for model in models]
    weights = normalize_weights(torch.tensor(config_weights, dtype=grams.dtype))
    merged = merge(inputs, base, grams, weights, values)
    squares = grams.diagonal(dim1=-2, dim2=-1)
    norms = merged.models.sum(0).diagonal().sqrt()
    others = merged.coefficients.shape[-1] - count
    straight = torch.cat([weights.new_zeros(others), weights])
    linear = _length(straight.expand_as(merged.coefficients), merged.grams)
    departure = _length(merged.coefficients - straight, merged.grams)
    effective = _effective(merged.projection, merged.models)
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
        granularity=values.granularity,
        magnitude=values.magnitude,
        contrast=values.contrast,
        profile=merged.profile,
        zero_sum=sums_to_zero(config_weights),
        lambda_=values.lambda_,
        t=float(weights[1]) if count == 2 else None,
        vectors=merged.vectors,
        base=None if planned.base is None else str(planned.base),
        parts=[
            Part(
                model=str(model),
                weight=float(weights[index]),
                effective=effective[index],
                norm=float(norms[index]),
                relative_norm=_ratio(float(norms[index]), base_norm),
                zero=int((squares[:, index] == 0).sum()),
            )
            for index, model in enumerate(models)
        ],
        absent=[str(model) for model in _weights(planned) if model not in models],
        pairs=[
            _pair(models, grams, first, second, antipodal_bound(grams.dtype))
            for first, second in combinations(range(count), 2)
        ],
        norm_ratio=_ratio(float(norms.max()), float(norms.min())),
        base_norm=base_norm,
        linear=merged.linear,
        departure=_ratio(departure, linear),
        length=_ratio(_length(merged.coefficients, merged.grams), max(mean_norm, 0)),
    )


def _length(coefficients: torch.Tensor, grams: torch.Tensor) -> float:
    """Length over the whole tensor of sums of its vectors."""
    products = (grams @ coefficients.unsqueeze(-1)).squeeze(-1)
    return float((coefficients * products).sum().clamp(min=0).sqrt())


def _effective(
    coefficients: torch.Tensor, grams: torch.Tensor
) -> list[float] | list[None]:
    """The weights with which the merged directions are means on the sphere.

    A mean u of unit vectors u_i with weights w_i is the sum of w_i u_i a_i / sin a_i,
    up to its length, where a_i is the angle between u and u_i. Here u is known, and so
    the weights are. Of many vectors, their mean; None where only one model has any.
    """
    lengths = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    products = (grams @ coefficients.unsqueeze(-1)).squeeze(-1)
    merged = (coefficients * products).sum(-1, keepdim=True).clamp(min=0).sqrt()
    cosines = (products / (lengths * merged)).nan_to_num().clamp(-1, 1)
    terms = coefficients * lengths * torch.sinc(cosines.acos() / torch.pi)
    total = terms.sum(-1)
    is_mean = (total > 1e-9 * terms.abs().sum(-1)) & ((lengths > 0).sum(-1) > 1)
    is_mean &= merged.squeeze(-1) > 1e-9 * lengths.sum(-1)  # else they cancel
    if not is_mean.any():
        return [None] * len(terms[0])
    return (terms / total.unsqueeze(-1))[is_mean].mean(0).tolist()


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
    values = np.quantile(angles, [*QUANTILES.values()]).tolist()
    bins = _BINS if values[-1] > values[0] else 1
    histogram, _ = np.histogram(angles, bins, (values[0], values[-1]))
    return Distribution(**dict(zip(QUANTILES, values)), histogram=histogram.tolist())
