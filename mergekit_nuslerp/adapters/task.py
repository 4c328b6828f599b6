# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.4: one graph task for each output weight."""

from typing import Any, Dict, List, Mapping, Optional

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.base import (
    ConfigParameterDef,
    MergeMethod,
    MergeTensorInput,
)
from mergekit.merge_methods.rectify_embed import rectify_embed_sizes

from mergekit_nuslerp import __version__, parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.kernel import NonFiniteError, RangeError, merge_batch
from mergekit_nuslerp.parameters import WORDS, check_models, warn_of_linear
from mergekit_nuslerp.plugin import announce_merge, try_merge

# Whether a slice of one model is that model.
PASSES_ON = True


class NuslerpTask(Task[torch.Tensor]):
    """Merges one weight, once mergekit has loaded it from every model."""

    gather_tensors: MergeTensorInput
    shared: ImmutableMap[str, Any]
    tensor_parameters: ImmutableMap[ModelReference, ImmutableMap[str, Any]]
    base_model: Optional[ModelReference]
    weight_info: WeightInfo

    def uses_accelerator(self) -> bool:
        return True

    def arguments(self) -> Dict[str, Task]:
        return {"tensors": self.gather_tensors}

    def group_label(self) -> Optional[str]:
        return self.gather_tensors.group_label()

    def execute(  # type: ignore[override]
        self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> torch.Tensor:
        announce_merge()
        name = self.weight_info.name
        if len(tensors) == 1:
            # An optional weight that only one of the models has.
            (only,) = tensors.values()
            return only
        check_models(list(tensors), self.base_model, tensor=name)
        plan = planning.planned(_asked(self))
        absent = [model for model in plan.weights if model not in tensors]
        parameters.warn_of_absent(absent, name)
        models = [model for model in tensors if model != self.base_model]
        if self.base_model is not None:
            models.append(self.base_model)
        inputs = [tensors[model] for model in models]
        rectify_embed_sizes(self.weight_info, inputs)
        if planning.agree(inputs):
            return planning.copied(inputs, None)
        if not all(tensor.is_floating_point() for tensor in inputs):
            raise ValueError(planning.integers_differ(name))
        planning.check_shapes(name, self.weight_info, dict(zip(models, inputs)))
        parameters.check_block(plan.granularity, name, inputs[0].shape)
        base = None if self.base_model is None else inputs.pop()
        weights = [plan.weights[model] for model in models[: len(inputs)]]
        parameters.warn_of_zero_sum(weights, name)
        try:
            merged = merge_batch(
                [tensor.unsqueeze(0) for tensor in inputs],
                torch.tensor([weights], dtype=torch.float64),
                base=None if base is None else base.unsqueeze(0),
                granularity=plan.granularity,
                lambda_=plan.lambda_,
            )
        except (NonFiniteError, RangeError) as error:
            raise parameters.named(error, name, models, self.base_model) from None
        warn_of_linear(int(merged.linear), merged.vectors, name)
        return merged.result.squeeze(0)


class NuslerpMethod(MergeMethod):
    """`nuslerp` as mergekit 0.1.4 calls it."""

    def name(self) -> str:
        return "nuslerp"

    def pretty_name(self) -> Optional[str]:
        return f"NuSLERP (mergekit-nuslerp {__version__})"

    def parameters(self) -> List[ConfigParameterDef]:
        return _definitions(
            {
                name: field
                for name, field in parameters.Shared.model_fields.items()
                if name not in WORDS
            }
        )

    def tensor_parameters(self) -> List[ConfigParameterDef]:
        return _definitions(parameters.PerModel.model_fields)

    def make_task(
        self,
        *,
        output_weight: WeightInfo,
        tensors: MergeTensorInput,
        parameters: ImmutableMap[str, Any],
        tensor_parameters: ImmutableMap[ModelReference, ImmutableMap[str, Any]],
        base_model: Optional[ModelReference],
        **_kwargs: Any,
    ) -> Task:
        try_merge()
        return NuslerpTask(
            gather_tensors=tensors,
            shared=parameters,
            tensor_parameters=tensor_parameters,
            base_model=base_model,
            weight_info=output_weight,
        )


def _definitions(declared: Mapping[str, Any]) -> List[ConfigParameterDef]:
    # None of them is required as far as mergekit is concerned: a missing value comes
    # to `make_task`, where the message can say what to write.
    return [
        ConfigParameterDef(
            name=name,
            default_value=None if field.is_required() else field.default,
        )
        for name, field in declared.items()
    ]


def asked(task: Task) -> Optional[planning.Asked]:
    """What mergekit plans for one weight, None if it is not merged."""
    is_ours = isinstance(task, NuslerpTask)
    # A weight of the only model that is listed is that model's.
    if not is_ours or len(planning.sources(task.gather_tensors)) == 1:
        return None
    return _asked(task)


def _asked(task: NuslerpTask) -> planning.Asked:
    base = task.base_model
    return planning.Asked(
        tensors=task.gather_tensors,
        info=task.weight_info,
        base=base,
        shared=task.shared,
        weights=[
            (model, values["weight"])
            for model, values in task.tensor_parameters.items()
            # Paths first, as to compare models takes long.
            if base is None or model.model.path != base.model.path or model != base
        ],
    )


def aligned(
    planned: planning.Planned, tensors: Dict[ModelReference, torch.Tensor]
) -> Dict[ModelReference, torch.Tensor]:
    """The tensors as they are merged: embeddings cut to the part that all have."""
    models, inputs = list(tensors), list(tensors.values())
    rectify_embed_sizes(planned.info, inputs)
    return dict(zip(models, inputs))


def tiny(models: List[ModelReference], info: WeightInfo, scale: float) -> Task:
    """What merges a weight of two models and a base, with equal weights."""
    return make().make_task(
        output_weight=info,
        tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(models, info))),
        parameters=ImmutableMap({"lambda": scale}),
        tensor_parameters=ImmutableMap(
            {model: ImmutableMap({"weight": 1.0}) for model in models}
        ),
        base_model=models[2],
    )


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    return NuslerpMethod()
