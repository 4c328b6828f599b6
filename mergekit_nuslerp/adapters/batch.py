# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.5: a native batch kernel."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
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

from mergekit_nuslerp import granularity, parameters
from mergekit_nuslerp.kernel import NonFiniteError, merge_batch
from mergekit_nuslerp.parameters import Shared, nonfinite
from mergekit_nuslerp.plugin import announce, warn_of_zero_sum


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
            return parameters.validate(self.name, given, **_resolved_for())


def _resolved_for() -> dict[str, Any]:
    """The model and tensor that mergekit is resolving a parameter for, if it is.

    mergekit hands a parameter its value alone, and adds no context to an error. Its
    resolver has both as local variables, some frames up.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if (
            frame.f_code.co_name == "resolve_parameter"
            and frame.f_globals.get("__name__") == "mergekit.parameter_resolver"
        ):
            names = {"model": "model", "tensor": "tensor_name"}
            return {key: frame.f_locals.get(name) for key, name in names.items()}
    return {}


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


_DEFAULTS = {name: field.default for name, field in Shared.model_fields.items()}


def _merge(
    batch: TensorBatch,
    *,
    weight: torch.Tensor,
    nuslerp_row_wise: bool,
    nuslerp_flatten: bool,
) -> torch.Tensor:
    base = None if batch.base_index is None else batch.tensors[batch.base_index]
    return merge_batch(
        [t for index, t in enumerate(batch.tensors) if index != batch.base_index],
        weight,
        base=base,
        granularity=granularity.from_flags(
            flatten=nuslerp_flatten, row_wise=nuslerp_row_wise
        ),
    )


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
                    min_non_base=parameters.MODELS,
                    max_non_base=parameters.MODELS,
                ),
            ),
            _merge,
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        announce()
        # Called for a slice when a config is planned, and for a tensor with the models
        # that were found to have it.
        planning = group_name is None or re.search(r"\.slices\[\d+\]$", group_name)
        where = {"place" if planning else "tensor": group_name}
        if None not in input_ids and len(set(input_ids)) == len(input_ids):
            parameters.check_models(input_ids, base_id, **where)
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As the inherited method, but with weights in float64 and named errors."""
        # A graph task made by hand may leave shared parameters to their defaults.
        parameters = [{**_DEFAULTS, **bound} for bound in parameters]
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
            for index, values in zip(batch.indices, weights):
                warn_of_zero_sum(tuple(values), groups[index].metadata.name)
            kwargs["weight"] = torch.tensor(weights, dtype=torch.float64)
            try:
                merged = self.merge_batch(tensors, **kwargs)
            except NonFiniteError as error:
                group = groups[batch.indices[error.output]]
                is_base = error.model is None
                entry = group.base if is_base else group.non_base[error.model]
                message = nonfinite(group.metadata.name, entry.id, is_base=is_base)
                raise ValueError(message) from None
            if out_dtype is not None:
                merged = merged.to(dtype=out_dtype)
            results.update(zip(batch.indices, merged.unbind(0)))
            del tensors, kwargs, merged
        return tuple(results[index] for index in range(len(groups)))


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    return NuslerpMethod()
