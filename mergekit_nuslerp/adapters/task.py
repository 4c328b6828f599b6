# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.4: one graph task for each output weight."""

from typing import Any, Dict, List, Optional

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.base import (
    ConfigParameterDef,
    MergeMethod,
    MergeTensorInput,
)
from mergekit.merge_methods.rectify_embed import rectify_embed_sizes

from mergekit_nuslerp import __version__, parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.adapters.planning import Planned
from mergekit_nuslerp.parameters import WORDS
from mergekit_nuslerp.plugin import announce_merge

# Whether a slice of one model is that model, and whether parameters may be words.
PASSES_ON, TAKES_WORDS = True, False


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
        name, entry = self.weight_info.name, planned(self)
        if entry is None or len(tensors) == 1:
            # An optional weight that only one of the models has.
            return next(iter(tensors.values()))
        parameters.check_models(list(tensors), self.base_model, tensor=name)
        tensors = aligned(self.weight_info, tensors)
        inputs = list(tensors.values())
        entry.weights = [(m, weight) for m, weight in entry.weights if m in tensors]
        planning.check_loaded(entry, inputs[0].shape)
        if planning.agree(inputs):
            return planning.copied(name, inputs[0])
        if not all(tensor.is_floating_point() for tensor in inputs):
            raise ValueError(planning.integers_differ(name))
        planning.check_shapes(name, tensors)
        one = {model: tensor.unsqueeze(0) for model, tensor in tensors.items()}
        models = [one[model] for model, _ in entry.weights]
        return planning.merge([entry], models, one.get(entry.base))[0]


# Made once, as mergekit asks for them for each weight. None of them is required as far
# as mergekit is concerned: of a missing value our message can say what to write.
_SHARED = [
    ConfigParameterDef(name=name, default_value=default)
    for name, default in parameters.DEFAULTS.items()
    if name not in WORDS
]
_PER_MODEL = [ConfigParameterDef(name=name) for name in parameters.PER_MODEL]


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


def planned(task: Task) -> Optional[Planned]:
    """What mergekit plans for one weight, None if it is not merged."""
    # A weight of the only model that is listed is that model's.
    if not isinstance(task, NuslerpTask) or len(task.tensor_parameters) < 2:
        return None
    base = task.base_model
    path = base and base.model.path
    weights = [
        (model, values["weight"])
        for model, values in task.tensor_parameters.items()
        # As mergekit's own way to compare models takes long.
        if model.model.path != path or str(model) != str(base)
    ]
    info = task.weight_info
    return Planned(info.name, base, task.shared, weights, task.gather_tensors, info)


def aligned(
    info: WeightInfo, tensors: Dict[ModelReference, torch.Tensor]
) -> Dict[ModelReference, torch.Tensor]:
    """The tensors as they are merged: embeddings cut to the part that all have."""
    inputs = list(tensors.values())
    rectify_embed_sizes(info, inputs)
    return dict(zip(tensors, inputs))


make = NuslerpMethod
make_task = make().make_task
