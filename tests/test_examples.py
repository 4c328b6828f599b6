# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Every config that the repository shows to users does what it says."""

from __future__ import annotations

import doctest
import os
import re
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mergekit.merge_methods
import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from oracle import oracle
from support import (
    EXAMPLES,
    REPOSITORY,
    Demo,
    announcement,
    clean_environment,
    load_tensors,
    merge_here,
    run_command,
    run_mergekit,
    steps_apart,
)

from mergekit_nuslerp import plugin
from mergekit_nuslerp.demo import LAYERS


class Expected(NamedTuple):
    """What a config asks for, for one tensor."""

    weights: tuple[float, ...]
    granularity: str = "tensor"
    base: bool = True
    magnitude: str = "slerp"
    lambda_: float = 1.0
    contrast: float = 1.0

    def exact(self, base: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        return oracle(
            tensors,
            self.weights,
            base if self.base else None,
            self.granularity,
            magnitude=self.magnitude,
            contrast=self.contrast,
            lambda_=self.lambda_,
        )


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


def _heads_and_neurons(tensor: str) -> Expected:
    granularity = "tensor" if "norm" in tensor else "row"
    if ".self_attn." in tensor:
        granularity = "column:128" if "o_proj" in tensor else "row:128"
    elif "down_proj" in tensor:
        granularity = "column"
    return Expected((0.3, 0.7), granularity)


def _granularities(tensor: str) -> Expected:
    granularity = "row"
    if "norm" in tensor:
        granularity = "tensor"
    elif ".self_attn." in tensor:
        granularity = "column"
    return Expected((0.3, 0.7), granularity)


def _rows_and_columns(tensor: str) -> Expected:
    granularity = "tensor" if "norm" in tensor else "row*column"
    contrast = 1.5 if ".mlp." in tensor else 1.0
    return Expected((0.3, 0.7), granularity, contrast=contrast)


# What each example says in words, written down once more by hand.
EXPECTED: dict[str, Callable[[str], Expected]] = {
    "medswin.yaml": lambda _: Expected((0.3, 0.7)),
    "no_base.yaml": lambda _: Expected((0.6, 0.4), base=False),
    "row_wise.yaml": lambda _: Expected((0.5, 0.5), "row"),
    "column_wise.yaml": lambda _: Expected((0.5, 0.5), "column"),
    "attention_and_mlp.yaml": _attention_and_mlp,
    "early_and_late_layers.yaml": _early_and_late,
    "float32_arithmetic.yaml": lambda _: Expected((0.3, 0.7)),
    "three_models.yaml": lambda _: Expected((0.5, 0.3, 0.2)),
    "heads_and_neurons.yaml": _heads_and_neurons,
    "warp.yaml": lambda _: Expected((0.5, 0.5), lambda_=0.3),
    "magnitude.yaml": lambda _: Expected((0.5, 0.5), magnitude="linear"),
    "granularities.yaml": _granularities,
    "rows_and_columns.yaml": _rows_and_columns,
}

# Starting the command takes longer than all the merges together, so the other
# examples are merged in this process.
BY_COMMAND = {"medswin.yaml", "rows_and_columns.yaml"}

MODELS = ("base", "sft", "kd")
MODELS_OF = {
    "three_models.yaml": (*MODELS, "dpo"),
    "magnitude.yaml": ("base", "sft", "dpo"),
}

# Parameters whose values are names, which mergekit 0.1.4 does not take.
NAMED = ("nuslerp_granularity", "nuslerp_magnitude")
TAKES_NAMES = hasattr(mergekit.merge_methods, "merge_tensors")


def assert_merged(
    out: Path, folder: Path, models: tuple[str, ...], rule: Callable[[str], Expected]
) -> None:
    """Every tensor is the float64 merge, rounded once to bfloat16."""
    base, *others = (load_tensors(folder / name) for name in models)
    merged = load_tensors(out)
    assert merged.keys() == base.keys()
    for name, found in merged.items():
        exact = rule(name).exact(base[name], [other[name] for other in others])
        assert found.dtype == torch.bfloat16
        steps = steps_apart(found, exact.to(found.dtype))
        # Where base and task vector cancel, by float32's rounding of either.
        tiny = (found.double() - exact).abs() <= 1e-6 * exact.abs().max()
        assert ((steps <= 1) | tiny).all(), name
        assert (steps > 0).sum() <= 1 + 0.001 * found.numel(), name


def merge_in_process(
    config: str, out: Path, cwd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Merge, and see in the log that the plugin did it."""
    plugin.announce.cache_clear()  # an earlier test may have been the first use
    with caplog.at_level("INFO"):
        merge_here(config, out, cwd=cwd)
    assert [announcement() in line for line in caplog.messages].count(True) == 1
    method = mergekit.merge_methods.get("nuslerp")
    assert type(method).__module__.startswith("mergekit_nuslerp.")


def refused(config: str, out: Path, cwd: Path) -> bool:
    """Whether this mergekit is too old for a config. If so it must say so."""
    named = yaml.safe_load(config).get("parameters", {}).keys() & set(NAMED)
    if TAKES_NAMES or not named:
        return False
    with pytest.raises(ValueError, match=r"0\.1\.5") as caught:
        merge_here(config, out, cwd=cwd)
    assert any(name in str(caught.value) for name in named)
    assert not out.exists()
    return True


def test_every_example_has_an_expectation() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(
    name: str, demo: Demo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As it stands, in the folder that the demo makes."""
    folder = demo.folder
    config = (EXAMPLES / name).read_text(encoding="utf-8")
    if refused(config, tmp_path / "out", folder):
        return
    if name in BY_COMMAND:
        done = run_mergekit(EXAMPLES / name, tmp_path / "out", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.announcements == 1
    else:
        merge_in_process(config, tmp_path / "out", folder, caplog)
    models = MODELS_OF.get(name, MODELS)
    assert_merged(tmp_path / "out", folder, models, EXPECTED[name])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_says_first_what_it_is_for(name: str) -> None:
    first, *_ = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert re.match(r"# [A-Z]\w+ ", first)


def test_the_examples_differ() -> None:
    """Else a config whose parameters have no effect would pass above."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 256, 64, generator=generator)  # two heads of 128 rows
    base, sft, kd, dpo = (0.02 * noise).bfloat16()
    changed = {
        "sft": base + 0.05 * sft,
        "kd": base + 0.05 * kd,
        "dpo": base + 0.2 * dpo,
    }
    results = []
    for example, rule in EXPECTED.items():
        _, *models = MODELS_OF.get(example, MODELS)
        tensors = [changed[model] for model in models]
        expected = rule("model.layers.0.self_attn.q_proj.weight")
        results.append(expected.exact(base, tensors).to(torch.bfloat16))
    same = [
        (i, j)
        for i, a in enumerate(results)
        for j, b in enumerate(results[:i])
        if (a == b).double().mean() >= 0.999
    ]
    # The model card's weights, once in bfloat16 and once in float32 arithmetic.
    keys = list(EXPECTED)
    assert same == [(keys.index("float32_arithmetic.yaml"), keys.index("medswin.yaml"))]


PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))


def _blocks(language: str) -> list[str]:
    """What the README and the pages of docs show in a language."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _chosen(value: Any, tensor: str) -> Any:
    """What a parameter's filters, if it has any, leave for one tensor."""
    if not isinstance(value, list):
        return value
    assert all(isinstance(entry, dict) for entry in value), "no gradients in docs"
    filters = (entry for entry in value if entry.get("filter", "") in tensor)
    return next(filters)["value"]


def _as_written(config: dict[str, Any], tensor: str) -> Expected:
    """What a config asks for, read as simply as it can be."""
    base = config.get("base_model")
    models = [entry for entry in config["models"] if entry["model"] != base]
    weights = [_chosen(model["parameters"]["weight"], tensor) for model in models]
    shared = {
        key: _chosen(value, tensor)
        for key, value in config.get("parameters", {}).items()
    }
    granularity = "column" if shared.get("nuslerp_row_wise", False) else "row"
    if shared.get("nuslerp_flatten", True):
        granularity = "tensor"
    return Expected(
        tuple(weights),
        shared.get("nuslerp_granularity", granularity),
        base is not None,
        shared.get("nuslerp_magnitude", "slerp"),
        shared.get("lambda", 1.0),
        shared.get("nuslerp_contrast", 1.0),
    )


@pytest.mark.parametrize("config", _blocks("yaml"))
def test_documented_config(
    config: str, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if refused(config, tmp_path / "out", checkpoints):
        return
    merge_in_process(config, tmp_path / "out", checkpoints, caplog)
    parsed = yaml.safe_load(config)
    listed = [entry["model"].removeprefix("./") for entry in parsed["models"]]
    models = ("base", *(name for name in listed if name != "base"))
    rule = partial(_as_written, parsed)
    assert_merged(tmp_path / "out", checkpoints, models, rule)


@pytest.mark.parametrize("code", _blocks("python"))
def test_documented_python(code: str) -> None:
    if "merge_tensors" in code and not TAKES_NAMES:
        pytest.skip("new in mergekit 0.1.5")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["merged"].shape == names["a"].shape
    assert names["merged"].isfinite().all()


@pytest.fixture(scope="module")
def first_hour(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and the first config of the README."""
    folder = tmp_path_factory.mktemp("first hour")
    for name in (*MODELS, "dpo"):
        (folder / name).symlink_to(checkpoints / name)
    (folder / "merge.yaml").write_text(_blocks("yaml")[0], encoding="utf-8")
    return folder


def _commands() -> list[str]:
    lines = "\n".join(_blocks("sh")).replace(" && ", "\n").splitlines()
    return list(dict.fromkeys(line.partition("#")[0].strip() for line in lines))


@pytest.mark.parametrize("line", _commands())
def test_documented_command(line: str, first_hour: Path) -> None:
    """All but those that install, and the demo, which other tests are about."""
    if line.startswith("pip install"):
        extras = re.findall(r"\[(\w+)\]", line)
        project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        assert all(f"\n{extra} = [" in project for extra in extras)
    elif line in ("pytest", "cd play") or " demo " in line:
        return
    else:
        scripts = sysconfig.get_path("scripts")
        path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
        environment = clean_environment(PATH=path)
        done = run_command("bash", "-c", line, cwd=first_hour, env=environment)
        assert done.returncode == 0, done.stderr


def test_documented_session(
    first_hour: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the merge that the demo makes."""
    monkeypatch.chdir(demo.folder)
    LoaderCache.loaders.clear()
    (session,) = _blocks("pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, "docs", None, 0)
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0 and results.attempted > 5


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{target} in {page.name}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 170
