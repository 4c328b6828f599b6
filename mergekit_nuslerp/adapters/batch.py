# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.5: a native batch kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.base import (
    MISSING,
    BasePolicy,
    BatchedMergeMethod,
    BatchOptions,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorBatch,
    TensorGroup,
)
from mergekit.merge_methods.batching import prepare_batches
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from pydantic import ValidationError

from mergekit_nuslerp import __version__, parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.kernel import merge_batch
from mergekit_nuslerp.parameters import DEFAULTS
from mergekit_nuslerp.plugin import announce_merge

# Whether a slice of one model is that model.
PASSES_ON = False

T = TypeVar("T")


class NuslerpParameter(ParameterSpec):
    """A parameter whose unfit values are passed on.

    They are refused where it is known which model and tensor they are for.
    """

    required = False  # a missing value is passed on as well

    def validate(self, value: Any) -> Any:
        if value is self.default:
            return None if value is MISSING else value
        try:
            return super().validate(value)
        except ValidationError:
            return value


def _specs() -> tuple[ParameterSpec, ...]:
    scopes = (
        (parameters.PerModel, ParameterScope.NON_BASE),
        (parameters.Shared, ParameterScope.SHARED),
    )
    return tuple(
        NuslerpParameter(
            name=name,
            value_type=parameters.type_of(name),
            scope=scope,
            default=MISSING if field.is_required() else field.default,
            description=field.description,
            batch_tensor=scope == ParameterScope.NON_BASE,
        )
        for declaration, scope in scopes
        for name, field in declaration.model_fields.items()
    )


def _split(batch: TensorBatch) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The models' tensors, and the base's if there is one."""
    inputs = list(batch.tensors)
    return inputs, None if batch.base_index is None else inputs.pop(batch.base_index)


def _kernel(batch: TensorBatch, *, weight: Any, **shared: Any) -> torch.Tensor:
    """What mergekit asks of a batch kernel: the weights and nothing else."""
    inputs, base = _split(batch)
    return merge_batch(
        inputs,
        weight,
        base=base,
        granularity=parameters.choose_granularity(shared),
        magnitude=shared["nuslerp_magnitude"],
        lambda_=shared["lambda"],
    ).result


class NuslerpMethod(BatchedMergeMethod):
    """`nuslerp` as mergekit 0.1.5 calls it."""

    def __init__(self) -> None:
        super().__init__(
            MergeMethodSpec(
                name="nuslerp",
                pretty_name=f"NuSLERP (mergekit-nuslerp {__version__})",
                parameters=_specs(),
                optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
                contract=InputContract(
                    base=BasePolicy.OPTIONAL,
                    min_non_base=parameters.MIN_MODELS,
                ),
            ),
            _kernel,
        )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As the inherited method, with weights in float64 and errors that name."""
        announce_merge()
        # A graph task made by hand may leave shared parameters to their defaults.
        parameters = [{**DEFAULTS, **bound} for bound in parameters]
        planned = [_planned(group, bound) for group, bound in zip(groups, parameters)]
        # As resolved, so that only tensors of one granularity share a batch.
        parameters = [
            {**bound, "nuslerp_granularity": entry.values.granularity}
            for bound, entry in zip(parameters, planned)
        ]
        results = {
            index: planning.copied(group.tensors, out_dtype or input_dtypes[index])
            for index, group in enumerate(groups)
            if planning.agree(group.tensors)
        }
        others = [index for index in range(len(groups)) if index not in results]

        def of_others(entries: Sequence[T]) -> list[T]:
            return [entries[index] for index in others]

        for batch in prepare_batches(
            of_others(groups),
            of_others(parameters),
            self.spec,
            options,
            input_dtypes=of_others(input_dtypes),
        ):
            indices = [others[index] for index in batch.indices]
            # Not the weights that mergekit packs: in float32, they would cost float32
            # merges their last digit.
            inputs, base = _split(batch.pack(self.spec)[0])
            merged = planning.merge([planned[i] for i in indices], inputs, base)
            for index, result in zip(indices, merged):
                if out_dtype is not None:
                    result = _converted(result, out_dtype, planned[index].name)
                results[index] = result
            del inputs, base, merged, result
        return tuple(results[index] for index in range(len(results)))


def _planned(group: TensorGroup, bound: dict[str, Any]) -> planning.Planned:
    """How tensors that have been loaded are merged, with or without a plan."""
    name, models = group.metadata.name, {entry.id for entry in group.entries}
    all_models = planning.models_of(name)
    if all_models.issuperset(models):
        parameters.warn_of_absent(sorted(map(str, all_models - models)), str(name))
    return planning.planned(
        name,
        None if group.base is None else group.base.id,
        {name: bound[name] for name in DEFAULTS},
        bound["weight"].items(),
        shape=group.entries[0].tensor.shape,
    )


def _converted(
    result: torch.Tensor, dtype: torch.dtype, tensor: str | None
) -> torch.Tensor:
    """A finite result in another dtype, if that can hold it."""
    if result.numel():
        ends = torch.stack(result.detach().aminmax()).to(dtype)
        if not ends.to(torch.float64).isfinite().all():
            reason = f"the result is too large for {dtype}"
            raise parameters.out_of_range(tensor, reason)
    return result.to(dtype)


def planned(task: Any) -> planning.Planned | None:
    """What mergekit plans for one weight, None if it is not merged."""
    if not isinstance(task, ExecuteMergeMethodTask):
        return None
    return planning.planned(
        task.output_weight.name,
        task.base_model,
        task.parameters,
        [
            (model, values["weight"])
            for model, values in task.input_parameters.items()
            if "weight" in values  # else the base
        ],
        tensors=task.gather_tensors,
        info=task.output_weight,
    )


def aligned(_info: WeightInfo, tensors: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors as they are merged: of one shape, or mergekit refuses them."""
    return tensors


def tiny(models: list[ModelReference], info: WeightInfo, scale: float) -> Any:
    """What merges a weight of two models and a base, with equal weights."""
    return ExecuteMergeMethodTask(
        method_name="nuslerp",
        gather_tensors=GatherTensors(
            weight_info=ImmutableMap(dict.fromkeys(models, info))
        ),
        model_order=tuple(models),
        base_model=models[2],
        output_weight=info,
        parameters=ImmutableMap({**DEFAULTS, "lambda": scale}),
        input_parameters=ImmutableMap(
            {model: ImmutableMap({"weight": 1.0}) for model in models}
        ),
    )


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    return NuslerpMethod()
