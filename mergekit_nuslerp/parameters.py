# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The parameters of the merge method, declared once for all adapters.

mergekit resolves gradients and filters; what it resolves for one weight comes here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

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

    model_config = ConfigDict(frozen=True)

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
    models: Sequence[Hashable], base: Hashable | None, *, where: str | None = None
) -> None:
    """Refuse a merge of more or fewer than two models besides the base.

    Args:
        models: all inputs, the base among them or not.
        base: the base model, None if there is none.
        where: the tensor or slice concerned, for the message.

    Raises:
        ConfigError: naming the models found, and what to write instead.
    """
    others = [str(model) for model in models if model != base]
    if len(others) == MODELS:
        return
    place = "" if where is None else f" for {where}"
    listed = f" ({', '.join(others)})" if others else ""
    if base is not None and base in models and len(models) == MODELS:
        remedy = (
            f"The base model {base} is one of the two models listed. To interpolate "
            "the two, remove `base_model`; to interpolate task vectors, list two "
            "models besides it."
        )
    elif len(others) < MODELS:
        remedy = "List two models besides `base_model`, each with a `weight`."
    else:
        remedy = (
            "Merge two at a time, or use `karcher` or `multislerp`, which take any "
            "number of models."
        )
    raise ConfigError(
        f"nuslerp: exactly {MODELS} models besides the base are interpolated, but "
        f"there are {len(others)}{place}{listed}. {remedy}"
    )


def nonfinite(tensor: str | None, model: Hashable) -> str:
    """The message about an input that cannot be merged."""
    return (
        f"nuslerp: tensor {tensor} of model {model} contains NaN or infinity. "
        "The checkpoint is damaged or its training diverged; use another one."
    )
