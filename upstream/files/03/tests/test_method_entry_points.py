# Copyright (C) 2026 The mergekit-nuslerp authors
# SPDX-License-Identifier: LGPL-3.0-only

from importlib import metadata

import pytest
import torch

from mergekit import merge_methods
from mergekit.merge_methods import TensorGroup, merge_method, merge_tensors, registry

CODE = """
import torch
from mergekit.merge_methods import TensorGroup, merge_method, register

@merge_method(name="{name}")
def method(group: TensorGroup, scale: float = 1.0) -> torch.Tensor:
    return scale * group.tensors[0]

not_a_method = 1
if {registers}:
    register(method)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package with one method and one entry point, and forget it afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def install(package, point, value="method", name=None, registers=False):
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        code = CODE.format(name=name or point, registers=registers)
        (folder / f"{package}.py").write_text(code)
        (info / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[mergekit.merge_methods]\n{point} = {package}:{value}\n"
        )
        monkeypatch.syspath_prepend(str(folder))

    return install


def test_a_method_of_another_package_is_found_by_its_name(install):
    with pytest.raises(RuntimeError, match="Unimplemented merge method scaled"):
        merge_methods.get("scaled")
    install("scaled_package", "scaled")
    tensors = [torch.ones(2), torch.zeros(2)]
    result = merge_tensors(tensors, "scaled", parameters={"scale": 3})
    torch.testing.assert_close(result, torch.full((2,), 3.0))
    assert merge_methods.get("scaled") in merge_methods.registered_methods()


def test_built_in_methods_cannot_be_replaced(install):
    builtin = merge_methods.get("linear")
    install("impostor_package", "linear")
    assert merge_methods.get("linear") is builtin


def test_a_registered_method_comes_before_an_entry_point(install):
    @merge_method(name="mine")
    def mine(group: TensorGroup) -> torch.Tensor:
        return group.tensors[0]

    install("mine_package", "mine")
    merge_methods.register(mine)
    assert merge_methods.get("mine") is mine


def test_a_package_may_register_its_method_when_it_is_imported(install):
    install("eager_package", "eager", registers=True)
    assert merge_methods.get("eager").spec.name == "eager"


@pytest.mark.parametrize(
    "options", [{"value": "not_a_method"}, {"name": "another_name"}]
)
def test_an_entry_point_must_lead_to_a_method_of_its_name(install, options):
    package = f"broken_{next(iter(options))}"
    install(package, "broken", **options)
    with pytest.raises(TypeError, match=f"broken.*{package}"):
        merge_methods.get("broken")
    assert "broken" not in registry._METHODS


def test_two_packages_with_one_name_are_refused(install):
    install("first_package", "twice")
    install("second_package", "twice")
    found = metadata.entry_points(group="mergekit.merge_methods", name="twice")
    assert len(found) == 2
    with pytest.raises(RuntimeError, match="twice.*first_package.*second_package"):
        merge_methods.get("twice")
