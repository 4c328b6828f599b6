# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""All the ways into mergekit lead to the plugin."""

from __future__ import annotations

import shutil
import sysconfig

import mergekit.merge_methods
import pytest
import torch
import yaml
from mergekit.common import ImmutableMap, ModelReference
from oracle import oracle
from safetensors.torch import save_file
from support import clean_environment, load_tensors, run_command, run_mergekit

from mergekit_nuslerp import parameters

# The in-memory interface and the batch kernel came with mergekit 0.1.5.
BATCHED = hasattr(mergekit.merge_methods, "merge_state_dicts")
only_batched = pytest.mark.skipif(not BATCHED, reason="new in mergekit 0.1.5")
only_tasks = pytest.mark.skipif(BATCHED, reason="of mergekit 0.1.4")

if BATCHED:
    from mergekit.merge_methods import merge_state_dicts, merge_tensors
else:
    from mergekit.architecture import WeightInfo
    from mergekit.io.tasks import GatherTensors

CONFIG = {
    "merge_method": "nuslerp",
    "base_model": "./base",
    "models": [
        {"model": "./sft", "parameters": {"weight": 0.3}},
        {"model": "./kd", "parameters": {"weight": 0.7}},
    ],
    "dtype": "bfloat16",
}


def command(name):
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert found is not None
    return found


def assert_is_our_merge(merged, models, weights=(0.3, 0.7)):
    base, *others = models
    assert merged.keys() == base.keys()
    for name, found in merged.items():
        exact = oracle([model[name] for model in others], weights, base[name])
        same = found == exact.to(found.dtype)
        assert same.double().mean() >= 0.99, name
    # bfloat16 arithmetic, which mergekit's own method has, would not get there.


@pytest.fixture(scope="module")
def models(checkpoints):
    return [load_tensors(checkpoints / name) for name in ("base", "sft", "kd")]


def test_switched_off_it_is_mergekits_own_merge(checkpoints, models, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump(CONFIG))
    off = clean_environment(MERGEKIT_NUSLERP="0")
    done = run_mergekit(config, tmp_path / "out", cwd=checkpoints, env=off)
    assert done.returncode == 0, done.stderr
    assert "mergekit-nuslerp" not in done.stderr
    merged, name = load_tensors(tmp_path / "out"), "model.embed_tokens.weight"
    base, first, second = (model[name] for model in models)
    own = mergekit.merge_methods.nuslerp.nuslerp
    assert merged[name].equal(
        base + own(0.7, first - base, second - base, flatten=True)
    )
    config.write_text(yaml.dump({**CONFIG, "parameters": {"lambda": 0.5}}))
    done = run_mergekit(config, tmp_path / "other", cwd=checkpoints, env=off)
    assert done.returncode != 0
    assert "MERGEKIT_NUSLERP=0 asks for, has no parameter 'lambda'" in done.stderr
    assert not [*tmp_path.glob("other/*.safetensors")]


def test_mergekit_pytorch(checkpoints, models, tmp_path):
    for name, tensors in zip(("base", "sft", "kd"), models):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    config = {**CONFIG, "base_model": "./base.safetensors"}
    config["models"] = [
        {**entry, "model": f"{entry['model']}.safetensors"}
        for entry in CONFIG["models"]
    ]
    (tmp_path / "config.yaml").write_text(yaml.dump(config))
    done = run_command(command("mergekit-pytorch"), "config.yaml", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.announcements == 1
    assert_is_our_merge(load_tensors(tmp_path / "out"), models)


def test_mergekit_multi(checkpoints, models, tmp_path):
    first = {**CONFIG, "name": "inner"}
    second = {**CONFIG, "models": [dict(entry) for entry in CONFIG["models"]]}
    second["models"][0]["model"] = "inner"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump_all([first, second]))
    done = run_command(
        command("mergekit-multi"),
        config,
        "--out-path",
        tmp_path / "out",
        "-I",
        tmp_path / "inner_merges",
        cwd=checkpoints,
    )
    assert done.returncode == 0, done.stderr
    assert done.announcements == 1
    base, _, kd = models
    inner = load_tensors(tmp_path / "inner_merges" / "inner")
    assert_is_our_merge(inner, models)
    assert_is_our_merge(load_tensors(tmp_path / "out"), (base, inner, kd))


@only_batched
def test_merge_tensors():
    a, b, base = (torch.randn(8, 16, dtype=torch.float64) for _ in range(3))
    for flatten, row_wise, granularity in (
        (True, False, "tensor"),
        (False, False, "row"),
        (False, True, "column"),
    ):
        merged = merge_tensors(
            [a, base, b],
            "nuslerp",
            base_index=1,
            parameters={
                "weight": [0.3, 0.7],
                "nuslerp_flatten": flatten,
                "nuslerp_row_wise": row_wise,
            },
        )
        exact = oracle([a, b], (0.3, 0.7), base, granularity)
        torch.testing.assert_close(merged, exact, rtol=1e-13, atol=1e-13)


@only_batched
def test_merge_state_dicts_in_batches():
    from mergekit.merge_methods import BatchOptions, PerGroupValues

    shapes = {"a": (4, 6), "b": (4, 6), "c": (6, 4), "d": (5,), "e": (4, 6)}
    first, second = (
        {name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)
    )
    second["d"] = second["d"].double()
    first["step"] = second["step"] = torch.tensor(7)
    weights = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    merged = merge_state_dicts(
        [first, second],
        "nuslerp",
        parameters={
            "weight": PerGroupValues([[w, 1 - w] for w in weights]),
            "nuslerp_flatten": False,
        },
        batch_options=BatchOptions(max_groups=2),
    )
    assert merged["step"].equal(torch.tensor(7))
    for name, weight in zip(shapes, weights):
        exact = oracle([first[name], second[name]], (weight, 1 - weight), None, "row")
        expected = exact.to(torch.promote_types(first[name].dtype, second[name].dtype))
        torch.testing.assert_close(merged[name], expected, rtol=2e-7, atol=0)


@only_batched
def test_a_batch_is_one_kernel_call(monkeypatch):
    from mergekit_nuslerp.adapters import planning as adapter

    calls, kernel = [], adapter.merge_batch
    monkeypatch.setattr(
        adapter, "merge_batch", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    first, second = ({str(i): torch.randn(8) for i in range(200)} for _ in range(2))
    merge_state_dicts([first, second], "nuslerp", parameters={"weight": [0.5, 0.5]})
    assert len(calls) == 1


@only_batched
def test_float32_merges_keep_the_weights_precision():
    """mergekit would pack the weights in float32."""
    a, b = torch.randn(2, 4096)
    merged = merge_tensors([a, b], "nuslerp", parameters={"weight": [0.3, 0.7]})
    assert merged.equal(oracle([a, b], (0.3, 0.7)).float())


@only_batched
def test_output_dtype():
    a, b = torch.randn(2, 64)
    merged = merge_tensors(
        [a, b],
        "nuslerp",
        parameters={"weight": [0.3, 0.7]},
        out_dtype=torch.bfloat16,
    )
    assert merged.equal(oracle([a, b], (0.3, 0.7)).float().bfloat16())


@only_batched
@pytest.mark.parametrize(
    "culprit, named",
    [(0, "the base model ./base"), (1, "model ./sft"), (2, "model ./kd")],
)
def test_nan_names_tensor_and_model(culprit, named):
    state = {name: {"w": torch.randn(3, 4)} for name in ("./base", "./sft", "./kd")}
    state[("./base", "./sft", "./kd")[culprit]]["w"][1, 2] = float("nan")
    with pytest.raises(ValueError, match=f"tensor w of {named} contains NaN"):
        merge_state_dicts(
            state, "nuslerp", base="./base", parameters={"weight": [0.3, 0.7]}
        )


TOO_LARGE = r"w: the result is too large for torch\.float16\. .*`dtype`.*`lambda`"


@only_batched
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_dtype_cannot_hold_names_the_tensor(dtype):
    """In the merge or in the conversion of its result."""
    rows = 6e4 * torch.eye(3, dtype=dtype)
    state = {str(i): {"v": rows[2], "w": rows[i]} for i in range(3)}
    options = {"weight": [1.0, 1.0], "lambda": 2.0}
    with pytest.raises(OverflowError, match=f"tensor {TOO_LARGE}"):
        merge_state_dicts(
            state, "nuslerp", base="2", parameters=options, out_dtype=torch.float16
        )


@only_batched
def test_one_tensor_object_for_base_and_model():
    x, y = torch.randn(2, 8)
    merged = merge_tensors(
        [x, x, y], "nuslerp", base_index=0, parameters={"weight": [0.3, 0.7]}
    )
    torch.testing.assert_close(merged, oracle([x, y], (0.3, 0.7), x).float())


@only_batched
def test_mistakes_of_direct_callers():
    a, b = torch.randn(2, 8)
    with pytest.raises(parameters.ConfigError, match="'weight' of model 0 is missing"):
        merge_tensors([a, b], "nuslerp")
    with pytest.raises(ValueError, match="at least 2 non-base inputs"):
        merge_tensors([a], "nuslerp", parameters={"weight": 1.0})
    with pytest.raises(parameters.ConfigError, match="'lambda' is 0"):
        merge_tensors([a, b], "nuslerp", parameters={"weight": 1.0, "lambda": 0.5})
    blocks = {"weight": 1.0, "nuslerp_granularity": "row:2"}
    with pytest.raises(parameters.ConfigError, match=r"3 rows .* Write row:1 or row:3"):
        merge_tensors(
            [torch.ones(3, 3), torch.ones(3, 3)], "nuslerp", parameters=blocks
        )
    with pytest.raises(TypeError, match="floating-point"):
        merge_tensors([a.int(), b.int()], "nuslerp", parameters={"weight": 1.0})


# --- mergekit 0.1.4: one task a tensor ---------------------------------------------


def task(name="model.layers.0.w", base=True, is_embed=False, **shared):
    """The planned task for one weight, and the models."""
    refs = [ModelReference.model_validate(n) for n in ("base", "sft", "kd")]
    used = refs if base else refs[1:]
    info = WeightInfo(name=name, is_embed=is_embed)
    weights = dict(zip(refs, (None, 0.3, 0.7)))
    method = mergekit.merge_methods.get("nuslerp")
    planned = method.make_task(
        output_weight=info,
        tensors=GatherTensors(weight_info=ImmutableMap({ref: info for ref in used})),
        parameters=ImmutableMap(
            {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0, **shared}
        ),
        tensor_parameters=ImmutableMap(
            {ref: ImmutableMap({"weight": weights[ref]}) for ref in used}
        ),
        base_model=refs[0] if base else None,
    )
    return planned, used


@only_tasks
def test_a_task_merges():
    planned, refs = task(nuslerp_flatten=0.0, nuslerp_row_wise=1.0)
    base, a, b = (torch.randn(8, 16) for _ in refs)
    merged = planned.execute(dict(zip(refs, (base, a, b))))
    exact = oracle([a, b], (0.3, 0.7), base, "column")
    torch.testing.assert_close(merged, exact.float(), rtol=2e-7, atol=0)
    assert planned.uses_accelerator()


@only_tasks
def test_a_task_cuts_embeddings_to_the_common_part():
    planned, refs = task("lm_head.weight", is_embed=True)
    tensors = [torch.randn(rows, 4) for rows in (10, 12, 11)]
    merged = planned.execute(dict(zip(refs, tensors)))
    base, a, b = (tensor[:10] for tensor in tensors)
    exact = oracle([a, b], (0.3, 0.7), base)
    torch.testing.assert_close(merged, exact.float(), rtol=2e-7, atol=0)


@only_tasks
def test_a_task_refuses_other_shapes_and_says_where():
    planned, refs = task()
    tensors = dict(zip(refs, (torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3))))
    with pytest.raises(RuntimeError, match=r"layers\.0\.w.*shape.*different sizes"):
        planned.execute(tensors)


@only_tasks
def test_a_task_passes_on_what_only_one_model_has():
    planned, refs = task(base=False)
    only = torch.ones(3)
    assert planned.execute({refs[0]: only}) is only


@only_tasks
def test_a_task_refuses_to_drop_the_base():
    planned, refs = task()
    tensors = {ref: torch.ones(3) for ref in refs[1:]}
    with pytest.raises(
        ValueError,
        match=r"base model .* is not among .* that have tensor .*layers\.0\.w",
    ):
        planned.execute(tensors)


@only_tasks
def test_a_task_copies_integers_that_agree():
    planned, refs = task()
    counter = torch.tensor([7])
    merged = planned.execute({ref: counter.clone() for ref in refs})
    assert merged.equal(counter)
    tensors = {ref: torch.tensor([n]) for n, ref in enumerate(refs)}
    with pytest.raises(ValueError, match="differ between the models"):
        planned.execute(tensors)


@only_tasks
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_task_names_tensor_and_model_of_nan(culprit):
    planned, refs = task()
    tensors = {ref: torch.randn(3) for ref in refs}
    tensors[refs[culprit]][1] = float("inf")
    expected = rf"layers\.0\.w of (the base )?model {refs[culprit]} contains"
    with pytest.raises(ValueError, match=expected):
        planned.execute(tensors)


@only_tasks
def test_a_task_names_the_tensor_that_its_dtype_cannot_hold():
    planned, refs = task(**{"lambda": 2.0})
    tensors = dict(zip(refs, 6e4 * torch.eye(3, dtype=torch.float16)))
    with pytest.raises(OverflowError, match=rf"layers\.0\.{TOO_LARGE}"):
        planned.execute(tensors)
