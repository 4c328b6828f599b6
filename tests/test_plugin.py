# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How the plugin comes into mergekit, stays out of it, and fails."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, entry_points
from pathlib import Path
from types import SimpleNamespace

import mergekit
import mergekit.merge_methods.registry as registry
import pytest
import torch
from click.testing import CliRunner
from mergekit import merge_methods
from support import (
    REPOSITORY,
    Finished,
    clean_environment,
    load_tensors,
    merge_here,
    run_command,
)

import mergekit_nuslerp
from mergekit_nuslerp import cli, passes, plugin

PACKAGE = Path(mergekit_nuslerp.__file__).parent


def python(code: str, **environment: str) -> Finished:
    """Run code in a fresh interpreter, with the plugin's switches as given."""
    return run_command(
        sys.executable,
        "-W",
        "ignore",
        "-c",
        code,
        cwd=Path(tempfile.gettempdir()),  # not where a copy of the package lies
        env=clean_environment(**environment),
    )


def damaged_copy(folder: Path, *missing: str) -> str:
    """A copy of the installed package without some of its files, to be found first."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy)
    for path in copy.rglob("*.py"):
        if path.name in missing:
            # Not deleted: an editable installation would find it where it came from.
            path.write_text(f"raise ModuleNotFoundError('no {path.stem}')\n")
    installed = distribution("mergekit-nuslerp")
    info = folder / f"mergekit_nuslerp-{installed.version}.dist-info"
    info.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (info / name).write_text(installed.read_text(name) or "", encoding="utf-8")
    return str(folder)


def test_mergekit_uses_the_plugin_without_being_asked():
    method = merge_methods.get("nuslerp")
    assert type(method).__module__.startswith("mergekit_nuslerp.adapters.")


def test_the_package_itself_imports_nothing_but_the_standard_library():
    heavy = "{'torch', 'numpy', 'pydantic', 'click', 'mergekit'}"
    code = f"import sys, mergekit_nuslerp; print({heavy} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"


def test_import_torch_prints_nothing_and_loads_only_the_hook():
    code = (
        "import torch, sys\n"
        "assert 'mergekit' not in sys.modules\n"
        "mine = {n for n in sys.modules if n.startswith('mergekit_nuslerp')}\n"
        "assert mine == {'mergekit_nuslerp'}, mine"
    )
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_mergekit_s_methods_loads_no_more_than_without_the_plugin():
    """Of what takes seconds: mergekit 0.1.5 itself needs transformers only to plan."""
    code = (
        "import sys\n"
        "from mergekit import merge_methods as m\n"
        "mine = type(m.get('nuslerp')).__module__.startswith('mergekit_nuslerp')\n"
        "print(mine, *sorted({'transformers', 'peft'} & set(sys.modules)))"
    )
    on, *loaded = python(code).stdout.split()
    off, *without = python(code, MERGEKIT_NUSLERP="0").stdout.split()
    assert (on, off) == ("True", "False")
    assert loaded == without


OTHERS = sorted({path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py"})

# Asks for two methods, and plans by one of them.
_ASK = """
import torch
from mergekit import merge_methods
linear = merge_methods.get("linear")
assert "Refused" not in type(linear).__name__
method = merge_methods.get("nuslerp")
entry = getattr(method, "validate_inputs", None) or method.make_task
try:
    entry([0, 1])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "missing", [("plugin.py",), ("parameters.py",), ("kernel.py",), tuple(OTHERS)]
)
def test_a_damaged_installation_fails_nuslerp_merges_and_no_others(tmp_path, missing):
    path = damaged_copy(tmp_path, *missing)
    result = python(_ASK, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "cannot be used here" in result.stdout
    assert f"no {missing[0][:-3]}" in result.stdout or len(missing) > 1  # the reason
    assert "MERGEKIT_NUSLERP=0" in result.stdout  # the way out


def test_without_its_first_file_nothing_is_merged_in_silence(tmp_path):
    """PyTorch itself says so then."""
    path = damaged_copy(tmp_path)
    (tmp_path / PACKAGE.name / "__init__.py").write_text("")
    result = python("import torch", PYTHONPATH=path)
    assert result.returncode != 0
    assert "mergekit_nuslerp" in result.stderr


# --- Other mergekits ---------------------------------------------------------------


def changed_mergekit(
    folder: Path, version: str, changes: dict[str, tuple[str, str]]
) -> str:
    """A copy of the installed mergekit, by another version and with other texts."""
    source = Path(mergekit.__file__).parent
    copy = folder / "mergekit"
    shutil.copytree(source, copy)
    info = folder / f"mergekit-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: mergekit\nVersion: {version}\n")
    for name, (before, after) in changes.items():
        paths = [path for path in copy.rglob("*.py") if name in str(path)]
        texts = {path: path.read_text("utf-8") for path in paths}
        assert any(before in text for text in texts.values()), (name, before)
        for path, text in texts.items():
            path.write_text(text.replace(before, after), "utf-8")
    return str(folder)


def merge_by(path: str, checkpoints: Path, out: Path, *command: str) -> Finished:
    """Run mergekit-yaml, or another command, with a mergekit from a folder."""
    config = out.parent / "config.yaml"
    config.write_text(
        "merge_method: nuslerp\nbase_model: ./base\nmodels:\n"
        "  - {model: ./sft, parameters: {weight: 0.3}}\n"
        "  - {model: ./kd, parameters: {weight: 0.7}}\n"
        "parameters: {lambda: 0.5}\n"
    )
    words = command or ("mergekit.scripts.run_yaml",)
    return run_command(
        *(sys.executable, "-W", "ignore", "-m", *words, config, out),
        cwd=checkpoints,
        env=clean_environment(PYTHONPATH=os.pathsep.join([path, *_OURS])),
    )


# Where the package under test is, if that is said by this variable.
_OURS = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def test_a_mergekit_of_another_version_merges(checkpoints, tmp_path):
    path = changed_mergekit(tmp_path, "0.2.0", {})
    done = merge_by(path, checkpoints, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    merge_here((tmp_path / "config.yaml").read_text(), tmp_path / "b", cwd=checkpoints)
    first, second = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


_BATCHED = hasattr(registry, "_METHODS")

# How a mergekit may differ from those that are known, and the reason that is given.
STRANGE = {
    "the registry's name": (
        {".py": ("_METHODS" if _BATCHED else "REGISTERED_MERGE_METHODS", "_TABLE")},
        "keeps its merge methods in another way",
    ),
    "the registry's module": (
        {".py": ("merge_methods.registry", "merge_methods.table")},
        "keeps its merge methods in another way",
    ),
    "no class of methods": (
        {".py": ("BatchedMergeMethod" if _BATCHED else "MergeMethod", "Method")},
        "cannot import name",
    ),
    "a kernel's signature": (
        {
            "merge_methods/base.py": (
                "return self._execute(\n            groups,",
                ("return self._execute(\n            0, groups,"),
            )
        }
        if _BATCHED
        else {"rectify_embed.py": ("weight_info: WeightInfo,", "*, other,")},
        "two tiny tensors",
    ),
}

# All ways to a merge, and what each says before it ends with an error.
_WAYS = """
import json, sys, yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from mergekit_nuslerp import cli

def python(config, out):
    with open(config) as file:
        written = yaml.safe_load(file)
    run_merge(MergeConfiguration.model_validate(written), out, MergeOptions())

config, out = sys.argv[1:]
said = {}
for command, *words in (
    (mergekit_yaml, config, out),
    (cli.main, "run", config, out),
    (cli.main, "inspect", config),
):
    done = CliRunner().invoke(command, words)
    said[words[0]] = f"{done.output} {done.exception}" if done.exit_code else "nothing"
try:
    python(config, out)
except Exception as error:
    said["python"] = str(error)
print(json.dumps(said))
"""


@pytest.mark.parametrize("name", STRANGE)
def test_a_mergekit_that_does_not_fit_is_refused(name, checkpoints, tmp_path):
    changes, reason = STRANGE[name]
    path = changed_mergekit(tmp_path, "0.1.6", changes)
    registry = Path(path, "mergekit/merge_methods/registry.py")
    if "module" in name:
        registry.rename(registry.with_name("table.py"))
    (tmp_path / "ways.py").write_text(_WAYS, "utf-8")
    done = merge_by(path, checkpoints, tmp_path / "out", "ways")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 4
    assert all(reason in words for words in said.values()), said
    assert not [*tmp_path.glob("out/*.safetensors")]


def test_mergekit_yaml_ends_with_the_reason(checkpoints, tmp_path):
    changes, reason = STRANGE["no class of methods"]
    path = changed_mergekit(tmp_path, "0.1.6", changes)
    done = merge_by(path, checkpoints, tmp_path / "out")
    assert done.returncode != 0
    assert reason in done.stderr, done.stderr
    assert not [*tmp_path.glob("out/*.safetensors")]


# A merge that is right, one that is not, and the test of what is wrapped.
_SEAMS = f"""
import sys
from pathlib import Path
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main
from mergekit_nuslerp.adapters.planning import SEAMS

config, out = map(Path, sys.argv[1:])
done = CliRunner().invoke(main, [str(config), str(out)])
assert done.exit_code == 0, done.output
config.write_text(config.read_text().replace("lambda: 0.5", "lambda: .nan"))
done = CliRunner().invoke(main, [str(config), str(out)])
assert done.exit_code
print(done.output, done.exception)
sys.path.append({str(REPOSITORY / "tests")!r})
try:
    from test_config import test_mergekit_has_what_is_wrapped as check
    for seam in SEAMS.values():
        check(*seam)
except (AttributeError, ImportError) as error:
    print(error)
"""


@pytest.mark.parametrize(
    "file, name, other",
    [(".py", "MergeConfiguration", "Settings"), ("plan.py", "_plan(", "_plan_all(")],
)
def test_without_a_seam_tensors_are_checked_in_their_turn(
    file, name, other, checkpoints, tmp_path
):
    """And the test of the seams, in test_config.py, fails then."""
    path = changed_mergekit(tmp_path, "0.1.6", {file: (name, other)})
    (tmp_path / "seams.py").write_text(_SEAMS, "utf-8")
    done = merge_by(path, checkpoints, tmp_path / "out", "seams")
    assert done.returncode == 0, done.stderr
    assert "parameter 'lambda'" in done.stdout, done.stdout
    assert ("at tensor " in done.stdout) == (name == "_plan(")
    *_, error = done.stdout.splitlines()
    assert f"has no attribute '{name}'".replace("('", "'") in error or (
        f"cannot import name '{name}'" in error
    ), done.stdout


def test_switched_off_mergekit_has_its_own_method():
    code = (
        "from mergekit import merge_methods as m; "
        "print(type(m.get('nuslerp')).__module__)"
    )
    result = python(code, MERGEKIT_NUSLERP="0")
    assert result.stdout.startswith("mergekit.merge_methods."), result.stderr


def test_importing_the_package_installs_it_where_autoloading_is_off():
    code = (
        "import {first}, {second}\n"
        "from mergekit import merge_methods as m\n"
        "print(type(m.get('nuslerp')).__module__)"
    )
    order = {"first": "mergekit_nuslerp", "second": "mergekit.merge_methods"}
    result = python(code.format(**order), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr
    order = {"first": "mergekit.merge_methods", "second": "mergekit_nuslerp"}
    result = python(code.format(**order), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr


def test_worker_processes_use_the_plugin(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def probe(_):\n"
        "    from mergekit import merge_methods\n"
        "    return type(merge_methods.get('nuslerp')).__module__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(*pool.map(probe, [0]))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr


def test_the_registry_keeps_its_own_loader():
    assert "mergekit_nuslerp" not in type(registry.__spec__.loader).__module__
    assert "nuslerp" in inspect.getsource(registry).lower()


def test_both_entry_points_lead_to_the_package():
    groups = ("torch.backends", "mergekit.merge_methods")
    found = {g: [e.value for e in entry_points(group=g)] for g in groups}
    assert "mergekit_nuslerp:_autoload" in found["torch.backends"]
    assert "mergekit_nuslerp.entry_point:method" in found["mergekit.merge_methods"]


@pytest.mark.skipif(not hasattr(registry, "register"), reason="for mergekit 0.1.5")
def test_the_entry_point_is_what_mergekit_registers(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (point,) = entry_points(group="mergekit.merge_methods", name="mergekit_nuslerp")
    method = point.load()
    assert method.spec.name == point.name
    registry.register(method)
    tensors, weights = [torch.eye(2)[0], torch.eye(2)[1]], {"weight": [1, 1]}
    found = merge_methods.merge_tensors(tensors, point.name, parameters=weights)
    torch.testing.assert_close(found, torch.full((2,), 0.5**0.5))


def test_registering_again_changes_nothing():
    method = merge_methods.get("nuslerp")
    mergekit_nuslerp.register()
    mergekit_nuslerp._autoload()
    assert merge_methods.get("nuslerp") is method


def test_finders_that_ask_all_finders_do_not_turn_in_circles():
    code = """
import sys, torch
class Asker:
    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                return spec
sys.meta_path.insert(0, Asker())
for name in [n for n in sys.modules if n.startswith("mergekit_nuslerp")]:
    del sys.modules[name]
import mergekit_nuslerp, copy, importlib.util
from mergekit import merge_methods
print(type(merge_methods.get("nuslerp")).__module__)
"""
    result = python(code)
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr


def test_a_spec_that_was_found_can_be_copied():
    finder = mergekit_nuslerp._Finder()
    spec = finder.find_spec(mergekit_nuslerp.REGISTRY, merge_methods.__path__)
    assert copy.copy(spec.loader)._loader is spec.loader._loader
    assert spec.loader.get_source(mergekit_nuslerp.REGISTRY)


def test_the_switch_works_until_mergekit_is_imported():
    code = (
        "import torch, os; os.environ['MERGEKIT_NUSLERP'] = '0'\n"
        "from mergekit import merge_methods as m\n"
        "print(type(m.get('nuslerp')).__module__)"
    )
    assert python(code).stdout.startswith("mergekit.merge_methods.")


@pytest.mark.parametrize("attribute, adapter", plugin.ADAPTERS.items())
def test_an_adapter_can_be_imported_first(attribute, adapter):
    if not hasattr(registry, attribute):
        pytest.skip("for another mergekit")
    code = (
        f"import mergekit_nuslerp.adapters.{adapter}\n"
        "from mergekit import merge_methods as m\n"
        "print(type(m.get('nuslerp')).__module__)"
    )
    result = python(code)
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr


def test_the_demo_needs_the_plugin(tmp_path):
    result = CliRunner().invoke(
        cli.main, ["demo", str(tmp_path / "out")], env={"MERGEKIT_NUSLERP": "0"}
    )
    assert result.exit_code == 2
    assert "MERGEKIT_NUSLERP=0 switches the plugin off" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value, said",
    [
        ("compile", "MERGEKIT_NUSLERP=compile is not needed any more"),
        ("complie", "MERGEKIT_NUSLERP=complie has no effect"),
    ],
)
def test_status_says_what_the_switch_does(value, said, monkeypatch):
    answer = {"module": "mergekit_nuslerp.x", "mergekit": "0.1.5", "torch": "2.13.0"}
    probed = SimpleNamespace(stdout=json.dumps(answer))
    monkeypatch.setattr(cli, "subprocess", SimpleNamespace(run=lambda *_, **__: probed))
    result = CliRunner().invoke(cli.main, ["status"], env={"MERGEKIT_NUSLERP": value})
    assert result.exit_code == 0, result.output
    assert said in result.output


@pytest.mark.parametrize(
    "value, said",
    [
        ("1", passes.description()),
        ("portable", "portable pass (PyTorch), as MERGEKIT_NUSLERP=portable says"),
    ],
)
def test_status_says_on_and_which_pass_serves(value, said):
    result = CliRunner().invoke(cli.main, ["status"], env={"MERGEKIT_NUSLERP": value})
    assert result.exit_code == 0, result.output
    assert result.output.startswith("on: mergekit")
    assert f"arithmetic: {said}." in result.output
    assert "compiled" not in result.output


@pytest.mark.parametrize(
    "switch", [{"MERGEKIT_NUSLERP": "0"}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}]
)
def test_status_says_off_and_why(switch):
    result = CliRunner().invoke(cli.main, ["status"], env=switch)
    assert result.exit_code == 1
    assert result.output.startswith("off:")
    assert "=".join(*switch.items()) in result.output


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"module": "mergekit_nuslerp.adapters.batch"}, None),
        ({"module": "mergekit.x", "failure": "it broke"}, "it broke"),
        ({"error": "ImportError: no mergekit"}, "no mergekit"),
        ({"module": "mergekit.x", "entry": []}, "not installed"),
        (
            {
                "module": "mergekit.x",
                "entry": ["mergekit_nuslerp:_autoload"],
                "torch": "2.4.1+cpu",
            },
            "2.5 or newer",
        ),
        (
            {
                "module": "mergekit.x",
                "entry": ["mergekit_nuslerp:_autoload"],
                "torch": "2.13.0",
                "mergekit": "9.9",
            },
            "damaged: reinstall it",
        ),
    ],
)
def test_status_knows_every_reason(answer, reason):
    found = cli.why_not(answer)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_run_passes_everything_on_to_mergekit_yaml():
    command = [sys.executable, "-m", "mergekit_nuslerp", "run", "--help"]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert "--copy-tokenizer" in result.stdout, result.stderr


def test_run_respects_the_switch():
    result = CliRunner().invoke(cli.main, ["run", "x"], env={"MERGEKIT_NUSLERP": "0"})
    assert result.exit_code == 2
    assert "MERGEKIT_NUSLERP=0" in result.output
