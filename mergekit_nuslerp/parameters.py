# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The parameters of the merge method, declared once for all adapters, and messages.

mergekit resolves gradients and filters; what it resolves for one weight comes here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args

from click import ClickException
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from mergekit_nuslerp import granularity
from mergekit_nuslerp.geometry import MOST_CONTRAST, Magnitude, sums_to_zero
from mergekit_nuslerp.kernel import NonFiniteError, RangeError
from mergekit_nuslerp.messages import brief, printable, shortened

LOG = logging.getLogger(__package__)

MIN_MODELS = 2
PREFIX = "nuslerp_"
_LARGEST_WEIGHT = 1e300  # so that sums of weights are finite too

# Of the tensors that a warning is about, as many are named in one merge.
_NAMED_TENSORS = 3


class ConfigError(ClickException, ValueError):
    """A merge configuration that cannot be run, found before any weight is read.

    mergekit's commands print its message without a traceback, as they are click's.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))

    def at(self, place: str) -> ConfigError:
        """The same error, with the place where it was found."""
        return ConfigError(f"{self.message} Found at {place}.")


# --- Values ------------------------------------------------------------------------


class Parameter(NamedTuple):
    type: Any  # with what restricts its values
    default: Any
    allowed: str
    example: str


def _check_granularity(value: str) -> str:
    if value != granularity.HEAD:
        granularity.parse(value)
    if value == granularity.FIRST_DIMENSION:
        raise ValueError("written as flags")
    return value


# With a value for each model but the base.
PER_MODEL = {
    "weight": Parameter(
        Annotated[float, Field(ge=-_LARGEST_WEIGHT, le=_LARGEST_WEIGHT)],
        None,
        f"a finite number between {-_LARGEST_WEIGHT:g} and {_LARGEST_WEIGHT:g}",
        "0.5",
    )
}

_GRANULARITIES = (
    f"one of {granularity.HEAD}, {', '.join(granularity.NAMES)}, with a number for N"
)

# With one value for all models.
SHARED = {
    "nuslerp_row_wise": Parameter(bool | None, None, "true or false", "false"),
    "nuslerp_flatten": Parameter(bool | None, None, "true or false", "true"),
    "nuslerp_granularity": Parameter(
        Annotated[str, AfterValidator(_check_granularity)] | None,
        None,
        _GRANULARITIES,
        "row",
    ),
    "nuslerp_magnitude": Parameter(
        Magnitude, "slerp", f"one of {', '.join(get_args(Magnitude))}", "linear"
    ),
    "nuslerp_contrast": Parameter(
        Annotated[float, Field(ge=0, le=MOST_CONTRAST)],
        1.0,
        f"a number between 0 and {MOST_CONTRAST}",
        "2",
    ),
    "lambda": Parameter(
        Annotated[float, Field(allow_inf_nan=False)], 1.0, "a finite number", "0.5"
    ),
}

PARAMETERS = PER_MODEL | SHARED
DEFAULTS = {name: parameter.default for name, parameter in SHARED.items()}

# The parameters that are words. mergekit 0.1.4 takes only numbers.
WORDS = ("nuslerp_granularity", "nuslerp_magnitude")

_CHECKS = {name: TypeAdapter(it.type) for name, it in PARAMETERS.items()}


def validate(name: str, value: Any, model: Hashable | None = None) -> Any:
    """Check and convert one parameter's value, None if the config gives none."""
    try:
        return _CHECKS[name].validate_python(value)
    except ValidationError:
        raise unfit(name, value, model) from None


def unfit(name: str, value: Any, model: Hashable | None = None) -> ConfigError:
    """The error about a value that a parameter, which may not exist, cannot have."""
    if name not in PARAMETERS:
        return _unknown(name)
    owner = "" if model is None else f" of model {model}"
    state = "is missing" if value is None else f"is {brief(value)}"
    message = f"nuslerp: parameter {name!r}{owner} {state}, but must be "
    message += f"{PARAMETERS[name].allowed}. For example: {_example(name)}."
    if value is None or isinstance(value, (list, dict)):
        message += " A list of filters has a `value` in each entry and ends with one "
        message += "for all other tensors: `[{filter: mlp, value: ...}, {value: ...}]`."
    return ConfigError(message)


def _example(name: str) -> str:
    value = PARAMETERS[name].example
    if name in SHARED:
        return f"`{name}: {value}` under `parameters` at the top level"
    return f"`parameters: {{{name}: {value}}}` under each model but the base"


def choose_granularity(shared: Mapping[str, Any]) -> str:
    """The granularity that three parameters, as far as given, ask for together."""
    flatten = shared.get("nuslerp_flatten")
    row_wise = shared.get("nuslerp_row_wise")
    name = shared.get("nuslerp_granularity")
    if name is None:
        # mergekit's `nuslerp_row_wise: true` makes vectors run along dimension 0, so
        # that one is a *column* of a matrix; `false` along the last, and one is a row.
        by_row = granularity.FIRST_DIMENSION if row_wise else "row"
        return "tensor" if flatten is not False else by_row
    kind = name if name == granularity.HEAD else granularity.parse(name)[0]
    # mergekit reads `nuslerp_row_wise` only where `nuslerp_flatten` is false.
    fitting = {
        "nuslerp_flatten": kind == "tensor",
        "nuslerp_row_wise": {
            "row": False,
            "column": True,
            granularity.ROW_COLUMN: None,
        }.get(kind, row_wise),
    }
    for flag, value in fitting.items():
        if shared.get(flag) not in (None, value):
            raise ConfigError(
                f"nuslerp: `{flag}: {str(shared[flag]).lower()}` contradicts "
                f"`nuslerp_granularity: {name}`. Remove `{flag}`."
            )
    return name


class Values(NamedTuple):
    """What the parameters of one weight come to."""

    weights: tuple[float, ...]
    granularity: str
    magnitude: Magnitude
    contrast: float
    lambda_: float


def resolve(
    shared: Mapping[str, Any],
    weights: Sequence[tuple[Hashable, Any]],
    has_base: bool,
) -> Values:
    """Check and convert what the config gives for one weight, None where nothing."""
    settings = {**DEFAULTS, **dict(shared)}
    values = {name: validate(name, settings[name]) for name in DEFAULTS}
    numbers = tuple(validate("weight", weight, model) for model, weight in weights)
    scale = values["lambda"]
    if not has_base and scale != 1:
        raise ConfigError(
            f"nuslerp: parameter 'lambda' is {scale}, but without a base model there "
            "are no task vectors to scale. Add `base_model`, or remove `lambda`."
        )
    kind, contrast = choose_granularity(values), values["nuslerp_contrast"]
    refusing = ""
    if len(numbers) > MIN_MODELS:
        refusing = "of more than two models"
    elif kind == granularity.ROW_COLUMN:
        refusing = f"with `nuslerp_granularity: {kind}`"
    elif contrast != 1:
        refusing = f"with `nuslerp_contrast: {contrast:g}`"
    if refusing and not sums_to_zero(numbers):
        total = sum(numbers)
        for (model, _), number in zip(weights, numbers):
            if number / total < 0:
                raise ConfigError(
                    f"nuslerp: parameter 'weight' of model {model} is {number}, but "
                    f"weights {refusing}, {brief(list(numbers))}, must all have the "
                    "same sign. Write weights of at least 0."
                )
    return Values(numbers, kind, values["nuslerp_magnitude"], contrast, scale)


def check_block(
    kind: str, tensor: str | None, shape: Sequence[int], head_size: int | None = None
) -> None:
    """Refuse a granularity whose blocks do not divide a weight."""
    try:
        granularity.vector_view((1, *shape), kind)
    except ValueError as error:
        heads = f" A head of these models has {head_size} numbers." if head_size else ""
        raise ConfigError(
            f"nuslerp: {tensor_label(tensor)} has the shape {tuple(shape)}: {error}, "
            f"or use a filter to give such tensors another granularity.{heads}"
        ) from None


_SHORT_NAMES = {name.removeprefix(PREFIX): name for name in PARAMETERS}

# Of other methods, and what to say of them.
_OF_OTHERS = {
    "t": "It belongs to slerp; weights 0.3 and 0.7 are t = 0.7.",
    "density": "It belongs to methods that drop elements, such as ties.",
    "normalize": "The weights of nuslerp are always relative.",
}


def check_name(name: str, place: str = "") -> None:
    """Refuse a new parameter that has no effect in a place, or warn of an old one.

    mergekit ignores its own without a word, and configs may have them.
    """
    if name not in PARAMETERS:
        if name.startswith(PREFIX):
            raise _unknown(name)
        warn_of_no_effect(name, f"{place}. nuslerp does not read it.{_hint(name)}")
    elif place:
        hint = f"{place}. Write it in its place, for example {_example(name)}."
        if name in (*WORDS, "nuslerp_contrast"):
            raise ConfigError(f"nuslerp: parameter {name!r} has no effect{hint}")
        warn_of_no_effect(name, hint)


@cache
def is_like_a_parameter(key: Hashable) -> bool:
    """Whether a key outside of `parameters` was meant to be a parameter."""
    name = str(key)
    return name in PARAMETERS or name.startswith(PREFIX) or bool(_hint(name))


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"nuslerp: there is no parameter {name!r}.{_hint(name)} The parameters, which "
        f"are written under `parameters`, are {', '.join(PARAMETERS)}."
    )


def _hint(name: str) -> str:
    """What was meant by a name that nuslerp does not read, if that can be told."""
    if name in _OF_OTHERS:
        return f" {_OF_OTHERS[name]}"
    near = get_close_matches(name.removeprefix(PREFIX), _SHORT_NAMES, 1, cutoff=0.75)
    return f" Did you mean {_SHORT_NAMES[near[0]]!r}?" if near else ""


def check_models(
    models: Sequence[Hashable],
    base: Hashable | None,
    *,
    place: str = "the config",
    tensor: str | None = None,  # which the models were found to have, while merging
) -> None:
    """Refuse a merge of fewer than two models besides the base."""
    others = [str(model) for model in models if model != base]
    where, listed = f"in {place}", f"({', '.join(others)})"
    if base is not None and base not in models:
        problem = f"the base model {base} is not among the models {listed}"
        remedy = "Add it to the sources, without a weight, or remove `base_model`."
    elif len(others) >= MIN_MODELS:
        return
    elif base is not None and others:
        problem = f"besides the base model {base} there is only {others[0]}"
        remedy = (
            "To merge task vectors, list another model. To interpolate these two, "
            "remove `base_model` and give each of them a `weight`."
        )
    else:
        problem = f"a merge takes two models besides the base, not {len(others)}"
        problem += f" {listed}" if others else ""
        remedy = "List another one, with `weight: 0` if it is to have no part."
    if tensor:
        where = f"that have tensor {printable(tensor)}"
        hint = "`mergekit-pytorch --tensor-intersection`"
        remedy = f"Use models with the same tensors, or {hint}."
    raise ConfigError(f"nuslerp: {problem} {where}. {remedy}")


# How many tensors of the merge each warning has been about.
WARNED: Counter[str] = Counter()


def warn_of_no_effect(name: str, hint: str) -> None:
    LOG.warning("nuslerp: parameter %r has no effect%s", name, hint)


def warn_of_tensor(tensor: str | None, message: str, *about: Any) -> None:
    """Warn of the first tensors, and tell of the others those who ask for more."""
    WARNED[message] += 1
    level = logging.WARNING if WARNED[message] <= _NAMED_TENSORS else logging.INFO
    LOG.log(level, f"nuslerp: %s {message}", tensor_label(tensor), *about)
    if WARNED[message] == _NAMED_TENSORS:
        LOG.warning("nuslerp: more tensors like these are listed only with --verbose")


def user_error(
    error: NonFiniteError | RangeError,
    tensor: str | None,
    models: Sequence[Hashable],
    base: Hashable | None,
) -> Exception:
    """The kernel's error about one tensor, by names that users know."""
    _, detail = error.args
    if isinstance(error, RangeError):
        return OverflowError(
            f"nuslerp: {tensor_label(tensor)}: {detail}. Write another `dtype`, or a "
            "smaller `lambda`."
        )
    owner = f"the base model {base}" if detail is None else f"model {models[detail]}"
    return ValueError(
        f"nuslerp: {tensor_label(tensor)} of {owner} contains NaN or infinity. The "
        "checkpoint is damaged, its training diverged, or the config's `dtype` is too "
        "small for its numbers; write another one."
    )


def tensor_label(tensor: str | None) -> str:
    return f"tensor {printable(tensor)}" if tensor else "a tensor"
