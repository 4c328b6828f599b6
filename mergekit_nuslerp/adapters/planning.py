# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The two places where the plugin hooks into mergekit's planning, and their checks.

`MergeConfiguration.model_validate` sees a config as it is written, before unknown keys
are dropped; `MergePlanner._plan` has the config, and every weight's models and
parameters when it returns. Where a mergekit has moved one of them, its checks are left
out, and what a weight cannot be merged by is refused when its turn comes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from mergekit_nuslerp import METHODS, heads, parameters, plugin, stored
from mergekit_nuslerp.adapters import tokens, written
from mergekit_nuslerp.geometry import sums_to_zero
from mergekit_nuslerp.granularity import HEAD
from mergekit_nuslerp.kernel import (
    NonFiniteError,
    RangeError,
    merge_batch,
    refuse_infinite,
)
from mergekit_nuslerp.parameters import LOG, WORDS, ConfigError, tensor_label

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# Each as the module, the class and its method that is wrapped.
SEAMS = {
    "config": ("mergekit.config", "MergeConfiguration", "model_validate"),
    "plan": ("mergekit.plan", "MergePlanner", "_plan"),
}

# Those of mergekit's dtypes in which a merge can be worked out.
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def attach() -> None:
    """Wrap both methods, as far as mergekit has been imported. May be repeated."""
    wraps_of = zip(SEAMS.values(), (_checked_config, _checked_plan))
    for (module, name, attribute), wrap in wraps_of:
        owner = getattr(sys.modules.get(module), name, None)
        own = getattr(owner, attribute, None)
        if own is not None and not hasattr(own, "mergekit_nuslerp"):
            is_plain = own is vars(owner).get(attribute)
            wrapper = wrap(getattr(own, "__func__", own))
            wrapper.mergekit_nuslerp = True  # type: ignore[attr-defined]
            setattr(owner, attribute, wrapper if is_plain else classmethod(wrapper))


# --- A config as it is written -----------------------------------------------------


def _checked_config(validate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(validate)
    def model_validate(cls: Any, config: Any, *args: Any, **options: Any) -> Any:
        attach()  # the planner may have come since
        if not isinstance(config, dict) or config.get("merge_method") not in METHODS:
            return validate(cls, config, *args, **options)
        written.check_written(config)
        try:
            result = validate(cls, config, *args, **options)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise written.misfit(config, first) from None
        except RuntimeError as error:  # as mergekit's own validators raise
            raise ConfigError(f"config: {error}") from None
        for _, place, inputs, _ in _inputs(result):
            if not inputs:
                raise ConfigError(f"config: `{place}.sources` must list models.")
        return result

    return model_validate


# --- A plan ------------------------------------------------------------------------


@dataclass(eq=False)
class Planned:
    """How one tensor is to be merged, whichever mergekit planned it."""

    name: Any  # None where a caller gives none
    base: Any
    shared: Mapping[str, Any]  # as mergekit resolved them for this tensor
    weights: Sequence[tuple[Any, Any]]  # each model but the base, and its weight
    tensors: Any = None  # the task that gathers them, where there is a plan
    info: Any = None  # mergekit's WeightInfo
    shape: Sequence[int] | None = None  # of the loaded weight
    out_dtype: Any = None  # what mergekit converts the result to, if to anything

    @property
    def key(self) -> Hashable:
        """What the values depend on."""
        weights = tuple([weight for _, weight in self.weights])
        return tuple(self.shared.items()), weights, self.base is None

    @cached_property
    def values(self) -> parameters.Values:
        """The parameters, checked and converted."""
        try:
            values = parameters.resolve(
                self.shared, self.weights, self.base is not None
            )
        except ConfigError as error:
            raise error.at(tensor_label(self.name)) from None
        kind = values.granularity
        if kind != HEAD and ":" not in kind:
            return values
        # Files take a while to read.
        shape = stored_shape(self.tensors) if self.shape is None else self.shape
        models = [*(model for model, _ in self.weights), self.base]
        configs = {m: stored.config_of(m) for m in models if m is not None}
        if kind == HEAD:
            kind = heads.granularity_of(str(self.name), configs, shape)
        if shape is not None:
            size = heads.head_size(configs)
            parameters.check_block(kind, self.name, shape, size)
        return values._replace(granularity=kind)


# The tensors of the latest plan, by name.
_latest: dict[str, Planned] = {}


def _checked_plan(plan: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plan)
    def _plan(self: Any) -> Any:
        config = self.config
        if config.merge_method not in METHODS:
            return plan(self)
        plugin.try_merge()
        parameters.WARNED.clear()
        _latest.clear()
        settings = list(settings_of(config))
        integers = _check_config(self, settings)
        try:
            result = plan(self)  # changes the config
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"nuslerp: mergekit cannot plan this: {error}") from error
        planned = plugin.adapter().planned
        entries = [entry for _, task in self._tensors if (entry := planned(task))]
        out_dtype = _dtype(config.out_dtype)
        for entry in entries:
            entry.out_dtype = out_dtype
        _latest.update((entry.name, entry) for entry in entries)
        # Most tensors have the same values, but blocks may not fit one of them.
        distinct = {entry.key: entry for entry in reversed(entries)}
        words = {str(dict(entry.shared).get(WORDS[0])) for entry in distinct.values()}
        has_blocks = any(":" in word or word == HEAD for word in words)
        for entry in entries if has_blocks else reversed(distinct.values()):
            entry.values  # noqa: B018 (refuses what does not fit)
        dtypes = [each for each in (_dtype(config.dtype), out_dtype) if each]
        is_inspection = getattr(self, "is_inspection", False)
        for entry in entries:
            if entry.info.optional:  # or mergekit says what is missing
                _check_present(entry, warn=not is_inspection)
        _check_integers(entries, integers, dtypes)
        if not is_inspection:  # which has this in its report
            plugin.announce_merge()
            for text in unmatched(settings, entries):
                LOG.warning("nuslerp: no tensor's name contains the filter %r", text)
            for module in left_out(self):
                message = "nuslerp: the config has no module %r: it is left out"
                LOG.warning(message, module)
        return result

    return _plan


def _inputs(config: Any) -> Iterator[tuple[str, str, Sequence[Any], Any]]:
    """Where models are listed: the module, if it has a name, the place in the config,
    the entries, and the base that goes with them."""
    for name, module in {"": config, **(config.modules or {})}.items():
        path = f"modules.{name}." if name else ""
        if module.models:
            yield name, f"{path}models", module.models, config.base_model
        for number, part in enumerate(module.slices or ()):
            base = part.base_model or config.base_model
            yield name, f"{path}slices[{number}]", part.sources, base


def settings_of(config: Any) -> Iterator[tuple[Any, str, str | None, Any]]:
    """All parameters in a config: the model they stand under, if they do, the name, the
    filter, if there is one, and the value, or one after the other those of a gradient.
    """
    parts = [config, *(config.modules or {}).values()]
    parts += [part for module in parts for part in module.slices or ()]
    parts += [entry for _, _, inputs, _ in _inputs(config) for entry in inputs]
    for part in parts:
        for name, setting in (part.parameters or {}).items():
            for choice in written.listed(setting):
                text = getattr(choice, "filter", None)
                for value in written.listed(getattr(choice, "value", choice)):
                    yield getattr(part, "model", None), name, text, value


def unmatched(settings: Iterable[Any], tensors: Iterable[Planned]) -> list[str]:
    """The filters in a config that no tensor's name contains, here or in a model."""
    filters = dict.fromkeys(text for _, _, text, _ in settings)
    wanted = [text for text in filters if text not in (None, "*")]
    names = {
        getattr(info, "name", entry.name)
        for entry in (tensors if wanted else ())
        for info in (entry, *sources(entry.tensors).values())
    }
    return [text for text in wanted if not any(text in name for name in names)]


def left_out(planner: Any) -> list[str]:
    """Modules of the models that the merged one will not have."""
    planned = planner.config.modules
    return [name for name in planner.arch_info.modules if name not in planned]


def _check_config(planner: Any, settings: Sequence[Any]) -> set[str]:
    """Refuse or warn of what mergekit ignores, and return the tensors of integers."""
    config, modules = planner.config, planner.arch_info.modules
    for module in config.modules or ():
        if module not in modules:
            hint = f"in these models. Theirs are {', '.join(modules)}."
            raise ConfigError(f"config: there is no module {module!r} {hint}")
    for field in ("dtype", "out_dtype"):
        name = getattr(config, field)
        if name and name.removeprefix("torch.") not in _DTYPES:
            raise ConfigError(
                f"config: `{field}` is {name!r}, but must be one of "
                f"{', '.join(_DTYPES)}. For example: `{field}: bfloat16`."
            )
    places = {(name, model is not None) for model, name, _, _ in settings}
    names = {name for name, _ in places}
    for name, of_model in sorted(places):
        is_common = of_model and name in parameters.SHARED
        place = " under a model: all models share it" if is_common else ""
        parameters.check_name(name, place)
    decides = WORDS[0] if WORDS[0] in names else "nuslerp_flatten"
    coarse = all(
        name != decides or value in (True, "tensor", "matrix")
        for _, name, _, value in settings
    )
    if "nuslerp_row_wise" in names and coarse and decides == "nuslerp_flatten":
        hint = " without `nuslerp_flatten: false`. Write both."
        parameters.warn_of_no_effect("nuslerp_row_wise", hint)
    if "nuslerp_contrast" in names and coarse:
        hint = (
            " where each matrix is one vector. Write, say, `nuslerp_granularity: row`."
        )
        parameters.warn_of_no_effect("nuslerp_contrast", hint)
    for model, name, text, value in settings:
        written.check_word(name)
        try:
            if name in parameters.PARAMETERS:
                parameters.validate(name, value, model)
        except ConfigError as error:
            raise error.at(f"the filter {text!r}") if text else error from None
    configs: dict[str, Any] = {}
    opened: list[ModelReference] = []
    integers: set[str] = set()
    checked = set()  # as most slices have the same models
    first: dict[str, int] = {}
    dropped: dict[str, list[str]] = {}
    for module, place, inputs, base in _inputs(config):
        # By name, as mergekit's own way to compare models takes long.
        entries = ((str(entry.model), *(entry.parameters or ())) for entry in inputs)
        key = str(base), *entries
        if key not in checked:
            checked.add(key)
            for model in _check_inputs(place, inputs, base):
                if str(model) not in configs:
                    configs[str(model)], integer_names = stored.check_checkpoint(model)
                    integers |= integer_names
                    opened.append(model)
        architecture = modules[module or next(iter(modules))].architecture
        _check_layers(place, inputs, architecture.num_layers_config_key(), configs)
        first.setdefault(module, len(inputs))
        dropped[module] = [str(entry.model) for entry in inputs[first[module] :]]
    lost = ", ".join(name for names in dropped.values() for name in names)
    if lost:
        raise ConfigError(
            "nuslerp: mergekit would merge the tensors after the layers without "
            f"{lost}, as the first slice has fewer sources than the last. List as many "
            "there, with `weight: 0` for those that are to have no part in it."
        )
    tokenizer = config.tokenizer
    source = config.tokenizer_source if tokenizer is None else tokenizer.source
    if source is not None:
        sizes = {model: configs[str(model)].get("vocab_size") for model in opened}
        folders = {model: (stored.folder(model), size) for model, size in sizes.items()}
        tokens.check(source, config.base_model, folders)
    return integers


def _check_inputs(place: str, inputs: Sequence[Any], base: Any) -> list[ModelReference]:
    """Check the models of a slice or module, which are returned."""
    input_models = [entry.model for entry in inputs]
    models = (
        input_models if base is None or base in input_models else [*input_models, base]
    )
    by_path: dict[Any, ModelReference] = {}
    for model in models:
        parts = [part for part in (model.model, model.lora) if part]
        key = tuple((os.path.realpath(part.path), part.revision) for part in parts)
        if key in by_path:
            raise ConfigError(
                f"nuslerp: {by_path[key]} and {model} in {place} are the same model. "
                "List another one, or write the base's path the same way everywhere. "
                "To merge layers of one model with each other, list a copy of it."
            )
        by_path[key] = model
    # mergekit adds the base itself, but not to slices.
    listed = input_models if hasattr(inputs[0], "layer_range") else models
    if len(listed) > 1 or not plugin.adapter().PASSES_ON:
        parameters.check_models(listed, base, place=place)
    for entry in inputs:
        if entry.model == base and "weight" in (entry.parameters or ()):
            hint = f" under the base model {base}. To stay closer to it, write a "
            hint += "`lambda` below 1 at the top level."
            parameters.warn_of_no_effect("weight", hint)
    return models


def _check_layers(
    place: str, inputs: Sequence[Any], key: str | None, configs: Mapping[str, Any]
) -> None:
    """Refuse layers that a model does not have, by its config.json."""
    for entry in inputs if hasattr(inputs[0], "layer_range") else ():
        most = configs[str(entry.model)]
        for part in (key or "").split("."):
            most = most.get(part) if isinstance(most, dict) else None
        first, end = entry.layer_range
        most = most if isinstance(most, int) else inf
        if not 0 <= first < end <= most:
            raise ConfigError(
                f"config: `layer_range` of model {entry.model} in {place} is "
                f"[{first}, {end}], but the model has layers [0, {most}]. Write the "
                "first layer and the one after the last."
            )


# --- A tensor ----------------------------------------------------------------------


def merge(
    planned: Sequence[Planned],
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Merge tensors with the same parameters but for the weights, all in one shape.

    The inputs of each model and the base are `(len(planned), *shape)`.
    """
    values, weights = planned[0].values, [entry.values.weights for entry in planned]
    for entry in planned:
        if sums_to_zero(entry.values.weights):
            message = "has weights that sum to zero, %s; all models count the same"
            parameters.warn_of_tensor(entry.name, message, list(entry.values.weights))
    try:
        merged = merge_batch(
            inputs,
            torch.tensor(weights, dtype=torch.float64),
            base=base,
            granularity=values.granularity,
            magnitude=values.magnitude,
            contrast=values.contrast,
            lambda_=values.lambda_,
        )
        result = merged.result
        for other in (dtype, _out_dtype(planned[0].name)):
            if other not in (None, result.dtype):
                indices = torch.arange(len(result), device=result.device)
                refuse_infinite(_extremes(result).to(other), indices, "the result")
    except (NonFiniteError, RangeError) as error:
        entry = planned[error.args[0]]
        models = [model for model, _ in entry.weights]
        raise parameters.user_error(error, entry.name, models, entry.base) from None
    for entry, count in zip(planned, merged.linear.tolist()):
        if count:
            message = "has %d of %d vectors without a unique spherical mean (they are "
            message += "opposite, or cancel), which are merged linearly instead"
            parameters.warn_of_tensor(entry.name, message, count, merged.vectors)
    return (result if dtype is None else result.to(dtype)).unbind(0)


def _out_dtype(name: Any) -> torch.dtype | None:
    """What mergekit converts a tensor of the latest plan to, after it is merged."""
    return _latest[name].out_dtype if name in _latest else None


def _extremes(tensors: torch.Tensor) -> torch.Tensor:
    """The least and the largest number of each of several tensors, `(tensors, 2)`."""
    if not tensors.numel():
        return tensors.new_zeros(len(tensors), 2)
    return torch.stack(tensors.reshape(len(tensors), -1).aminmax(dim=1), 1)


def copied(
    name: Any, tensor: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A copy of a tensor that is the same in all models, if its dtype can hold it."""
    result = tensor.to(dtype or tensor.dtype, copy=True)
    last = _out_dtype(name) or result.dtype
    if not _extremes(result.unsqueeze(0)).to(last).isfinite().all():
        # mergekit may have converted it when it was loaded.
        tensors = getattr(_latest.get(name), "tensors", None)
        places = stored_names(tensors) if _gathers(tensors) else {}
        originals = (stored.loader(m).get_tensor(n) for m, n in places.items())
        if next(originals, tensor).isfinite().all():
            error = RangeError(0, f"the result is too large for {last}")
            raise parameters.user_error(error, name, [], None)
    return result


def _gathers(tensors: Any) -> bool:
    """Whether it is mergekit's task that gathers a weight as the models have it."""
    from mergekit.io.tasks import GatherTensors

    return isinstance(tensors, GatherTensors)


def sources(tensors: Any) -> Mapping[ModelReference, Any]:
    """The models that mergekit's task gathers a weight from, and where it is there."""
    if not _gathers(tensors):
        tensors = getattr(tensors, "gather_tensors", tensors)
    return tensors.weight_info if hasattr(tensors, "weight_info") else tensors.tensors


def check_loaded(entry: Planned, shape: Sequence[int]) -> None:
    """Check a tensor in its turn, and warn of models of the plan that lack it."""
    entry.shape = shape
    present = {*(model for model, _ in entry.weights), entry.base} - {None}
    planned = _latest.get(entry.name)
    models = set(sources(planned.tensors)) if planned else present
    if present < models:
        absent = " and ".join(sorted(map(str, models - present)))
        message = "is merged without %s, where it is missing"
        parameters.warn_of_tensor(entry.name, message, absent)
    entry.values  # noqa: B018 (refuses what does not fit)


def check_shapes(name: str, tensors: Mapping[Any, torch.Tensor]) -> None:
    """Refuse a weight that has another shape in one of the models."""
    shapes = {model: tuple(tensor.shape) for model, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        text = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
        raise RuntimeError(
            f"nuslerp: tensor {name} differs in shape: {text}. Models of different "
            "sizes cannot be merged. If only their vocabularies differ, write "
            "`tokenizer_source: union` (or `base`)."
        )


def agree(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor is the same in all models, and may be copied.

    Not where a gradient is recorded, in which all of them have a part.
    """
    first, *rest = tensors
    if torch.is_grad_enabled() and any(t.requires_grad for t in (first, *rest)):
        return False
    start = torch.atleast_1d(first)[:1]
    # What differs mostly does so at once, and comparing all of it starts PyTorch's
    # threads, which would spin beside the merge for milliseconds.
    return all(
        t.dtype == first.dtype
        and t.shape == first.shape
        and torch.equal(torch.atleast_1d(t)[:1], start)
        and torch.equal(t, first)
        for t in rest
    )


def stored_names(tensors: Any) -> dict[ModelReference, str]:
    """The models whose checkpoint has a weight, and its name there."""
    names = {m: stored.name_of(m, info) for m, info in sources(tensors).items()}
    return {model: name for model, name in names.items() if name is not None}


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name.removeprefix("torch.")) if name else None


def _check_integers(
    tensors: Iterable[Planned], integers: set[str], dtypes: Sequence[torch.dtype]
) -> None:
    """Refuse integers that differ, or that mergekit would round to one of dtypes."""
    for entry in tensors if integers and dtypes else ():
        places = stored_names(entry.tensors)
        if integers.isdisjoint(places.values()):
            continue
        first, *rest = (stored.loader(m).get_tensor(n) for m, n in places.items())
        if not agree([first, *rest]):
            raise ConfigError(integers_differ(entry.name))
        for dtype in dtypes:
            if not first.to(dtype).to(first.dtype).equal(first):
                raise ConfigError(
                    f"nuslerp: tensor {entry.name} holds integers that {dtype} cannot "
                    "hold, and mergekit would round them. Write another `dtype` and "
                    "`out_dtype`, or none."
                )


def _check_present(entry: Planned, *, warn: bool) -> None:
    """Refuse a weight that some models may lack, and too few have, or warn of it."""
    if not _gathers(entry.tensors):
        return
    models = list(stored_names(entry.tensors))
    if len(models) == 1 and warn:
        message = "is that of %s, as no other model has it"
        parameters.warn_of_tensor(entry.name, message, models[0])
    elif 1 < len(models) < len(sources(entry.tensors)):
        parameters.check_models(models, entry.base, tensor=entry.name)


def integers_differ(tensor: str) -> str:
    return (
        f"nuslerp: tensor {tensor} holds integers or booleans that differ between the "
        "models, and cannot be interpolated. Use models that agree in it."
    )


def stored_shape(tensors: Any) -> tuple[int, ...] | None:
    """The shape of a weight that is still to be read, as far as it is known."""
    if not _gathers(tensors):
        return None  # a tokenizer changes embeddings
    model, info = next(iter(sources(tensors).items()))
    return stored.shape(model, info.name)
