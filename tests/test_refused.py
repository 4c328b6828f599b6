# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""Mistakes in a config are found while mergekit plans, before a weight is read."""

from __future__ import annotations

import os
import shutil

import pytest
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main as mergekit_yaml
from support import CONFIG, run_mergekit, working_directory

from mergekit_nuslerp import cli

# mergekit 0.1.4 takes only numbers for parameters, and passes on what only one model
# is listed for.
TYPED = hasattr(merge_methods, "registered_methods")


def weight(value):
    return CONFIG.replace("0.7", value)


def shared(text):
    return f"{CONFIG}parameters: {{{text}}}\n"


def without_base(text=CONFIG):
    return text.replace("base_model: ./base\n", "")


def listing(*models, base="./base", more=""):
    """A config of models with equal weights."""
    entries = "".join(
        f"  - {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models
    )
    base = f"base_model: {base}\n" if base else ""
    return f"merge_method: nuslerp\n{base}models:\n{entries}{more}"


def slices(*parts, base="./base", ranges=None):
    """A config of slices, each of some models."""
    text = f"merge_method: nuslerp\n{f'base_model: {base}' if base else ''}\nslices:\n"
    ranges = ranges or [f"[{2 * n}, {2 * n + 2}]" for n in range(len(parts))]
    for models, layers in zip(parts, ranges):
        text += "  - sources:\n"
        for model in models.split():
            own = "" if model == "./base" else ", parameters: {weight: 1}"
            text += f"      - {{model: {model}, layer_range: {layers}{own}}}\n"
    return text


# What cannot be a number: as written, and how the message has it.
NO_NUMBERS = {
    "": "is missing",
    "null": "is missing",
    ".nan": "nan",
    ".inf": "inf",
    "-.inf": "-inf",
    "1.0e+400": "inf",
    "half": "'half'",
    "'0,5'": "'0,5'",
    "{}": "{}",
    "{row: 8}": "'row': 8",
    "[]": "is missing",
    "[[1]]": "[[1]]",
    "[0.1, half]": "'half'",
    "[0.1, .nan, 0.2]": "nan",
    "[{filter: mlp}]": "'filter': 'mlp'",
    "{filter: mlp}": "'filter': 'mlp'",
    "[{filter: mlp, value: }, {value: 1}]": "'mlp'",
    "[{filter: mlp, value: a lot}, {value: 1}]": "a lot",
    "[{filter: nowhere, value: .inf}, {value: 1}]": "inf",
    "2026-01-01": "2026",
}
NO_FLAGS = ("", "0.5", "2", "maybe", "[0.5]", "{}", "[{filter: mlp, value: 3}]")
NO_GRANULARITIES = {
    "rows": "'rows'",
    "row:0": "'row:0'",
    "row:-8": "'row:-8'",
    "row:x": "'row:x'",
    "'row:'": "'row:'",
    "dim0": "'dim0'",
    "128": "128",
    "true": "True",
    "null": "is missing",
    "{row: 8}": "'row': 8",
    "[row, lines]": "'lines'",
    "[{filter: mlp, value: dim0}]": "'dim0'",
    "[{filter: mlp}]": "'filter': 'mlp'",
}

CONTRADICTIONS = [
    ("row", "nuslerp_flatten", "true"),
    ("matrix", "nuslerp_flatten", "true"),
    ("tensor", "nuslerp_flatten", "false"),
    ("'row:2'", "nuslerp_row_wise", "true"),
    ("row*column", "nuslerp_flatten", "true"),
    ("row*column", "nuslerp_row_wise", "true"),
    ("column", "nuslerp_row_wise", "false"),
    ("head", "nuslerp_flatten", "true"),
]

# Of each bad config what its message must name.
REFUSED = {
    **{
        weight(value): ("'weight' of model ./kd", given, "finite number between")
        for value, given in NO_NUMBERS.items()
    },
    weight("1.0e+301"): ("'weight' of model ./kd", "1e+301"),
    weight("[{filter: mlp, value: 0.4}]"): (
        "'weight'",
        "./kd",
        "ends with one for all other tensors",
        "at tensor ",
    ),
    CONFIG.replace("weight: 0.7", ""): ("'weight'", "./kd", "embed_tokens", "missing"),
    CONFIG.replace("    parameters: {weight: 0.7}\n", ""): ("'weight'", "./kd"),
    **{
        shared(f"lambda: {value}"): ("'lambda'", given, "finite number", "lambda: 0.5")
        for value, given in NO_NUMBERS.items()
    },
    **{
        shared(f"nuslerp_contrast: {value}"): (
            "'nuslerp_contrast'",
            given,
            "between 0 and 100",
        )
        for value, given in {
            **NO_NUMBERS,
            **{"-1": "-1", "101": "101", "row": "'row'"},
        }.items()
    },
    weight("-0.1").replace("dtype", "parameters: {nuslerp_contrast: 2}\ndtype"): (
        "'weight' of model ./kd",
        "embed_tokens",
        "is -0.1, but weights with `nuslerp_contrast: 2`, [",
        "Write weights of at least 0",
    ),
    weight("-0.1").replace(
        "dtype", "parameters: {nuslerp_granularity: row*column}\ndtype"
    ): (
        (
            "'weight' of model ./kd",
            "embed_tokens",
            "weights with `nuslerp_granularity: row*column`",
            "at least 0",
        )
        if TYPED
        else ("nuslerp_granularity", "mergekit==0.1.5")
    ),
    without_base(shared("lambda: 0.5")): ("'lambda'", "0.5", "Add `base_model`"),
    **{
        shared(f"nuslerp_{name}: {value}"): (f"'nuslerp_{name}'", "true or false")
        for name in ("flatten", "row_wise")
        for value in NO_FLAGS
    },
    # On mergekit 0.1.4 any value is refused, as none of those that fit is a number.
    **{
        shared(f"nuslerp_granularity: {value}"): (
            "'nuslerp_granularity'",
            *((given, "row, column, row:N") if TYPED else ("mergekit==0.1.5",)),
        )
        for value, given in NO_GRANULARITIES.items()
    },
    **{
        shared(f"nuslerp_magnitude: {value}"): (
            "'nuslerp_magnitude'",
            "slerp, linear, geometric" if TYPED else "mergekit==0.1.5",
        )
        for value in ("long", "1", "null", "[slerp, long]", "{}", "[{filter: mlp}]")
    },
    shared("nuslerp_granularity: 'row:7'"): (
        "row:7" if TYPED else "mergekit==0.1.5",
        *(("the shape (", "embed_tokens") if TYPED else ()),
    ),
    **{
        shared(f"nuslerp_granularity: {named}, {flag}: {value}"): (
            (f"{flag}: {value}", named.strip("'"), f"Remove `{flag}`")
            if TYPED
            else ("nuslerp_granularity", "mergekit==0.1.5")
        )
        for named, flag, value in CONTRADICTIONS
    },
    # Names.
    **{
        shared(f"{name}: 1"): (f"no parameter '{name}'", *meant, "weight, nuslerp_row")
        for name, meant in {
            "nuslerp_flaten": ["Did you mean 'nuslerp_flatten'?"],
            "nuslerp_lambda": ["Did you mean 'lambda'?"],
            "nuslerp_weights": ["Did you mean 'weight'?"],
            "nuslerp_length": [],
            "nuslerp_t": [],
        }.items()
    },
    shared("nuslerp_granularty: row"): (
        "'nuslerp_granularty'",
        "granularity'?",
    ),
    weight("0.7, nuslerp_flaten: true"): ("'nuslerp_flaten'", "'nuslerp_flatten'?"),
    weight("0.7, nuslerp_contrast: 2"): ("'nuslerp_contrast'", "under a model"),
    weight("0.7, nuslerp_magnitude: linear"): (
        "'nuslerp_magnitude'",
        "under a model" if TYPED else "mergekit==0.1.5",
    ),
    **{
        text: (f"{name!r}", *said)
        for name, *said in (
            ("nuslerp_magnitude", "outside of `parameters`", "`nuslerp_magnitude: "),
            ("nuslerp_flaten", "'nuslerp_flatten'?", "written under `parameters`"),
            ("nuslerp_granularity", "outside of `parameters`", "granularity: row`"),
            ("nuslerp_contrast", "outside of `parameters`", "`nuslerp_contrast: "),
        )
        for text in (
            f"{CONFIG}{name}: linear\n",
            f"{CONFIG}parameter: {{{name}: linear}}\n",
            CONFIG.replace("- model: ./kd", f"- {name}: linear\n    model: ./kd"),
        )
    },
    shared("lambda: [{filters: mlp, value: 0.5}, {value: 1}]"): (
        "'lambda'",
        "'filters'",
        "has `filter` and `value`",
    ),
    weight("[{fliter: mlp, value: 0.1}, {value: 0.7}]"): ("'weight'", "'fliter'"),
    # The same name in its place is no excuse.
    f"{shared('nuslerp_flaten: 1')}nuslerp_flaten: 1\n": ("'nuslerp_flaten'",),
    # Models.
    listing("./sft"): ("besides the base model ./base there is only ./sft",),
    listing("./sft", "./kd", base="./sft"): ("./sft there is only ./kd",),
    listing("./sft", "./kd", "./kd"): (
        "./kd and ./kd",
        "are the same model",
        "another one",
    ),
    slices("./base ./sft ./kd ./kd", ranges=["[0, 4]"]): ("./kd and ./kd",),
    **{
        listing("./sft", other): (f"./sft and {other}", "are the same model")
        for other in ("sft", "sft/", "././sft", "./kd/../sft", "link")
    },
    listing("./sft", "ABSOLUTE/sft"): ("./sft and /", "are the same model"),
    **{
        listing(other, "./sft", "./kd"): (f"{other} and ./base", "are the same model")
        for other in ("base", "base/", "./base/", "./sft/../base")
    },
    listing("ABSOLUTE/base", "./sft"): ("/base and ./base", "are the same model"),
    slices("base ./sft ./kd", ranges=["[0, 4]"]): ("base and ./base", "same model"),
    listing("./sft", "./kd", more="base_model: ./sft/.\n").replace(
        "base_model: ./base\n", ""
    ): ("./sft and ./sft/.", "same model"),
    listing("./sft", "./kd", "./dpo", base="").replace("1}", "-0.5}", 1): (
        "'weight' of model ./sft",
        "-0.5",
        "Write weights of at least 0",
    ),
    slices("./sft ./kd", ranges=["[0, 4]"]): (
        "base model ./base is not among the models",
        "./sft, ./kd",
        "slices[0]",
        "Add it to the sources",
    ),
    slices("./base ./sft", ranges=["[0, 4]"]): ("./base there is only ./sft",),
    slices("./base ./sft ./kd", "./base ./sft ./kd ./dpo"): (
        "without ./dpo, as the first slice",
        "`weight: 0`",
    ),
    slices("./base ./sft ./kd", "./base ./sft ./kd").replace("[2, 4]", "[2, 2]"): (
        "layer_range",
        "[2, 2]",
    ),
    slices("./base ./sft ./kd", "./base ./sft ./kd").replace("[2, 4]", "[2, 5]"): (
        "layer_range` of model ./base in slices[1] is [2, 5]",
        "the model has layers [0, 4]",
    ),
    slices("./base ./sft ./kd").replace("[0, 2], p", "[0, 3], p", 1): ("same number",),
    # What mergekit cannot read.
    "merge_method: nuslerp\n": ("models",),
    "merge_method: nuslerp\nmodels: 3\n": ("`models` is 3", "a list"),
    "merge_method: nuslerp\nmodels: {./sft: 1}\n": ("`models` is", "a list"),
    "merge_method: nuslerp\nmodels: []\n": ("models",),
    "merge_method: nuslerp\nmodels: [~]\n": ("`models[0]` is None",),
    "merge_method: nuslerp\nmodels: [./sft, ./kd]\n": ("`models[0]` is './sft'",),
    CONFIG.replace("model: ./kd", "modle: ./kd"): ("`models[1].model` is missing",),
    CONFIG.replace("model: ./kd", "model:"): ("`models[1].model` is None", "a path"),
    CONFIG.replace("model: ./kd", "model: 7"): ("`models[1].model` is 7", "a path"),
    CONFIG.replace("model: ./kd", "model: [a]"): ("`models[1].model`", "a path"),
    CONFIG.replace("base_model: ./base", "base_model: 3"): ("`base_model` is 3",),
    CONFIG.replace("{weight: 0.7}", "0.7"): ("`models[1].parameters` is 0.7", "names"),
    CONFIG.replace("{weight: 0.7}", "[0.7]"): ("`models[1].parameters` is [0.7]",),
    f"{CONFIG}parameters: row\n": ("`parameters` is 'row'", "names and values"),
    f"{CONFIG}slices: []\nmodules: 3\n": ("`modules` is 3",),
    f"{CONFIG}slices: [{{sources: [{{model: ./sft, layer_range: [0, 4]}}]}}]\n": (
        "'models', 'slices', or 'modules'",
    ),
    "merge_method: nuslerp\nslices: [{}]\n": ("`slices[0].sources` is missing",),
    "merge_method: nuslerp\nslices: [{sources: []}]\n": ("sources",),
    slices("./sft ./kd").replace("layer_range: [0, 2], ", "", 1): (
        "`slices[0].sources[0].layer_range` is missing",
        "[0, 16]",
    ),
    slices("./sft ./kd").replace("[0, 2]", "[0]", 1): (
        "layer_range[1]` is missing",
        "two whole numbers",
    ),
    slices("./sft ./kd").replace("[0, 2]", "[0, x]", 1): ("layer_range", "'x'"),
    slices("./sft ./kd").replace("[0, 2]", "all", 1): ("layer_range` is 'all'",),
    "merge_method: nuslerp\nmodules: {vision: {}}\n": ("slices or models",),
    "merge_method: nuslerp\nmodules: {vision: {models: [{model: ./sft}]}}\n": (
        "no module 'vision'",
        "default",
    ),
    CONFIG.replace("bfloat16", "bfloat17"): (
        "`dtype` is 'bfloat17'",
        "dtype: bfloat16",
    ),
    CONFIG.replace("bfloat16", "int64"): ("`dtype` is 'int64'", "dtype: bfloat16"),
    CONFIG.replace("bfloat16", "16"): ("`dtype` is 16", "bfloat16"),
    f"{CONFIG}out_dtype: half\n": ("`out_dtype` is 'half'", "out_dtype: bfloat16"),
    f"{CONFIG}out_dtype: [float16]\n": ("`out_dtype` is", "bfloat16"),
    f"{CONFIG}tokenizer_source: 7\n": ("`tokenizer_source` is 7", "union"),
    f"{CONFIG}tokenizer: 7\n": ("`tokenizer` is 7", "union"),
    f"{CONFIG}chat_template: [a]\n": ("`chat_template` is ['a']",),
    # What YAML can write and nobody can read.
    weight("&a [*a]"): ("'weight' of model ./kd", "[[...]]"),
    weight("[&a {value: [*a]}]"): ("'weight' of model ./kd",),
    f"{CONFIG}parameters: &a {{weight: *a}}\n": ("'weight'",),
    weight('"\\e[31m red"'): ("'weight' of model ./kd", "\\x1b[31m red"),
    weight(f"'{'long ' * 500}'"): ("'weight' of model ./kd", "long long"),
    **(
        {
            listing("./sft", base=""): (
                "besides the base, not 1",
                "(./sft)",
                "`weight: 0`",
            ),
            slices("./sft", "./sft ./kd", base=""): (
                "besides the base, not 1",
                "slices[0]",
            ),
        }
        if TYPED
        else {}
    ),
}


# Words that only pydantic would use.
_OF_PYDANTIC = ("validation error", "Input should", "Field required", "pydantic")


@pytest.fixture
def linked(checkpoints, tmp_path):
    """A folder with links to the checkpoints, and one link more."""
    for name in ("base", "sft", "kd", "dpo"):
        shutil.copytree(checkpoints / name, tmp_path / name, copy_function=os.symlink)
    (tmp_path / "link").symlink_to("sft")
    return tmp_path


@pytest.fixture
def unread(monkeypatch):
    """No tensor may be read."""

    def read(*_arguments, **_options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", read)


def assert_names(message, *parts):
    for part in parts:
        assert part in message, message


def assert_in_order(message, *parts):
    assert_names(message, *parts)
    assert len(message) <= 600
    assert "\n" not in message.strip() and message.strip().isprintable()
    assert not any(words in message for words in _OF_PYDANTIC), message


def run_here(command, *words, cwd):
    """What a command says, and its exit status, in this process."""
    LoaderCache.loaders.clear()
    with working_directory(cwd):
        return CliRunner().invoke(command, words)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused(text, linked):
    names = REFUSED[text]
    text = text.replace("ABSOLUTE", str(linked))
    (linked / "config.yaml").write_text(text, "utf-8")
    done = run_here(mergekit_yaml, "config.yaml", "out", cwd=linked)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit), done.exception
    assert_in_order(done.stderr.splitlines()[-1], *names)
    assert not (linked / "out").exists()
    done = run_here(cli.main, "inspect", "config.yaml", cwd=linked)
    assert done.exit_code == 2
    assert_in_order(done.stderr, *names)


def test_refused_in_a_process_of_its_own(linked):
    """With no tensor in the checkpoints, only the headers of their files."""
    text = shared("nuslerp_granularty: row")
    for path in linked.glob("*/*.safetensors"):
        header = path.read_bytes()[
            : 8 + int.from_bytes(path.read_bytes()[:8], "little")
        ]
        path.unlink()
        path.write_bytes(header)
    (linked / "config.yaml").write_text(text, "utf-8")
    done = run_mergekit(linked / "config.yaml", linked / "out", cwd=linked)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert_in_order(done.stderr.splitlines()[-1], *REFUSED[text])
    assert not (linked / "out").exists()


def test_the_pointer_of_a_file_that_git_keeps_elsewhere(linked):
    path = next(linked.glob("kd/*.safetensors"))
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n", "utf-8")
    (linked / "config.yaml").write_text(listing("./sft", "./kd", base=""), "utf-8")
    done = run_here(mergekit_yaml, "config.yaml", "out", cwd=linked)
    assert done.exit_code == 1
    names = str(path.relative_to(linked)), "not a safetensors file", "git lfs pull"
    assert_in_order(done.stderr.splitlines()[-1], *names)


def test_there_are_enough_of_them():
    assert len(REFUSED) >= 120
