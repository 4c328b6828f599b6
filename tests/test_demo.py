# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`mergekit-nuslerp demo`: the whole of it, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from support import EXAMPLES, Demo, load_tensors, merge_here
from test_examples import EXPECTED, MODELS, assert_merged

from mergekit_nuslerp import __version__, cli
from mergekit_nuslerp import demo as module
from mergekit_nuslerp.checkpoints import write_checkpoints


def test_merges_and_says_so(demo: Demo) -> None:
    assert demo.status == 0, demo.stderr
    assert "merged by the plugin" in demo.stdout
    for name in (*MODELS, "config.yaml"):
        assert name in demo.stdout
    rule = EXPECTED["medswin.yaml"]
    assert_merged(demo.folder / "merged", demo.folder, MODELS, rule)


def test_writes_sharded_bfloat16_checkpoints_of_32_layers(demo: Demo) -> None:
    for name in MODELS:
        folder = demo.folder / name
        assert len(list(folder.glob("*.safetensors"))) > 1
        tensors = load_tensors(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert tensors.keys() == index["weight_map"].keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert "model.layers.31.mlp.up_proj.weight" in tensors
        assert "model.layers.32.mlp.up_proj.weight" not in tensors


def test_config_is_the_model_cards(demo: Demo) -> None:
    """Only the paths differ, and those of the demo work from anywhere."""
    written = (demo.folder / "config.yaml").read_text(encoding="utf-8")
    example = (EXAMPLES / "medswin.yaml").read_text(encoding="utf-8")
    prefix = f"{demo.folder.as_posix()}/"
    assert demo.folder.is_absolute() and prefix in written
    bare = yaml.safe_load(written.replace(prefix, ""))
    assert bare == yaml.safe_load(example.replace("./", ""))
    assert bare["base_model"] == MODELS[0]


def test_one_line_of_text_whatever_the_model_writes(demo: Demo) -> None:
    (line,) = (line for line in demo.stdout.splitlines() if "random weights w" in line)
    assert line.isascii() and line.isprintable() and line.endswith("'")


def test_card_of_the_result_names_method_and_base(demo: Demo) -> None:
    card = (demo.folder / "merged" / "README.md").read_text(encoding="utf-8")
    (sentence,) = (line for line in card.splitlines() if "merge method" in line)
    assert (
        f"NuSLERP (mergekit-nuslerp {__version__})" in sentence and "base" in sentence
    )


def test_suggested_command_merges_again(demo: Demo, tmp_path: Path) -> None:
    *_, suggested = demo.stdout.partition("What to try next")
    commands = [
        shlex.split(line) for line in suggested.splitlines() if line.startswith("    ")
    ]
    assert commands[0][1] == "inspect" and "--html" in commands[0]
    (again_by,) = (words for words in commands if words[0] == "mergekit-yaml")
    _, config, again = again_by
    assert Path(again).parent == demo.folder and not Path(again).exists()
    text = Path(config).read_text(encoding="utf-8")
    merge_here(text, tmp_path / "again", cwd=tmp_path)
    merged = load_tensors(demo.folder / "merged")
    for name, tensor in load_tensors(tmp_path / "again").items():
        assert torch.equal(tensor, merged[name])


def test_result_loads_with_its_own_weights_and_tokenizer(demo: Demo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.folder / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
    loaded = model.state_dict()
    for name, tensor in load_tensors(folder).items():
        assert torch.equal(loaded[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A dry cough, naïve tokens & 37.5 °C\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < model.config.vocab_size


def _linked(demo: Demo, root: Path) -> Path:
    """A folder with the demo's checkpoints, and room for another result."""
    for name in MODELS:
        (root / name).symlink_to(demo.folder / name, target_is_directory=True)
    (root / "merged").mkdir()
    return root


def test_check_tells_slerp_from_linear_interpolation(
    demo: Demo, tmp_path: Path
) -> None:
    agreement, tensors = module._agreement(demo.folder)
    assert agreement >= 0.999
    assert tensors == len(load_tensors(demo.folder / MODELS[0]))

    _, first, second = (load_tensors(demo.folder / name) for name in MODELS)
    linear = {name: torch.lerp(first[name], second[name], 0.7) for name in first}
    root = _linked(demo, tmp_path)
    save_file(linear, root / "merged" / "model.safetensors")
    assert module._agreement(root)[0] < 0.999


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_refuses_a_folder_in_use(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    kept = out if content == "a file" else out / "mine.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert module.run(out) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(out) in message
    assert kept.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (1 if kept == out else 2)


@pytest.mark.parametrize("sign", "+@")
def test_refuses_a_path_that_mergekit_would_misread(
    tmp_path: Path, sign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.run(tmp_path / f"a{sign}b") == 2
    assert repr(sign) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refuses_without_mergekit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert module.run(tmp_path / "out") == 1
    assert "pip install mergekit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ("sys.exit('no space left')", "no space left"),
        # Only a merge that the plugin announces counts.
        ("sys.stderr.write('mergekit-nuslerp does not know this')", "status"),
    ],
)
def test_reports_a_merge_gone_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    child: str,
    message: str,
) -> None:
    command = [sys.executable, "-c", f"import sys; {child}"]
    monkeypatch.setattr(module, "_mergekit_yaml", lambda: command)
    assert module.run(tmp_path / "out") == 1
    done = capsys.readouterr()
    assert message in done.err
    assert "merged by the plugin" not in done.out


def test_command_passes_the_status_on(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert CliRunner().invoke(cli.main, ["demo", str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize("text", ["/a/b-c_d.e", "/a b/c: d #e", '/q"u\\ote/ü'])
def test_paths_survive_yaml(text: str) -> None:
    assert yaml.safe_load(f"base: {module._yaml_path(Path(text))}") == {"base": text}


def _weights(folder: Path, **options: object) -> dict[str, dict[str, torch.Tensor]]:
    folders = write_checkpoints(folder, layers=1, hidden_size=32, **options)
    return {path.name: load_tensors(path) for path in folders}


def test_generated_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (
        _weights(tmp_path / name, vocabulary=259, seed=seed)
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    for model, tensors in first.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again[model][name])
            assert not torch.equal(tensor, other[model][name])


def test_generated_task_vectors(tmp_path: Path) -> None:
    """Of the asked length, at an acute angle, and zero where training was frozen."""
    models = _weights(tmp_path, dtype="float32", change=0.1, fine_tunes=("a", "b"))
    name = "model.layers.0.mlp.up_proj.weight"
    base, a, b = (models[model][name].double() for model in ("base", "a", "b"))
    assert ((a - base).norm() / base.norm()).item() == pytest.approx(0.1, rel=0.1)
    cosine = torch.cosine_similarity((a - base).flatten(), (b - base).flatten(), dim=0)
    assert cosine.item() == pytest.approx(0.5, abs=0.1)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(models["b"][norm], models["base"][norm])
    assert not torch.equal(models["a"][norm], models["base"][norm])


@pytest.mark.parametrize("options", [{"vocabulary": 100}, {"hidden_size": 40}])
def test_refuses_sizes_that_do_not_work_out(
    tmp_path: Path, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        write_checkpoints(tmp_path, **options)
    assert not list(tmp_path.iterdir())
