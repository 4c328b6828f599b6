# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""`mergekit-nuslerp demo`: a whole merge, small and without a download.

Generates a base and fine-tunes of it, merges two of them with mergekit's own command
as a user would, and checks the result against the formula. The models are called what
the example configs call them, and have heads as wide as those expect.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergekit_nuslerp import __version__
from mergekit_nuslerp.checkpoints import write_checkpoints

if TYPE_CHECKING:
    import torch

BASE = "base"
FINE_TUNES = ("sft", "kd")
# Some examples merge a third one, which went further from the base.
_THIRD, _FURTHER = "dpo", 0.06
LAYERS = 32
_SIZES: dict[str, Any] = {"layers": LAYERS, "hidden_size": 128, "head_size": 128}

# The config on the model card of MedSwin/MedSwin-Merged-NuSLERP-KD-0.7, with paths
# in place of the models' names.
CONFIG = """\
base_model: {base}
dtype: bfloat16
merge_method: nuslerp
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 32]
        model: {sft}
        parameters:
          weight: 0.3
      - layer_range: [0, 32]
        model: {kd}
        parameters:
          weight: 0.7
      - layer_range: [0, 32]
        model: {base}
"""
_SECOND_WEIGHT = 0.7

# Of the elements. The others lie so close to the middle between two bfloat16 values
# that sums in another order round them to the other side.
_REQUIRED_AGREEMENT = 0.999


class _Failure(Exception):
    """Ends the demo with a message and an exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def run(out: Path) -> int:
    """Write checkpoints and a config into `out`, merge them, and check the result.

    Returns:
        The exit status: 0, or 2 where `out` cannot be used, or 1 where something went
        wrong later. Errors go to standard error, in one line where possible.
    """
    try:
        _demo(Path(out))
    except _Failure as failure:
        print(f"mergekit-nuslerp demo: {failure}", file=sys.stderr)
        return failure.status
    except OSError as error:
        print(f"mergekit-nuslerp demo: {error}", file=sys.stderr)
        return 1
    return 0


def write_models(root: Path, **sizes: Any) -> list[Path]:
    """Write the models that all examples merge into a folder, the third one last.

    Args:
        sizes: as `write_checkpoints` takes them, in place of the demo's.
    """
    options = {"base": BASE, **(sizes or _SIZES)}
    folders = write_checkpoints(root, fine_tunes=FINE_TUNES, **options)
    with TemporaryDirectory(dir=root) as aside:
        *_, third = write_checkpoints(
            Path(aside), fine_tunes=[_THIRD], change=_FURTHER, **options
        )
        return [*folders, third.rename(root / _THIRD)]


def _demo(out: Path) -> None:
    if importlib.util.find_spec("mergekit") is None:
        raise _Failure("mergekit is not installed here; pip install mergekit")
    root = _empty_folder(out)
    config, merged = root / "config.yaml", root / "merged"

    _say(f"Writing four small Llama checkpoints to {out} ...")
    base, sft, kd, _ = map(_yaml_path, write_models(root))
    config.write_text(CONFIG.format(base=base, sft=sft, kd=kd), encoding="utf-8")
    _say(f"  {BASE}: the base, {LAYERS} layers, bfloat16, random weights")
    for name in (*FINE_TUNES, _THIRD):
        _say(f"  {name}: a fine-tune of it")
    _say("  config.yaml: the config on the model card of MedSwin-Merged-NuSLERP-KD-0.7")

    _say(f"\nMerging: {_shell('mergekit-yaml', config, merged)}")
    _merge(config, merged)
    agreement, tensors = _agreement(root)
    if agreement < _REQUIRED_AGREEMENT:
        raise _Failure(
            f"only {agreement:.3%} of the merged elements equal the formula's result; "
            "please report this as a bug"
        )
    text = _generate(merged)
    _say("  merged by the plugin: NuSLERP of the two task vectors at t = 0.7")
    _say(f"  {tensors} tensors, {agreement:.3%} of their elements equal to float64")
    _say("  arithmetic rounded once to bfloat16")
    _say(f"  loads in transformers, and writes (random weights write nonsense): {text}")
    _say("  These tensors are too small to time: most of it is mergekit's start.")

    again = _shell("mergekit-yaml", config, root / "again")
    page = _shell("mergekit-nuslerp", "inspect", config, "--html", root / "page.html")
    example = _shell("cd", root)
    _say("\nWhat to try next")
    _say(f"  see what decides the merge, then open page.html:\n    {page}")
    _say(
        "  an example of the repository; every one of them runs in this folder:\n"
        f"    {example} && mergekit-yaml CLONE/example_configs/three_models.yaml three"
    )
    _say(f"  change a weight in {config} and merge again:\n    {again}")
    _say(f"  the same merge by mergekit's own nuslerp:\n    MERGEKIT_NUSLERP=0 {again}")
    _say("  your own models: put their paths in the config")


def _empty_folder(out: Path) -> Path:
    """Make `out` and return it as a path that works from any directory."""
    root = out.absolute()
    for sign, meaning in (("+", "a LoRA adapter"), ("@", "a revision")):
        if sign in str(root):
            raise _Failure(
                f"{root}: mergekit takes {sign!r} in a path for the start of "
                f"{meaning}; choose a folder without it",
                status=2,
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise _Failure(f"{out} is not empty; choose a new folder", status=2)
    except OSError as error:
        raise _Failure(f"cannot write to {out}: {error.strerror}", status=2) from None
    return root


def _merge(config: Path, merged: Path) -> None:
    """Run mergekit's command, and make sure that the plugin took part."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*_mergekit_yaml(), str(config), str(merged)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if process.returncode:
        tail = "\n".join(process.stderr.splitlines()[-15:])
        raise _Failure(f"mergekit-yaml failed ({process.returncode}):\n{tail}")
    if f"mergekit-nuslerp {__version__} merges" not in process.stderr:
        raise _Failure(
            "the merge succeeded, but mergekit's own nuslerp did it, not the plugin; "
            "`mergekit-nuslerp status` says why"
        )


def _mergekit_yaml() -> list[str]:
    """The command `mergekit-yaml` of the environment that this runs in."""
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    command = shutil.which("mergekit-yaml", path=os.pathsep.join(folders))
    if command:
        return [command]
    return [sys.executable, "-m", "mergekit.scripts.run_yaml"]


def _agreement(root: Path) -> tuple[float, int]:
    """Compare the merged checkpoint with the formula, in float64.

    Returns:
        The share of elements that are the formula's result rounded once, and the
        number of tensors.
    """
    merged = _load(root / "merged")
    base = _load(root / BASE)
    first, second = (_load(root / name) for name in FINE_TUNES)
    if merged.keys() != base.keys():
        raise _Failure("the merged checkpoint has other tensors than its base")
    equal = total = 0
    for name, tensor in merged.items():
        expected = _formula(base[name], first[name], second[name], _SECOND_WEIGHT)
        equal += int((tensor == expected.to(tensor.dtype)).sum())
        total += tensor.numel()
    return equal / total, len(merged)


def _formula(
    base: torch.Tensor, first: torch.Tensor, second: torch.Tensor, t: float
) -> torch.Tensor:
    """SLERP of two task vectors as textbooks have it, apart from the kernel."""
    import torch

    base = base.double()
    v0, v1 = first.double() - base, second.double() - base
    lengths = v0.norm() * v1.norm()
    # A fine-tune that left a weight as it was has no direction: at a right angle.
    theta = torch.acos((v0 * v1).sum() / lengths if lengths else torch.zeros(()))
    c0, c1 = torch.sin((1 - t) * theta), torch.sin(t * theta)
    return base + (c0 * v0 + c1 * v1) / torch.sin(theta)


def _load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def _generate(folder: Path) -> str:
    """Load a checkpoint in transformers and let it continue a sentence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    finally:
        logging.enable_progress_bar()
    prompt = tokenizer("The patient reports", return_tensors="pt")
    (tokens,) = model.generate(
        **prompt,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    if len(tokens) == prompt["input_ids"].shape[1]:
        raise _Failure("the merged model generates nothing")
    # In ASCII: whatever bytes come, no terminal is spoilt and no line is broken.
    return ascii(tokenizer.decode(tokens))


def _yaml_path(path: Path) -> str:
    """A path as a YAML scalar, in quotes where it needs them."""
    text = path.as_posix()
    # JSON's strings are YAML's, and so spaces, colons and # are safe.
    plain = re.fullmatch(r"[\w./-]+", text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _shell(*words: str | Path) -> str:
    """A command as one can paste it into a shell."""
    return shlex.join(str(word) for word in words)


def _say(line: str) -> None:
    print(line, flush=True)
