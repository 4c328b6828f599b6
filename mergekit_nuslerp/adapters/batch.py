# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.5: a native batch kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import torch
from mergekit.merge_methods.base import (
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
from pydantic_core import core_schema

from mergekit_nuslerp import __version__, parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.adapters.planning import Planned
from mergekit_nuslerp.parameters import DEFAULTS, WORDS
from mergekit_nuslerp.plugin import announce_merge

if TYPE_CHECKING:
    from mergekit.architecture import WeightInfo

# Whether a slice of one model is that model, and whether parameters may be words.
PASSES_ON, TAKES_WORDS = False, True


class Lenient:
    """Marks a type whose unfit values are passed on.

    They are refused where it is known which model and tensor they are for.
    """

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Any) -> Any:
        choices = [handler(source), core_schema.any_schema()]
        return core_schema.union_schema(choices, mode="left_to_right")


def _specs(declared: dict[str, Any], scope: ParameterScope) -> list[ParameterSpec]:
    return [
        ParameterSpec(
            name=name,
            value_type=Annotated[parameter.type, Lenient],
            scope=scope,
            default=parameter.default,  # None where there is none, which is passed on
            description=parameter.allowed,
            batch_tensor=scope == ParameterScope.NON_BASE,
        )
        for name, parameter in declared.items()
    ]


class Spec(MergeMethodSpec):
    """Sorts the parameters once, and not four times for each tensor that is planned."""

    shared_parameters = cached_property(MergeMethodSpec.shared_parameters.fget)
    input_parameters = cached_property(MergeMethodSpec.input_parameters.fget)


def _split(batch: TensorBatch) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The models' tensors, and the base's if there is one."""
    inputs = list(batch.tensors)
    return inputs, None if batch.base_index is None else inputs.pop(batch.base_index)


def _kernel(batch: TensorBatch, *, weight: Any, **shared: Any) -> torch.Tensor:
    """What mergekit asks of a batch kernel: the weights and nothing else."""
    inputs, base = _split(batch)
    origin = None if base is None else "base"
    weights = [list(enumerate(row)) for row in weight.tolist()]
    entries = [Planned(None, origin, shared, of_models) for of_models in weights]
    return torch.stack(planning.merge(entries, inputs, base))


class NuslerpMethod(BatchedMergeMethod):
    """`nuslerp` as mergekit 0.1.5 calls it."""

    def __init__(self) -> None:
        spec = Spec(
            name="nuslerp",
            pretty_name=f"NuSLERP (mergekit-nuslerp {__version__})",
            parameters=(
                *_specs(parameters.PER_MODEL, ParameterScope.NON_BASE),
                *_specs(parameters.SHARED, ParameterScope.SHARED),
            ),
            optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
            contract=InputContract(
                base=BasePolicy.OPTIONAL, min_non_base=parameters.MIN_MODELS
            ),
        )
        super().__init__(spec, _kernel)

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
        planned = [_loaded(group, bound) for group, bound in zip(groups, parameters)]
        # As resolved, so that only tensors of one granularity share a batch.
        parameters = [
            {**bound, WORDS[0]: entry.values.granularity}
            for bound, entry in zip(parameters, planned)
        ]
        results = {
            index: planning.copied(
                planned[index].name, group.tensors[0], out_dtype or dtype
            )
            for index, (group, dtype) in enumerate(zip(groups, input_dtypes))
            if planning.agree(group.tensors)
        }
        others = [index for index in range(len(groups)) if index not in results]
        for batch in prepare_batches(
            [groups[index] for index in others],
            [parameters[index] for index in others],
            self.spec,
            options,
            input_dtypes=[input_dtypes[index] for index in others],
        ):
            indices = [others[index] for index in batch.indices]
            # Not the weights that mergekit packs: in float32, they would cost float32
            # merges their last digit.
            inputs, base = _split(batch.pack(self.spec)[0])
            entries = [planned[index] for index in indices]
            merged = planning.merge(entries, inputs, base, out_dtype)
            results.update(zip(indices, merged))
            del inputs, base, merged
        return tuple(results[index] for index in range(len(results)))


def _loaded(group: TensorGroup, bound: dict[str, Any]) -> Planned:
    """How tensors that have been loaded are merged, with or without a plan."""
    shared = {name: bound[name] for name in DEFAULTS}
    base = None if group.base is None else group.base.id
    entry = Planned(group.metadata.name, base, shared, [*bound["weight"].items()])
    planning.check_loaded(entry, group.entries[0].tensor.shape)
    return entry


def planned(task: Any) -> Planned | None:
    """What mergekit plans for one weight, None if it is not merged."""
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    if not isinstance(task, ExecuteMergeMethodTask):
        return None
    weights = [
        (model, values["weight"])
        for model, values in task.input_parameters.items()
        if "weight" in values  # else the base
    ]
    info = task.output_weight
    return Planned(
        info.name, task.base_model, task.parameters, weights, task.gather_tensors, info
    )


def aligned(_info: WeightInfo, tensors: dict[Any, Any]) -> dict[Any, Any]:
    """The tensors as they are merged: of one shape, or mergekit refuses them."""
    return tensors


def make_task(*, tensors: Any, tensor_parameters: Any, **more: Any) -> Any:
    """What merges one weight."""
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    return ExecuteMergeMethodTask(
        method_name="nuslerp",
        gather_tensors=tensors,
        model_order=tuple(tensor_parameters),
        input_parameters=tensor_parameters,
        **more,
    )


make = NuslerpMethod
