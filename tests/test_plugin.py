# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

"""How the plugin comes into mergekit, stays out of it, and fails."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, entry_points
from pathlib import Path
from types import SimpleNamespace

import mergekit.merge_methods.registry as registry
import pytest
from click.testing import CliRunner
from mergekit import merge_methods
from support import Finished, clean_environment, run_command

import mergekit_nuslerp
from mergekit_nuslerp import _hook, cli, passes, plugin

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
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
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
        "assert mine == {'mergekit_nuslerp', 'mergekit_nuslerp._hook'}, mine"
    )
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


OTHERS = sorted({path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py"})


@pytest.mark.parametrize("missing", [("_hook.py",), tuple(OTHERS)])
def test_a_damaged_installation_does_not_break_import_torch(tmp_path, missing):
    path = damaged_copy(tmp_path, *missing)
    code = "import torch, mergekit_nuslerp; print(mergekit_nuslerp.__file__)"
    result = python(code, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(path)


def test_a_damaged_installation_fails_nuslerp_merges_and_no_others(tmp_path):
    path = damaged_copy(tmp_path, "kernel.py")
    code = """
import torch
from mergekit import merge_methods
a = merge_methods.get("linear")
method = merge_methods.get("nuslerp")
entry = getattr(method, "validate_inputs", None) or method.make_task
try:
    entry([0, 1])
except RuntimeError as error:
    print(error)
"""
    result = python(code, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "could not be loaded" in result.stdout
    assert "no kernel" in result.stdout  # the reason
    assert "MERGEKIT_NUSLERP=0" in result.stdout  # the way out


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
    assert "mergekit_nuslerp:register" in found["mergekit.merge_methods"]


def test_registering_again_changes_nothing():
    method = merge_methods.get("nuslerp")
    mergekit_nuslerp.register()
    mergekit_nuslerp._autoload()
    assert merge_methods.get("nuslerp") is method


@pytest.mark.parametrize("version", ["0.1.3", "0.1.6", "0.2.0", "1.0", "of no version"])
def test_an_unknown_mergekit_is_left_alone_with_a_warning(version, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "mergekit_version", lambda: version)
    own = object()
    methods = {"nuslerp": own}
    plugin.install(SimpleNamespace(_METHODS=methods, REGISTERED_MERGE_METHODS=methods))
    assert methods == {"nuslerp": own}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"does not know mergekit {version}" in record.message
    assert "0.1.5 and 0.1.4" in record.message
    with pytest.raises(ImportError, match=f"does not know mergekit {version}; it kn"):
        plugin.adapter()


@pytest.mark.parametrize("version", ["0.1.5.dev3+g1234", "0.1.4.post1"])
def test_builds_of_a_known_mergekit_are_known(version, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "mergekit_version", lambda: version)
    methods = {"nuslerp": merge_methods.get("nuslerp")}
    plugin.install(SimpleNamespace(_METHODS=methods, REGISTERED_MERGE_METHODS=methods))
    assert not caplog.records


def test_a_known_version_without_its_registry_is_left_alone(caplog):
    fake = SimpleNamespace()
    plugin.install(fake)
    assert vars(fake) == {}
    assert "stays in place" in caplog.text


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
    finder = _hook._Finder()
    spec = finder.find_spec(_hook.REGISTRY, merge_methods.__path__)
    assert copy.copy(spec.loader)._loader is spec.loader._loader
    assert spec.loader.get_source(_hook.REGISTRY)


def test_the_switch_works_until_mergekit_is_imported():
    code = (
        "import torch, os; os.environ['MERGEKIT_NUSLERP'] = '0'\n"
        "from mergekit import merge_methods as m\n"
        "print(type(m.get('nuslerp')).__module__)"
    )
    assert python(code).stdout.startswith("mergekit.merge_methods.")


@pytest.mark.parametrize("name", sorted(plugin.ADAPTERS.values()))
def test_an_adapter_can_be_imported_first(name):
    adapter, attribute = name
    if not hasattr(registry, attribute):
        pytest.skip("for another mergekit")
    code = (
        f"import mergekit_nuslerp.adapters.{adapter}\n"
        "from mergekit import merge_methods as m\n"
        "print(type(m.get('nuslerp')).__module__)"
    )
    result = python(code)
    assert result.stdout.startswith("mergekit_nuslerp."), result.stderr


def test_any_other_failure_shows_when_nuslerp_is_asked_for(monkeypatch):
    def broken(_registry):
        raise OSError("disk on fire")

    class Own:
        def validate_inputs(self):
            return "merged"

    own, linear = Own(), Own()
    fake = SimpleNamespace(_METHODS={"nuslerp": own, "linear": linear})
    monkeypatch.setattr(plugin, "install", broken)
    _hook.install(fake)
    with pytest.raises(RuntimeError, match="disk on fire"):
        fake._METHODS["nuslerp"].validate_inputs()
    assert own.validate_inputs() == "merged"  # mergekit's own object is untouched
    assert fake._METHODS["linear"] is linear


def test_the_plugin_says_once_that_it_merges(caplog):
    plugin.announce.cache_clear()
    plugin.announce()
    plugin.announce()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "mergekit-nuslerp",
        mergekit_nuslerp.__version__,
        "MERGEKIT_NUSLERP=0",
    ):
        assert part in record.message


def test_status_says_on():
    result = CliRunner().invoke(cli.main, ["status"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("on: mergekit")
    assert "compiled" not in result.output


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
def test_status_says_which_pass_serves(value, said):
    result = CliRunner().invoke(cli.main, ["status"], env={"MERGEKIT_NUSLERP": value})
    assert result.exit_code == 0, result.output
    assert f"arithmetic: {said}." in result.output


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
            "does not know mergekit 9.9",
        ),
    ],
)
def test_status_knows_every_reason(answer, reason):
    found = cli.why_not(answer)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_run_passes_everything_on_to_mergekit_yaml():
    command = [sys.executable, "-m", "mergekit_nuslerp.cli", "run", "--help"]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert "--copy-tokenizer" in result.stdout, result.stderr


def test_run_respects_the_switch():
    result = CliRunner().invoke(cli.main, ["run", "x"], env={"MERGEKIT_NUSLERP": "0"})
    assert result.exit_code == 2
    assert "MERGEKIT_NUSLERP=0" in result.output
