# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import logging

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from mergekit.architecture import arch_info_for_config
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts import legacy
from tests.common import make_picollama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [make_picollama(tmp_path_factory.mktemp(name)) for name in ("a", "b")]


def plan(config):
    config = MergeConfiguration.model_validate(config)
    model_config = config.referenced_models()[0].config()
    MergePlanner(
        config,
        arch_info_for_config(model_config),
        MergeOptions(),
        out_model_config=model_config,
    ).plan_to_disk("unused")


def plan_models(models, *, parameters=None, of_models=None):
    of_models = {"weight": 1, **(of_models or {})}
    plan(
        {
            "merge_method": "nuslerp",
            "models": [{"model": model, "parameters": of_models} for model in models],
            "parameters": parameters or {},
        }
    )


def test_an_error_names_value_parameter_model_and_tensor(models):
    setting = [{"filter": "mlp", "value": "much"}, {"value": 1}]
    with pytest.raises(ValueError) as caught:
        plan_models(models, of_models={"weight": setting})
    start = (
        f"Invalid value 'much' of parameter weight for {models[0]}.model.layers.0.mlp"
    )
    assert str(caught.value).startswith(start)
    assert isinstance(caught.value.__cause__, ValidationError)


def test_an_error_about_a_shared_parameter_names_the_tensor(models):
    with pytest.raises(ValueError, match="nuslerp_flatten for model.embed_tokens"):
        plan_models(models, parameters={"nuslerp_flatten": "maybe"})


def unread(caplog):
    start = "does not read parameter "
    return [x.split(start)[1] for x in caplog.messages if start in x]


def test_what_is_not_read_is_named(models, caplog):
    of_models = {"density": 0.5, "nuslerp_row_wise": True}
    with caplog.at_level(logging.WARNING):
        plan_models(models, parameters={"nuslerp_flaten": 0}, of_models=of_models)
    expected = [f"{name} of model {model}" for name in of_models for model in models]
    assert sorted(unread(caplog)) == sorted(["nuslerp_flaten", *expected])
    assert "Merge method nuslerp does not read parameter nuslerp_flaten" in caplog.text


def test_what_is_not_read_is_named_in_modules_and_slices(models, caplog):
    sources = [
        {
            "model": model,
            "layer_range": [0, 2],
            "parameters": {"weight": 1, "source": 1},
        }
        for model in models
    ]
    slices = [{"sources": sources, "parameters": {"slice": 1}}]
    modules = {"default": {"slices": slices, "parameters": {"module": 1}}}
    with caplog.at_level(logging.WARNING):
        plan({"merge_method": "nuslerp", "modules": modules, "parameters": {"top": 1}})
    expected = [f"source of model {model}" for model in models]
    assert sorted(unread(caplog)) == sorted(["module", "slice", "top", *expected])


def test_what_is_read_is_not_warned_of(models, caplog):
    with caplog.at_level(logging.WARNING):
        plan_models(models, parameters={"weight": 1, "nuslerp_flatten": False})
    assert not unread(caplog)


@pytest.mark.parametrize("method", METHOD_PARAM_MAPS)
def test_what_mergekit_evolve_writes_is_read(models, caplog, method):
    needs_base = method not in ("linear", "slerp")
    definition = ModelGenomeDefinition(
        models=models[needs_base:],
        merge_method=method,
        base_model=models[0] if needs_base else None,
        tokenizer_source="union",
    )
    genome = ModelGenome(definition)
    config = genome.genotype_merge_config(genome.initial_genotype())
    assert ("normalize" in config.parameters) == (method != "slerp")
    with caplog.at_level(logging.WARNING):
        plan(config.model_dump(exclude_none=True))
    assert not unread(caplog)


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_what_mergekit_legacy_writes_is_read(models, caplog, monkeypatch, method):
    monkeypatch.setattr(legacy, "run_merge", lambda config, *_, **__: plan(config))
    merge = [word for model in models for word in ("--merge", model)]
    base = ["--base-model", models[0]] if method == "slerp" else []
    options = ["unused", *merge, *base, "--method", method, "--weight", "0.5"]
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(legacy.main, options)
    assert result.exception is None and not unread(caplog)
