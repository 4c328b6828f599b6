# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The parameters of the merge method, declared once for all adapters.

mergekit resolves gradients and filters; what it resolves for one weight comes here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

MODELS = 2


class ConfigError(ValueError):
    """A merge configuration that cannot be run, found before any weight is read."""


class PerModel(BaseModel):
    """Parameters that each model but the base has its own value of."""

    weight: float = Field(
        allow_inf_nan=False,
        description="a finite number",
        examples=["`parameters: {weight: 0.5}` under each model but the base"],
    )


class Shared(BaseModel):
    """Parameters with one value for all models."""

    nuslerp_row_wise: bool = Field(
        default=False,
        description="true or false",
        examples=["`nuslerp_row_wise: false` under `parameters`"],
    )
    nuslerp_flatten: bool = Field(
        default=True,
        description="true or false",
        examples=["`nuslerp_flatten: true` under `parameters`"],
    )


FIELDS = {**PerModel.model_fields, **Shared.model_fields}


@cache
def _adapter(name: str) -> TypeAdapter:
    field = FIELDS[name]
    annotated: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotated)


def validate(
    name: str, value: Any, *, model: Hashable | None = None, tensor: str | None = None
) -> Any:
    """Check and convert one parameter's value.

    Args:
        name: of the parameter.
        value: as the configuration gives it; None if it gives none.
        model: the model it belongs to, for the message.
        tensor: the weight it was resolved for, for the message.

    Raises:
        ConfigError: naming the parameter, model and weight, and what to write instead.
    """
    try:
        return _adapter(name).validate_python(value)
    except ValidationError:
        field = FIELDS[name]
        given = "is missing" if value is None else f"is {value!r}"
        owner = "" if model is None else f" of model {model}"
        weight = "" if tensor is None else f" for tensor {tensor}"
        raise ConfigError(
            f"nuslerp: parameter {name!r}{owner}{weight} {given}, but must be "
            f"{field.description}. Write, say, {(field.examples or [''])[0]}."
        ) from None


def check_models(
    models: Sequence[Hashable],
    base: Hashable | None,
    *,
    place: str | None = None,
    tensor: str | None = None,
) -> None:
    """Refuse a merge of more or fewer than two models besides the base.

    Args:
        models: all inputs, the base among them if there is one.
        base: the base model, None if there is none.
        place: the part of the config concerned, for the message.
        tensor: the tensor that the models were found to have, while merging.

    Raises:
        ConfigError: naming the models found, and what to write instead.
    """
    where = f" for tensor {tensor}" if tensor else f" for {place}" if place else ""
    others = [str(model) for model in models if model != base]
    listed = f" ({', '.join(others)})" if others else ""
    if base is not None and base not in models:
        if tensor:
            remedy = (
                f"The base model {base} does not have it, so there is no task vector. "
                "Use models with the same tensors, or `mergekit-pytorch "
                "--tensor-intersection`."
            )
        else:
            remedy = (
                f"The base model {base} is not among the models{listed}. Add it to the "
                "sources, without a weight, or remove `base_model`."
            )
        raise ConfigError(f"nuslerp: Base input is not present{where}. {remedy}")
    if len(others) == MODELS:
        return
    if len(others) > MODELS:
        remedy = (
            "Merge two at a time, or use `karcher` or `multislerp`, which take any "
            "number of models."
        )
    elif tensor:
        remedy = (
            "The others do not have it. Use models with the same tensors, or "
            "`mergekit-pytorch --tensor-intersection`."
        )
    elif base is not None and len(models) == MODELS:
        remedy = (
            f"The base model {base} is one of the two models listed. To interpolate "
            "the two, remove `base_model`; to interpolate task vectors, list two "
            "models besides it."
        )
    else:
        remedy = (
            "List two different models besides `base_model`, each with a `weight`; one "
            "that is listed twice counts once."
        )
    raise ConfigError(
        f"nuslerp: exactly {MODELS} models besides the base are interpolated, but "
        f"there are {len(others)}{where}{listed}. {remedy}"
    )


def nonfinite(tensor: str | None, model: Hashable, *, is_base: bool) -> str:
    """The message about an input that cannot be merged."""
    name = "a tensor" if tensor is None else f"tensor {tensor}"
    owner = f"the base model {model}" if is_base else f"model {model}"
    return (
        f"nuslerp: {name} of {owner} contains NaN or infinity. "
        "The checkpoint is damaged or its training diverged; use another one."
    )
