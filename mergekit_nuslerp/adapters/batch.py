# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.5: a native batch kernel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

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
from mergekit_nuslerp.kernel import Merged, NonFiniteError, RangeError, merge_batch
from mergekit_nuslerp.parameters import DEFAULTS, named, warn_of_linear
from mergekit_nuslerp.plugin import announce_merge, try_merge

# Whether a slice of one model is that model.
PASSES_ON = False


class NuslerpParameter(ParameterSpec):
    """A parameter whose unfit values are passed on.

    They are refused where it is known which model and tensor they are for.
    """

    @property
    def required(self) -> bool:
        # A missing value is passed on as well.
        return False

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


def _merge(batch: TensorBatch, *, weight: torch.Tensor, **shared: Any) -> Merged:
    base = None if batch.base_index is None else batch.tensors[batch.base_index]
    return merge_batch(
        [t for index, t in enumerate(batch.tensors) if index != batch.base_index],
        weight,
        base=base,
        granularity=parameters.choose_granularity(shared),
        magnitude=shared["nuslerp_magnitude"],
        lambda_=shared["lambda"],
    )


def _kernel(batch: TensorBatch, **values: Any) -> torch.Tensor:
    """What mergekit asks of a batch kernel: the weights and nothing else."""
    return _merge(batch, **values).result


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

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        try_merge()
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except (RuntimeError, ValueError):
            if None not in input_ids and len(set(input_ids)) == len(input_ids):
                parameters.check_models(input_ids, base_id, tensor=group_name)
            raise
        planned = planning.models_of(group_name)
        if planned.issuperset(input_ids):
            absent = [model for model in planned if model not in input_ids]
            parameters.warn_of_absent(absent, str(group_name))

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
        for group, bound in zip(groups, parameters):
            _check_group(group, bound)
        results = {
            index: planning.copied(group.tensors, out_dtype or input_dtypes[index])
            for index, group in enumerate(groups)
            if planning.agree(group.tensors)
        }
        others = [index for index in range(len(groups)) if index not in results]
        groups = [groups[index] for index in others]
        parameters = [parameters[index] for index in others]
        input_dtypes = [input_dtypes[index] for index in others]
        for batch in prepare_batches(
            groups, parameters, self.spec, options, input_dtypes=input_dtypes
        ):
            tensors, kwargs = batch.pack(self.spec)
            # mergekit packs coefficients in float32, which would cost float32 merges
            # their last digit.
            weights = [
                parameters[index]["weight"].values_for(groups[index].non_base)
                for index in batch.indices
            ]
            kwargs["weight"] = torch.tensor(weights, dtype=torch.float64)
            try:
                merged = _merge(tensors, **kwargs)
            except (NonFiniteError, RangeError) as error:
                group = groups[batch.indices[error.output]]
                models = [entry.id for entry in group.non_base]
                base = None if group.base is None else group.base.id
                raise named(error, group.metadata.name, models, base) from None
            for index, count, result in zip(
                batch.indices, merged.linear.tolist(), merged.result.unbind(0)
            ):
                name = groups[index].metadata.name
                warn_of_linear(count, merged.vectors, name)
                if out_dtype is not None:
                    result = _converted(result, out_dtype, name)
                results[others[index]] = result
            del tensors, kwargs, merged, result
        return tuple(results[index] for index in range(len(results)))


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


def _check_group(group: TensorGroup, bound: dict[str, Any]) -> None:
    """Check the parameters of a weight that is merged, with or without a plan."""
    shared = {name: bound[name] for name in DEFAULTS}
    weights = bound["weight"].items()
    name, has_base = group.metadata.name, group.base is not None
    values = parameters.resolve(shared, weights, has_base=has_base, tensor=name)
    parameters.check_block(values.granularity, name, group.entries[0].tensor.shape)
    parameters.warn_of_zero_sum(values.weights, name)


def asked(task: Any) -> planning.Asked | None:
    """What mergekit plans for one weight, None if it is not merged."""
    if not isinstance(task, ExecuteMergeMethodTask):
        return None
    return planning.Asked(
        tensors=task.gather_tensors,
        info=task.output_weight,
        base=task.base_model,
        shared=task.parameters,
        weights=[
            (model, values["weight"])
            for model, values in task.input_parameters.items()
            if "weight" in values  # else the base
        ],
    )


def aligned(_planned: planning.Planned, tensors: dict[Any, Any]) -> dict[Any, Any]:
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
