# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Mistakes in a config are found while mergekit plans, before a weight is read."""

from __future__ import annotations

import copy
import json
import math
import re
from shutil import copytree, ignore_patterns

import pytest
import yaml
from mergekit import merge_methods
from mergekit.io.tasks import LoadTensor
from safetensors.torch import save_file
from support import LAYERS, load_tensors, merge_here

from mergekit_nuslerp import parameters
from mergekit_nuslerp.parameters import ConfigError

# mergekit 0.1.4 refuses values that are no numbers before a method sees them.
TYPED = hasattr(merge_methods, "registered_methods")

CONFIG = """
merge_method: nuslerp
base_model: ./base
models:
  - {model: ./sft, parameters: {weight: 0.3}}
  - {model: ./kd, parameters: {weight: 0.7}}
dtype: bfloat16
"""


@pytest.fixture
def config():
    return copy.deepcopy(yaml.safe_load(CONFIG))


@pytest.fixture
def refused(monkeypatch, checkpoints, tmp_path):
    """The message that a config is refused with, no tensor having been read."""

    def read(_self):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(LoadTensor, "execute", read)

    def run(config, error=ConfigError):
        with pytest.raises(error) as caught:
            merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
        return str(caught.value)

    return run


@pytest.fixture
def warned(checkpoints, tmp_path, caplog):
    """The one warning about a parameter without effect that a merge gives."""
    parameters._warn_of_no_effect.cache_clear()  # said once in a process
    parameters.check_places.cache_clear()

    def run(config):
        merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
        (told,) = (message for message in caplog.messages if "no effect" in message)
        return told

    return run


def test_the_config_is_in_order(config, checkpoints, tmp_path):
    merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
    assert load_tensors(tmp_path / "out")


def assert_names(message, *parts):
    for part in parts:
        assert part in message, message


def test_a_missing_weight(config, refused):
    del config["models"][1]["parameters"]
    message = refused(config)
    assert_names(message, "'weight'", "./kd", "model.embed_tokens.weight", "missing")
    assert_names(message, "finite number", "weight: 0.5")


def test_a_weight_missing_for_some_tensors(config, refused):
    config["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 0.4}]
    message = refused(config)
    assert_names(message, "'weight'", "./sft", "embed_tokens", "missing")
    assert_names(message, "End a list of filters", "`- value: 0.5`")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_a_weight_whose_sum_is_not_finite(config, refused, value):
    config["models"][0]["parameters"]["weight"] = value
    message = refused(config)
    assert_names(message, "'weight'", "./sft", "model.embed_tokens.weight", str(value))
    assert_names(message, "finite number", "weight: 0.5")


@pytest.mark.skipif(not TYPED, reason="mergekit 0.1.4 refuses it with its own message")
@pytest.mark.parametrize("value", ["a lot", "0,5"])
def test_a_weight_that_is_no_number(config, refused, value):
    config["models"][0]["parameters"]["weight"] = value
    message = refused(config)
    assert_names(message, "'weight'", "./sft", "model.embed_tokens.weight", value)


@pytest.mark.skipif(TYPED, reason="of mergekit 0.1.4")
def test_a_weight_that_is_no_number_on_the_older_mergekit(config, refused):
    config["models"][0]["parameters"]["weight"] = "a lot"
    assert "weight" in refused(config, ValueError)


@pytest.mark.parametrize("name", ["nuslerp_flatten", "nuslerp_row_wise"])
def test_a_flag_that_is_no_flag(config, refused, name):
    config["parameters"] = {name: 0.5}
    message = refused(config)
    assert_names(message, repr(name), "model.embed_tokens.weight", "true or false")


@pytest.mark.skipif(not TYPED, reason="mergekit 0.1.4 takes only numbers")
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("nuslerp_granularity", "rows", "row, column, row:N, column:N"),
        ("nuslerp_granularity", "row:0", "row, column, row:N, column:N"),
        ("nuslerp_granularity", "dim0", "row, column, row:N, column:N"),
        ("nuslerp_granularity", 128, "row, column, row:N, column:N"),
        ("nuslerp_magnitude", "long", "slerp, linear, geometric"),
    ],
)
def test_a_word_that_is_none_of_those(config, refused, name, value, allowed):
    config["parameters"] = {name: [{"filter": "mlp", "value": value}]}
    message = refused(config)
    assert_names(message, repr(name), "mlp.", repr(value), allowed)


@pytest.mark.skipif(TYPED, reason="of mergekit 0.1.4")
@pytest.mark.parametrize("value", ["row", 8, [{"filter": "mlp", "value": "row:8"}]])
@pytest.mark.parametrize("name", parameters.NAMED)
def test_words_need_the_newer_mergekit(config, refused, name, value):
    config["parameters"] = {name: value}
    message = refused(config)
    assert_names(message, repr(name), "only numbers", "mergekit==0.1.5")
    # What flags can say, they may.
    assert ("nuslerp_row_wise" in message) == (name == "nuslerp_granularity")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lambda_that_is_not_finite(config, refused, value):
    config["parameters"] = {"lambda": value}
    assert_names(refused(config), "'lambda'", "embed_tokens", "finite number")


def test_a_lambda_without_a_base(config, refused):
    del config["base_model"]
    config["parameters"] = {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}
    message = refused(config, (ConfigError, RuntimeError))
    assert_names(message, "'lambda'", "layers.0.mlp.", "0.5", "Add `base_model`")


@pytest.mark.skipif(not TYPED, reason="mergekit 0.1.4 takes only numbers")
@pytest.mark.parametrize(
    ("granularity", "flag", "value"),
    [
        ("row", "nuslerp_flatten", True),
        ("matrix", "nuslerp_flatten", True),
        ("tensor", "nuslerp_flatten", False),
        ("row:2", "nuslerp_row_wise", True),
        ("column", "nuslerp_row_wise", False),
    ],
)
def test_flags_that_contradict_the_granularity(
    config, refused, granularity, flag, value
):
    config["parameters"] = {"nuslerp_granularity": granularity, flag: value}
    message = refused(config, RuntimeError)
    assert_names(message, f"{flag}: {str(value).lower()}", granularity, "embed_tokens")
    assert_names(message, f"Remove `{flag}`")


@pytest.mark.parametrize(
    ("granularity", "flags"),
    [
        ("tensor", {"nuslerp_flatten": True, "nuslerp_row_wise": True}),
        ("row", {"nuslerp_flatten": False}),
        ("row:2", {"nuslerp_flatten": False, "nuslerp_row_wise": False}),
        ("column", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("matrix", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_flags_that_agree_with_the_granularity(granularity, flags):
    shared = {"nuslerp_granularity": granularity, **flags}
    assert parameters.choose_granularity(shared) == granularity


@pytest.mark.skipif(not TYPED, reason="mergekit 0.1.4 takes only numbers")
def test_a_block_that_does_not_fit(config, refused):
    config["parameters"] = {
        "nuslerp_granularity": [{"filter": "q_proj", "value": "row:7"}]
    }
    message = refused(config, RuntimeError)
    assert_names(message, "row:7", "layers.0.self_attn.q_proj.weight", "the shape (")
    rows = int(re.search(r"divide (\d+) rows", message)[1])
    near = [int(found) for found in re.findall(r"row:(\d+)", message)[1:]]
    assert near and all(rows % number == 0 for number in near)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("nuslerp_flaten", "nuslerp_flatten"),
        ("nuslerp_lambda", "lambda"),
        ("nuslerp_weights", "weight"),
        ("nuslerp_length", None),
    ],
)
def test_a_parameter_that_does_not_exist(name, meant, config, refused):
    config["models"][0]["parameters"][name] = True
    message = refused(config)
    assert_names(message, repr(name), "parameters are weight, nuslerp_row_wise")
    assert ("Did you mean" in message) == (meant is not None)
    assert_names(message, repr(meant) if meant else name)


def test_a_parameter_that_is_close_to_one(config, warned):
    config["parameters"] = {"lamda": 0.5, "normalize": 1.0}
    assert_names(warned(config), "'lamda'", "'lambda'")


@pytest.mark.parametrize("name", ["lambda", "nuslerp_flatten"])
def test_what_is_the_same_for_all_models_under_one(name, config, warned):
    config["models"][0]["parameters"][name] = 0
    assert_names(warned(config), repr(name), "under a model", f"`{name}: ")


@pytest.mark.skipif(not TYPED, reason="mergekit 0.1.4 takes only numbers")
def test_a_new_parameter_under_a_model(config, refused):
    config["models"][0]["parameters"]["nuslerp_magnitude"] = "linear"
    message = refused(config)
    assert_names(message, "'nuslerp_magnitude'", "under a model", "at the top level")


@pytest.mark.parametrize("name", ["flatten", "row_wise"])
def test_a_name_without_its_beginning(name, config, warned):
    config["parameters"] = {name: 0}
    assert_names(warned(config), repr(name), f"'nuslerp_{name}'")


def test_one_model(config, refused):
    del config["models"][1]
    assert_names(refused(config), "at least 2 models", "there is 1", "./sft")


def test_three_models_of_different_signs(config, refused):
    config["models"].append({"model": "./base", "parameters": {"weight": -0.5}})
    del config["base_model"]
    message = refused(config, (ConfigError, RuntimeError))
    assert_names(message, "'weight' of model ./base", "embed_tokens", "-0.5")
    assert_names(message, "Write weights of at least 0")


def test_a_base_that_is_one_of_the_two(config, refused):
    config["base_model"] = "./sft"
    message = refused(config)
    assert_names(message, "Besides the base model ./sft there is only ./kd")
    assert_names(message, "remove `base_model`")


def test_a_base_that_is_missing_from_a_slice(config, refused):
    sources = [{**model, "layer_range": [0, 4]} for model in config.pop("models")]
    config["slices"] = [{"sources": sources}]
    message = refused(config)
    assert_names(message, "base model ./base is not among the models", "./sft, ./kd")
    assert_names(message, "Add it to the sources")


@pytest.mark.parametrize("kind", ["q_proj", "proj"])
def test_weights_that_sum_to_zero_are_told_for_the_first_tensors(
    kind, config, checkpoints, tmp_path, caplog
):
    for model, weight in zip(config["models"], (0.5, -0.5)):
        entry = {"filter": kind, "value": weight}
        model["parameters"]["weight"] = [entry, {"value": 0.5}]
    parameters._WARNED.clear()
    with caplog.at_level("INFO"):
        merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
    told = [record for record in caplog.records if "sum to zero" in record.msg]
    assert len(told) == LAYERS * (1 if kind == "q_proj" else 7)
    assert all("q_proj" in record.getMessage() or kind == "proj" for record in told)
    levels = [record.levelname for record in told]
    assert levels == ["WARNING"] * min(3, len(told)) + ["INFO"] * (len(told) - 3)
    more = [message for message in caplog.messages if "--verbose" in message]
    assert len(more) == (len(told) >= 3)


def test_a_tensor_that_one_of_three_models_does_not_have(checkpoints, tmp_path, caplog):
    """In an architecture that mergekit finds out from the files."""
    lacking = "model.layers.0.self_attn.q_proj.weight"
    models = []
    for name in ("base", "sft", "kd"):
        folder = tmp_path / name
        copytree(checkpoints / name, folder, ignore=ignore_patterns("*.safetensors*"))
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        settings["architectures"] = ["MadeUpForCausalLM"]
        (folder / "config.json").write_text(json.dumps(settings), "utf-8")
        tensors = load_tensors(checkpoints / name)
        if name == "kd":
            del tensors[lacking]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        models.append({"model": f"./{name}", "parameters": {"weight": 0.5}})

    def merged(number):
        caplog.clear()
        parameters._WARNED.clear()
        config = {"merge_method": "nuslerp", "models": models[:number]}
        merge_here(yaml.dump(config), tmp_path / str(number), cwd=tmp_path)
        told = [message for message in caplog.messages if "merged without" in message]
        return load_tensors(tmp_path / str(number)), told

    two, told = merged(2)
    assert not told
    three, (told,) = merged(3)
    assert_names(told, f"tensor {lacking} is", "without ./kd, which does not have it")
    # What is said is what is done.
    same = {name for name in two if three[name].equal(two[name])}
    assert lacking in same
    assert not any("down_proj" in name for name in same)


def slices(*parts):
    """Two layers of some models each, all with the same weight but the base."""
    return [
        {
            "sources": [
                {
                    "model": f"./{name}",
                    "layer_range": [2 * number, 2 * number + 2],
                    "parameters": {} if name == "base" else {"weight": 1},
                }
                for name in names
            ]
        }
        for number, names in enumerate(parts)
    ]


@pytest.mark.parametrize(
    "first, last",
    [
        (("base", "sft", "kd"), ("base", "sft", "kd", "dpo")),
        (("sft", "kd"), ("sft", "kd", "base")),
    ],
)
def test_slices_that_would_lose_a_model_after_the_layers(first, last, config, refused):
    """mergekit takes as many there as the first slice has."""
    del config["models"]
    config["slices"] = slices(first, last)
    if "base" not in first:
        del config["base_model"]
        config["slices"][1]["base_model"] = "./base"
    message = refused(config, (ConfigError, RuntimeError))
    assert_names(message, f"without ./{last[-1]}, as the first slice", "`weight: 0`")
    assert_names(message, "tensor model.norm.weight")


def test_slices_of_several_numbers_of_models(config, checkpoints, tmp_path):
    """As the message about slices says that they are to be written."""
    del config["models"]
    config["slices"] = slices(*[("base", "sft", "kd", "dpo")] * 2)
    unused = config["slices"][0]["sources"][3]
    unused["parameters"]["weight"] = 0
    merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
    merged = load_tensors(tmp_path / "out")
    config["slices"] = slices(("base", "sft", "kd"), ("base", "sft", "kd"))
    merge_here(yaml.dump(config), tmp_path / "two", cwd=checkpoints)
    two = load_tensors(tmp_path / "two")
    for name in ("embed_tokens", "layers.0.mlp.up_proj"):
        assert merged[f"model.{name}.weight"].equal(two[f"model.{name}.weight"])
    for name in ("model.layers.2.mlp.up_proj", "lm_head"):
        assert not merged[f"{name}.weight"].equal(two[f"{name}.weight"])


def test_a_weight_of_the_base(config, warned):
    config["models"].append({"model": "./base", "parameters": {"weight": 0.4}})
    assert_names(warned(config), "'weight'", "under the base model ./base", "`lambda`")


@pytest.mark.parametrize("form", ["models", "slices"])
def test_a_model_that_is_listed_twice(form, config, refused):
    config["models"].append({"model": "./kd", "parameters": {"weight": 0.1}})
    if form == "slices":
        sources = [{**model, "layer_range": [0, 4]} for model in config.pop("models")]
        config["slices"] = [{"sources": sources}]
    assert_names(refused(config), "model ./kd is listed 2 times", "write another one")


def test_rows_or_columns_of_whole_tensors(config, warned):
    config["parameters"] = {"nuslerp_row_wise": True}
    assert_names(warned(config), "'nuslerp_row_wise'", "`nuslerp_flatten: false`")


@pytest.mark.parametrize("outside", ["top", "parameter", "model"])
@pytest.mark.parametrize("name", ["nuslerp_magnitude", "nuslerp_flaten", "lambda"])
def test_parameters_outside_of_parameters(outside, name, config, warned, request):
    """mergekit drops what it does not know before a merge method sees the config."""
    given = {name: 0.5 if name == "lambda" else "linear"}
    if outside == "parameter":
        config["parameter"] = given
    elif outside == "model":
        config["models"][0] |= given
    else:
        config |= given
    if name == "lambda":
        told = warned(config)
    else:
        told = request.getfixturevalue("refused")(config)
    assert_names(told, repr(name), "outside of `parameters`", f"`{name}")


def test_names_that_are_tokens_or_belong_to_other_merges():
    def config(method, name):
        tokens = "tokenizer: {tokens: {lambda: {}}}"
        return f"merge_method: {method}\n{tokens}\n{name}: 1\n"

    parameters.check_places(config("nuslerp", "dtype"))
    repeated = "x: &x {nuslerp_granularity: row}\nparameters: {<<: *x}"
    parameters.check_places(f"merge_method: nuslerp\n{repeated}\n")
    others = config("karcher", "nuslerp_x") + "---\n"
    parameters.check_places(others)
    with pytest.raises(ConfigError, match="'nuslerp_x' has no effect outside of"):
        parameters.check_places(others + config("nuslerp", "nuslerp_x"))


def test_a_base_that_is_listed_needs_no_weight(config, checkpoints, tmp_path):
    merge_here(yaml.dump(config), tmp_path / "a", cwd=checkpoints)
    config["models"].append({"model": "./base"})
    merge_here(yaml.dump(config), tmp_path / "b", cwd=checkpoints)
    first, second = load_tensors(tmp_path / "a"), load_tensors(tmp_path / "b")
    assert all(first[name].equal(second[name]) for name in first)


def test_numbers_as_mergekit_takes_them():
    assert parameters.validate("weight", "1e-5") == 1e-5  # YAML reads this as a string
    assert parameters.validate("weight", 1) == 1.0
    assert parameters.validate("nuslerp_flatten", 0.0) is False


def test_a_message_without_a_place_is_still_a_sentence():
    with pytest.raises(ConfigError, match="parameter 'weight' is missing, but must"):
        parameters.validate("weight", None)
    with pytest.raises(ConfigError, match="there are 0"):
        parameters.check_models([], None)
    with pytest.raises(ConfigError, match=r"for tensor q \(a\).*others do not have it"):
        parameters.check_models(["a"], None, tensor="q")
