# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What `mergekit-nuslerp inspect` says is so, of real checkpoints and made up ones."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import statistics
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mergekit.merge_methods
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache
from oracle import angle, oracle, vectors
from rich.console import Console
from safetensors.torch import save_file
from support import (
    EXAMPLES,
    Demo,
    load_tensors,
    merge_here,
    run_command,
    working_directory,
    write_t5,
)
from torch.nn.utils.rnn import pad_sequence

import mergekit_nuslerp.inspect.terminal
from mergekit_nuslerp import cli, plugin
from mergekit_nuslerp.adapters import planning
from mergekit_nuslerp.adapters.planning import Planned
from mergekit_nuslerp.checkpoints import write_checkpoints
from mergekit_nuslerp.inspect import figures as records
from mergekit_nuslerp.inspect import measure, terminal
from mergekit_nuslerp.inspect.figures import Inspection, Skipped, TensorGeometry
from mergekit_nuslerp.inspect.verdict import verdict, warnings
from mergekit_nuslerp.parameters import ConfigError

# Parameters whose values are names, which mergekit 0.1.4 does not take.
TAKES_NAMES = hasattr(mergekit.merge_methods, "merge_tensors")
only_names = pytest.mark.skipif(not TAKES_NAMES, reason="new in mergekit 0.1.5")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """mergekit remembers by its path what it has opened."""
    LoaderCache.loaders.clear()
    yield
    LoaderCache.loaders.clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `sft`, `dpo`, `kd` of two layers. Not to be written to."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoints(
        folder,
        fine_tunes=["sft", "dpo", "kd"],
        layers=2,
        hidden_size=32,
        vocabulary=272,
    )
    return folder


def config_of(weights: dict[str, float], base: str | None, **shared: Any) -> dict:
    config: dict[str, Any] = {"merge_method": "nuslerp", "dtype": "bfloat16"}
    if base:
        config["base_model"] = f"./{base}"
    config["models"] = [
        {"model": f"./{name}", "parameters": {"weight": weight}}
        for name, weight in weights.items()
    ]
    return {**config, "parameters": shared}


def slice_of(
    layer: int, weights: dict[str, float], base: str | None = None
) -> dict[str, Any]:
    models = config_of(weights, None)["models"]
    if base:
        models.append({"model": f"./{base}"})
    return {"sources": [{**m, "layer_range": [layer, layer + 1]} for m in models]}


def inspect_here(config: dict, folder: Path, **more: Any) -> Inspection:
    with working_directory(folder):
        return measure.inspect(MergeConfiguration.model_validate(config), **more)


def command(folder: Path, *words: str | Path) -> Result:
    """Run `mergekit-nuslerp inspect` in this process."""
    with working_directory(folder):
        return CliRunner().invoke(cli.main, ["inspect", *map(str, words)])


# --- The figures -------------------------------------------------------------------


GRANULARITIES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "row": {"nuslerp_flatten": False},
    "dim0": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}
if TAKES_NAMES:
    GRANULARITIES |= {
        name: {"nuslerp_granularity": name}
        for name in ("matrix", "column", "row:8", "column:8", "row*column")
    }

MERGES: list[tuple[dict[str, float], str | None, dict[str, Any]]] = [
    ({"kd": 0.2, "sft": 0.6}, "base", {"lambda": 0.5}),
    ({"sft": 1, "dpo": 2}, "base", {"nuslerp_magnitude": "linear"}),
    ({"sft": 0.5, "kd": 0.3, "dpo": 0.2}, "base", {}),
    ({"dpo": 0.2, "kd": 0.3, "sft": 0.5}, None, {"nuslerp_magnitude": "geometric"}),
    ({"sft": 1, "kd": 2}, "base", {"nuslerp_contrast": 2.0}),
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("weights, base, shared", MERGES)
def test_figures(
    weights: dict[str, float],
    base: str | None,
    shared: dict[str, Any],
    granularity: str,
    small: Path,
) -> None:
    """All of them, against float64 arithmetic on whole vectors."""
    if not TAKES_NAMES:
        shared = {key: shared[key] for key in shared if key != "nuslerp_magnitude"}
    config = config_of(weights, base, **shared, **GRANULARITIES[granularity])
    found = inspect_here(config, small)
    records = json.loads(found.model_dump_json(by_alias=True))
    states = {name: load_tensors(small / name) for name in weights}
    base_state = load_tensors(small / base) if base else {}
    assert records["models"] == [f"./{name}" for name in weights]
    assert sorted(t["name"] for t in records["tensors"]) == sorted(states["sft"])
    assert not records["skipped"]
    # Those of another layer take as long and add nothing.
    for record in records["tensors"]:
        if record["layer"] in (None, 1):
            name = record["name"]
            tensors = {model: state[name] for model, state in states.items()}
            expected = expected_figures(
                tensors, weights, base_state.get(name), granularity, shared
            )
            assert_agree(record, expected, name)


def expected_figures(
    tensors: dict[str, torch.Tensor],
    weights: dict[str, float],
    base: torch.Tensor | None,
    granularity: str,
    shared: dict[str, Any],
) -> dict[str, Any]:
    """A tensor's record, from the definitions of what it says."""
    shape = next(iter(tensors.values())).shape
    places = list(vectors(shape, granularity))
    origin = torch.zeros(shape).double() if base is None else base.double()
    tasks = {model: tensor.double() - origin for model, tensor in tensors.items()}
    split = {
        model: pad_sequence([task[place].flatten() for place in places], True)
        for model, task in tasks.items()
    }
    shares = {
        model: weight / sum(weights.values()) for model, weight in weights.items()
    }
    norms = {model: task.norm().item() for model, task in tasks.items()}
    magnitude, lambda_ = (
        shared.get("nuslerp_magnitude", "slerp"),
        shared.get("lambda", 1),
    )
    merged = oracle(
        list(tensors.values()),
        tuple(weights.values()),
        base,
        granularity,
        magnitude=magnitude,
        contrast=shared.get("nuslerp_contrast", 1),
        lambda_=lambda_,
    )
    merged = (merged - origin) / lambda_
    # The matrix that coefficients are compared to counts too.
    contrast = shared.get("nuslerp_contrast", 1)
    compared = contrast != 1 and granularity != "row*column" and len(places) > 1
    linear = sum(shares[model] * tasks[model] for model in tasks)
    mean_norm = sum(shares[model] * norms[model] for model in tasks)
    base_norm = None if base is None else origin.norm().item()
    return {
        "shape": list(shape),
        "dtype": "bfloat16",
        "granularity": granularity,
        "magnitude": magnitude,
        "contrast": contrast,
        "lambda": lambda_,
        "t": list(shares.values())[1] if len(shares) == 2 else None,
        "vectors": len(places) + compared,
        "base_norm": base_norm,
        "norm_ratio": ratio(max(norms.values()), min(norms.values())),
        "departure": ratio((merged - linear).norm().item(), linear.norm().item()),
        "length": ratio(merged.norm().item(), mean_norm),
        "linear": 0,
        "parts": [
            {
                "model": f"./{model}",
                "weight": shares[model],
                "norm": norms[model],
                "relative_norm": None if base is None else norms[model] / base_norm,
                "zero": (split[model] == 0).all(-1).sum().item(),
            }
            for model in tensors
        ],
        "pairs": [
            {
                "first": f"./{first}",
                "second": f"./{second}",
                "antipodal": 0,
                **angles(split[first], split[second]),
            }
            for index, first in enumerate(tensors)
            for second in list(tensors)[index + 1 :]
        ],
    }


def ratio(value: float, unit: float) -> float | None:
    return value / unit if unit else None


def angles(first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    both = first.any(-1) & second.any(-1)
    units = [v[both] / v[both].norm(dim=-1, keepdim=True) for v in (first, second)]
    found = sorted(angle(*units).tolist())
    if not found:
        return {"angle": None, "parallel": 0}

    def quantile(share: float) -> float:
        place = share * (len(found) - 1)
        below = math.floor(place)
        above = min(below + 1, len(found) - 1)
        return found[below] + (place - below) * (found[above] - found[below])

    named = {f"p{n}": quantile(n / 100) for n in (5, 25, 50, 75, 95)}
    ends = {"smallest": found[0], "largest": found[-1]}
    parallel = sum(value < 1e-6 for value in found)
    return {"angle": {**named, **ends}, "parallel": parallel}


def assert_agree(found: Any, expected: Any, place: str) -> None:
    """To 1e-6, in all that is expected."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_agree(found[key], value, f"{place} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_agree(found[index], value, f"{place}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), place
    else:
        assert found == expected, place


def plan(
    name: str,
    weights: dict[ModelReference, float],
    *,
    base: ModelReference | None = None,
    granularity: str = "tensor",
    magnitude: Any = "slerp",
    contrast: float = 1.0,
) -> Planned:
    """How a tensor would be merged that no file holds."""
    info = WeightInfo(name=name)
    return Planned(
        name=name,
        base=base,
        shared={
            "nuslerp_granularity": granularity,
            "nuslerp_magnitude": magnitude,
            "nuslerp_contrast": contrast,
        },
        weights=list(weights.items()),
        tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(weights, info))),
        info=info,
    )


def measured(
    tensors: list[torch.Tensor],
    weights: list[float],
    base: torch.Tensor | None = None,
    granularity: str = "row",
    magnitude: Any = "slerp",
    contrast: float = 1.0,
    name: str = "model.layers.3.mlp.up_proj.weight",
) -> TensorGeometry:
    """The record of a tensor made up here."""
    models = [ModelReference.parse(f"model-{index}") for index in range(len(tensors))]
    state = dict(zip(models, tensors))
    origin = ModelReference.parse("base") if base is not None else None
    if origin is not None and base is not None:
        state[origin] = base
    planned = plan(
        name,
        dict(zip(models, weights)),
        base=origin,
        granularity=granularity,
        magnitude=magnitude,
        contrast=contrast,
    )
    return measure.measure(planned, state)


def test_counts_of_special_vectors() -> None:
    v = torch.tensor([3.0, 4.0, 0.0])
    zero = torch.zeros(3)
    across = torch.tensor([4.0, -3.0, 0.0])
    first = torch.stack([zero, zero, v, v, v, v, v])
    second = torch.stack([zero, v, 2 * v, 2 * v, -v, -3 * v, across])
    found = measured([first, second], [1, 3])
    (pair,) = found.pairs
    assert [part.zero for part in found.parts] == [2, 1]
    assert (found.vectors, found.linear) == (7, 2)
    assert (pair.parallel, pair.antipodal) == (2, 2)
    assert pair.angle is not None
    assert sum(pair.angle.histogram) == 5  # those that are not zero
    assert pair.angle.smallest == 0
    assert pair.angle.p50 == pytest.approx(math.pi / 2)
    assert pair.angle.largest == pytest.approx(math.pi)
    assert (found.stack, found.layer) == ("model.layers", 3)
    assert found.projection == "mlp.up_proj"


def test_vectors_that_cancel_have_no_unique_mean() -> None:
    corners = [[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]
    tensors = [
        torch.tensor([corner, [1.0, 0.1 * n]]) for n, corner in enumerate(corners)
    ]
    found = measured(tensors, [1, 1, 1])
    assert (found.vectors, found.linear) == (2, 1)
    assert not any(pair.antipodal for pair in found.pairs)


def test_tensors_are_dropped_one_after_the_other(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    one = measure.measure

    def watched(planned: Planned, tensors: Any) -> TensorGeometry:
        assert not any(tensor() is not None for tensor in alive)
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]
        return one(planned, tensors)

    monkeypatch.setattr(measure, "measure", watched)
    steps: list[tuple[int, int]] = []
    config = config_of({"sft": 1, "kd": 1}, "base")
    found = inspect_here(config, small, progress=lambda *at: steps.append(at))
    count = len(found.tensors)
    assert len(alive) == 3
    assert steps == [(done, count) for done in range(count + 1)]


# --- The command -------------------------------------------------------------------


def needs_names(config: str) -> bool:
    named = yaml.safe_load(config).get("parameters", {}).keys()
    return bool(named & {"nuslerp_granularity", "nuslerp_magnitude"})


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_examples(path: Path, demo: Demo, tmp_path: Path) -> None:
    folder = demo.folder
    records, table = tmp_path / "records.json", tmp_path / "table.csv"
    done = command(folder, path, "--json", records, "--csv", table)
    if needs_names(path.read_text(encoding="utf-8")) and not TAKES_NAMES:
        assert_refused(done, r"this mergekit takes only numbers")
        assert not [*tmp_path.iterdir()]
        return
    assert done.exit_code == 0, done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {records.name, table.name}
    found = json.loads(records.read_text(encoding="utf-8"))
    weights = load_tensors(folder / found["models"][0])
    assert {tensor["name"] for tensor in found["tensors"]} == weights.keys()
    assert_table_agrees(table, found)
    assert_narrow(done.stdout)
    for layer in {tensor["layer"] for tensor in found["tensors"]} - {None}:
        assert len(re.findall(rf"^{layer:>5}  ", done.stdout, re.MULTILINE)) == 1


def assert_table_agrees(path: Path, found: dict[str, Any]) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(t, pair) for t in found["tensors"] for pair in t["pairs"]]
    assert len(rows) == len(pairs)
    for row, (tensor, pair) in zip(rows, pairs):
        assert row.keys() == records.COLUMNS.keys()
        parts = {part["model"]: part for part in tensor["parts"]}
        same = {
            "name": tensor["name"],
            "layer": tensor["layer"],
            "granularity": tensor["granularity"],
            "lambda": tensor["lambda"],
            "vectors": tensor["vectors"],
            "first": pair["first"],
            "second": pair["second"],
            "weight_first": parts[pair["first"]]["weight"],
            "norm_second": parts[pair["second"]]["norm"],
            "relative_norm_second": parts[pair["second"]]["relative_norm"],
            "zero_second": parts[pair["second"]]["zero"],
            "antipodal": pair["antipodal"],
            "linear": tensor["linear"],
            "departure": tensor["departure"],
            "length": tensor["length"],
        }
        for column, value in same.items():
            assert row[column] == ("" if value is None else str(value)), column
        for quantile in ("smallest", "p5", "p25", "p50", "p75", "p95", "largest"):
            cell = row[f"angle_{quantile}_degrees"]
            if pair["angle"] is None:
                assert cell == ""
            else:
                expected = pair["angle"][quantile] * 180 / math.pi
                assert float(cell) == pytest.approx(expected, rel=1e-12)


def assert_narrow(text: str) -> None:
    # All but the names of the files, which are as long as their folder's.
    lines = [line for line in text.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= 80


def test_a_row_for_each_tensor_and_pair(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    models = {"sft": 1, "kd": 1, "dpo": 1}
    config.write_text(yaml.safe_dump(config_of(models, "base")), encoding="utf-8")
    done = command(small, config, "--full")
    assert done.exit_code == 0
    assert_narrow(done.stdout)
    tensors = load_tensors(small / "base")
    for pair in ("1-2", "1-3", "2-3"):
        assert len(re.findall(rf"  {pair}  ", done.stdout)) == len(tensors)


OTHERS = {
    "slerp": {"base_model": "./sft", "parameters": {"t": 0.5}},
    "linear": {"base_model": "./sft"},
    "task_arithmetic": {"base_model": "./base"},
}


@pytest.mark.parametrize("method", OTHERS)
def test_configs_of_other_methods(method: str, small: Path, tmp_path: Path) -> None:
    """What they have in common with `nuslerp`, and nothing else."""
    config = {**config_of({"sft": 1, "kd": 1}, None), **OTHERS[method]}
    config["merge_method"] = method
    if method == "slerp":
        del config["parameters"], config["models"]
        config["slices"] = [slice_of(layer, {"sft": 1, "kd": 1}) for layer in range(2)]
        config["parameters"] = {"t": 0.5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = command(small, tmp_path / "config.yaml", "--json", "-")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    base = "base" if method == "task_arithmetic" else None
    ours = inspect_here(config_of({"sft": 1, "kd": 1}, base), small)
    assert found["method"] == method and found["models"] == ["./sft", "./kd"]
    for theirs, tensor in zip(found["tensors"], ours.tensors):
        assert theirs["pairs"] == [pair.model_dump() for pair in tensor.pairs]
        assert theirs["departure"] is theirs["parts"][0]["weight"] is None
    text = command(small, tmp_path / "config.yaml").stdout
    assert f"merge by {method}" in words(text) and "departs" not in text


def test_the_other_name_of_the_method(small: Path) -> None:
    """That of the entry point: the same merge."""
    config = config_of({"sft": 0.3, "kd": 0.7}, "base", **{"lambda": 0.5})
    ours = inspect_here(config, small)
    other = inspect_here({**config, "merge_method": "mergekit_nuslerp"}, small)
    assert other.method == "mergekit_nuslerp"
    assert (other.tensors, other.verdict) == (ours.tensors, ours.verdict)


def test_a_list_of_checkpoints(small: Path) -> None:
    done = command(small, "sft", "kd", "dpo", "--base", "base", "--json", "-")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["sft", "kd", "dpo"]
    assert {tensor["base"] for tensor in found["tensors"]} == {"base"}
    assert_refused(command(small, "sft", "no.yaml"), r"no\.yaml is no folder")


def test_figures_to_standard_output(small: Path, tmp_path: Path) -> None:
    """And nothing else, so that another program can read them."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    found = json.loads(command(small, config, "--json", "-").stdout)
    assert [entry["kind"] for entry in found["verdict"]]
    assert any("only sft has a task vector" in text for text in found["warnings"])
    table = tmp_path / "table.csv"
    done = command(small, config, "--csv", "-", "--json", tmp_path / "records.json")
    table.write_bytes(done.stdout.encode())
    assert_table_agrees(table, found)
    assert json.loads((tmp_path / "records.json").read_text("utf-8")) == found
    assert_refused(command(small, config, "--csv", "-", "--json", "-"), "its own")


def test_strict_exits_with_1_where_there_are_warnings(
    small: Path, tmp_path: Path
) -> None:
    for weights, status in (({"sft": 1, "kd": 1}, 1), ({"sft": 1, "dpo": 1}, 0)):
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(config_of(weights, "base")), encoding="utf-8")
        assert command(small, config).exit_code == 0
        assert command(small, config, "--strict").exit_code == status


def test_several_configs_side_by_side(small: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.yaml" for name in ("a", "b")]
    for path, weight in zip(paths, ([0.3, 0.3], [0.3, 0.6])):
        config = config_of({"sft": 1, "dpo": 1}, "base")
        config["models"][0]["parameters"]["weight"] = weight
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = command(small, *paths, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [entry["config"] for entry in found] == list(map(str, paths))
    rows = terminal.differences([Inspection.model_validate(entry) for entry in found])
    assert {tuple(row[:2]) for row in rows} > {
        ("", "weight of sft"),
        ("q_proj", "gets"),
    }
    assert all(row[2] != row[3] for row in rows)
    assert ("q_proj", "angle") not in {tuple(row[:2]) for row in rows}


def test_weights_that_vary_take_the_place_of_angles(small: Path) -> None:
    config = config_of({"sft": 1, "dpo": 1}, "base")
    assert "Angle between the task vectors, degrees" in shown(config, small)[1]
    config["models"][0]["parameters"]["weight"] = [0.25, 3]
    text = shown(config, small)[1]
    said = re.search(r"effective weight.* 0 (\d+):\d+ .* 1 (\d+):\d+ ", text)
    assert said
    assert int(said[1]) == pytest.approx(20, abs=2)
    assert int(said[2]) == pytest.approx(75, abs=2)


@pytest.mark.parametrize("terminal, no_color", [(True, ""), (True, "1"), (False, "")])
def test_colour_is_for_terminals(
    terminal: bool, no_color: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: terminal)
    console = Console(file=out)
    records_of = at_angles(["lm_head"])
    records_of.warnings = ["a warning"]
    mergekit_nuslerp.inspect.terminal.show([records_of], console)
    assert ("\x1b[33m" in out.getvalue()) == (terminal and not no_color)


def test_the_help_says_what_each_column_means(small: Path) -> None:
    text = words(command(small, "--help").stdout)
    for figure in records.FIGURES:
        assert figure.heading in text and figure.meaning in text


def test_the_schema_describes_the_records(small: Path) -> None:
    done = command(small, "--schema")
    schema = json.loads(done.stdout)
    found = inspect_here(config_of({"sft": 1, "kd": 1}, "base"), small)
    tensor = json.loads(found.model_dump_json(by_alias=True))["tensors"][0]
    definitions = schema["$defs"]
    for name, record in (
        ("TensorGeometry", tensor),
        ("Part", tensor["parts"][0]),
        ("Pair", tensor["pairs"][0]),
        ("Distribution", tensor["pairs"][0]["angle"]),
    ):
        assert definitions[name]["properties"].keys() == record.keys()
    assert "radians" in schema["description"]


# --- Words -------------------------------------------------------------------------


def printed(found: Inspection, *, full: bool = False, width: int = 80) -> str:
    """What a terminal of some width would show."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    terminal.show([found], console, full=full)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(text: str) -> str:
    """In one line, without rules."""
    return " ".join(text.replace("─", "").split())


def shown(config: dict, folder: Path) -> tuple[Inspection, str]:
    found = inspect_here(config, folder)
    return found, words(printed(found))


def test_what_one_model_left_unchanged(small: Path) -> None:
    _, text = shown(config_of({"sft": 0.3, "kd": 0.7}, "base"), small)
    assert (
        "5 tensors of 21 unchanged in kd: all 2 input_layernorm, all 2 "
        "post_attention_layernorm, the norm." in text
    )
    assert "unchanged in sft" not in text
    # There the other one's task vector is at a right angle to nothing.
    taken = math.sin(0.3 * math.pi / 2)
    assert "only sft has a task vector that is not zero. Magnitude slerp takes " in text
    assert f"takes {taken:.3g} of it, where its weight is 0.3." in text
    assert re.search(r"kd weight .*\(median where not zero\)", words(text))
    assert "sft weight 0.3, task vectors 2 % of the base (median)" in words(text)


def test_a_layer_without_a_weight_that_others_have() -> None:
    record = measured([*torch.randn(2, 4, 4)], [1, 1])
    tensors = [
        record.model_copy(
            update={"stack": "layers", "layer": layer, "projection": projection}
        )
        for layer, projection in ((0, "router"), (0, "up_proj"), (1, "up_proj"))
    ]
    assert "vector is zero" not in printed(made_up(tensors))


@only_names
def test_no_warning_where_the_weight_is_what_is_taken(small: Path) -> None:
    config = config_of({"sft": 0.3, "kd": 0.7}, "base", nuslerp_magnitude="linear")
    _, text = shown(config, small)
    assert "unchanged in kd" in text
    assert "warning" not in text


def test_rows_that_one_model_left_unchanged(tmp_path: Path, small: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name:
            weight[:100] = load_tensors(small / "base")[name][:100]
        return weight

    altered(small, tmp_path, change)
    config = config_of({"sft": 1, "kd": 1}, "base", nuslerp_flatten=False)
    _, text = shown(config, tmp_path)
    assert "100 of the 272 vectors of 1 other tensor unchanged in kd." in text


@pytest.mark.parametrize("base", [None, "base"])
def test_the_verdict_on_directions(base: str | None, small: Path) -> None:
    """The angles and the distance from the linear merge, as in the merge itself."""
    found = inspect_here(config_of({"sft": 0.3, "kd": 0.7}, base), small)
    directions = found.verdict[0]
    assert directions.kind == ("related" if base else "nearly_linear")
    said = re.search(
        r"([\d.]+) degrees apart \(median; ([\d.]+) at most\).*?([\d.e-]+) % off",
        directions.text,
    )
    assert said
    states = [load_tensors(small / name) for name in ("sft", "kd", "base")]
    departures, between = [], []
    for name, weight in states[0].items():
        if weight.dim() > 1:
            a, b, origin = (state[name].double() for state in states)
            a, b = (x - origin if base else x for x in (a, b))
            merged = oracle([a, b], (0.3, 0.7), None, "tensor")
            linear = 0.3 * a + 0.7 * b
            departures.append(((merged - linear).norm() / linear.norm()).item())
            units = ((x / x.norm()).flatten() for x in (a, b))
            between.append(math.degrees(angle(*units).item()))
    assert float(said[1]) == pytest.approx(statistics.median(between), abs=0.06)
    assert float(said[2]) == pytest.approx(max(between), abs=0.06)
    middle = 100 * statistics.median(departures)
    assert float(said[3]) == pytest.approx(middle, rel=0.06)


def test_a_longer_task_vector_draws_the_merge(checkpoints: Path) -> None:
    found, text = shown(config_of({"sft": 0.5, "dpo": 0.5}, "base"), checkpoints)
    (dominates,) = (each for each in found.verdict if each.kind == "dominates")
    assert dominates.models == ["./dpo"]
    assert yaml.safe_load(dominates.lines) == {
        "parameters": {"nuslerp_magnitude": "linear"}
    }
    said = re.search(
        r"most in (\S+), dpo's ([\d.]+) times as long as sft's. .* There dpo gets "
        r"([\d.]+), where its weight is 0.5. `nuslerp_magnitude: ",
        text,
    )
    assert said
    base, sft, dpo = (
        load_tensors(checkpoints / name)[f"{said[1]}.weight"]
        for name in ("base", "sft", "dpo")
    )
    merged = oracle([sft, dpo], (0.5, 0.5), base, "tensor") - base.double()
    first, second, between = (
        v.flatten() / v.norm()
        for v in (sft.double() - base, dpo.double() - base, merged)
    )
    turned = (angle(first, between) / angle(first, second)).item()
    assert float(said[3]) == pytest.approx(turned, abs=0.0051)
    longer = ((dpo.double() - base).norm() / (sft.double() - base).norm()).item()
    assert float(said[2]) == pytest.approx(longer, abs=0.051)


@pytest.mark.parametrize("models", [2, 3])
def test_the_weights_that_models_really_have(models: int) -> None:
    """By which the oracle's mean, of vectors as long as each other, is this merge."""
    tensors = list(torch.randn(models, 5, 8, dtype=torch.float64))
    tensors = [x / x.norm() * length for x, length in zip(tensors, (1, 4, 2))]
    weights = [0.2, 0.3, 0.5][:models]
    merged = oracle(tensors, tuple(weights), None, "tensor")
    found = measured(tensors, weights, granularity="tensor")
    effective = [part.effective or 0 for part in found.parts]
    units = [x / x.norm() for x in tensors]
    again = oracle(units, tuple(effective), None, "tensor")
    assert sum(effective) == pytest.approx(1)
    same = torch.cosine_similarity(merged.flatten(), again.flatten(), dim=0)
    assert same.item() == pytest.approx(1, abs=1e-9)
    linear = measured(tensors, weights, granularity="tensor", magnitude="linear")
    for part, weight in zip(linear.parts, weights):
        assert part.effective == pytest.approx(weight / sum(weights), abs=1e-9)


@pytest.mark.parametrize("granularity", ["row", "row*column"])
def test_what_contrast_does_to_the_weights_that_models_have(granularity: str) -> None:
    """In rows where all agree, and in others where the first is much shorter."""
    first, second, third = torch.randn(3, 8, 32, dtype=torch.float64)
    first[4:] *= 0.2
    found = {}
    for contrast in (0, 1, 2):
        record = measured(
            [first, second, third],
            [1, 1, 1],
            granularity=granularity,
            magnitude="linear",
            contrast=contrast,
        )
        assert record.contrast == contrast
        found[contrast] = [part.effective or 0 for part in record.parts]
        assert sum(found[contrast]) == pytest.approx(1)
    assert found[0][0] != pytest.approx(found[1][0], abs=0.01)
    assert found[2][0] != pytest.approx(found[1][0], abs=0.01)
    if granularity == "row":  # where it is shorter, the whole's merge lets it be
        assert found[2][0] > found[1][0] > found[0][0]
        assert found[1] == pytest.approx([1 / 3] * 3)
    else:
        assert found[0] == pytest.approx([1 / 3] * 3)
    # Of two as long as each other in all vectors, what the weights say.
    a, b = torch.eye(4).double(), torch.eye(4).double().roll(1, 0)
    for contrast in (0.5, 1, 3):
        record = measured([a, b], [1, 3], granularity=granularity, contrast=contrast)
        shares = [part.effective for part in record.parts]
        assert shares == pytest.approx([0.25, 0.75], abs=1e-9)


def test_a_model_without_weight_gets_nothing_by_rows_and_columns() -> None:
    a, b, c = torch.randn(3, 2, 6, 8, dtype=torch.float64)
    for contrast in (1, 2):
        found = measured(
            [a, b, c], [1, 0, 2], granularity="row*column", contrast=contrast
        )
        first, second, third = (part.effective for part in found.parts)
        assert second == 0
        assert 0.2 < first < 0.5 < third < 0.8
    low, high = found.profile
    assert low < 1 < high
    # At 0 it is each expert's mean as a whole.
    found = measured([a, b], [1, 3], granularity="row*column", contrast=0)
    assert found.profile == (1, 1)
    shares = [part.effective for part in found.parts]
    whole = measured([a, b], [1, 3], granularity="matrix")
    assert shares == pytest.approx([part.effective for part in whole.parts])
    assert found.departure == pytest.approx(whole.departure)


def test_a_merge_by_rows_and_columns_is_measured_in_float64() -> None:
    """Differences of the largest numbers that bfloat16 has."""
    base = torch.full((4, 6), -3e38).bfloat16()
    models = [-base, (1 - 0.5 * torch.rand(4, 6)).bfloat16() * base]
    found = measured(models, [1, 1], base, granularity="row*column")
    assert found.length == pytest.approx(1, abs=0.5)


def test_matrices_without_a_mean_are_counted_among_the_vectors() -> None:
    a = torch.randn(4, 6, dtype=torch.float64)
    found = measured([a, -2 * a], [2, 3], granularity="row", contrast=2)
    assert (found.linear, found.vectors) == (5, 5)


def test_zero_and_parallel_tensors_by_rows_and_columns() -> None:
    v = torch.randn(3, 4, dtype=torch.float64)
    found = measured([v, torch.zeros_like(v)], [1, 1], granularity="row*column")
    assert [part.zero for part in found.parts] == [0, 3 + 4 + 1]
    assert [part.effective for part in found.parts] == [None, None]
    found = measured([v, 3 * v], [1, 1], granularity="row*column")
    assert (found.departure, found.length) == (
        pytest.approx(0, abs=1e-7),
        pytest.approx(1),
    )
    found = measured([v[0], 3 * v[1]], [1, 1], granularity="row*column", contrast=2)
    assert (found.vectors, found.linear) == (1, 0)


def at(degrees: float, length: float = 1) -> torch.Tensor:
    """A vector in the plane."""
    angle = math.radians(degrees)
    return length * torch.tensor([[math.cos(angle), math.sin(angle)]]).double()


# Two task vectors, and the kinds of what the verdict must say, of how many models.
VERDICTS = {
    "identical": (at(0), at(0), {"identical": 2, "as_weighted": 2}),
    "nearly parallel": (at(0), at(8), {"nearly_linear": 2, "as_weighted": 2}),
    "orthogonal": (at(0), at(90), {"unrelated": 2, "as_weighted": 2}),
    "ten times longer": (at(0), at(60, 10), {"related": 2, "dominates": 1}),
    "one frozen": (at(0), at(0, 0), {"unchanged": 1}),
    "opposite": (at(0), -at(0), {"opposed": 2}),
    "nearly opposite": (at(0), at(150), {"opposed": 2, "as_weighted": 2}),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case: str) -> None:
    first, second, expected = VERDICTS[case]
    base = torch.ones(1, 2, dtype=torch.float64)
    found = measured([base + first, base + second], [0.5, 0.5], base, "tensor")
    told = made_up([found]).verdict
    assert {finding.kind: len(finding.models) for finding in told} == expected
    for finding in told:
        if finding.kind in ("dominates", "unchanged"):
            assert finding.models == ["model-1"]
        # Whoever reads that something is wrong reads what to do.
        wrong = ("identical", "opposed", "dominates", "unchanged")
        assert bool(finding.consider) == (finding.kind in wrong)
        assert not finding.lines or yaml.safe_load(finding.lines)


@pytest.mark.parametrize("ratio, told", [(1.9, False), (2.1, True)])
def test_from_which_ratio_on_a_longer_vector_is_told(ratio: float, told: bool) -> None:
    first, second = torch.randn(2, 8, 8)
    second *= ratio * first.norm() / second.norm()
    found = made_up([measured([first, second], [0.5, 0.5])])
    assert ("more than twice as long" in words(printed(found))) == told


def test_a_model_without_a_weight_makes_no_ratio() -> None:
    """Attention from one model and MLPs from the other: nothing turns too far."""
    one, other, third = (unit / unit.norm() for unit in torch.randn(3, 8, 8))
    pair = measured([one, 5 * other], [1, 0])
    assert "twice as long" not in words(printed(made_up([pair])))
    three = measured([one, 5 * third, 2.5 * other], [1, 0, 1])
    text = words(printed(made_up([three])))
    assert "model-2's 2.50 times as long as model-0's" in text


def test_opposite_vectors_by_the_bound_of_the_merge() -> None:
    rows = torch.randn(500, 64, dtype=torch.float64)
    found = measured([rows, -0.3 * rows], [1, 1])
    assert found.linear == found.pairs[0].antipodal == 500
    text = words(printed(made_up([found])))
    assert "500 of the 500 vectors" in text
    assert "spherical and linear agree" not in text
    zeros = measured([rows, -rows], [1, 1])
    assert "(-: a model's vector, or the result, is zero)" in printed(made_up([zeros]))


@only_names
def test_what_a_config_says_in_vain(small: Path) -> None:
    weight = [{"filter": "block_sparse", "value": 0.1}, {"value": 1.0}]
    config = config_of({"sft": 1, "kd": 1}, "base")
    config["models"][0]["parameters"]["weight"] = weight
    config["parameters"]["lambda"] = [
        {"filter": "layers.1.mlp", "value": 0},
        {"filter": "*", "value": 1},
    ]
    found, text = shown(config, small)
    assert found.unmatched == ["block_sparse"]
    text = words(text)
    assert "warning: no tensor's name contains the filter 'block_sparse'." in text
    assert re.search(r"lambda is 0 for 3 tensors \(.*\)\. The base stays", text)


def test_weights_that_sum_to_zero_are_said(small: Path) -> None:
    config = config_of({"sft": 0.5, "kd": -0.5}, "base")
    found, text = shown(config, small)
    assert all(tensor.zero_sum and tensor.t == 0.5 for tensor in found.tensors)
    assert re.search(r"the weights of 21 tensors \(.*\) sum to zero", words(text))


def test_modules_that_a_config_leaves_out(tmp_path: Path) -> None:
    write_t5(tmp_path, "one", "other")
    models = config_of({"one": 1, "other": 1}, None)["models"]
    merge = {"merge_method": "nuslerp", "modules": {"encoder": {"models": models}}}
    found, text = shown(merge, tmp_path)
    assert "decoder" in found.left_out and "encoder" not in found.left_out
    assert "the config has no module 'decoder'. The merged model will" in text
    merge = {"merge_method": "nuslerp", "models": models}
    found, text = shown(merge, tmp_path)
    assert found.left_out == []
    assert " encoder: q 1 " in text and " decoder: SelfAttention.q 1 " in text
    assert "degrees, in decoder.block layer SelfAttention.q " in text


def test_a_long_reason_keeps_both_ends(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ValueError(f"the start {'{...} ' * 500}\nthe end")

    monkeypatch.setattr(measure, "inspect", broken)
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = command(small, tmp_path / "config.yaml")
    assert_refused(done, r"the start .* \[\.\.\.\] .*the end")
    assert len(done.stderr) < 600


def test_parameters_that_stand_in_the_wrong_place(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"{CONFIG}nuslerp_magnitude: linear\n", encoding="utf-8"
    )
    done = command(tmp_path, "config.yaml")
    assert_refused(done, "'nuslerp_magnitude' has no effect outside of `parameters`")


def test_an_inspection_does_not_say_that_it_merges(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.announce.cache_clear()  # said once in a process
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    assert command(small, tmp_path / "config.yaml").exit_code == 0
    inspect_here(yaml.safe_load(CONFIG), small)
    assert not any("merges here" in message for message in caplog.messages)
    merge_here(CONFIG, tmp_path / "out", cwd=small)
    assert any("merges here" in message for message in caplog.messages)


def test_extrapolation_is_said(small: Path) -> None:
    config = config_of({"sft": -0.3, "kd": 1.3}, "base")
    _, text = shown(config, small)
    assert re.search(r"beyond the models, at t = 1\.3 \(0 is sft, 1 is kd\)", text)
    assert "turns as far" not in text


def test_extrapolation_names_the_models_of_its_slice(small: Path) -> None:
    config = config_of({}, "base")
    del config["models"]
    config["slices"] = [
        slice_of(0, {"sft": 0.3, "kd": 0.7}, "base"),
        slice_of(1, {"kd": -0.5, "sft": 1.5}, "base"),
    ]
    _, text = shown(config, small)
    assert "at t = 1.5 (0 is kd, 1 is sft)" in text


def test_nothing_is_said_of_angles_where_one_model_has_all_the_weight(
    small: Path,
) -> None:
    _, text = shown(config_of({"sft": 1, "kd": 0}, "base"), small)
    assert "agree" not in text and "linear" not in text


@only_names
def test_a_mean_length_below_zero(small: Path, tmp_path: Path) -> None:
    altered(small, tmp_path, lambda _, weight: weight + torch.randn_like(weight))
    config = config_of({"sft": 1.9, "kd": -0.9}, "base", nuslerp_magnitude="linear")
    found, text = shown(config, tmp_path)
    assert all(tensor.length is None for tensor in found.tensors)
    assert "is not above zero. Magnitude linear leaves the base there." in text


def test_the_config_stays_as_it_is(small: Path) -> None:
    config = MergeConfiguration.model_validate(
        config_of({"sft": 0.3, "kd": 0.7}, "base")
    )
    before = config.model_dump()
    with working_directory(small):
        measure.inspect(config)
    assert config.model_dump() == before


def test_models_that_are_the_same(small: Path, tmp_path: Path) -> None:
    altered(small, tmp_path, lambda _, weight: weight)
    shutil.copytree(small / "kd", tmp_path / "copy")
    _, text = shown(config_of({"kd": 1, "copy": 1}, "base"), tmp_path)
    assert "kd and copy do not differ in any tensor." in text
    _, text = shown(config_of({"kd": 1, "sft": 1}, "base"), tmp_path)
    assert "do not differ" not in text


NOTHING: dict[str, list[str]] = {"left_out": [], "unmatched": []}


def made_up(tensors: list[TensorGeometry], **rest: Any) -> Inspection:
    models = list(dict.fromkeys(part.model for t in tensors for part in t.parts))
    found = Inspection(
        mergekit_nuslerp="0",
        mergekit="0.1.5",
        **{"models": models, "tensors": tensors, "skipped": [], **NOTHING, **rest},
    )
    found.verdict, found.warnings = verdict(found), list(warnings(found))
    return found


def test_vectors_without_a_mean_are_counted() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    opposite = rows * torch.tensor([[-1.0], [1.0], [-2.0]])
    text = words(printed(made_up([measured([rows, opposite], [1, 1])])))
    assert (
        "2 of the 3 vectors of tensor model.layers.3.mlp.up_proj have no unique mean"
        in text
    )


def test_skipped_tensors_are_named() -> None:
    skipped = [
        Skipped(name=f"buffer.{n}", reason="only one model has it") for n in range(5)
    ]
    text = words(printed(made_up([], skipped=skipped)))
    assert (
        "not interpolated, as only one model has it: 5 tensors (buffer.0, buffer.1, "
        "buffer.2, ...)." in text
    )
    assert "nothing to interpolate" in text


MIXTURE = [f"mlp.experts.{n}.{p}" for n in range(3) for p in ("gate_proj", "up_proj")]
LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
LONG = ["self_attn.kv_a_proj_with_mqa", "mlp.shared_experts.down_proj", "a" * 90]


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize(
    "projections, columns",
    [
        (LLAMA, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ([*LLAMA, "self_attn.q_proj.bias"], "up_proj down_proj"),
        (MIXTURE, "gate_proj up_proj"),
        ([*LLAMA, *LONG], "o_proj gate_proj up_proj mlp.down_proj"),
        ([*LLAMA, *MIXTURE], "experts.*.gate_proj experts.*.up_proj"),
    ],
)
def test_tables_fit_the_width(
    models: int, projections: list[str], columns: str
) -> None:
    layers = range(70, 82)
    record = measured([*torch.randn(models, 4, 4)], [1] * models)
    flat = measured([*torch.randn(models, 4)], [1] * models)
    tensors = [
        (flat if "norm" in projection or "bias" in projection else record).model_copy(
            update={
                "name": f"model.layers.{layer}.{projection}.weight",
                "stack": "model.layers",
                "layer": layer,
                "projection": projection,
            }
        )
        for layer in layers
        for projection in projections
    ]
    found = made_up(tensors)
    overview = printed(found)
    for text in (overview, printed(found, full=True)):
        assert_narrow(text)
    assert words(columns) in words(overview)
    bands = len(re.findall("^layer  ", overview, re.MULTILINE))
    for layer in layers:
        assert len(re.findall(rf"^{layer:>5}  ", overview, re.MULTILINE)) == bands


def test_slices_with_a_base_of_their_own(small: Path) -> None:
    """Task vectors in one layer, weights in the other: words for each."""
    weights = {"sft": 0.3, "kd": 0.7}
    config = {
        "merge_method": "nuslerp",
        "dtype": "bfloat16",
        "slices": [
            {**slice_of(0, weights, "base"), "base_model": "./base"},
            slice_of(1, weights),
        ],
    }
    found, text = shown(config, small)
    with_base = [tensor for tensor in found.tensors if tensor.base]
    assert {tensor.base for tensor in with_base} == {"./base"}
    assert {t.layer for t in found.tensors if not t.base} >= {1}
    assert {t.layer for t in with_base} >= {0} and 1 not in {t.layer for t in with_base}
    text = words(text)
    assert f" base base of {len(with_base)} tensors " in text
    assert "Angle between the vectors, degrees" in text
    assert " unchanged in kd: " in text and " zero in kd" not in text
    assert "only sft has a task vector that is not zero" in text


def at_angles(names: list[str]) -> Inspection:
    """Weights of these names, the first at 10 degrees, the next at 11, ..."""
    tensors = []
    for degrees, name in enumerate(names, 10):
        angle = torch.tensor(math.radians(degrees), dtype=torch.float64)
        one, other = torch.eye(2, dtype=torch.float64).unsqueeze(1)
        turned = angle.cos() * one + angle.sin() * other
        tensors.append(measured([one, turned], [1, 1], name=f"{name}.weight"))
    return made_up(tensors)


@pytest.mark.parametrize(
    ("stacks", "shown"),
    [
        (("encoder.block", "decoder.block"), ("encoder", "decoder")),
        (("model.visual.blocks", "model.text.layers"), ("visual", "text")),
        (("layers", "layers.more"), ("layers", "layers.more")),
    ],
)
def test_stacks_of_layers_stay_apart(
    stacks: tuple[str, str], shown: tuple[str, str]
) -> None:
    parts = ("attn.q", "attn.k", "cross.k")
    first, second = (
        [f"{stack}.{layer}.{part}" for layer in range(2) for part in parts]
        for stack in stacks
    )
    found = at_angles(["shared", *first, *second])
    text = printed(found)
    for stack, start in zip(stacks, (11, 17)):
        rows = [" ".join(f"{start + 3 * n + k}.0" for k in range(3)) for n in range(2)]
        assert (
            f"between the weights, degrees, in {stack} layer q attn.k cross.k "
            f"0 {rows[0]} 1 {rows[1]} "
        ) in words(text)
    for name, middle in zip(shown, ("12.5", "18.5")):
        assert re.search(rf"^{name}: q +2 .* {middle} ", text, re.MULTILINE)
    assert re.search(r"^shared +1 +10\.0 ", text, re.MULTILINE)
    full = printed(found, full=True)
    for name, last in zip(shown, ("14.0", "20.0")):
        assert re.search(rf"^ +1  {name}: q +{last} ", full, re.MULTILINE)


# --- Bad input ---------------------------------------------------------------------


def altered(
    source: Path, to: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """Copies of `base`, `sft` and `kd`, with the last one's weights changed."""
    for name in ("base", "sft"):
        (to / name).symlink_to(source / name)
    shutil.copytree(source / "kd", to / "kd")
    for shard in (to / "kd").glob("*.safetensors"):
        state = load_tensors_of(shard)
        changed = {name: change(name, weight) for name, weight in state.items()}
        save_file(changed, shard, {"format": "pt"})
    return to / "kd"


def load_tensors_of(shard: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(shard)


def assert_refused(done: Any, message: str) -> None:
    """One clear line, and nothing else."""
    status = done.exit_code if isinstance(done, Result) else done.returncode
    assert status == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert re.fullmatch(f"Error: .*{message}.*\n", done.stderr), done.stderr


CONFIG = yaml.safe_dump(config_of({"sft": 0.3, "kd": 0.7}, "base"))

MODULES = yaml.safe_dump(
    {
        "merge_method": "nuslerp",
        "modules": {"vision": {"slices": [slice_of(0, {"sft": 0.3, "kd": 0.7})]}},
    }
)

BAD_CONFIGS = {
    "models: [1,\nb: }": r"config\.yaml is not YAML: .*line 2",
    "\tmodels": r"config\.yaml is not YAML",
    "": r"config\.yaml is no config",
    "just words": r"config\.yaml is no config",
    "merge_method: nuslerp\nmodels: 3\n": "`models` is 3, but must be a list",
    CONFIG.replace("weight", "wait"): r"'weight' of model \./(sft|kd).* is missing",
    CONFIG.replace("{}", "{nuslerp_flaten: 1}"): r"'nuslerp_flaten'. Did you mean",
    CONFIG.replace("./kd", "./nowhere"): r"\./nowhere cannot be read: there is no fold",
    CONFIG.replace("./kd", "no/where"): r"no/where cannot be read: .*hub has no such",
    CONFIG.replace("bfloat16", "bloat"): "bloat",
    f"{CONFIG}---\n{CONFIG}": r"config\.yaml is not a single config: ",
    MODULES: r"there is no module 'vision' in these models. Theirs are default",
}


@pytest.mark.parametrize("config, message", BAD_CONFIGS.items())
def test_bad_configs(config: str, message: str, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config, encoding="utf-8")
    done = command(small, path, "--json", tmp_path / "records.json")
    assert_refused(done, message)
    assert [*tmp_path.iterdir()] == [path]


def test_a_config_in_another_encoding(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-16")
    assert_refused(command(small, path), r"config\.yaml is not a text in UTF-8")


def test_a_missing_config(small: Path) -> None:
    assert_refused(command(small, "nowhere.yaml"), "No such file.*nowhere.yaml")


def cut_short(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])


def garbled(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].write_bytes(b"no weights" * 50)


def without_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_short, r"model \./kd cannot be read: .*model-0000\d-of.*safetensors"),
        (garbled, r"model \./kd cannot be read: .*model-0000\d-of.*safetensors"),
        (without_shard, r"model \./kd cannot be read: .*model-0000\d-of.*safetensors"),
        (emptied, r"model \./kd cannot be read: Unable to find model files"),
        (without_config, r"\./kd.*config\.json"),
    ],
)
def test_damaged_checkpoints(
    damage: Callable[[Path], None], message: str, small: Path, tmp_path: Path
) -> None:
    damage(altered(small, tmp_path, lambda _, weight: weight))
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = command(tmp_path, "config.yaml", "--csv", "table.csv")
    assert_refused(done, message)
    assert not (tmp_path / "table.csv").exists()


def wider(name: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, weight]) if "layers.1.mlp.up_proj" in name else weight


def not_a_number(name: str, weight: torch.Tensor) -> torch.Tensor:
    if "layers.1.mlp.up_proj" in name:
        weight[5, 7] = math.nan
    return weight


def huge(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * 1e200 if "layers.1.mlp.up_proj" in name else weight


def renamed(shard: Path) -> None:
    state = load_tensors_of(shard)
    save_file({f"other.{name}": weight for name, weight in state.items()}, shard)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            wider,
            r"mlp\.up_proj\.weight differs in shape: .*\./kd.* Models of different",
        ),
        (not_a_number, r"layers\.1\.mlp\.up_proj\.weight of model \./kd contains NaN"),
        (huge, r"up_proj\.weight: a squared length is too large for torch\.float64\."),
    ],
)
def test_weights_that_cannot_be_merged(
    change: Callable[[str, torch.Tensor], torch.Tensor],
    message: str,
    small: Path,
    tmp_path: Path,
) -> None:
    altered(small, tmp_path, change)
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("dtype: bfloat16", ""), encoding="utf-8"
    )
    done = command(tmp_path, "config.yaml", "--json", "records.json")
    assert_refused(done, message)
    assert {path.name for path in tmp_path.iterdir()} == {
        "base",
        "sft",
        "kd",
        "config.yaml",
    }


def test_vocabularies_cut_as_the_merge_cuts_them(small: Path, tmp_path: Path) -> None:
    def longer(name: str, weight: torch.Tensor) -> torch.Tensor:
        vocabulary = "embed_tokens" in name or "lm_head" in name
        return torch.cat([weight, weight[:3]]) if vocabulary else weight

    altered(small, tmp_path, longer)
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    if TAKES_NAMES:  # mergekit 0.1.4 cuts them unasked
        assert_refused(command(tmp_path, "config.yaml"), "tokenizer_source: union")
    words = ("config.yaml", "--unsafe-truncate-embeddings", "--csv", "table.csv")
    done = command(tmp_path, *words)
    assert done.exit_code == 0, done.stderr
    whole = command(small, tmp_path / "config.yaml", "--csv", tmp_path / "whole.csv")
    assert whole.exit_code == 0, whole.stderr
    cut, uncut = (
        [{**row, "config": ""} for row in csv.DictReader(file.read_text().splitlines())]
        for file in (tmp_path / "table.csv", tmp_path / "whole.csv")
    )
    assert cut == uncut


def test_a_tensor_that_one_of_three_models_does_not_have() -> None:
    models = [ModelReference.parse(name) for name in ("a", "b", "c")]
    task = measure._Measure(planned=plan("head", dict(zip(models, (1.0, 2.0, 3.0)))))
    a, b, c = torch.randn(3, 4, 4)
    whole = task.execute(dict(zip(models, (a, b, c))))
    found = task.execute({models[2]: c, models[0]: a})
    assert whole.absent == [] and found.absent == ["b"]
    assert [(part.model, part.weight) for part in found.parts] == [
        ("a", 0.25),
        ("c", 0.75),
    ]
    text = words(printed(made_up([found], models=["a", "b", "c"])))
    assert "warning: b does not have tensor head. The others' weights" in text
    assert "does not have" not in printed(made_up([whole]))


def test_integers_are_left_alone_where_they_agree() -> None:
    models = [ModelReference.parse(name) for name in ("a", "b")]
    planned = plan("positions", dict.fromkeys(models, 1.0))
    task = measure._Measure(planned=planned)
    found = task.execute(dict.fromkeys(models, torch.arange(4)))
    assert isinstance(found, Skipped)
    with pytest.raises(ConfigError, match=r"tensor positions .* differ between"):
        task.execute(dict(zip(models, (torch.arange(4), torch.arange(1, 5)))))


@only_names
def test_blocks_that_do_not_fit_once_a_weight_is_read(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "stored_shape", lambda tensors: None)
    config = config_of({"sft": 0.3, "kd": 0.7}, "base", nuslerp_granularity="row:7")
    with pytest.raises(
        (ConfigError, RuntimeError), match=r"tensor \S+ has .*Write row:"
    ):
        inspect_here(config, small)


def test_an_index_that_names_what_is_not_there(small: Path, tmp_path: Path) -> None:
    folder = altered(small, tmp_path, lambda _, weight: weight)
    renamed(sorted(folder.glob("*.safetensors"))[0])
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = command(tmp_path, "config.yaml")
    assert_refused(done, r"\./kd cannot be read: .*safetensors: \S+ is not in it")


def test_an_index_that_leads_out_of_its_folder(small: Path, tmp_path: Path) -> None:
    folder = altered(small, tmp_path, lambda _, weight: weight)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    for outside in ("../sft/model.safetensors", str(small / "sft" / "x.safetensors")):
        content["weight_map"]["lm_head.weight"] = outside
        index.write_text(json.dumps(content), "utf-8")
        (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
        LoaderCache.loaders.clear()
        done = command(tmp_path, "config.yaml")
        assert_refused(done, r"\./kd names .*, a file outside of its folder")


def as_bin(folder: Path, change: Callable[[Any], Any] = lambda state: state) -> Path:
    """Put the weights of a checkpoint into a pickle."""
    state = load_tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(change(state), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def parameters_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.nn.Parameter(weight) for name, weight in state.items()}


def without_reason(folder: Path) -> None:
    as_bin(folder).write_bytes(b"")


def with_parameters(folder: Path) -> None:
    as_bin(folder, parameters_of)


def with_malformed_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["merges"] = [["a", "b", "c"]]
    path.write_text(json.dumps(content), "utf-8")


def with_a_token_beyond(folder: Path) -> None:
    """One that the other models have an embedding for."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["a"] = 272
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("source", ["base", "union", "./kd", "./sft"])
def test_tokens_without_an_embedding(source: str, small: Path, tmp_path: Path) -> None:
    """Refused while mergekit plans, which would say nothing but a number."""
    with_a_token_beyond(altered(small, tmp_path, lambda _, weight: weight))
    text = f"{CONFIG}tokenizer_source: {source}\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    message = r"of model \./kd has the token 'a' at 272, but .* 0 to 271 only\. Write"
    assert_refused(command(tmp_path, "config.yaml"), message)
    with working_directory(tmp_path):
        done = CliRunner().invoke(cli.main, ["run", "config.yaml", "out"])
    assert done.exit_code == 1
    assert re.search(message, done.stderr.splitlines()[-1])
    # Where the merged model does not get the token, nothing is wrong.
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    assert command(tmp_path, "config.yaml").exit_code == 0


def in_four_bits(folder: Path) -> None:
    """As bitsandbytes stores them, but without what tells how."""
    state = load_tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name, weight in state.items():
        if "proj" in name:
            state[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_reason, r"model \./kd cannot be read: a file is empty"),
        (with_parameters, r"cannot read this: .*_rebuild_parameter"),
        (with_malformed_merges, r"cannot read this: .*MergeType"),
        (in_four_bits, r"weight holds integers"),
    ],
)
def test_files_that_mergekit_cannot_read(
    damage: Callable[[Path], None], message: str, small: Path, tmp_path: Path
) -> None:
    """In one line, whatever mergekit and what it loads with raise."""
    damage(altered(small, tmp_path, lambda _, weight: weight))
    more = "tokenizer_source: ./kd\n" if damage is with_malformed_merges else ""
    (tmp_path / "config.yaml").write_text(f"{CONFIG}{more}", encoding="utf-8")
    assert_refused(command(tmp_path, "config.yaml", "--lazy-unpickle"), message)


@pytest.mark.parametrize("error", [AssertionError, TypeError])
def test_a_bug_of_ours_keeps_its_traceback(
    error: type[Exception], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise error("of ours")

    monkeypatch.setattr(measure, "measure", broken)
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    assert isinstance(command(small, tmp_path / "config.yaml").exception, error)


# --- Files -------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint may be read."""

    def read(*_args: Any) -> None:
        raise AssertionError("reads the checkpoints first")

    monkeypatch.setattr(cli, "_inspected", read)


@pytest.mark.parametrize(
    "output, message",
    [
        ("nowhere/out", "No such file"),
        ("config.yaml/out", "Not a directory"),
        (".", "it is not a file"),
        ("/dev/null", "it is not a file"),
    ],
)
@pytest.mark.parametrize("option", ["--json", "--csv"])
@pytest.mark.usefixtures("unread")
def test_outputs_that_cannot_be_written(
    output: str, message: str, option: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = command(tmp_path, "config.yaml", option, output)
    assert_refused(done, f"cannot write {re.escape(output)}: {message}")
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.usefixtures("unread")
def test_two_outputs_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    done = command(tmp_path, "config.yaml", "--json", "a", "--csv", "./a")
    assert_refused(done, "a file of its own")


@pytest.mark.usefixtures("unread")
def test_an_output_in_place_of_the_config(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    done = command(tmp_path, "config.yaml", "--json", config)
    assert_refused(done, "other than the config")
    assert config.read_text(encoding="utf-8") == CONFIG


def test_a_dtype_that_the_merge_could_not_write(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"{CONFIG}\nout_dtype: bf17\n", encoding="utf-8")
    assert_refused(command(small, config), "`out_dtype` is 'bf17', but must be")


@pytest.mark.parametrize("columns", ["0", "1", "7"])
def test_a_terminal_next_to_nothing_wide(
    columns: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = command(small, EXAMPLES / "no_base.yaml")
    assert done.exit_code == 0, done.stderr


def test_output_that_does_not_arrive(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergekit_nuslerp.inspect.terminal.show", full)
    done = command(small, EXAMPLES / "no_base.yaml")
    assert_refused(done, "No space left on device")


def test_a_page_is_written(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = command(small, EXAMPLES / "no_base.yaml", "--html", out)
    assert done.exit_code == 0, done.stderr
    assert "model.embed_tokens" in out.read_text(encoding="utf-8")


def test_the_switch_switches_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_NUSLERP", "0")
    done = command(tmp_path, EXAMPLES / "no_base.yaml")
    assert_refused(done, "MERGEKIT_NUSLERP=0 switches the plugin off")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_files_are_written_whole_or_not_at_all(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.csv"
    old.write_text("before", encoding="utf-8")
    write = Path.write_text

    def interrupted(path: Path, text: str, **more: Any) -> int:
        if "new.csv" in path.name:
            write(path, text[:3], **more)
            raise error
        return write(path, text, **more)

    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(Path, "write_text", interrupted)
        cli.write_together({old: "after", new: "after"})
    assert [*tmp_path.iterdir()] == [old]
    assert old.read_text(encoding="utf-8") == "before"
    cli.write_together({old: "after", new: "after"})
    assert sorted(tmp_path.iterdir()) == [new, old]
    assert old.read_text(encoding="utf-8") == "after"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("before", encoding="utf-8")
    (tmp_path / "link").symlink_to("real")
    cli.check_writable([tmp_path / "link"], [tmp_path / "config.yaml"])
    cli.write_together({tmp_path / "link": "after"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "after"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o666 & ~umask


def test_no_planted_link_is_followed(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "out.json"
    victim.write_text("mine", encoding="utf-8")
    (tmp_path / f".out.json.{os.getpid()}").symlink_to(victim)
    cli.check_writable([target], [tmp_path / "config.yaml"])
    cli.write_together({target: "after"})
    assert target.read_text(encoding="utf-8") == "after"
    assert victim.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_names_are_no_formulas(name: str) -> None:
    found = at_angles([name])
    (row,) = csv.DictReader(io.StringIO(records.table([found])))
    assert row["name"] == f"'{name}.weight"


def test_names_do_not_reach_a_terminal_as_commands() -> None:
    text = printed(at_angles(["a \x1b[31m name"]), full=True)
    assert "\x1b" not in text and "a \\x1b[31m name" in text


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli._bar() as advance:
        assert advance is not None
        for done in range(4):
            advance(done, 3)
    assert "Reading" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cli._bar() as advance:
        assert advance is None


def test_the_command_itself(small: Path, tmp_path: Path) -> None:
    """Once, with what other libraries write to standard error."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("./kd", "./nowhere"), encoding="utf-8")
    inspect = [sys.executable, "-m", "mergekit_nuslerp", "inspect"]
    done = run_command(*inspect, config, "--json", "out.json", cwd=small)
    assert_refused(done, r"model \./nowhere cannot be read: there is no folder")
    assert not (small / "out.json").exists()
