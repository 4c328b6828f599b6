# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""The page with the geometry of a merge: what is in it, and what a browser draws."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from urllib.parse import quote

import pytest

from mergekit_nuslerp.inspect.figures import (
    FIGURES,
    Distribution,
    Inspection,
    Pair,
    Part,
    Skipped,
    TensorGeometry,
)
from mergekit_nuslerp.inspect.page import page
from mergekit_nuslerp.inspect.verdict import verdict, warnings

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)

BINS = 40
PROJECTIONS = ("input_layernorm", "self_attn.q_proj", "mlp.down_proj")
HOSTILE = (
    "org/</script><script>alert(1)</script>",
    'org/"><img src=x onerror=alert(2)>',
    "org/{{data}}<!--<script>",
)


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.by_id: dict[str, dict[str, str]] = {}
        self.classes: Counter[tuple[str, str]] = Counter()
        self.text: dict[str, str] = {}
        self._within: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.count[tag] += 1
        self.attributes += found.items()
        self.classes.update((tag, name) for name in found.get("class", "").split())
        self._within = found.get("id")
        if self._within:
            self.by_id[self._within] = found

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within:
            self.text[self._within] = self.text.get(self._within, "") + data


def tensor(
    name: str,
    models: Sequence[str],
    *,
    layer: int | None = None,
    projection: str,
    vectors: int,
    frozen: bool,
) -> TensorGeometry:
    """Figures of the right kinds, not those of a real merge."""
    many = vectors > 1
    angles = Distribution(
        p5=0.5,
        p25=0.7 if many else 0.5,
        p50=1.0 if many else 0.5,
        p75=1.2 if many else 0.5,
        p95=1.5 if many else 0.5,
        smallest=0.5,
        largest=1.6 if many else 0.5,
        histogram=[vectors // BINS] * BINS if many else [1],
    )
    return TensorGeometry(
        name=name,
        stack=None if layer is None else "model.layers",
        layer=layer,
        projection=projection,
        shape=[vectors, 64] if many else [64],
        dtype="bfloat16",
        granularity="row",
        magnitude="linear",
        zero_sum=False,
        lambda_=0.5,
        t=0.5 if len(models) == 2 else None,
        vectors=vectors,
        base=None,
        parts=[
            Part(
                model=model,
                weight=1 / len(models),
                effective=None if frozen else 1 / len(models),
                norm=0 if frozen and index else 1 + index,
                relative_norm=None,
                zero=vectors if frozen and index else 0,
            )
            for index, model in enumerate(models)
        ],
        absent=[],
        pairs=[
            Pair(
                first=first,
                second=second,
                angle=None if frozen else angles,
                parallel=0,
                antipodal=0,
            )
            for first, second in combinations(models, 2)
        ],
        norm_ratio=None if frozen else len(models),
        base_norm=None,
        linear=0,
        departure=None if frozen else 0.1,
        length=1.0,
    )


def inspection(models: Sequence[str], *, layers: int) -> Inspection:
    """With a cell that is missing, models that are frozen, and single vectors."""
    tensors = [
        tensor(
            f"model.layers.{layer}.{projection}.weight",
            models,
            layer=layer,
            projection=projection,
            vectors=1 if "norm" in projection else 2 * BINS,
            frozen=layer == 1 and "norm" in projection,
        )
        for layer in range(layers)
        for projection in PROJECTIONS
        if (layer, projection) != (2, "mlp.down_proj")
    ]
    head = tensor(
        "lm_head.weight", models, projection="lm_head", vectors=80, frozen=False
    )
    found = Inspection(
        config="a.yaml",
        mergekit_nuslerp="0",
        mergekit="0",
        models=list(models),
        tensors=[*tensors, head],
        skipped=[Skipped(name="position_ids", reason="its numbers are not fractional")],
        left_out=["vision"],
        unmatched=[f"q_prj{HOSTILE[0]}"],
    )
    found.verdict, found.warnings = verdict(found), list(warnings(found))
    return found


SHAPES = {
    "two models": inspection(("sft", "kd"), layers=3),
    "three models": inspection(HOSTILE, layers=3),
    "one layer": inspection(("sft", "kd"), layers=1),
    "no layers": inspection(HOSTILE[:2], layers=0),
}
shapes = pytest.mark.parametrize("shown", SHAPES.values(), ids=SHAPES)


@shapes
def test_the_page_holds_every_figure(shown):
    tags = Tags(page([shown, shown]))
    data = json.loads(tags.text["data"])
    assert data["inspections"] == [json.loads(shown.model_dump_json(by_alias=True))] * 2
    assert [figure["name"] for figure in data["figures"]][:2] == ["angle", "effective"]


def test_names_do_not_become_markup():
    """Neither the elements nor their attributes depend on how models are called."""
    plain = Tags(page([inspection(("a", "b", "c"), layers=3)]))
    hostile = Tags(page([inspection(HOSTILE, layers=3)]))
    assert hostile.count == plain.count
    assert hostile.attributes == plain.attributes


def test_nothing_comes_from_outside():
    text = page([SHAPES["two models"]])
    tags = Tags(text)
    assert not {"link", "img", "iframe", "base"} & tags.count.keys()
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in tags.attributes}
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert style
    assert "url(" not in style and "@import" not in style
    # And the browser refuses what a script might still ask for.
    policy = next(value for _, value in tags.attributes if "default-src" in value)
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(" ".join(rules.values()).split()) == {
        "'none'",
        "'unsafe-inline'",
    }


def rendered(text: str, folder: Path, fragment: str) -> tuple[Tags, str]:
    """What is on a page once its scripts have run, and what they complained of."""
    assert CHROMIUM
    file = folder / "page.html"
    file.write_text(text, "utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage "
        "--enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    )
    process = subprocess.run(
        [
            CHROMIUM,
            *options.split(),
            f"--user-data-dir={folder / 'profile'}",
            f"{file.as_uri()}#{quote(fragment)}",
        ],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=100,
    )
    complaints = [line for line in process.stderr.splitlines() if "CONSOLE" in line]
    return Tags(process.stdout), "\n".join(complaints)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    "shape, selected",
    [
        ("three models", "model.layers.1.input_layernorm.weight"),
        ("no layers", "lm_head.weight"),
    ],
)
def test_a_browser_draws_it(shape, selected, tmp_path):
    shown = SHAPES[shape]
    tags, complaints = rendered(page([shown]), tmp_path, selected)
    assert not complaints
    assert "hidden" in tags.by_id["problem"], tags.text.get("problem")
    assert "img" not in tags.count
    assert tags.text["name"] == selected
    assert len(shown.warnings) > 2
    assert tags.count["li"] == len(shown.warnings) + len(shown.skipped)
    assert tags.count["pre"] == sum(bool(each.lines) for each in shown.verdict)

    # A map for each figure, with a cell for each tensor within layers.
    layered = [tensor for tensor in shown.tensors if tensor.layer is not None]
    maps = tags.count["figure"]
    assert maps == len(FIGURES)
    cells = [value for name, value in tags.attributes if name == "data-name"]
    assert Counter(cells) == {tensor.name: len(FIGURES) for tensor in layered}

    chosen = next(tensor for tensor in shown.tensors if tensor.name == selected)
    assert tags.classes["td", "chosen"] == (len(FIGURES) if layered else 0)
    bars = [value for name, value in tags.attributes if value.startswith("height: ")]
    assert len(bars) == (BINS if chosen.vectors > 1 else 0)
    assert ("svg" in tags.count) == (len(chosen.parts) == 2)
    assert "all rules are linear" not in tags.text.get("dial-said", "")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_what_counts_as_opposite_is_what_the_merge_counts(tmp_path):
    """At 0.5 radians, where the page's own arithmetic sees nothing opposite."""
    shown = SHAPES["two models"].model_copy(deep=True)
    head = shown.tensors[-1]
    head.pairs[0].antipodal = head.vectors
    tags, complaints = rendered(page([shown]), tmp_path, head.name)
    assert not complaints
    assert "all rules are linear" in tags.text["dial-said"]
