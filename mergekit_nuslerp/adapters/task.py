# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.4: one graph task for each output weight."""

from typing import Any, Dict, List, Mapping, Optional, Tuple

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

from mergekit_nuslerp import parameters
from mergekit_nuslerp.granularity import Granularity, from_flags
from mergekit_nuslerp.kernel import NonFiniteError, merge_batch
from mergekit_nuslerp.parameters import check_models
from mergekit_nuslerp.plugin import announce, warn_of_zero_sum


class NuslerpTask(Task[torch.Tensor]):
    """Merges one weight, once mergekit has loaded it from every model."""

    gather_tensors: MergeTensorInput
    weights: ImmutableMap[ModelReference, float]
    base_model: Optional[ModelReference]
    weight_info: WeightInfo
    granularity: Granularity

    def uses_accelerator(self) -> bool:
        return True

    def arguments(self) -> Dict[str, Task]:
        return {"tensors": self.gather_tensors}

    def group_label(self) -> Optional[str]:
        return self.gather_tensors.group_label()

    def execute(  # type: ignore[override]
        self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> torch.Tensor:
        name = self.weight_info.name
        if len(tensors) == 1:
            # An optional weight that only one of the models has.
            (only,) = tensors.values()
            return only
        check_models(list(tensors), self.base_model, tensor=name)
        models = [model for model in tensors if model != self.base_model]
        if self.base_model is not None:
            models.append(self.base_model)
        inputs = [tensors[model] for model in models]
        rectify_embed_sizes(self.weight_info, inputs)
        if not all(tensor.is_floating_point() for tensor in inputs):
            return self._agreed(inputs)
        if any(tensor.shape != inputs[0].shape for tensor in inputs):
            shapes = {str(m): tuple(t.shape) for m, t in zip(models, inputs)}
            raise RuntimeError(
                f"nuslerp: tensor {name} differs in shape: {shapes}. Embeddings of "
                "different vocabularies need `tokenizer_source: union` (or `base`)."
            )

        base = None if self.base_model is None else inputs.pop()
        try:
            return merge_batch(
                [tensor.unsqueeze(0) for tensor in inputs],
                torch.tensor(
                    [[self.weights[model] for model in models[: len(inputs)]]],
                    dtype=torch.float64,
                ),
                base=None if base is None else base.unsqueeze(0),
                granularity=self.granularity,
            ).squeeze(0)
        except NonFiniteError as error:
            model = models[-1 if error.model is None else error.model]
            is_base = model == self.base_model
            message = parameters.nonfinite(name, model, is_base=is_base)
            raise ValueError(message) from None

    def _agreed(self, inputs: List[torch.Tensor]) -> torch.Tensor:
        """Integers and booleans are copied where all models agree, as 0.1.5 does."""
        first, *rest = inputs
        if any(t.dtype != first.dtype or not torch.equal(t, first) for t in rest):
            raise ValueError(
                f"nuslerp: tensor {self.weight_info.name} does not hold floating-point "
                "numbers and differs between the models; it cannot be interpolated"
            )
        return first.clone()


class NuslerpMethod(MergeMethod):
    """`nuslerp` as mergekit 0.1.4 calls it."""

    def name(self) -> str:
        return "nuslerp"

    def pretty_name(self) -> Optional[str]:
        return "NuSLERP"

    def parameters(self) -> List[ConfigParameterDef]:
        return _definitions(parameters.Shared)

    def tensor_parameters(self) -> List[ConfigParameterDef]:
        return _definitions(parameters.PerModel)

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
        announce()
        shared, weights = _validated(
            output_weight.name, parameters, tensor_parameters, base_model
        )
        check_models(_sources(tensors), base_model, place=output_weight.name)
        warn_of_zero_sum(tuple(weights.values()), output_weight.name)
        return NuslerpTask(
            gather_tensors=tensors,
            weights=ImmutableMap(weights),
            base_model=base_model,
            weight_info=output_weight,
            granularity=from_flags(
                flatten=shared["nuslerp_flatten"], row_wise=shared["nuslerp_row_wise"]
            ),
        )


def _definitions(declaration: type) -> List[ConfigParameterDef]:
    # None of them is required as far as mergekit is concerned: a missing value comes
    # to `make_task`, where the message can say what to write.
    fields: Mapping[str, Any] = declaration.model_fields  # type: ignore[attr-defined]
    return [
        ConfigParameterDef(
            name=name,
            default_value=None if field.is_required() else field.default,
        )
        for name, field in fields.items()
    ]


def _sources(tensors: MergeTensorInput) -> List[ModelReference]:
    """The models that a weight will be gathered from, in mergekit's order."""
    gather: Any = getattr(tensors, "gather_tensors", tensors)
    return list(getattr(gather, "weight_info", None) or gather.tensors)


def _validated(
    tensor: str,
    shared: ImmutableMap[str, Any],
    per_model: ImmutableMap[ModelReference, ImmutableMap[str, Any]],
    base: Optional[ModelReference],
) -> Tuple[Dict[str, Any], Dict[ModelReference, float]]:
    # mergekit 0.1.4 reads true and false as 1.0 and 0.0, which count as both here.
    values = {
        name: parameters.validate(name, shared[name], tensor=tensor)
        for name in parameters.Shared.model_fields
    }
    weights = {
        model: parameters.validate(
            "weight", per_model[model]["weight"], model=model, tensor=tensor
        )
        for model in per_model
        if model != base
    }
    return values, weights


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    return NuslerpMethod()
