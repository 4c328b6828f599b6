# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Every config that the repository shows to users does what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mergekit.merge_methods
import pytest
import torch
import yaml
from oracle import oracle
from support import (
    EXAMPLES,
    LAYERS,
    REPOSITORY,
    announcement,
    load_tensors,
    merge_here,
    run_mergekit,
    steps_apart,
)

from mergekit_nuslerp import plugin


class Expected(NamedTuple):
    """What a config asks for, for one tensor."""

    weights: tuple[float, float]
    granularity: str = "tensor"
    base: bool = True


def _attention_and_mlp(tensor: str) -> Expected:
    if ".self_attn." in tensor:
        return Expected((0.8, 0.2))
    return Expected((0.3, 0.7) if ".mlp." in tensor else (0.5, 0.5))


def _early_and_late(tensor: str) -> Expected:
    if tensor in ("model.norm.weight", "lm_head.weight"):
        depth = 1.0
    else:
        layer = re.match(r"model\.layers\.(\d+)\.", tensor)
        depth = int(layer[1]) / (LAYERS - 1) if layer else 0.0
    second = 0.1 + 0.8 * depth
    return Expected((1 - second, second))


# What each example says in words, written down once more by hand.
EXPECTED: dict[str, Callable[[str], Expected]] = {
    "medswin.yaml": lambda _: Expected((0.3, 0.7)),
    "no_base.yaml": lambda _: Expected((0.6, 0.4), base=False),
    "row_wise.yaml": lambda _: Expected((0.5, 0.5), "row"),
    "column_wise.yaml": lambda _: Expected((0.5, 0.5), "column"),
    "attention_and_mlp.yaml": _attention_and_mlp,
    "early_and_late_layers.yaml": _early_and_late,
    "float32_arithmetic.yaml": lambda _: Expected((0.3, 0.7)),
}

# Starting the command takes longer than all the merges together, so the other
# examples are merged in this process.
BY_COMMAND = {"medswin.yaml", "attention_and_mlp.yaml"}

MODELS = ("base", "sft", "kd")
CARD_MODELS = ("medalpaca-7b", "medalpaca-sft", "medalpaca-kd")


def assert_merged(
    out: Path, folder: Path, models: tuple[str, ...], rule: Callable[[str], Expected]
) -> None:
    """Every tensor is the float64 merge, rounded once to bfloat16."""
    base, first, second = (load_tensors(folder / name) for name in models)
    merged = load_tensors(out)
    assert merged.keys() == base.keys()
    equal = total = 0
    for name, found in merged.items():
        weights, granularity, has_base = rule(name)
        exact = oracle(
            [first[name], second[name]],
            weights,
            base[name] if has_base else None,
            granularity,
        )
        assert found.dtype == torch.bfloat16
        steps = steps_apart(found, exact.to(found.dtype))
        assert steps.max() <= 1, name
        equal += int((steps == 0).sum())
        total += found.numel()
    assert equal >= 0.999 * total


def merge_in_process(
    config: str, out: Path, cwd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Merge, and see in the log that the plugin did it."""
    plugin.announce.cache_clear()  # an earlier test may have been the first use
    with caplog.at_level("WARNING"):
        merge_here(config, out, cwd=cwd)
    assert [announcement() in line for line in caplog.messages].count(True) == 1
    method = mergekit.merge_methods.get("nuslerp")
    assert type(method).__module__.startswith("mergekit_nuslerp.")


def test_every_example_has_an_expectation() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if name == "medswin.yaml":  # its layer range takes models of 32 layers
        folder, models = request.getfixturevalue("demo").folder, CARD_MODELS
    else:
        folder, models = request.getfixturevalue("checkpoints"), MODELS
    if name in BY_COMMAND:
        done = run_mergekit(EXAMPLES / name, tmp_path / "out", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.announcements == 1
    else:
        config = (EXAMPLES / name).read_text(encoding="utf-8")
        merge_in_process(config, tmp_path / "out", folder, caplog)
    assert_merged(tmp_path / "out", folder, models, EXPECTED[name])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_says_first_what_it_is_for(name: str) -> None:
    first, *_ = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert re.match(r"# [A-Z]\w+ ", first)


def test_the_examples_differ(checkpoints: Path) -> None:
    """Else a config whose parameters have no effect would pass above."""
    base, first, second = (load_tensors(checkpoints / name) for name in MODELS)
    name = "model.layers.0.self_attn.q_proj.weight"
    results = []
    for rule in EXPECTED.values():
        weights, granularity, has_base = rule(name)
        inputs = [first[name], second[name]]
        exact = oracle(inputs, weights, base[name] if has_base else None, granularity)
        results.append(exact.to(torch.bfloat16))
    same = [
        (i, j)
        for i, a in enumerate(results)
        for j, b in enumerate(results[:i])
        if (a == b).double().mean() >= 0.999
    ]
    # The model card's weights, once in bfloat16 and once in float32 arithmetic.
    keys = list(EXPECTED)
    assert same == [(keys.index("float32_arithmetic.yaml"), keys.index("medswin.yaml"))]


def _readme_configs() -> list[str]:
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    blocks = re.findall(r"^```ya?ml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "merge_method:" in block]


def _as_written(config: dict[str, Any]) -> Expected | None:
    """What a config asks for if it is plain, None if filters or gradients decide."""
    base = config.get("base_model")
    models = [entry for entry in config["models"] if entry["model"] != base]
    shared = config.get("parameters", {})
    values = [model["parameters"]["weight"] for model in models]
    if any(isinstance(value, list) for value in (*values, *shared.values())):
        return None
    granularity = "column" if shared.get("nuslerp_row_wise", False) else "row"
    if shared.get("nuslerp_flatten", True):
        granularity = "tensor"
    first, second = values
    return Expected((first, second), granularity, base is not None)


@pytest.mark.parametrize("config", _readme_configs())
def test_readme_config(
    config: str, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge_in_process(config, tmp_path / "out", checkpoints, caplog)
    parsed = yaml.safe_load(config)
    expected = _as_written(parsed) if "models" in parsed else None
    if expected is not None:
        assert_merged(tmp_path / "out", checkpoints, MODELS, lambda _: expected)
    merged = load_tensors(tmp_path / "out")
    assert merged.keys() == load_tensors(checkpoints / "base").keys()
    assert all(tensor.isfinite().all() for tensor in merged.values())


def _readme_python() -> list[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", _readme_python())
def test_readme_python(code: str) -> None:
    if "merge_tensors" in code and not hasattr(mergekit.merge_methods, "merge_tensors"):
        pytest.skip("new in mergekit 0.1.5")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["merged"].shape == names["a"].shape
    assert names["merged"].isfinite().all()
