"""pyproject.toml, environment.yml and constraints.txt name the same packages."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}  # conda's name: PyPI's
ONLY_OLD_PYTHON = {"tomli"}  # environment.yml names its Python, so needs no such package


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def from_pyproject(project: dict) -> dict[str, str]:
    listed = project["dependencies"] + project["optional-dependencies"]["test"]
    requirements = [Requirement(line) for line in listed]
    return {
        canonicalize_name(r.name): str(r.specifier)
        for r in requirements
        if r.name not in ONLY_OLD_PYTHON
    }


def from_environment(environment: dict) -> dict[str, str]:
    found = {}
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            lines = [line for line in entry["pip"] if not line.startswith("--editable")]
            pip = [Requirement(line) for line in lines]
            found |= {canonicalize_name(r.name): str(r.specifier) for r in pip}
        else:
            spec = MatchSpec(entry, strict=True)
            name = spec.name.normalized if hasattr(spec.name, "normalized") else str(spec.name)
            found[canonicalize_name(CONDA_NAMES.get(name, name))] = str(spec.version or "")
    return found


def test_conda_and_pip_list_the_same_packages_and_bounds(project, environment):
    conda = from_environment(environment)
    assert conda.pop("python").startswith("3.11")  # Binder takes 3.10 where none is named
    assert conda.pop("pip") == ""
    assert conda == from_pyproject(project)


def test_conda_installs_the_kit_itself(environment):
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "--editable ." in pip


def test_bounds_are_loose_and_constraints_pin_every_dependency(project):
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert [s.operator for s in requirement.specifier] == ["=="], line
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    bounds = from_pyproject(project)
    assert bounds.pop("triton") and "triton" not in pins  # CUDA builds of torch pin it themselves
    for name, bound in bounds.items():
        assert bound.startswith(">="), f"{name}{bound}"
        for pin in pins[name]:
            version = next(iter(pin.specifier)).version
            assert Requirement(name + bound).specifier.contains(version), (name, bound, version)
    assert [str(pin) for pin in pins["torch"]] == ["torch==2.13.0"]


def test_constraints_name_no_place_and_no_cuda_package():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert not [line for line in pins if re.search(r"://|@|^-|^nvidia|^cuda", line)]
