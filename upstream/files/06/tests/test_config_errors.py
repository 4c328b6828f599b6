# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

import logging

import pytest

from mergekit.architecture import arch_info_for_config
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from tests.common import make_picollama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [make_picollama(tmp_path_factory.mktemp(name)) for name in ("a", "b")]


def plan(models, *, parameters=None, of_models=None, **config):
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "nuslerp",
            "models": [
                {"model": model, "parameters": {"weight": 1, **(of_models or {})}}
                for model in models
            ],
            "parameters": parameters or {},
            **config,
        }
    )
    model_config = config.referenced_models()[0].config()
    MergePlanner(
        config,
        arch_info_for_config(model_config),
        MergeOptions(),
        out_model_config=model_config,
    ).plan_to_disk("unused")


def test_an_error_names_value_parameter_model_and_tensor(models):
    setting = [{"filter": "mlp", "value": "much"}, {"value": 1}]
    with pytest.raises(ValueError) as caught:
        plan(models, of_models={"weight": setting})
    for part in ("'much'", "weight", models[0], "mlp"):
        assert part in str(caught.value)


def test_an_error_about_a_shared_parameter_names_the_tensor(models):
    with pytest.raises(ValueError, match="nuslerp_flatten for model.embed_tokens"):
        plan(models, parameters={"nuslerp_flatten": "maybe"})


def test_what_is_not_read_is_named(models, caplog):
    with caplog.at_level(logging.WARNING):
        plan(
            models,
            parameters={"nuslerp_flaten": False},
            of_models={"density": 0.5, "nuslerp_row_wise": True},
        )
    assert (
        "Merge method nuslerp does not read parameter nuslerp_flaten" in caplog.messages
    )
    for name in ("density", "nuslerp_row_wise"):
        for model in models:
            expected = (
                f"Merge method nuslerp does not read parameter {name} of model {model}"
            )
            assert caplog.messages.count(expected) == 1


def test_what_is_read_is_not_warned_of(models, caplog):
    with caplog.at_level(logging.WARNING):
        plan(models, parameters={"weight": 1, "nuslerp_flatten": False})
    assert "does not read" not in caplog.text
