# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The parameters of the merge method, declared once for all adapters, and messages.

mergekit resolves gradients and filters; what it resolves for one weight comes here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Annotated, Any, get_args

from click import ClickException
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
)

from mergekit_nuslerp import granularity
from mergekit_nuslerp.geometry import Magnitude, sums_to_zero
from mergekit_nuslerp.kernel import NonFiniteError, RangeError
from mergekit_nuslerp.messages import brief, printable, shortened

LOG = logging.getLogger(__package__)

MIN_MODELS = 2
PREFIX = "nuslerp_"
_LARGEST_WEIGHT = 1e300

# Of the tensors that a warning is about, as many are named in one merge.
_NAMED_TENSORS = 3


class ConfigError(ClickException, ValueError):
    """A merge configuration that cannot be run, found before any weight is read.

    mergekit's commands print its message without a traceback, as they are click's.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def _named(value: str) -> str:
    if value != granularity.HEAD:
        granularity.parse(value)
    if value == granularity.FIRST_DIMENSION:
        raise ValueError("written as flags")
    return value


class PerModel(BaseModel):
    """Parameters that each model but the base has its own value of."""

    weight: float = Field(
        # So that sums of weights are finite too.
        ge=-_LARGEST_WEIGHT,
        le=_LARGEST_WEIGHT,
        allow_inf_nan=False,
        description=f"a finite number, of at most {_LARGEST_WEIGHT:g} in size",
        examples=["`parameters: {weight: 0.5}` under each model but the base"],
    )


class _Named(BaseModel):
    """Those parameters of `Shared` whose names Python can spell."""

    nuslerp_row_wise: bool | None = Field(
        default=None,
        description="true or false",
        examples=["`nuslerp_row_wise: false` under `parameters`"],
    )
    nuslerp_flatten: bool | None = Field(
        default=None,
        description="true or false",
        examples=["`nuslerp_flatten: true` under `parameters`"],
    )
    nuslerp_granularity: Annotated[str, AfterValidator(_named)] | None = Field(
        default=None,
        description=f"one of {', '.join(granularity.NAMES)}, {granularity.HEAD} with a "
        "number for N",
        examples=["`nuslerp_granularity: row` under `parameters`"],
    )
    nuslerp_magnitude: Magnitude = Field(
        default="slerp",
        description=f"one of {', '.join(get_args(Magnitude))}",
        examples=["`nuslerp_magnitude: linear` under `parameters`"],
    )


_lambda = Field(
    default=1.0,
    allow_inf_nan=False,
    description="a finite number",
    examples=["`lambda: 0.5` under `parameters`"],
)
_unspellable: dict[str, Any] = {"lambda": (float, _lambda)}

# Parameters with one value for all models.
Shared: type[BaseModel] = create_model("Shared", __base__=_Named, **_unspellable)

FIELDS = {**PerModel.model_fields, **Shared.model_fields}
_SHORT_NAMES = {name.removeprefix(PREFIX): name for name in FIELDS}
DEFAULTS = {name: field.default for name, field in Shared.model_fields.items()}

# The parameters that are words. mergekit 0.1.4 takes only numbers.
WORDS = ("nuslerp_granularity", "nuslerp_magnitude")

# Of other methods, and what to say of them.
_OF_OTHERS = {
    "t": "It belongs to slerp; weights 0.3 and 0.7 are t = 0.7.",
    "density": "It belongs to methods that drop elements, such as ties.",
    "normalize": "The weights of nuslerp are always relative.",
}


# --- Values ------------------------------------------------------------------------


def type_of(name: str) -> Any:
    """The type of a parameter's values, with what restricts them."""
    return Annotated[FIELDS[name].annotation, FIELDS[name]]


@cache
def _adapter(name: str) -> TypeAdapter:
    return TypeAdapter(type_of(name))


def validate(
    name: str, value: Any, *, model: Hashable | None = None, where: str = ""
) -> Any:
    """Check and convert one parameter's value, None if the config gives none."""
    try:
        return _adapter(name).validate_python(value)
    except ValidationError:
        raise unfit(name, value, model=model, where=where) from None


def unfit(
    name: str,
    value: Any,
    *,
    model: Hashable | None = None,
    where: str = "",
    only_numbers: bool = False,
) -> ConfigError:
    """The error about a value that a parameter, which may not exist, cannot have.

    Args:
        only_numbers: whether mergekit takes no words for parameters.
    """
    owner = "" if model is None else f" of model {model}"
    given = "is missing" if value is None else f"is {brief(value)}"
    subject = f"nuslerp: parameter {name!r}{owner}{where}"
    if name not in FIELDS:
        if name.startswith(PREFIX):
            return _unknown(name)
        return ConfigError(
            f"{subject} {given}, which is no value for a parameter, and nuslerp does "
            f"not read it. Remove it.{_hint(name)}"
        )
    if only_numbers and name in WORDS:
        instead = ", or use `nuslerp_flatten` and `nuslerp_row_wise`"
        return ConfigError(
            f"{subject} takes a word, and this mergekit takes only numbers. Install "
            "mergekit 0.1.5 (`pip install mergekit==0.1.5`)"
            f"{instead if name == 'nuslerp_granularity' else ''}."
        )
    remedy = ""
    if value is None:
        remedy = " End a list of filters with an entry for all, `- value: 0.5`."
    elif isinstance(value, (list, dict)):
        remedy = (
            " In a list of filters each needs one: `- {filter: mlp, value: ...}`, and "
            "for all others `- value: ...`."
        )
    return ConfigError(
        f"{subject} {given}, but must be {FIELDS[name].description}. Write, say, "
        f"{_example(name)}.{remedy}"
    )


def _example(name: str) -> str:
    """How a parameter is written, for messages."""
    field = FIELDS.get(name)
    examples = field.examples if field else None
    return (examples or [f"`{name}` under `parameters`"])[0]


def choose_granularity(shared: Mapping[str, Any], *, where: str = "") -> str:
    """The granularity that three parameters, as far as given, ask for together."""
    flatten = shared.get("nuslerp_flatten")
    row_wise = shared.get("nuslerp_row_wise")
    named = shared.get("nuslerp_granularity")
    if named is None:
        # mergekit's `nuslerp_row_wise: true` makes vectors run along dimension 0, so
        # that one is a *column* of a matrix; `false` along the last, and one is a row.
        by_row = granularity.FIRST_DIMENSION if row_wise else "row"
        return "tensor" if flatten is not False else by_row
    kind = named if named == granularity.HEAD else granularity.parse(named)[0]
    # mergekit reads `nuslerp_row_wise` only where `nuslerp_flatten` is false.
    against = {
        "nuslerp_flatten": flatten is not None and flatten != (kind == "tensor"),
        "nuslerp_row_wise": row_wise is not None
        and {"row": row_wise, "column": not row_wise}.get(kind, False),
    }
    for flag, contradicts in against.items():
        if contradicts:
            raise ConfigError(
                f"nuslerp: `{flag}: {str(shared[flag]).lower()}` contradicts "
                f"`nuslerp_granularity: {named}`{where}. Remove `{flag}`: "
                "`nuslerp_granularity` says it all."
            )
    return named


@dataclass(frozen=True)
class Values:
    """What the parameters of one weight come to."""

    weights: tuple[float, ...]
    granularity: str
    magnitude: Magnitude
    lambda_: float


def resolve(
    shared: Mapping[str, Any],
    weights: Iterable[tuple[Hashable, Any]],
    *,
    has_base: bool,
    tensor: str | None = None,
) -> Values:
    """Check and convert the parameters of one weight.

    Args:
        shared: values of `Shared`, not yet checked.
        weights: each model but the base and its weight, None where there is none.
        has_base: whether task vectors are merged.
        tensor: the weight's name, for messages.
    """
    given, weights = tuple(shared.items()), list(weights)
    numbers = tuple(weight for _, weight in weights)
    try:
        return _resolve(given, numbers, has_base)
    except (ConfigError, TypeError):  # once more, for a message that names the weight
        where = f" for tensor {tensor}" if tensor else ""
        models = tuple(str(model) for model, _ in weights)
        return _resolve.__wrapped__(given, numbers, has_base, models, where)


@lru_cache(maxsize=1024)  # most weights of a merge have the same
def _resolve(
    shared: tuple[tuple[str, Any], ...],
    weights: tuple[Any, ...],
    has_base: bool,
    models: tuple[str, ...] = (),
    where: str = "",
) -> Values:
    given = {**DEFAULTS, **dict(shared)}
    values = {name: validate(name, given[name], where=where) for name in DEFAULTS}
    models = models or ("",) * len(weights)
    numbers = [
        validate("weight", weight, model=model, where=where)
        for model, weight in zip(models, weights)
    ]
    scale = values["lambda"]
    if not has_base and scale != 1:
        raise ConfigError(
            f"nuslerp: parameter 'lambda'{where} is {scale}, but without a base model "
            "there are no task vectors to scale. Add `base_model`, or remove `lambda`."
        )
    total = sum(numbers)
    if len(numbers) > MIN_MODELS and not sums_to_zero(numbers):
        for model, number in zip(models, numbers):
            if number / total < 0:
                raise ConfigError(
                    f"nuslerp: parameter 'weight' of model {model}{where} is {number}, "
                    f"but the weights of {len(numbers)} models, {brief(numbers)}, must "
                    "not have different signs: only two models have a line to go "
                    "beyond. Write weights of at least 0."
                )
    chosen = choose_granularity(values, where=where)
    return Values(tuple(numbers), chosen, values["nuslerp_magnitude"], scale)


def check_block(
    chosen: str,
    tensor: str | None,
    shape: Sequence[int],
    head_size: int | None = None,
) -> None:
    """Refuse a granularity whose blocks do not divide a weight.

    Args:
        head_size: of the models, if it is known.
    """
    try:
        granularity.vector_view((1, *shape), chosen)
    except ValueError as error:
        heads = f" A head of these models has {head_size} numbers." if head_size else ""
        raise ConfigError(
            f"nuslerp: {_called(tensor)} has the shape {tuple(shape)}: {error}, or "
            "give weights that it does not fit another granularity with a filter."
            f"{heads}"
        ) from None


# --- Names -------------------------------------------------------------------------


def check_name(name: str, *, of_model: bool) -> None:
    """Refuse a parameter in `parameters` that is new and not read, or warn of it."""
    if of_model and name in Shared.model_fields:
        check_place(name, "under a model, as it is the same for all")
    elif name.startswith(PREFIX) and name not in FIELDS:
        raise _unknown(name)
    elif name not in FIELDS:
        warn_of_no_effect(name, f"here: nuslerp does not read it.{_hint(name)}")


def check_place(name: str, place: str = "outside of `parameters`") -> None:
    """Refuse a parameter in a place where it has no effect, or warn of an old one.

    mergekit lets its own stand there, and configs may have them.
    """
    if name not in FIELDS and not name.startswith(PREFIX):
        return warn_of_no_effect(name, f"{place}.{_hint(name)}")
    where = "" if name in PerModel.model_fields else " at the top level"
    hint = f"{place}. Write, say, {_example(name)}{where}."
    if name in WORDS or name not in FIELDS:
        raise ConfigError(f"nuslerp: parameter {name!r} has no effect {hint}")
    return warn_of_no_effect(name, hint)


@cache
def is_like_a_parameter(name: Hashable) -> bool:
    """Whether a key outside of `parameters` was meant to be a parameter."""
    name = str(name)
    return name in FIELDS or name.startswith(PREFIX) or bool(_hint(name))


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"nuslerp: there is no parameter {name!r}.{_hint(name)} The parameters are "
        f"{', '.join(FIELDS)}."
    )


@cache
def _hint(name: str) -> str:
    """What was meant by a name that nuslerp does not read, if that can be told."""
    if name in _OF_OTHERS:
        return f" {_OF_OTHERS[name]}"
    near = get_close_matches(name.removeprefix(PREFIX), _SHORT_NAMES, 1, cutoff=0.75)
    return f" Did you mean {_SHORT_NAMES[near[0]]!r}?" if near else ""


# --- Models ------------------------------------------------------------------------


def check_models(
    models: Sequence[Hashable],
    base: Hashable | None,
    *,
    place: str | None = None,
    tensor: str | None = None,
) -> None:
    """Refuse a merge of fewer than two models besides the base.

    Args:
        models: all inputs, the base among them if there is one.
        place: the part of the config concerned, for the message.
        tensor: the tensor that the models were found to have, while merging.
    """
    where = f" for tensor {tensor}" if tensor else f" in {place}" if place else ""
    others = [str(model) for model in models if model != base]
    listed = f" ({', '.join(others)})" if others else ""
    lacks_base = base is not None and base not in models
    if len(others) >= MIN_MODELS and not lacks_base:
        return
    if tensor:
        lacking = f"The base model {base} does" if lacks_base else "The others do"
        remedy = (
            f"{lacking} not have it. Use models with the same tensors, or "
            "`mergekit-pytorch --tensor-intersection`."
        )
    elif lacks_base:
        remedy = (
            f"The base model {base} is not among the models{listed}. Add it to the "
            "sources, without a weight, or remove `base_model`."
        )
    elif base is not None and len(others) == 1:
        remedy = (
            f"Besides the base model {base} there is only {others[0]}. To merge task "
            "vectors, list two models besides the base; to interpolate these two, list "
            "both under `models`, each with a `weight`, and remove `base_model`."
        )
    else:
        remedy = (
            "List two different models besides `base_model`, each with a `weight`. To "
            "take one model as it is, list another one with `weight: 0`."
        )
    raise ConfigError(
        f"nuslerp: at least {MIN_MODELS} models and the base, if there is one, are "
        f"merged, but there {'is' if len(others) == 1 else 'are'} {len(others)}{where}"
        f"{listed}. {remedy}"
    )


# --- Warnings ----------------------------------------------------------------------

# How many tensors of the merge each warning has been about.
_WARNED: Counter[str] = Counter()


def start_merge() -> None:
    """Count the tensors that warnings are about anew."""
    _WARNED.clear()


def warn_of_no_effect(name: str, hint: str) -> None:
    """Say that a parameter is ignored."""
    LOG.warning("nuslerp: parameter %r has no effect %s", name, hint)


def warn_of_zero_sum(weights: Sequence[float], tensor: str | None) -> None:
    """Say that the weights of a tensor cannot be normalised, if so."""
    if sums_to_zero(weights):
        _warn_of_tensor(
            "nuslerp: the weights of %s, %s, sum to zero; the models are weighted "
            "equally instead",
            _called(tensor),
            list(weights),
        )


def warn_of_linear(linear: int, vectors: int, tensor: str | None) -> None:
    """Say how many vectors of a tensor have been merged linearly."""
    if linear:
        _warn_of_tensor(
            "nuslerp: %d of %d vectors of %s have no unique spherical mean (they are "
            "opposite, or cancel); they are merged linearly instead",
            linear,
            vectors,
            _called(tensor),
        )


def warn_of_absent(absent: Sequence[Hashable], tensor: str) -> None:
    """Say that a tensor is merged without some of the models, if so."""
    if absent:
        _warn_of_tensor(
            "nuslerp: %s is merged without %s, which do%s not have it",
            _called(tensor),
            " and ".join(map(str, absent)),
            "es" if len(absent) == 1 else "",
        )


def _warn_of_tensor(message: str, *about: Any) -> None:
    """Warn of the first tensors, and tell of the others those who ask for more."""
    _WARNED[message] += 1
    LOG.log(
        logging.WARNING if _WARNED[message] <= _NAMED_TENSORS else logging.INFO,
        message,
        *about,
    )
    if _WARNED[message] == _NAMED_TENSORS:
        LOG.warning("nuslerp: further tensors like these are only told with --verbose")


# --- Tensors -----------------------------------------------------------------------


def named(
    error: NonFiniteError | RangeError,
    tensor: str | None,
    models: Sequence[Hashable],
    base: Hashable | None,
) -> Exception:
    """The kernel's error about one tensor, by names that users know."""
    if isinstance(error, RangeError):
        return out_of_range(tensor, error.reason)
    owner = f"the base model {base}"
    if error.model is not None:
        owner = f"model {models[error.model]}"
    return ValueError(
        f"nuslerp: {_called(tensor)} of {owner} contains NaN or infinity. "
        "The checkpoint is damaged, its training diverged, or the config's `dtype` "
        "cannot hold its numbers; use another one."
    )


def out_of_range(tensor: str | None, reason: str) -> OverflowError:
    """The error about a tensor whose merge its dtype cannot hold."""
    return OverflowError(
        f"nuslerp: {_called(tensor)}: {reason}. Write another `dtype`, or a smaller "
        "`lambda`."
    )


def _called(tensor: str | None) -> str:
    return f"tensor {printable(tensor)}" if tensor else "a tensor"
