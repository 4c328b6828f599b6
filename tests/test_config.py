# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a merge says about its config, and how it takes what is in order."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
from shutil import copytree, ignore_patterns

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.architecture import auto
from mergekit.config import MergeConfiguration
from safetensors.torch import save_file
from support import CONFIG, LAYERS, load_tensors, merge_here, write_t5

from mergekit_nuslerp import parameters, plugin
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.parameters import ConfigError

# mergekit 0.1.4 takes only numbers for parameters, and passes on what only one model
# is listed for.
TYPED = hasattr(merge_methods, "registered_methods")


@pytest.fixture
def config():
    return copy.deepcopy(yaml.safe_load(CONFIG))


@pytest.fixture
def merged(checkpoints, tmp_path, caplog):
    """Merges a config: the tensors, and what was said meanwhile."""

    def run(config, cwd=checkpoints):
        caplog.clear()
        text = config if isinstance(config, str) else yaml.dump(config)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        merge_here(text, tmp_path / "out", cwd=cwd)
        told = [
            record.getMessage()
            for record in caplog.records
            if record.name == "mergekit_nuslerp" and record.levelno >= logging.WARNING
        ]
        return load_tensors(tmp_path / "out"), told

    return run


def assert_names(message, *parts):
    for part in parts:
        assert part in message, message


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def under_parameters(text):
    return f"{CONFIG}parameters: {{{text}}}\n"


# Of each config what the one warning about it names.
WARNINGS = {
    under_parameters("lamda: 0.5"): ("'lamda'", "nuslerp does not", "mean 'lambda'?"),
    under_parameters("wieght: 0.5"): ("'wieght'", "mean 'weight'?"),
    under_parameters("flatten: 0"): ("'flatten'", "'nuslerp_flatten'?"),
    under_parameters("row_wise: 0"): ("'row_wise'", "'nuslerp_row_wise'?"),
    under_parameters("t: 0.7"): ("'t'", "slerp; weights 0.3 and 0.7 are t = 0.7"),
    under_parameters("density: 0.5"): ("'density'", "ties"),
    under_parameters("normalize: 1"): ("'normalize'", "relative"),
    under_parameters("int8_mask: 1"): ("'int8_mask'", "nuslerp does not read it"),
    under_parameters("nuslerp_row_wise: true"): ("'nuslerp_row_wise'", "Write both"),
    under_parameters("nuslerp_row_wise: true, nuslerp_flatten: true"): (
        "'nuslerp_row_wise'",
        "without `nuslerp_flatten: false`",
    ),
    under_parameters("nuslerp_contrast: 2"): (
        "'nuslerp_contrast'",
        "where each matrix is one vector",
    ),
    under_parameters("nuslerp_contrast: 2, nuslerp_flatten: true"): (
        "'nuslerp_contrast'",
        "`nuslerp_granularity: row`",
    ),
    under_parameters("lambda: [{filter: q_prj, value: 0.5}, {value: 1}]"): (
        "no tensor's name contains the filter 'q_prj'",
    ),
    under_parameters("lambda: [{value: 1}, {filter: mlp, value: 0.5}]"): (
        "of 'lambda', the entry for 'mlp' is not read",
        "the one for all tensors comes first",
    ),
    under_parameters("lambda: [{filter: mlp, value: 1}, {filter: mlp.up, value: 0}]"): (
        "of 'lambda', the entry for 'mlp.up' is not read",
        "the one for 'mlp' comes first",
    ),
    CONFIG.replace("base_model", "base_mode"): ("`base_mode`", "mean `base_model`?"),
    CONFIG.replace("dtype", "dtpye"): ("`dtpye`", "mean `dtype`?"),
    f"{CONFIG}out_dtpye: float32\n": ("`out_dtpye`", "mean `out_dtype`?"),
    CONFIG.replace("./kd\n", "./kd\n    lora: ./lora\n"): ("`lora`", "not read"),
    CONFIG.replace("0.7", "0.7, t: 0.7"): ("'t'", "slerp"),
    CONFIG.replace("0.7", "0.7, lambda: 1"): ("'lambda'", "under a model", "`lambda: "),
    CONFIG.replace("0.7", "0.7, nuslerp_flatten: 0"): (
        "'nuslerp_flatten'",
        "under a model",
    ),
    f"{CONFIG}lambda: 0.5\n": ("'lambda'", "outside of `parameters`", "`lambda: 0.5`"),
    f"{CONFIG}t: 0.5\n": ("'t'", "outside of `parameters`", "belongs to slerp"),
    f"{CONFIG}wieght: 0.5\n": ("'wieght'", "outside of `parameters`", "'weight'?"),
    f"{CONFIG}parameter: {{lambda: 0.5}}\n": ("'lambda'", "outside of `parameters`"),
    # In Python and in JSON both are one key.
    f"{under_parameters('lambda: 1')}x: {{lambda: 0.5}}\n": ("'lambda'", "outside of"),
    # A value of its own beside the one in place, which is what counts.
    f"{under_parameters('lambda: 1')}lambda: 0.5\n": ("'lambda'", "outside of"),
    under_parameters("weight: 0.5").replace(
        "- model: ./kd\n    parameters: {weight: 0.7}", "- {model: ./kd, weight: 0.9}"
    ): ("'weight'", "outside of `parameters`", "under each model"),
    CONFIG.replace("dtype", "  - {model: ./base, parameters: {weight: 1}}\ndtype"): (
        "'weight'",
        "under the base model ./base",
        "`lambda`",
    ),
}
if TYPED:
    WARNINGS[
        under_parameters(
            "nuslerp_contrast: 2, nuslerp_granularity: matrix, nuslerp_flatten: false"
        )
    ] = ("'nuslerp_contrast'", "where each matrix is one vector")


@pytest.mark.parametrize("text", WARNINGS, ids=range(len(WARNINGS)))
def test_warned_once_a_merge(text, merged):
    for _ in range(2):
        _, (told,) = merged(text)
        assert_names(told, *WARNINGS[text])


IN_ORDER = {
    "as it is": CONFIG,
    "a narrow filter before a wide one": under_parameters(
        "lambda: [{filter: mlp.up, value: 1}, {filter: mlp, value: 1}, {value: 1}]"
    ),
    "a base that is listed": CONFIG.replace("dtype", "  - model: ./base\ndtype"),
    "numbers as YAML has them": CONFIG.replace("0.3", "3.0e-1").replace("0.7", "7e-1"),
    "an alias of a mapping": f"x: &x {{weight: 0.7}}\n{CONFIG}".replace(
        "{weight: 0.7}", "*x", 2
    ).replace("x: &x *x", "x: &x {weight: 0.7}"),
    "a merged alias": f"x: &x {{weight: 0.7}}{CONFIG}".replace(
        "parameters: {weight: 0.7}", "parameters: {<<: *x}"
    ),
    "names of tokens": f"{CONFIG}tokenizer: {{source: base, tokens: {{}}}}\n",
}


def test_nothing_is_said_of_rows_of_some_tensors(merged):
    flatten = "nuslerp_flatten: [{filter: mlp, value: false}, {value: true}]"
    assert not merged(under_parameters(f"{flatten}, nuslerp_row_wise: true"))[1]


@pytest.mark.parametrize("name", IN_ORDER)
def test_nothing_is_said_of_what_is_in_order(name, merged):
    tensors, told = merged(IN_ORDER[name])
    assert not told
    assert_same(tensors, merged(CONFIG)[0])


def test_each_merge_says_what_it_has_to(config, merged):
    """Three merges in one process, as mergekit-multi has them."""
    for model, weight in zip(config["models"], (0.5, -0.5)):
        model["parameters"]["weight"] = weight
    for _ in range(3):
        _, told = merged(config)
        assert sum("sum to zero" in message for message in told) == 3
        assert sum("--verbose" in message for message in told) == 1


def test_modules_that_are_left_out(tmp_path, caplog):
    write_t5(tmp_path, "one", "other")
    models = [
        {"model": f"./{name}", "parameters": {"weight": 1}} for name in ("one", "other")
    ]
    config = {"merge_method": "nuslerp", "modules": {"encoder": {"models": models}}}
    merge_here(yaml.dump(config), tmp_path / "out", cwd=tmp_path)
    assert "the config has no module 'decoder'" in caplog.text


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


@pytest.mark.parametrize("kind", ["q_proj", "proj"])
def test_weights_that_sum_to_zero_are_told_for_the_first_tensors(
    kind, config, checkpoints, tmp_path, caplog
):
    for model, weight in zip(config["models"], (0.5, -0.5)):
        entry = {"filter": kind, "value": weight}
        model["parameters"]["weight"] = [entry, {"value": 0.5}]
    with caplog.at_level("INFO"):
        merge_here(yaml.dump(config), tmp_path / "out", cwd=checkpoints)
    told = [record for record in caplog.records if "sum to zero" in record.msg]
    assert len(told) == LAYERS * (1 if kind == "q_proj" else 7)
    assert all("q_proj" in record.getMessage() or kind == "proj" for record in told)
    levels = [record.levelname for record in told]
    assert levels == ["WARNING"] * min(3, len(told)) + ["INFO"] * (len(told) - 3)
    more = [message for message in caplog.messages if "--verbose" in message]
    assert len(more) == (len(told) >= 3)


# A tensor that may be of any kind: mergekit 0.1.4 has transformers load those that it
# knows, and 0.1.5 leaves out the others.
LOOSE = "model.norm.weight" if TYPED else "model.loose"


@pytest.fixture
def altered(checkpoints, tmp_path):
    """Copies of `base`, `sft` and `kd`, in an architecture found out from the files."""

    def run(change):
        auto.infer_architecture_info.cache_clear()  # which goes by a model's path
        folder = tmp_path / "altered"
        for name in ("base", "sft", "kd"):
            to = folder / name
            copytree(checkpoints / name, to, ignore=ignore_patterns("*.safetensors*"))
            settings = json.loads((to / "config.json").read_text("utf-8"))
            settings["architectures"] = ["MadeUpForCausalLM"]
            tensors = load_tensors(checkpoints / name)
            change(name, tensors, settings)
            (to / "config.json").write_text(json.dumps(settings), "utf-8")
            save_file(tensors, to / "model.safetensors", {"format": "pt"})
        return folder

    return run


def test_a_tensor_that_one_of_three_models_does_not_have(altered, merged):
    lacking = "model.layers.0.self_attn.q_proj.weight"

    def change(name, tensors, _settings):
        if name == "kd":
            del tensors[lacking]

    folder = altered(change)
    models = [
        {"model": f"./{name}", "parameters": {"weight": 0.5}}
        for name in ("base", "sft", "kd")
    ]
    two, told = merged({"merge_method": "nuslerp", "models": models[:2]}, folder)
    assert not told
    three, (told,) = merged({"merge_method": "nuslerp", "models": models}, folder)
    assert_names(told, f"tensor {lacking} is", "without ./kd, where it is missing")
    # What is said is what is done.
    same = {name for name in two if three[name].equal(two[name])}
    assert lacking in same
    assert not any("down_proj" in name for name in same)


def test_a_tensor_that_one_model_alone_has(altered, merged):
    def change(name, tensors, _settings):
        if name == "sft":
            tensors.setdefault(LOOSE, torch.ones(4))
        else:
            tensors.pop(LOOSE, None)

    folder = altered(change)
    result, (told,) = merged(CONFIG, folder)
    assert_names(told, f"tensor {LOOSE} is that of ./sft", "no other model has it")
    assert result[LOOSE].equal(load_tensors(folder / "sft")[LOOSE].bfloat16())


@pytest.mark.parametrize("lacking", ["base", "kd"])
def test_a_tensor_that_too_few_models_have(lacking, altered, merged, tmp_path):
    def change(name, tensors, _settings):
        tensors[LOOSE] = torch.full((4,), len(name) + 0.0)
        if name == lacking:
            del tensors[LOOSE]

    folder = altered(change)
    with pytest.raises(ConfigError, match=rf"base.*{LOOSE}|{LOOSE}.*base"):
        merged(CONFIG, folder)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32\nout_dtype: float16", "float16"])
@pytest.mark.parametrize("is_same", [True, False])
def test_what_the_last_dtype_cannot_hold_is_refused(dtype, is_same, altered, merged):
    """mergekit converts tensors when it loads them, and once more when it writes."""
    name = "model.layers.1.mlp.up_proj.weight"

    def change(model, tensors, _settings):
        tensors[name] = tensors[name].float()
        if is_same:
            tensors[name].fill_(7e4)
        else:
            tensors[name][0, 0] = 7e4 + len(model)

    config = CONFIG.replace("bfloat16", dtype)
    with pytest.raises((ValueError, OverflowError), match=name):
        merged(config, altered(change))


def test_infinities_that_are_the_same_are_copied_in_any_dtype(altered, merged):
    def change(_model, tensors, _settings):
        tensors[LOOSE] = torch.tensor([-math.inf, 0.0])

    config = CONFIG.replace("bfloat16", "float32\nout_dtype: float16")
    result, told = merged(config, altered(change))
    assert not told and result[LOOSE].equal(torch.tensor([-math.inf, 0.0]).half())


def quantised_by_config(_tensors, settings):
    settings["quantization_config"] = {"quant_method": "fp8"}


def beside(ending):
    def change(tensors, _settings):
        tensors[f"model.layers.0.mlp.up_proj{ending}"] = torch.ones(4)

    return change


def in_float8(tensors, _settings):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "quantise, sign",
    [
        (quantised_by_config, "quantization_config in its config.json"),
        (beside(".weight_scale"), "weight_scale"),
        (beside(".weight_scale_inv"), "weight_scale_inv"),
        (beside(".weight.absmax"), "absmax"),
        (beside(".qweight"), "qweight"),
        (beside(".SCB"), "SCB"),
        (in_float8, "float8"),
    ],
)
def test_quantised_checkpoints_are_refused(quantise, sign, altered, merged):
    def change(name, tensors, settings):
        if name == "kd":
            quantise(tensors, settings)

    folder = altered(change)
    with pytest.raises(ConfigError) as caught:
        merged(CONFIG, folder)
    assert_names(str(caught.value), "model ./kd is quantised", sign, "dequantize()")


@pytest.mark.parametrize("dtype", ["", "dtype: float32"])
@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("counter", [torch.arange(4), torch.tensor(7)])
def test_integers_are_copied_or_refused(counter, is_same, dtype, altered, merged):
    name = LOOSE

    def change(model, tensors, _settings):
        tensors[name] = counter + (0 if is_same else len(model))

    folder = altered(change)
    text = CONFIG.replace("dtype: bfloat16", dtype)
    if is_same:
        assert merged(text, folder)[0][name].equal(
            counter.to(torch.float32 if dtype else torch.int64)
        )
    else:
        with pytest.raises(ValueError, match=LOOSE):
            merged(text, folder)


@pytest.mark.parametrize("owners", [("sft",), ("base", "sft"), ("sft", "kd")], ids=str)
def test_integers_that_a_model_lacks(owners, altered, merged):
    """As of other tensors: what one model alone has is its own."""

    def change(model, tensors, _settings):
        tensors.pop(LOOSE, None)
        if model in owners:
            tensors[LOOSE] = torch.arange(4)

    folder = altered(change)
    if len(owners) == 1:
        tensors, told = merged(CONFIG, folder)
        assert tensors[LOOSE].tolist() == [0, 1, 2, 3]
        assert len(told) == 1 and "no other model has it" in told[0]
    else:
        with pytest.raises(ConfigError, match=f"that have tensor {LOOSE}"):
            merged(CONFIG, folder)


def test_integers_that_a_dtype_cannot_hold_are_refused(altered, merged):
    def change(_model, tensors, _settings):
        tensors[LOOSE] = torch.tensor([1, 1000001])

    folder = altered(change)
    for dtype in ("bfloat16", "float64\nout_dtype: bfloat16"):
        with pytest.raises(
            ConfigError, match=f"{LOOSE} holds integers that .*bfloat16"
        ):
            merged(CONFIG.replace("bfloat16", dtype), folder)
    result, _ = merged(CONFIG.replace("bfloat16", "float32"), folder)
    assert result[LOOSE].tolist() == [1, 1000001]


@pytest.mark.parametrize("lone", ["base", "sft", None])
def test_buffers_that_are_the_same_are_copied(lone, altered, merged):
    name = LOOSE
    mask = torch.tensor([[0.0, -torch.inf], [0.1, 1e30]], dtype=torch.float64)

    def change(model, tensors, _settings):
        tensors[name] = mask * 2 if model == lone else mask

    folder = altered(change)
    text = CONFIG.replace("dtype: bfloat16", "")
    if lone is None:
        assert merged(text, folder)[0][name].equal(mask)
    else:
        with pytest.raises(ValueError, match=rf"{LOOSE} of .* NaN or infinity"):
            merged(text, folder)


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


def test_slices_of_several_numbers_of_models(config, merged):
    """As the message about slices says that they are to be written."""
    del config["models"]
    config["slices"] = slices(*[("base", "sft", "kd", "dpo")] * 2)
    unused = config["slices"][0]["sources"][3]
    unused["parameters"]["weight"] = 0
    three, _ = merged(config)
    config["slices"] = slices(("base", "sft", "kd"), ("base", "sft", "kd"))
    two, _ = merged(config)
    for name in ("embed_tokens", "layers.0.mlp.up_proj"):
        assert three[f"model.{name}.weight"].equal(two[f"model.{name}.weight"])
    for name in ("model.layers.2.mlp.up_proj", "lm_head"):
        assert not three[f"{name}.weight"].equal(two[f"{name}.weight"])


@pytest.mark.skipif(TYPED, reason="mergekit 0.1.5 refuses it")
def test_one_model_is_passed_on(config, checkpoints, merged):
    """In a slice, here the second, with and without a base."""
    sft = load_tensors(checkpoints / "sft")
    del config["models"]
    for first in (("base", "sft", "kd"), ("sft", "kd")):
        if "base" not in first:
            del config["base_model"]
        config["slices"] = slices(first, ("sft",))
        tensors, _ = merged(config)
        for name, tensor in tensors.items():
            is_passed_on = any(text in name for text in ("s.2.", "s.3.", "lm_head"))
            assert tensor.equal(sft[name]) or not is_passed_on


def test_numbers_as_mergekit_takes_them():
    assert parameters.validate("weight", "1e-5") == 1e-5  # YAML reads this as a string
    assert parameters.validate("weight", 1) == 1.0
    assert parameters.validate("nuslerp_flatten", 0.0) is False


def test_a_message_without_a_place_is_still_a_sentence():
    with pytest.raises(ConfigError, match="parameter 'weight' is missing, but must"):
        parameters.validate("weight", None)
    with pytest.raises(ConfigError, match="besides the base, not 0"):
        parameters.check_models([], None)
    with pytest.raises(ConfigError, match=r"not 1 \(a\) .* tensor q\. .* same"):
        parameters.check_models(["a"], None, tensor="q")


# --- Where mergekit is hooked into --------------------------------------------------


@pytest.mark.parametrize("module, owner, method", planning.SEAMS.values())
def test_mergekit_has_what_is_wrapped(module, owner, method):
    """Fails where a mergekit has moved it, so that its checks come late."""
    found = getattr(getattr(__import__(module, fromlist=[owner]), owner), method)
    assert found.mergekit_nuslerp


def test_a_config_is_not_walked_over_and_over():
    """What aliases repeat is visited once."""
    lines = ["a: &a {x: 1}"]
    for name, last in zip("bcdefghi", "abcdefgh"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]")
    text = CONFIG + "\n".join(lines) + "\nz: &z [*z]\n"
    start = time.perf_counter()
    parsed = yaml.safe_load(text)
    reading = time.perf_counter() - start
    start = time.perf_counter()
    MergeConfiguration.model_validate(parsed)
    assert time.perf_counter() - start < max(2 * reading, 0.1)
    parsed["models"][0]["parameters"]["weight"] = parsed["i"]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=r"'weight' of model \./sft") as caught:
        MergeConfiguration.model_validate(parsed)
    assert len(str(caught.value)) <= 600
    assert time.perf_counter() - start < max(2 * reading, 0.1)


def test_the_plugin_is_announced_once_and_not_as_trouble(config, merged, caplog):
    plugin.announce.cache_clear()
    records = []
    for _ in range(2):
        merged(config)
        records += [r for r in caplog.records if "merges here" in r.getMessage()]
    (record,) = records
    assert record.levelno == logging.INFO
