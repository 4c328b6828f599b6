# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The merge method for mergekit 0.1.4: one graph task for each output weight."""

from functools import wraps
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.merge_methods.base import (
    ConfigParameterDef,
    MergeMethod,
    MergeTensorInput,
)
from mergekit.merge_methods.rectify_embed import rectify_embed_sizes
from pydantic import ValidationError

from mergekit_nuslerp import parameters
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.kernel import NonFiniteError, merge_batch
from mergekit_nuslerp.parameters import (
    NAMED,
    ConfigError,
    check_gathered,
    check_models,
    check_together,
    parameter_names,
    warn_of_linear,
)
from mergekit_nuslerp.plugin import announce


class NuslerpTask(Task[torch.Tensor]):
    """Merges one weight, once mergekit has loaded it from every model."""

    gather_tensors: MergeTensorInput
    weights: ImmutableMap[ModelReference, float]
    base_model: Optional[ModelReference]
    weight_info: WeightInfo
    granularity: str
    lambda_: float

    def uses_accelerator(self) -> bool:
        return True

    def arguments(self) -> Dict[str, Task]:
        return {"tensors": self.gather_tensors}

    def group_label(self) -> Optional[str]:
        return self.gather_tensors.group_label()

    def execute(  # type: ignore[override]
        self, tensors: Dict[ModelReference, torch.Tensor], **_kwargs: Any
    ) -> torch.Tensor:
        announce()
        name = self.weight_info.name
        if len(tensors) == 1:
            # An optional weight that only one of the models has.
            (only,) = tensors.values()
            return only
        check_models(list(tensors), self.base_model, tensor=name)
        absent = [model for model in self.weights if model not in tensors]
        parameters.warn_of_absent(absent, name)
        models = [model for model in tensors if model != self.base_model]
        if self.base_model is not None:
            models.append(self.base_model)
        inputs = [tensors[model] for model in models]
        rectify_embed_sizes(self.weight_info, inputs)
        if not all(tensor.is_floating_point() for tensor in inputs):
            return self._agreed(inputs)
        if any(tensor.shape != inputs[0].shape for tensor in inputs):
            shapes = {model: tensor.shape for model, tensor in zip(models, inputs)}
            vocabulary = planning.has_vocabulary(self.weight_info)
            message = parameters.unlike_shapes(name, shapes, vocabulary=vocabulary)
            raise RuntimeError(message)

        base = None if self.base_model is None else inputs.pop()
        weights = [self.weights[model] for model in models[: len(inputs)]]
        parameters.warn_of_zero_sum(weights, name)
        try:
            merged = merge_batch(
                [tensor.unsqueeze(0) for tensor in inputs],
                torch.tensor([weights], dtype=torch.float64),
                base=None if base is None else base.unsqueeze(0),
                granularity=self.granularity,
                lambda_=self.lambda_,
            )
        except NonFiniteError as error:
            model = models[-1 if error.model is None else error.model]
            is_base = model == self.base_model
            message = parameters.nonfinite(name, model, is_base=is_base)
            raise ValueError(message) from None
        warn_of_linear(int(merged.linear), merged.vectors, name)
        return merged.result.squeeze(0)

    def _agreed(self, inputs: List[torch.Tensor]) -> torch.Tensor:
        """Integers and booleans are copied where all models agree, as 0.1.5 does."""
        if not planning.agree(inputs):
            raise ValueError(
                f"nuslerp: tensor {self.weight_info.name} does not hold floating-point "
                "numbers and differs between the models; it cannot be interpolated"
            )
        return inputs[0].clone()


class NuslerpMethod(MergeMethod):
    """`nuslerp` as mergekit 0.1.4 calls it."""

    def name(self) -> str:
        return "nuslerp"

    def pretty_name(self) -> Optional[str]:
        return "NuSLERP"

    def parameters(self) -> List[ConfigParameterDef]:
        return _definitions(_shared_fields())

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
        frame, name = planning.caller(), output_weight.name
        config = planning.config_of(frame)
        if config is not None:
            _refuse_named(name for name, _ in parameter_names(config))
            planning.check(config)
        sources = planning.sources(tensors)
        check_gathered(frame.f_locals.get("models", ()), sources, name)
        shared, weights = _validated(name, parameters, tensor_parameters, base_model)
        check_models(sources, base_model, place=name)
        has_base = base_model is not None
        granularity = check_together(shared, weights, has_base=has_base, tensor=name)
        return NuslerpTask(
            gather_tensors=tensors,
            weights=ImmutableMap(weights),
            base_model=base_model,
            weight_info=output_weight,
            granularity=granularity,
            lambda_=shared["lambda"],
        )


def _shared_fields() -> Dict[str, Any]:
    """The shared parameters that this mergekit can take."""
    shared = parameters.Shared.model_fields
    return {name: shared[name] for name in shared if name not in NAMED}


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


def _validated(
    tensor: str,
    shared: ImmutableMap[str, Any],
    per_model: ImmutableMap[ModelReference, ImmutableMap[str, Any]],
    base: Optional[ModelReference],
) -> Tuple[Dict[str, Any], Dict[ModelReference, float]]:
    # mergekit 0.1.4 reads true and false as 1.0 and 0.0, which count as both here.
    given = dict(shared.items())
    values = {
        name: parameters.validate(name, given.get(name, field.default), tensor=tensor)
        for name, field in _shared_fields().items()
    }
    weights = {
        model: parameters.validate(
            "weight", per_model[model]["weight"], model=model, tensor=tensor
        )
        for model in per_model
        if model != base
    }
    return values, weights


def _refuse_named(names: Iterable[str]) -> None:
    """Refuse the parameters that take words, which mergekit 0.1.4 does not."""
    for name in names:
        if name in NAMED:
            instead = ""
            if name == "nuslerp_granularity":
                instead = ", or use `nuslerp_flatten` and `nuslerp_row_wise`"
            raise ConfigError(
                f"nuslerp: parameter {name!r} takes a word, and mergekit 0.1.4 takes "
                "only numbers. Install mergekit 0.1.5 (`pip install mergekit==0.1.5`)"
                f"{instead}."
            )


def _refuse_named_early() -> None:
    """Let mergekit's config say which mergekit takes the parameters that are words.

    It refuses them before a merge method is asked, in eight errors or more.
    """
    validate = MergeConfiguration.model_validate.__func__

    @wraps(validate)
    def model_validate(cls: Any, *args: Any, **kwargs: Any) -> MergeConfiguration:
        try:
            return validate(cls, *args, **kwargs)
        except ValidationError as error:
            refused = error
        _refuse_named(str(part) for error in refused.errors() for part in error["loc"])
        raise refused

    MergeConfiguration.model_validate = classmethod(model_validate)


def planned(task: NuslerpTask) -> planning.Planned:
    """How mergekit plans to merge one weight."""
    return planning.Planned(
        name=task.weight_info.name,
        tensors=task.gather_tensors,
        weights=task.weights,
        base=task.base_model,
        granularity=task.granularity,
        magnitude="slerp",
        lambda_=task.lambda_,
        info=task.weight_info,
    )


def aligned(
    planned: planning.Planned, tensors: Dict[ModelReference, torch.Tensor]
) -> Dict[ModelReference, torch.Tensor]:
    """The tensors as they are merged: embeddings cut to the part that all have."""
    models, inputs = list(tensors), list(tensors.values())
    rectify_embed_sizes(planned.info, inputs)
    return dict(zip(models, inputs))


def make() -> NuslerpMethod:
    """The method to put into mergekit's registry."""
    _refuse_named_early()
    return NuslerpMethod()
