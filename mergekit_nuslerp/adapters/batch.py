# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.5: a native batch kernel."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from mergekit.common import ImmutableMap
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

from mergekit_nuslerp import parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.kernel import Merged, NonFiniteError, merge_batch
from mergekit_nuslerp.parameters import nonfinite, warn_of_linear
from mergekit_nuslerp.plugin import announce


class PlanError(RuntimeError):
    """A `ConfigError` where pydantic would bury a ValueError among its own words."""


class NuslerpParameter(ParameterSpec):
    """A parameter whose errors say which model and tensor they are about."""

    @property
    def required(self) -> bool:
        # A missing value is passed to `validate` as well, for the same message.
        return False

    def validate(self, value: Any) -> Any:
        given = None if value is MISSING else value
        try:
            return parameters.validate(self.name, given)
        except parameters.ConfigError:  # once more, for a message that says where
            return parameters.validate(self.name, given, **planning.resolved_for())


def _specs() -> tuple[ParameterSpec, ...]:
    scopes = (
        (parameters.PerModel, ParameterScope.NON_BASE),
        (parameters.Shared, ParameterScope.SHARED),
    )
    return tuple(
        NuslerpParameter(
            name=name,
            value_type=field.annotation,
            scope=scope,
            default=MISSING if field.is_required() else field.default,
            description=field.description,
            batch_tensor=scope == ParameterScope.NON_BASE,
        )
        for declaration, scope in scopes
        for name, field in declaration.model_fields.items()
    )


_DEFAULTS = {
    name: field.default for name, field in parameters.Shared.model_fields.items()
}


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
                pretty_name="NuSLERP",
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
        frame = planning.caller()
        config, task = planning.config_of(frame), frame.f_locals.get("self")
        if config is not None:
            planning.check(config)
        # Called for a slice when a config is planned, and for a tensor with the models
        # that were found to have it.
        is_slice = group_name is None or re.search(r"\.slices\[\d+\]$", group_name)
        where = {"place" if is_slice else "tensor": group_name}
        if None not in input_ids and len(set(input_ids)) == len(input_ids):
            parameters.check_models(input_ids, base_id, **where)
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if isinstance(task, ExecuteMergeMethodTask):
            _check_task(task)
            absent = [model for model in task.model_order if model not in input_ids]
            parameters.warn_of_absent(absent, task.output_weight.name)

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
        announce()
        # A graph task made by hand may leave shared parameters to their defaults.
        parameters = [{**_DEFAULTS, **bound} for bound in parameters]
        for group, bound in zip(groups, parameters):
            _check_group(group, bound)
        results: dict[int, torch.Tensor] = {}
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
            except NonFiniteError as error:
                group = groups[batch.indices[error.output]]
                is_base = error.model is None
                entry = group.base if is_base else group.non_base[error.model]
                message = nonfinite(group.metadata.name, entry.id, is_base=is_base)
                raise ValueError(message) from None
            for index, count in zip(batch.indices, merged.linear.tolist()):
                name = groups[index].metadata.name
                warn_of_linear(count, merged.vectors, name)
            result = merged.result
            if out_dtype is not None:
                result = result.to(dtype=out_dtype)
            results.update(zip(batch.indices, result.unbind(0)))
            del tensors, kwargs, merged, result
        return tuple(results[index] for index in range(len(groups)))


def _check_task(task: ExecuteMergeMethodTask) -> None:
    """Check the parameters of a weight that mergekit plans to merge."""
    shared = {**_DEFAULTS, **task.parameters}
    weights = _weights(task)
    name = task.output_weight.name
    # Only a block may not fit, and a file's header takes a while to read.
    has_blocks = ":" in (shared["nuslerp_granularity"] or "")
    sources = planning.sources(task.gather_tensors)
    try:
        parameters.check_gathered(task.model_order, sources, name)
        parameters.check_together(
            shared,
            weights,
            has_base=task.base_model is not None,
            tensor=name,
            shape=planning.stored_shape(task.gather_tensors) if has_blocks else None,
        )
    except parameters.ConfigError as error:
        raise PlanError(str(error)) from None


def _check_group(group: TensorGroup, bound: dict[str, Any]) -> None:
    """Check the parameters of a weight that is merged, with or without a plan."""
    values = bound["weight"].values_for(group.non_base)
    parameters.check_together(
        bound,
        {entry.id: value for entry, value in zip(group.non_base, values)},
        has_base=group.base is not None,
        tensor=group.metadata.name,
        shape=group.entries[0].tensor.shape,
    )
    parameters.warn_of_zero_sum(values, group.metadata.name)


def planned(task: ExecuteMergeMethodTask) -> planning.Planned:
    """How mergekit plans to merge one weight."""
    shared = {**_DEFAULTS, **task.parameters}
    name = task.output_weight.name
    return planning.Planned(
        name=name,
        tensors=task.gather_tensors,
        weights=ImmutableMap(_weights(task)),
        base=task.base_model,
        granularity=parameters.choose_granularity(shared, tensor=name),
        magnitude=shared["nuslerp_magnitude"],
        lambda_=shared["lambda"],
        info=task.output_weight,
    )


def aligned(_planned: planning.Planned, tensors: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors as they are merged: of one shape, or mergekit refuses them."""
    return tensors


def _weights(task: ExecuteMergeMethodTask) -> dict[Any, float]:
    return {
        model: task.input_parameters[model]["weight"]
        for model in task.model_order
        if model != task.base_model and model in task.input_parameters
    }


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    return NuslerpMethod()
