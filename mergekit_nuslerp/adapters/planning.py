# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The two places where the plugin hooks into mergekit's planning, and their checks.

`MergeConfiguration.model_validate` sees a config as it is written, before unknown keys
are dropped; `MergePlanner._plan` has the config, and every weight's models and
parameters when it returns. Where a mergekit has moved one of them, its checks are left
out, and what a weight cannot be merged by is refused when its turn comes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ParameterSetting
from mergekit.io.tasks import GatherTensors, LoaderCache
from pydantic import BaseModel, TypeAdapter, ValidationError

from mergekit_nuslerp import METHODS, heads, parameters, plugin
from mergekit_nuslerp.adapters import tokens
from mergekit_nuslerp.granularity import HEAD
from mergekit_nuslerp.kernel import NonFiniteError, RangeError, merge_batch
from mergekit_nuslerp.messages import brief
from mergekit_nuslerp.parameters import LOG, ConfigError

# Each as the module, the class and its method that is wrapped.
SEAMS = {
    "config": ("mergekit.config", "MergeConfiguration", "model_validate"),
    "plan": ("mergekit.plan", "MergePlanner", "_plan"),
}


@dataclass(frozen=True, eq=False)
class Planned:
    """How one tensor is to be merged, whichever mergekit planned it."""

    name: Any  # None where a caller gives none
    base: Any
    models: Sequence[Any]  # besides the base, in the order of the weights
    values: parameters.Values
    tensors: Any  # the task that gathers them, where there is a plan
    info: Any  # mergekit's WeightInfo

    @property
    def weights(self) -> dict[ModelReference, float]:
        """Of each model but the base, in the config's order."""
        # mergekit's mappings of parameters do not keep it.
        weights = dict(zip(self.models, self.values.weights))
        return {m: weights[m] for m in sources(self.tensors) if m in weights}

    @property
    def names(self) -> set[str]:
        """The tensor's name in the merge and in each model."""
        infos = sources(self.tensors).values()
        return {str(self.name), *(getattr(info, "name", "") for info in infos)}


# What gathers each tensor of the latest plan.
_latest: dict[str, Any] = {}


def models_of(tensor: str | None) -> set[ModelReference]:
    """The models that the latest plan has for a tensor."""
    return set(sources(_latest[tensor])) if tensor in _latest else set()


def attach() -> None:
    """Wrap both methods, as far as mergekit has been imported. May be repeated."""
    for wrap, (module, name, attribute) in zip(
        (_checked_config, _checked_plan), SEAMS.values()
    ):
        owner = getattr(sys.modules.get(module), name, None)
        own = getattr(owner, attribute, None)
        if own is not None and not hasattr(own, "mergekit_nuslerp"):
            wrapper = wrap(getattr(own, "__func__", own))
            wrapper.mergekit_nuslerp = True  # type: ignore[attr-defined]
            is_plain = own is vars(owner).get(attribute)
            setattr(owner, attribute, wrapper if is_plain else classmethod(wrapper))


# --- A config as it is written -----------------------------------------------------


def _checked_config(validate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(validate)
    def model_validate(cls: Any, config: Any, *args: Any, **options: Any) -> Any:
        attach()  # the planner may have come since
        if not isinstance(config, dict) or config.get("merge_method") not in METHODS:
            return validate(cls, config, *args, **options)
        check_written(config)
        try:
            result = validate(cls, config, *args, **options)
            if not any(inputs for _, _, inputs, _ in _inputs(result)):
                raise ConfigError("config: there must be a model in `sources`.")
            return result
        except ValidationError as error:
            place = error.errors(include_url=False, include_context=False)[0]["loc"]
        except RuntimeError as error:  # as mergekit's own validators raise
            raise ConfigError(f"config: {error}") from None
        raise _misfit(config, place)

    return model_validate


def check_written(config: Mapping[str, Any]) -> None:
    """Refuse parameters outside of `parameters` that are new, and warn of others.

    What YAML repeats by an alias is one object, and visited once.
    """
    in_place: set[int] = set()
    outside: dict[int, str] = {}
    visited: set[tuple[int, bool]] = set()
    nodes: list[tuple[Any, bool]] = [(config, False)]
    while nodes:
        node, is_parameters = nodes.pop()
        if not isinstance(node, (dict, list)) or (id(node), is_parameters) in visited:
            continue
        visited.add((id(node), is_parameters))
        if is_parameters and isinstance(node, dict):
            in_place.update(map(id, node))
        elif isinstance(node, list):
            nodes += [(entry, False) for entry in node]
        else:
            for key, value in node.items():
                if parameters.is_like_a_parameter(key):
                    outside[id(key)] = str(key)
                elif key != "tokenizer":  # names tokens, which may be called anything
                    nodes.append((value, key == "parameters"))
    # What YAML repeats from elsewhere has the same key, and is read where it is used.
    names = [name for key, name in outside.items() if key not in in_place]
    for name in sorted(set(names)):
        parameters.check_place(name)


# What mergekit takes under a key of a config.
_FORMS = {
    "models": "a list, with `- model: PATH` and `parameters: {weight: 0.5}` for each",
    "slices": "a list, with `- sources: [...]` for each",
    "sources": "a list, with `model`, `layer_range` and `parameters` for each",
    "modules": "a name and `models` or `slices` for each module",
    **dict.fromkeys(("model", "base_model"), "a path, or a name on the hub"),
    "layer_range": "two whole numbers, `[0, 16]`",
    "parameters": "names and values, `{weight: 0.5}`",
    **dict.fromkeys(("dtype", "out_dtype"), "a name, such as `bfloat16`"),
    "tokenizer_source": "`union`, `base` or a model",
    "tokenizer": "`{source: union}`, with `tokens` if need be",
    "chat_template": "a name or a template",
}


def _misfit(config: Mapping[str, Any], place: Sequence[Any]) -> ConfigError:
    """The error about what mergekit could not read of a config, in words of ours."""
    node: Any = config
    owner, keys, is_missing = None, [], False
    for key in place:
        if isinstance(node, dict):
            owner = node.get("model", owner)
        try:
            node = node[key] if isinstance(node, (dict, list)) else {}[key]
        except LookupError:
            # What follows are the names of types that were tried.
            is_missing = isinstance(node, dict) and key in _FORMS
            keys += [key] * is_missing
            break
        keys.append(key)
        if keys[-2:-1] == ["parameters"]:
            where = "" if owner is None else f", in {_path(keys[:-2])}"
            numbers = not _takes_words()
            return parameters.unfit(
                key, node, model=owner, where=where, only_numbers=numbers
            )
    given = "is missing" if is_missing else f"is {brief(node)}"
    last = [key for key in keys if isinstance(key, str)][-1]
    form = _FORMS.get(last, "as mergekit's documentation says")
    return ConfigError(f"config: `{_path(keys)}` {given}, but must be {form}.")


def _path(keys: Sequence[Any]) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, keys)))


@lru_cache
def _takes_words() -> bool:
    """Whether this mergekit takes words for parameters."""
    try:
        TypeAdapter(ParameterSetting).validate_python("row")
    except ValidationError:
        return False
    return True


# --- A plan ------------------------------------------------------------------------


def _checked_plan(plan: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plan)
    def _plan(self: Any) -> Any:
        config = self.config
        if config.merge_method not in METHODS:
            return plan(self)
        plugin.try_merge()
        parameters.start_merge()
        _latest.clear()
        settings = list(settings_of(config))
        # By name, as mergekit's own way to find each model once takes long.
        listed = [
            entry.model for _, _, inputs, _ in _inputs(config) for entry in inputs
        ]
        listed += [] if config.base_model is None else [config.base_model]
        models = list({str(model): model for model in listed}.values())
        check_config(self, settings, models)
        wanted = filters(settings)
        try:
            result = plan(self)  # changes the config
        except ConfigError:
            raise
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"nuslerp: this merge cannot be planned: {error}"
            ) from error
        found = map(plugin.adapter().planned, (task for _, task in self._tensors))
        tensors = [entry for entry in found if entry is not None]
        if config.dtype:
            _check_integers(tensors, models)
        _latest.update((entry.name, entry.tensors) for entry in tensors)
        names = {name for entry in tensors if wanted for name in entry.names}
        if not getattr(self, "is_inspection", False):  # which has this in its report
            plugin.announce_merge()
            for text in unmatched(wanted, names):
                LOG.warning("nuslerp: no tensor's name contains the filter %r", text)
            for module in left_out(self):
                LOG.warning(
                    "nuslerp: the config has no module %r, so the merged model will "
                    "not have it",
                    module,
                )
        return result

    return _plan


def check_config(
    planner: Any, settings: Sequence[Setting], models: Iterable[ModelReference]
) -> None:
    """Refuse what mergekit would ignore, or warn where it always did.

    Args:
        planner: mergekit's, of a merge by `nuslerp`, before it plans.
        settings: of its config.
        models: that are in it.
    """
    config = planner.config
    modules = planner.arch_info.modules
    for module in config.modules or ():
        if module not in modules:
            raise ConfigError(
                f"there is no module {module!r} in these models. Theirs are "
                f"{', '.join(modules)}"
            )
    for field in ("dtype", "out_dtype"):
        _check_dtype(field, getattr(config, field))
    names = {setting.name for setting in settings}
    for name, of_model in sorted({(s.name, s.model is not None) for s in settings}):
        parameters.check_name(name, of_model=of_model)
    if "nuslerp_row_wise" in names and names.isdisjoint(
        ("nuslerp_flatten", "nuslerp_granularity")
    ):
        parameters.warn_of_no_effect(
            "nuslerp_row_wise", "without `nuslerp_flatten: false`. Write both."
        )
    configs = {str(model): _check_checkpoint(model) for model in models}
    tokenizer = config.tokenizer
    source = config.tokenizer_source if tokenizer is None else tokenizer.source
    if source is not None:
        sizes = {model: configs[str(model)].get("vocab_size") for model in models}
        tokens.check(
            source, config.base_model, {m: (_folder(m), sizes[m]) for m in models}
        )
    checked = set()  # as most slices have the same models
    for module, place, inputs, base in _inputs(config):
        key = str(base), *((str(e.model), *(e.parameters or ())) for e in inputs)
        if key not in checked:
            checked.add(key)
            _check_inputs(place, inputs, base)
        architecture = modules[module or next(iter(modules))].architecture
        for entry in inputs if hasattr(inputs[0], "layer_range") else ():
            most = _layers(configs[str(entry.model)], architecture)
            first, end = entry.layer_range
            if not 0 <= first < end <= most:
                raise ConfigError(
                    f"config: `layer_range` of model {entry.model} in {place} is "
                    f"[{first}, {end}], but the model has layers [0, {most}]. Write "
                    "the first layer and the one after the last."
                )
    for part in (config, *(config.modules or {}).values()):
        if part.slices:
            _check_slices(part.slices)
    for model, name, text, value in settings:
        where = f" for tensors with {text!r} in their names" if text else ""
        if name in parameters.WORDS and not _takes_words():
            raise parameters.unfit(name, value, model=model, only_numbers=True)
        if name in parameters.FIELDS:
            parameters.validate(name, value, model=model, where=where)


def _check_dtype(field: str, name: str | None) -> None:
    try:
        dtype = dtype_from_name(name)
    except (AttributeError, RuntimeError):
        dtype = torch.int8
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ConfigError(
            f"config: `{field}` is {name!r}, but must be a floating-point dtype. "
            f"Write, say, `{field}: bfloat16`."
        )


def _check_inputs(place: str, inputs: Sequence[Any], base: Any) -> None:
    """Check the models of a slice or module."""
    models = [entry.model for entry in inputs]
    if not models:
        raise ConfigError(f"config: `{place}.sources` must be a list of models.")
    listed = models if base is None or base in models else [*models, base]
    found: dict[Any, ModelReference] = {}
    for model in listed:
        path, lora = model.model, model.lora
        adapted = lora and (_real(lora.path), lora.revision)
        key = _real(path.path), path.revision, adapted, model.override_architecture
        if key in found:
            raise ConfigError(
                f"nuslerp: {found[key]} and {model} in {place} are the same model, and "
                "a merge takes each once. List another one, or write the base the same "
                "way in both places; to merge layers of one model with each other, "
                "list a copy of its folder."
            )
        found[key] = model
    # mergekit adds the base itself, but not to slices.
    given = models if hasattr(inputs[0], "layer_range") else listed
    if len(given) > 1 or not plugin.adapter().PASSES_ON:
        parameters.check_models(given, base, place=place)
    for entry in inputs:
        if entry.model == base and "weight" in (entry.parameters or ()):
            parameters.warn_of_no_effect(
                "weight",
                f"under the base model {base}. To stay closer to it, write a `lambda` "
                "below 1 at the top level.",
            )


def _real(path: str | None) -> str | None:
    """Where a path leads, or a name on the hub as it is."""
    return os.path.realpath(path) if path and os.path.exists(path) else path


class Setting(NamedTuple):
    """One value of a parameter in a config."""

    model: Hashable | None  # where it stands under one
    name: str
    filter: str | None
    value: Any


def settings_of(node: Any) -> Iterator[Setting]:
    """All values in a config, from the outside in, those of a gradient one by one."""
    if isinstance(node, BaseModel):
        fields = vars(node)
        for name, setting in (fields.get("parameters") or {}).items():
            for choice in _listed(setting):
                text = getattr(choice, "filter", None)
                for value in _listed(getattr(choice, "value", choice)):
                    yield Setting(fields.get("model"), name, text, value)
        node = [fields[name] for name in fields if name not in ("parameters", "model")]
    for part in node.values() if isinstance(node, dict) else node:
        if isinstance(part, (dict, list, BaseModel)):
            yield from settings_of(part)


def _listed(value: Any) -> list[Any]:
    return (value or [None]) if isinstance(value, list) else [value]


def _check_slices(slices: Sequence[Any]) -> None:
    """Refuse slices of which mergekit would drop a model after the layers.

    It takes as many of the last slice's models there as the first slice has.
    """
    dropped = slices[-1].sources[len(slices[0].sources) :]
    if dropped:
        models = ", ".join(str(entry.model) for entry in dropped)
        raise ConfigError(
            f"nuslerp: the tensors after the layers would be merged without {models}, "
            "as the first slice has fewer sources than the last and mergekit takes its "
            "number for what comes after the layers. List as many sources in the first "
            "slice, with `weight: 0` where they are to have no part."
        )


def _layers(config: Any, architecture: Any) -> int:
    """How many layers a model has, as far as its config.json says it."""
    for key in (architecture.num_layers_config_key() or "").split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, int) else sys.maxsize


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


def filters(settings: Iterable[Setting]) -> list[str]:
    """The parts of tensors' names that a config has values for."""
    found = dict.fromkeys(setting.filter for setting in settings)
    return [text for text in found if text is not None and text != "*"]


def unmatched(wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """The filters that no tensor's name contains."""
    return [text for text in wanted if not any(text in name for name in names)]


def left_out(planner: Any) -> list[str]:
    """Modules of the models that the merged one will not have."""
    planned = planner.config.modules
    return [name for name in planner.arch_info.modules if name not in planned]


def planned(
    name: str | None,
    base: Hashable | None,
    shared: Mapping[str, Any],
    weights: Iterable[tuple[Hashable, Any]],
    *,
    tensors: Any = None,
    info: Any = None,
    shape: Sequence[int] | None = None,
) -> Planned:
    """Check how one tensor is to be merged.

    Args:
        shared: parameters with one value, not yet checked.
        weights: each model but the base, and its weight.
        shape: of the tensor, if it has been read.
    """
    weights = list(weights)
    has_base = base is not None
    values = parameters.resolve(shared, weights, has_base=has_base, tensor=name)
    models = [model for model, _ in weights]
    # Only a block may not fit, and files take a while to read.
    if ":" in values.granularity or values.granularity == HEAD:
        shape = stored_shape(tensors) if shape is None else shape
        configs = {m: config_of(m) for m in (*models, *([base] if has_base else []))}
        if values.granularity == HEAD:
            chosen = heads.resolved(str(name), configs, shape)
            values = replace(values, granularity=chosen)
        if shape is not None:
            size = heads.head_size(configs)
            parameters.check_block(values.granularity, name, shape, size)
    return Planned(name, base, models, values, tensors, info)


def merge(
    planned: Sequence[Planned],
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Merge tensors that have the same parameters but for the weights.

    Args:
        inputs: of each model, `(len(planned), *shape)`.
        base: of the same shape.
    """
    values = planned[0].values
    for entry in planned:
        parameters.warn_of_zero_sum(entry.values.weights, entry.name)
    try:
        merged = merge_batch(
            inputs,
            torch.tensor([e.values.weights for e in planned], dtype=torch.float64),
            base=base,
            granularity=values.granularity,
            magnitude=values.magnitude,
            lambda_=values.lambda_,
        )
    except (NonFiniteError, RangeError) as error:
        entry = planned[error.output]
        raise parameters.named(error, entry.name, entry.models, entry.base) from None
    for entry, count in zip(planned, merged.linear.tolist()):
        parameters.warn_of_linear(count, merged.vectors, entry.name)
    return merged.result.unbind(0)


def sources(tensors: Any) -> Mapping[ModelReference, Any]:
    """The models that mergekit's task gathers a weight from, and where it is there."""
    if not isinstance(tensors, GatherTensors):
        tensors = getattr(tensors, "gather_tensors", tensors)
    return tensors.weight_info if hasattr(tensors, "weight_info") else tensors.tensors


def check_shapes(name: str, info: Any, tensors: Mapping[Any, torch.Tensor]) -> None:
    """Refuse a weight that has another shape in one of the models."""
    shapes = {model: tuple(tensor.shape) for model, tensor in tensors.items()}
    if len(set(shapes.values())) == 1:
        return
    found = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
    # What mergekit 0.1.5 and 0.1.4 say of a weight with a row for each token.
    axis = getattr(info, "vocabulary_axis", None)
    vocabulary = axis is not None or getattr(info, "is_embed", False)
    remedy = "Models of different sizes cannot be merged: use others."
    if vocabulary and len({shape[1:] for shape in shapes.values()}) == 1:
        remedy = (
            "For models of different vocabularies write `tokenizer_source: union` (or "
            "`base`)."
        )
    raise RuntimeError(f"nuslerp: tensor {name} differs in shape: {found}. {remedy}")


def agree(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a tensor is the same in all models, and may be copied.

    Not where a gradient is recorded, in which all of them have a part.
    """
    first, *rest = tensors
    if torch.is_grad_enabled() and any(t.requires_grad for t in (first, *rest)):
        return False
    return all(
        t.dtype == first.dtype and t.shape == first.shape and torch.equal(t, first)
        for t in rest
    )


def copied(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor that is the same in all models."""
    return tensors[0].clone() if dtype is None else tensors[0].to(dtype, copy=True)


# --- Checkpoints -------------------------------------------------------------------

# What stands beside codes that a quantised checkpoint has in place of weights.
_SCALES = re.compile(
    r"\.(weight_scale\w*|weight\.(absmax|quant_state.*)|qweight|SCB)$|_scale_inv$"
)


def shards(model: ModelReference) -> Iterator[tuple[str, Sequence[str]]]:
    """The safetensors files of a model, and what its index says is in them."""
    index = LoaderCache().get(model).index
    for shard in index.shards if index.is_safetensors else ():
        file = os.path.normpath(shard.filename)
        if os.path.isabs(file) or file.startswith(os.pardir):
            raise ConfigError(
                f"nuslerp: the index of model {model} names {shard.filename}, a file "
                "outside of its folder. Do not use this checkpoint."
            )
        yield os.path.join(index.base_path, file), shard.contained_keys


def _check_checkpoint(model: ModelReference) -> Any:
    """What its config.json says of a checkpoint, if it is not quantised.

    The codes of a quantised one are not weights.
    """
    index = LoaderCache().get(model).index
    sign = next(filter(_SCALES.search, index.tensor_paths), "")
    config = config_of(model)
    if config.get("quantization_config"):
        sign = "quantization_config in its config.json"
    for path, _ in shards(model):
        float8 = [
            name for name, (dtype, _) in _header(path).items() if dtype[:2] == "F8"
        ]
        sign = f"{float8[0]} in float8" if float8 else sign
    if sign:
        raise ConfigError(
            f"nuslerp: model {model} is quantised: it has {sign}. Its codes cannot be "
            "interpolated. Use the checkpoint that it was made from, or load it with "
            "transformers, `model.dequantize()`, and save that."
        )
    return config


def config_of(model: Hashable) -> Mapping[str, Any]:
    """What the config.json of a model says, nothing where there is none to be read."""
    # Only checkpoints that are open: callers of mergekit's functions may have none.
    is_open = model in LoaderCache.loaders
    path = os.path.join(_folder(model), "config.json") if is_open else ""
    return _config_at(path, os.stat(path).st_mtime_ns) if os.path.exists(path) else {}


def _folder(model: Any) -> str:
    """Where a checkpoint lies."""
    return LoaderCache().get(model).index.base_path


@lru_cache(maxsize=64)
def _config_at(path: str, _modified: int) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            config = json.load(file)
    except (OSError, ValueError):  # transformers says so where it matters
        config = None
    return config if isinstance(config, dict) else {}


def _check_integers(planned: Iterable[Planned], models: Iterable[Any]) -> None:
    """Refuse integers that differ, where a `dtype` would have mergekit cast them."""
    integers = {
        (model, name)
        for model in models
        for path, _ in shards(model)
        for name, (dtype, _) in _header(path).items()
        if dtype[0] in "IUB" and dtype != "BF16"
    }
    for entry in planned if integers else ():
        named = [(model, info.name) for model, info in sources(entry.tensors).items()]
        if not integers.isdisjoint(named) and not agree(
            LoaderCache().get(model).get_tensor(name) for model, name in named
        ):
            raise ConfigError(integers_differ(str(entry.name)))


def integers_differ(tensor: str) -> str:
    """The message about integers or booleans that differ between the models."""
    return (
        f"nuslerp: tensor {tensor} holds integers or booleans that differ between the "
        "models: they cannot be interpolated. Use models that agree in it."
    )


def stored_shape(tensors: Any) -> tuple[int, ...] | None:
    """The shape of a weight that is still to be read, from its file's header.

    None with a tokenizer that changes embeddings, or without safetensors.
    """
    if not isinstance(tensors, GatherTensors):
        return None
    infos = sources(tensors)
    model = next(iter(infos))
    index, name = LoaderCache().get(model).index, infos[model].name
    file = index.tensor_paths.get(name)
    if not index.is_safetensors or file is None:
        return None
    return _header(os.path.join(index.base_path, file)).get(name, ("", None))[1]


def _header(path: str) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of all weights in a file."""
    return _header_of(path, os.stat(path).st_mtime_ns)


# Bytes; what safetensors itself accepts.
_LARGEST_HEADER = 100_000_000


@lru_cache(maxsize=256)
def _header_of(path: str, _modified: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LARGEST_HEADER)))
        header.pop("__metadata__", None)
        return {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ConfigError(
            f"nuslerp: {path} is not a safetensors file. If it is the pointer of a "
            "file that Git keeps elsewhere, fetch that by `git lfs pull`."
        ) from None
