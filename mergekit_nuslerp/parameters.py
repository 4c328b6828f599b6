# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The parameters of the merge method, declared once for all adapters.

mergekit resolves gradients and filters; what it resolves for one weight comes here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, get_args

import yaml
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

LOG = logging.getLogger(__package__)

MIN_MODELS = 2
_PREFIX = "nuslerp_"
_LARGEST_WEIGHT = 1e300

# Of the tensors that a warning is about, as many are named, and how many have been.
_NAMED_TENSORS = 3
_WARNED: Counter[str] = Counter()


class ConfigError(ValueError):
    """A merge configuration that cannot be run, found before any weight is read."""


def _named(value: str) -> str:
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
        description=f"one of {', '.join(granularity.NAMES)} with a number for N",
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
_WITHOUT_PREFIX = {name.removeprefix(_PREFIX): name for name in FIELDS}

# mergekit 0.1.4 takes only numbers for parameters, and so does not have these.
NAMED = ("nuslerp_granularity", "nuslerp_magnitude")

# What it takes for `nuslerp_row_wise` to mean something.
_WITH_ROW_WISE = ("nuslerp_flatten", "nuslerp_granularity")


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
        given, remedy = f"is {value!r}", ""
        if value is None:
            given = "is missing"
            remedy = " End a list of filters with an entry for all, `- value: 0.5`."
        owner = "" if model is None else f" of model {model}"
        weight = "" if tensor is None else f" for tensor {tensor}"
        raise ConfigError(
            f"nuslerp: parameter {name!r}{owner}{weight} {given}, but must be "
            f"{field.description}. Write, say, {_example(name)}.{remedy}"
        ) from None


def _example(name: str) -> str:
    """How a parameter is written, for messages."""
    field = FIELDS.get(name)
    examples = field.examples if field else None
    return (examples or [f"`{name}` under `parameters`"])[0]


def choose_granularity(shared: Mapping[str, Any], *, tensor: str | None = None) -> str:
    """The granularity that three parameters ask for together.

    Args:
        shared: values of `Shared`, those that are missing or None not given.
        tensor: the weight they were resolved for, for the message.

    Raises:
        ConfigError: parameters that contradict each other.
    """
    flatten = shared.get("nuslerp_flatten")
    row_wise = shared.get("nuslerp_row_wise")
    named = shared.get("nuslerp_granularity")
    if named is None:
        return granularity.from_flags(
            flatten=flatten is not False, row_wise=bool(row_wise)
        )
    kind, _ = granularity.parse(named)
    # mergekit reads `nuslerp_row_wise` only where `nuslerp_flatten` is false.
    against = {
        "nuslerp_flatten": flatten is not None and flatten != (kind == "tensor"),
        "nuslerp_row_wise": row_wise is not None
        and {"row": row_wise, "column": not row_wise}.get(kind, False),
    }
    for flag, contradicts in against.items():
        if contradicts:
            where = f" for tensor {tensor}" if tensor else ""
            raise ConfigError(
                f"nuslerp: `{flag}: {str(shared[flag]).lower()}` contradicts "
                f"`nuslerp_granularity: {named}`{where}. Remove `{flag}`: "
                "`nuslerp_granularity` says it all."
            )
    return named


def check_together(
    shared: Mapping[str, Any],
    weights: Mapping[Hashable, float],
    *,
    has_base: bool,
    tensor: str | None,
    shape: Sequence[int] | None = None,
) -> str:
    """Check what no parameter shows alone, once for each weight.

    Args:
        shared: values of `Shared` under the names that users write.
        weights: that of each model but the base.
        has_base: whether task vectors are merged.
        tensor: the weight's name, for messages.
        shape: the weight's, if known.

    Returns:
        The granularity.

    Raises:
        ConfigError: naming the parameter and weight, and what to write instead.
    """
    where = f" for tensor {tensor}" if tensor else ""
    chosen = choose_granularity(shared, tensor=tensor)
    if shape is not None:
        check_block(chosen, tensor, shape)
    scale = shared.get("lambda", 1.0)
    if not has_base and scale != 1:
        raise ConfigError(
            f"nuslerp: parameter 'lambda'{where} is {scale}, but without a base model "
            "there are no task vectors to scale. Add `base_model`, or remove `lambda`."
        )
    values = list(weights.values())
    total = sum(values)
    if len(values) > MIN_MODELS and not sums_to_zero(values):
        for model, value in weights.items():
            if value / total < 0:
                raise ConfigError(
                    f"nuslerp: parameter 'weight' of model {model}{where} is {value}, "
                    f"but the weights of {len(values)} models, {values}, must not have "
                    "different signs: only two models have a line to go beyond. "
                    "Write weights of at least 0."
                )
    return chosen


def check_block(chosen: str, tensor: str | None, shape: Sequence[int]) -> None:
    """Refuse a granularity whose blocks do not divide a weight.

    Raises:
        ConfigError: naming the weight, and what to write instead.
    """
    try:
        granularity.vector_view((1, *shape), chosen)
    except ValueError as error:
        raise ConfigError(
            f"nuslerp: {_called(tensor)} has the shape {tuple(shape)}: {error}, or "
            "give weights that it does not fit another granularity with a filter."
        ) from None


def warn_of_zero_sum(weights: Sequence[float], tensor: str | None) -> None:
    """Say that the weights of a tensor cannot be normalised, if so."""
    if sums_to_zero(weights):
        _warn_of_tensor(
            "nuslerp: the weights of %s, %s, sum to zero; the models are weighted "
            "equally instead",
            _called(tensor),
            weights,
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


def check_config(config: BaseModel, source: str | None = None) -> None:
    """Refuse what mergekit would ignore, or warn where it always did.

    Args:
        config: mergekit's, of a merge by `nuslerp`.
        source: the YAML it was read from, which may hold more.

    Raises:
        ConfigError: a parameter that begins with `nuslerp_` and does not exist, or a
            new one that stands where mergekit does not read it; a model listed twice.
    """
    parts = list(_parts(config))
    _check_names(dict.fromkeys(_names_in(parts)))
    for part in parts:
        base = part.get("base_model") or parts[0].get("base_model")
        for name in ("models", "sources"):
            if part.get(name):
                _check_inputs(part[name], base)
    if source is not None:
        check_places(source)


def _check_inputs(inputs: Sequence[Any], base: Hashable | None) -> None:
    models = Counter(entry.model for entry in inputs)
    for model, times in models.items():
        if times > 1:
            raise ConfigError(
                f"nuslerp: model {model} is listed {times} times among the same "
                "inputs, but a merge takes each model once. Remove it or write another "
                "one; to merge layers of one model with each other, list it under a "
                "second path."
            )
    for entry in inputs:
        if "weight" in (vars(entry).get("parameters") or ()) and entry.model == base:
            _warn_of_no_effect(
                "weight",
                f"under the base model {base}. To stay closer to it, write a `lambda` "
                "below 1 at the top level.",
            )


def _check_names(given: Collection[tuple[str, bool]]) -> None:
    names = {name for name, _ in given}
    if "nuslerp_row_wise" in names and names.isdisjoint(_WITH_ROW_WISE):
        _warn_of_no_effect(
            "nuslerp_row_wise", "without `nuslerp_flatten: false`. Write both."
        )
    for name, of_model in given:
        if of_model and name in Shared.model_fields:
            _tell_of_place(name, "under a model, as it is the same for all")
        if name in FIELDS:
            continue
        short = name.removeprefix(_PREFIX)
        near = get_close_matches(short, _WITHOUT_PREFIX, 1, cutoff=0.75)
        hint = f" Did you mean {_WITHOUT_PREFIX[near[0]]!r}?" if near else ""
        if name.startswith(_PREFIX):
            raise ConfigError(
                f"nuslerp: there is no parameter {name!r}.{hint} The parameters are "
                f"{', '.join(FIELDS)}."
            )
        if near:
            _warn_of_no_effect(name, f"here.{hint}")


def _tell_of_place(name: str, place: str) -> None:
    """Refuse a parameter in a place where it has no effect, or warn of an old one.

    mergekit lets its own stand there, and configs may have them.
    """
    where = "" if name in PerModel.model_fields else " at the top level"
    hint = f"{place}. Write, say, {_example(name)}{where}."
    if name in NAMED or name not in FIELDS:
        raise ConfigError(f"nuslerp: parameter {name!r} has no effect {hint}")
    _warn_of_no_effect(name, hint)


@cache
def check_places(source: str) -> None:
    """Refuse new parameters outside of `parameters`, where mergekit drops them.

    Args:
        source: YAML, of one config or several.

    Raises:
        ConfigError: naming the parameter, and what to write instead.
    """
    for config in yaml.safe_load_all(source):
        if isinstance(config, dict) and config.get("merge_method") == "nuslerp":
            names = dict.fromkeys(_written(config))
            for name, in_place in names:
                # What is in place as well was written once, to be repeated by alias.
                if not in_place and (name, True) not in names:
                    _tell_of_place(name, "outside of `parameters`")


def _written(node: Any, *, in_place: bool = False) -> Iterator[tuple[str, bool]]:
    """Parameters of ours in a YAML document, and whether they are in `parameters`."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in FIELDS or str(name).startswith(_PREFIX):
                yield name, in_place
            elif name != "tokenizer":  # names tokens, which may be called anything
                yield from _written(value, in_place=name == "parameters")
    elif isinstance(node, list):
        for value in node:
            yield from _written(value)


@cache
def _warn_of_no_effect(name: str, hint: str) -> None:
    """Say that a parameter is ignored, once, although each tensor's planning asks."""
    LOG.warning("nuslerp: parameter %r has no effect %s", name, hint)


def parameter_names(config: BaseModel) -> Iterator[tuple[str, bool]]:
    """Names of all parameters in a config, and whether they stand under a model."""
    return _names_in(_parts(config))


def _names_in(parts: Iterable[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    for part in parts:
        for name in part.get("parameters") or ():
            yield name, "model" in part


def filters(config: BaseModel) -> Iterator[str]:
    """The parts of tensors' names that a config has values for."""
    for part in _parts(config):
        for setting in (part.get("parameters") or {}).values():
            for choice in setting if isinstance(setting, list) else [setting]:
                wanted = getattr(choice, "filter", None)
                if wanted is not None and wanted != "*":
                    yield wanted


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """The fields of a config's modules, slices and inputs, from the outside in."""
    # mergekit 0.1.4 has a config checked for each tensor, and looking for attributes
    # that are not there takes pydantic long. Hence dictionaries, and nothing within
    # parameters and names of models, which are most of a config.
    if isinstance(node, BaseModel):
        fields = vars(node)
        yield fields
        node = [fields[name] for name in fields if name not in ("parameters", "model")]
    elif isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _parts(part)


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
    if len(others) >= MIN_MODELS:
        return
    if tensor:
        remedy = (
            "The others do not have it. Use models with the same tensors, or "
            "`mergekit-pytorch --tensor-intersection`."
        )
    elif base is not None and len(models) == MIN_MODELS:
        remedy = (
            f"Besides the base model {base} there is only {others[0]}. To merge task "
            "vectors, list two models besides the base; to interpolate these two, list "
            "both under `models`, each with a `weight`, and remove `base_model`."
        )
    else:
        remedy = "List two different models besides `base_model`, each with a `weight`."
    raise ConfigError(
        f"nuslerp: at least {MIN_MODELS} models besides the base are merged, but there "
        f"{'is' if len(others) == 1 else 'are'} {len(others)}{where}{listed}. {remedy}"
    )


def check_gathered(
    models: Iterable[Hashable], gathered: Collection[Hashable], tensor: str
) -> None:
    """Refuse to merge a tensor without models that mergekit drops from it.

    It takes as many of the last slice's models for what comes after the layers as the
    first slice has.

    Raises:
        ConfigError: naming the models, and what to write instead.
    """
    dropped = [str(model) for model in models if model not in gathered]
    if dropped:
        raise ConfigError(
            f"nuslerp: tensor {tensor} would be merged without {', '.join(dropped)}, "
            "as the first slice has fewer sources than the last and mergekit takes its "
            "number for what comes after the layers. List as many sources in the first "
            "slice, with `weight: 0` where they are to have no part."
        )


def nonfinite(tensor: str | None, model: Hashable, *, is_base: bool) -> str:
    """The message about an input that cannot be merged."""
    owner = f"the base model {model}" if is_base else f"model {model}"
    return (
        f"nuslerp: {_called(tensor)} of {owner} contains NaN or infinity. "
        "The checkpoint is damaged, its training diverged, or the config's `dtype` "
        "cannot hold its numbers; use another one."
    )


def unlike_shapes(
    tensor: str, shapes: Mapping[Any, Sequence[int]], *, vocabulary: bool
) -> str:
    """The message about a weight that has another shape in one of the models."""
    found = ", ".join(f"{tuple(shape)} in {model}" for model, shape in shapes.items())
    if vocabulary and len({tuple(shape[1:]) for shape in shapes.values()}) == 1:
        remedy = (
            "For models of different vocabularies write `tokenizer_source: union` (or "
            "`base`)."
        )
    else:
        remedy = "Models of different sizes cannot be merged: use others."
    return f"nuslerp: tensor {tensor} differs in shape: {found}. {remedy}"


def _called(tensor: str | None) -> str:
    return f"tensor {tensor}" if tensor else "a tensor"
