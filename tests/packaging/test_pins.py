"""Versions are pinned in constraints.txt and nowhere else, and the pins lie in the ranges that pyproject.toml gives."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [
    need
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    if (need := Requirement(line)).name != PROJECT["name"]
]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_everything_needed_is_pinned_inside_its_range() -> None:
    pins = _pins()
    for need in NEEDED:
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), str(need)


def test_pins_fit_any_machine() -> None:
    # A local version such as 2.13.0+cpu exists on some indexes only; a path or URL on one machine only.
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line


def test_answering_needs_no_package_of_training_and_evaluation() -> None:
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    heavy = {"trl", "datasets", "peft", "matplotlib", "scikit-image", "scipy"}
    assert not base & heavy
    assert not [name for name in base if name.startswith("font-")]
    assert heavy <= {canonicalize_name(Requirement(line).name) for line in [*EXTRAS["eval"], *EXTRAS["train"]]}


def test_torchvision_is_never_installed() -> None:
    assert "torchvision" not in _pins()
    assert all(need.name != "torchvision" for need in NEEDED)


def test_nothing_is_pinned_elsewhere() -> None:
    assert not [str(need) for need in NEEDED if "==" in str(need.specifier)]
    for page in ("README.md", "CONTRIBUTING.md"):
        pinned = set(re.findall(r"([A-Za-z0-9_-]+)==([\d.]+)", (ROOT / page).read_text(encoding="utf-8")))
        assert pinned <= {("torch", _pins()["torch"])}


def test_libraries_whose_private_parts_are_used_have_an_upper_bound() -> None:
    """GRPO overrides private methods of TRL's trainer, and every family is driven layer by layer."""
    for name in ("trl", "transformers"):
        specifiers = [need.specifier for need in NEEDED if need.name == name]
        assert specifiers and all(any(one.operator == "<" for one in specifier) for specifier in specifiers), name
