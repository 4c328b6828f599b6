# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""What a patched mergekit does, beside the plugin: one function for each question.

Run with the patched mergekit first on the path and the plugin's hook switched off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def same_bytes() -> None:
    """mergekit's `nuslerp` gives the bytes of the plugin's portable pass."""
    os.environ["MERGEKIT_NUSLERP"] = "portable"
    import torch
    from mergekit.merge_methods import merge_tensors
    from mergekit.merge_methods.nuslerp import nuslerp_merge_method as method

    from mergekit_nuslerp import nuslerp

    names = {parameter.name for parameter in method.spec.parameters}
    vectors = {
        "tensor": {},
        "row": {"nuslerp_flatten": False},
        "dim0": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }
    if "nuslerp_granularity" in names:
        more = ("matrix", "column", "row:2", "column:4")
        vectors |= {name: {"nuslerp_granularity": name} for name in more}
    lengths = {"slerp": {}}
    if "nuslerp_magnitude" in names:
        more = ("linear", "geometric")
        lengths |= {name: {"nuslerp_magnitude": name} for name in more}
    counts = (2,) if method.spec.contract.max_non_base == 2 else (2, 3, 5)
    scales = (1.0, 0.3) if "lambda" in names else (1.0,)
    shapes = [(38, 64), (5,), (), (3, 16, 24), (0, 4), (2050, 1028)]
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    generator, compared = torch.Generator().manual_seed(0), 0
    for shape, dtype, count in product(shapes, dtypes, counts):
        large = shape == shapes[-1]  # of several chunks and groups
        if large and (count > 2 or dtype not in (torch.bfloat16, torch.float32)):
            continue
        base = torch.randn(shape, generator=generator)
        tensors = [
            (base + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
            for _ in range(count)
        ]
        if shape == shapes[0]:  # rows that are opposite, zero, and the same
            tensors[0][1], tensors[0][2] = -tensors[1][1], 0
            tensors[1][3] = tensors[0][3]
        weights = [0.3, 0.7, 0.5, 0.1, 0.4][:count]
        bases = None, base.to(dtype)
        for base, granularity, magnitude, scale in product(
            bases, vectors, lengths, scales
        ):
            if (base is None and scale != 1) or (large and magnitude != "slerp"):
                continue
            options = {"granularity": granularity, "magnitude": magnitude}
            expected = nuslerp(tensors, weights, base=base, lambda_=scale, **options)
            parameters = {**vectors[granularity], **lengths[magnitude]}
            found = merge_tensors(
                tensors if base is None else [*tensors, base],
                method,
                base_index=None if base is None else count,
                parameters={
                    "weight": weights,
                    **parameters,
                    **({} if scale == 1 else {"lambda": scale}),
                },
            )
            compared += 1
            assert found.dtype == expected.dtype, parameters
            assert found.equal(expected), (shape, dtype, count, base is None, options)
    print(f"the same bytes in {compared} merges")


def examples() -> None:
    """Every example without the plugin is what it is with the plugin."""
    from mergekit_nuslerp.demo import write_models

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "models").mkdir()
        write_models(Path(folder, "models"))
        for switch in ("0", "portable"):
            environment = {**os.environ, "MERGEKIT_NUSLERP": switch}
            environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(int(switch != "0"))
            command = [sys.executable, __file__, "merge_examples", folder, switch]
            subprocess.run(command, env=environment, check=True)
        import torch
        from safetensors.torch import load_file

        own = sorted(Path(folder, "0").rglob("*.safetensors"))
        assert own
        for file in own:
            other = load_file(Path(folder, "portable", file.relative_to(f"{folder}/0")))
            found = load_file(file)
            assert found.keys() == other.keys()
            assert all(torch.equal(found[name], other[name]) for name in found), file
    print("the examples merge to the same tensors")


def merge_examples(folder: str, switch: str) -> None:
    """Merge every example, for `examples`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from mergekit import merge_methods
    from support import merge_here

    module = type(merge_methods.get("nuslerp")).__module__
    assert module.startswith("mergekit.") == (switch == "0"), module
    configs = sorted((ROOT / "example_configs").glob("*.yaml"))
    assert configs
    for path in configs:
        text = path.read_text("utf-8")
        ours = ("head", "row*column")
        if any(f"nuslerp_granularity: {name}" in text for name in ours):
            print(f"{path.name} needs the plugin: its granularity is not proposed")
            continue
        out = Path(folder, switch, path.stem)
        merge_here(text, out, cwd=Path(folder, "models"))


ENTRY_POINT = """
import sys, torch
from mergekit import merge_methods
tensors = [torch.eye(2)[0], torch.eye(2)[1]]
for name in ("nuslerp", "mergekit_nuslerp", "mergekit_nuslerp", "nuslerp"):
    merged = merge_methods.merge_tensors(tensors, name, parameters={"weight": [1, 1]})
    torch.testing.assert_close(merged, torch.full((2,), 0.5**0.5))
method = merge_methods.get("mergekit_nuslerp")
assert type(method).__module__ == "mergekit_nuslerp.adapters.batch"
assert method in merge_methods.registered_methods()
"""


def entry_point() -> None:
    """mergekit finds the plugin by its name, with the hook and without."""
    own = {**os.environ, "MERGEKIT_NUSLERP": "1"}
    for hook in ("0", "1"):
        environment = {**own, "TORCH_DEVICE_BACKEND_AUTOLOAD": hook}
        command = [sys.executable, "-W", "ignore", "-c", ENTRY_POINT]
        subprocess.run(command, env=environment, check=True)
    print("the plugin is found by its entry point")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
