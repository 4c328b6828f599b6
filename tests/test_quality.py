# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The benchmark of quality: its merges and its statistics, on a tiny model."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from support import REPOSITORY

pytest.importorskip("mergekit.merge_methods.api", reason="new in mergekit 0.1.5")

sys.path.append(str(REPOSITORY))  # at the end: the plugin that is installed is tested
from benchmarks import models, quality

SCALE = quality.Scale(steps=2, blocks=3)
SETS = {name: quality.SETS[name] for name in ("A", "three")}


def _tiny_model() -> tuple[Any, None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), None


def _random_text(kind: str, _tokenizer: None, count: int) -> models.Text:
    generator = torch.Generator().manual_seed(crc32(kind.encode()))
    tokens = torch.randint(64, (8 + count, models.BLOCK), generator=generator)
    return models.Text(kind, tokens[count:].flatten(), tokens[:count])


def test_merges_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "SETS", SETS)
    monkeypatch.setattr(quality, "load", _tiny_model)
    monkeypatch.setattr(quality, "read_text", _random_text)
    if find_spec("matplotlib") is None:
        monkeypatch.setattr(quality, "picture", lambda *_: None)
    store = quality.Store(tmp_path)
    quality.Bench(store, SCALE).run()
    assert store.results.keys() == SETS.keys()
    for name, results in store.results.items():
        plain = results["task_arithmetic, λ = 1"]
        assert plain != results["base"]
        for text, losses in results["linear"].items():
            assert losses == pytest.approx(plain[text], abs=1e-5), name
    pair = store.results["A"]
    for text, losses in pair[models.OWN].items():
        assert losses == pytest.approx(pair["nuslerp, tensor"][text], abs=1e-5)
    table = quality.report(store)
    assert f"| {quality.best(pair)} | +0.00 ± 0.00 |" in table

    def fail(*_: Any) -> None:
        raise AssertionError("done twice")

    monkeypatch.setattr(quality, "train", fail)
    monkeypatch.setattr(quality, "losses_of", fail)
    again = quality.Store(tmp_path)
    quality.Bench(again, SCALE).run()
    assert again.results == store.results
    assert quality.report(again) == table


def test_says_what_a_plugin_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    known = quality.linear(1.0, [0.5, 0.5])
    unknown = quality.ours("tensor", [0.5, 0.5], ", new", nuslerp_new=1)
    assert models.usable([known, unknown], 2) == [known]
    assert "LEFT OUT: nuslerp, tensor, new: " in capsys.readouterr().out


def test_differences_and_their_errors() -> None:
    reference = {"a": [1.0, 2.0, 3.0, 4.0] * 25, "b": [2.0] * 100}
    more = {text: [each + 0.01 for each in reference[text]] for text in reference}
    percent, error = quality.difference(more, reference)
    assert percent == pytest.approx(1.005, abs=1e-3)
    assert error == pytest.approx(0, abs=1e-9)
    # Half of a text's blocks gain 0.02, the others nothing; the other text is the same.
    mixed = {**reference, "b": [2.0, 2.02] * 50}
    percent, error = quality.difference(mixed, reference)
    assert percent == pytest.approx(0.501, abs=1e-3)
    assert error == pytest.approx(100 * 0.01 / 10 / 2, rel=0.1)


def test_lengths_and_angles() -> None:
    base = {"w": torch.ones(2)}
    tuned = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([2.0, 1.0])}]
    found = models.vectors(tuned, base)
    assert found == {"lengths": [2.0, 1.0], "degrees": [90.0]}
