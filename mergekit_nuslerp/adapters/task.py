# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.4: one graph task for each output weight."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

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
from mergekit_nuslerp.parameters import WORDS
from mergekit_nuslerp.plugin import announce_merge

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

    def planned(
        self,
        absent: Sequence[ModelReference] = (),
        shape: Optional[Sequence[int]] = None,
    ) -> planning.Planned:
        """How the weight is merged, without the models that do not have it."""
        base = self.base_model
        return planning.planned(
            self.weight_info.name,
            base,
            self.shared,
            [
                (model, values["weight"])
                for model, values in self.tensor_parameters.items()
                # Paths first, as to compare models takes long.
                if (base is None or model.model.path != base.model.path)
                or (model != base)
                if model not in absent
            ],
            tensors=self.gather_tensors,
            info=self.weight_info,
            shape=shape,
        )

    def execute(  # type: ignore[override]
        self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> torch.Tensor:
        announce_merge()
        name = self.weight_info.name
        if len(tensors) == 1:
            # An optional weight that only one of the models has.
            (only,) = tensors.values()
            return only
        parameters.check_models(list(tensors), self.base_model, tensor=name)
        absent = [model for model in self.tensor_parameters if model not in tensors]
        parameters.warn_of_absent(absent, name)
        tensors = aligned(self.weight_info, tensors)
        inputs = list(tensors.values())
        if planning.agree(inputs):
            return planning.copied(inputs, None)
        if not all(tensor.is_floating_point() for tensor in inputs):
            raise ValueError(planning.integers_differ(name))
        planning.check_shapes(name, self.weight_info, tensors)
        planned = self.planned(absent, inputs[0].shape)
        one = {model: tensor.unsqueeze(0) for model, tensor in tensors.items()}
        (merged,) = planning.merge(
            [planned], [one[model] for model in planned.models], one.get(planned.base)
        )
        return merged


def _definitions(declared: Mapping[str, Any]) -> List[ConfigParameterDef]:
    # None of them is required as far as mergekit is concerned: of a missing value our
    # message can say what to write.
    return [
        ConfigParameterDef(
            name=name, default_value=None if field.is_required() else field.default
        )
        for name, field in declared.items()
        if name not in WORDS
    ]


# Made once, as mergekit asks for them for each weight.
_SHARED = _definitions(parameters.Shared.model_fields)
_PER_MODEL = _definitions(parameters.PerModel.model_fields)


class NuslerpMethod(MergeMethod):
    """`nuslerp` as mergekit 0.1.4 calls it."""

    def name(self) -> str:
        return "nuslerp"

    def pretty_name(self) -> Optional[str]:
        return f"NuSLERP (mergekit-nuslerp {__version__})"

    def parameters(self) -> List[ConfigParameterDef]:
        return _SHARED

    def tensor_parameters(self) -> List[ConfigParameterDef]:
        return _PER_MODEL

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
        return NuslerpTask(
            gather_tensors=tensors,
            shared=parameters,
            tensor_parameters=tensor_parameters,
            base_model=base_model,
            weight_info=output_weight,
        )


def planned(task: Task) -> Optional[planning.Planned]:
    """What mergekit plans for one weight, None if it is not merged."""
    # A weight of the only model that is listed is that model's.
    is_merged = isinstance(task, NuslerpTask) and len(task.tensor_parameters) > 1
    return task.planned() if is_merged else None


def aligned(
    info: WeightInfo, tensors: Dict[ModelReference, torch.Tensor]
) -> Dict[ModelReference, torch.Tensor]:
    """The tensors as they are merged: embeddings cut to the part that all have."""
    inputs = list(tensors.values())
    rectify_embed_sizes(info, inputs)
    return dict(zip(tensors, inputs))


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
