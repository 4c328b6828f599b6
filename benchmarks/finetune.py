# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`python -m benchmarks.finetune OUT`: a real case to inspect and to merge.

Trains a small language model on Python's standard library, and fine-tunes it on text
of other kinds: prose (Python's language reference), C++ (PyTorch's headers) and a
table (the names of Unicode's characters). All of that is installed already, and
nothing is downloaded. Writes checkpoints as one would get them from elsewhere, and
configs to merge them. The figures depend on the versions of Python and PyTorch, of
whose files the text consists.
"""

from __future__ import annotations

import random
import subprocess
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SEED = 0
VOCABULARY = 2048
CONTEXT = 128
BATCH = 8

# One document in so many is not trained on, and of these so much is looked at.
HELD_OUT = 8
HELD_OUT_BATCHES = 4

BASE_STEPS, BASE_RATE = 400, 2e-3
FINE_TUNING_STEPS, FINE_TUNING_RATE = 100, 5e-4

# The kind of text of each fine-tune, and which parameters it leaves alone.
FINE_TUNES = {"prose": (), "cpp": (), "unicode": ("embed_tokens", "norm", "lm_head")}


def python() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield file.read_text(encoding="utf-8")


def prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (text for _, text in sorted(topics.items()))


def cpp() -> Iterator[str]:
    include = Path(torch.__file__).with_name("include")
    for part in ("c10", "ATen/core"):
        for file in sorted((include / part).rglob("*.h")):
            yield file.read_text(encoding="utf-8")


def unicode() -> Iterator[str]:
    """A page for each 256 characters that have names of their own."""
    numbered = ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE", "TANGUT")
    for start in range(0, 0x20000, 256):
        characters = map(chr, range(start, start + 256))
        names = ((each, unicodedata.name(each, "")) for each in characters)
        lines = [
            f"{each}\tU+{ord(each):04X}\t{name}\n"
            for each, name in names
            if name and not name.startswith(numbered)
        ]
        if lines:
            yield "".join(lines)


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "python": python,
    "prose": prose,
    "cpp": cpp,
    "unicode": unicode,
}


def split(kind: str) -> tuple[list[str], list[str]]:
    """Documents to train on, and documents held out."""
    documents = list(KINDS[kind]())
    random.Random(SEED).shuffle(documents)
    count = len(documents) // HELD_OUT
    return documents[count:], documents[:count]


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>"
    )


def encode(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return torch.tensor([token for tokens in encoded for token in (*tokens, end)])


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    steps: int,
    rate: float,
    *,
    seed: int = SEED,
    bfloat16: bool = False,
) -> None:
    """Train in place; `bfloat16` says in what products are, not weights."""
    generator = torch.Generator().manual_seed(seed)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        last = len(tokens) - CONTEXT
        starts = torch.randint(last, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(to)
    tokenizer.save_pretrained(to)


def load(folder: Path) -> LlamaForCausalLM:
    """A checkpoint in float32, in which it is trained and looked at."""
    return LlamaForCausalLM.from_pretrained(folder).float()


@torch.inference_mode()
def loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Of a token, in nats, on text spread over what was held out."""
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    rows = rows[:: max(1, len(rows) // (HELD_OUT_BATCHES * BATCH))]
    found = [model(input_ids=batch, labels=batch).loss for batch in rows.split(BATCH)]
    return torch.stack(found).mean().item()


def configs() -> dict[str, dict]:
    """mergekit's configurations, by the names of their files."""

    def sources(*names: str) -> list[dict]:
        weight = 1 / len(names)
        return [
            {"model": f"./{name}", "parameters": {"weight": weight}} for name in names
        ]

    common = {"merge_method": "nuslerp", "base_model": "./base", "dtype": "bfloat16"}
    two = {**common, "models": sources("prose", "cpp")}
    three = {**common, "models": sources(*FINE_TUNES)}
    linear = {"merge_method": "linear", "dtype": "bfloat16"}
    return {
        "nuslerp": two,
        "nuslerp-rows": {**two, "parameters": {"nuslerp_flatten": False}},
        "linear": {**linear, "models": two["models"]},
        "nuslerp-three": three,
        "linear-three": {**linear, "models": three["models"]},
    }


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--merge", is_flag=True, help="Carry out the merges, and judge them.")
def main(out: Path, merge: bool) -> None:
    """Train checkpoints in OUT, and print their losses on held-out text.

    Takes about five minutes, and one more to merge.
    """
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - started:4.0f} s  {what}", flush=True)

    logging.disable_progress_bar()
    # The same figures whatever the number of cores. And on a busy machine, threads
    # wait longer for each other than such small operations take.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    texts = {kind: split(kind) for kind in KINDS}
    tokenizer = train_tokenizer([text for seen, _ in texts.values() for text in seen])
    seen = {kind: encode(text, tokenizer) for kind, (text, _) in texts.items()}
    unseen = {kind: encode(text, tokenizer) for kind, (_, text) in texts.items()}
    say(
        "tokens to train on: "
        + ", ".join(f"{kind} {len(tokens):,}" for kind, tokens in seen.items())
    )
    model = new_model()
    train(model, seen["python"], BASE_STEPS, BASE_RATE)
    save(model, tokenizer, out / "base")
    say("base trained")
    for kind, frozen in FINE_TUNES.items():
        model = load(out / "base")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        train(model, seen[kind], FINE_TUNING_STEPS, FINE_TUNING_RATE)
        save(model, tokenizer, out / kind)
        say(f"{kind} fine-tuned")
    judged = ["base", *FINE_TUNES]
    for name, config in configs().items():
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        if merge:
            command = [sys.executable, "-m", "mergekit.scripts.run_yaml", file.name]
            subprocess.run(
                [*command, f"merged/{name}", "--quiet"],
                cwd=out,
                check=True,
            )
            judged.append(f"merged/{name}")
    say("looking at held-out text")
    print("\n| loss on held-out | " + " | ".join(KINDS) + " |")
    print("|---" * (1 + len(KINDS)) + "|")
    for name in judged:
        model = load(out / name)
        losses = [f"{loss(model, tokens):.3f}" for tokens in unseen.values()]
        print(f"| {name} | " + " | ".join(losses) + " |", flush=True)
    print()
    say("done")


if __name__ == "__main__":
    main()
