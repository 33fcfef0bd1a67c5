"""`qzoom doctor` on a machine where something does not fit: what it says, and what to do there."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from qzoom_agent.cli import doctor
from qzoom_agent.cli.doctor import Check

NEEDS = ["torch>=2.9", 'trl>=1.16,<1.17; extra == "train"', 'peft>=0.18; extra == "train"', 'scipy>=1; extra == "eval"']


def _packages(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, Check]:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: NEEDS)
    monkeypatch.setattr(doctor, "_version", versions.get)
    return {check.name: check for check in doctor._packages()}


def test_a_package_of_an_extra_outside_its_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _packages(monkeypatch, torch="2.13.0+cpu", trl="1.20.0", scipy="1.17.1")
    train = found["extra [train]"]
    assert train.verdict == "note"
    assert train.found == "not installed: peft; other versions: trl 1.20.0 (needs <1.17,>=1.16)"
    assert train.advice.endswith('pip install "qzoom-agent[train]"')
    assert found["extra [eval]"] == Check("extra [eval]", "installed")


def test_advice_needs_no_file_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = _packages(monkeypatch, torch="2.1.0")["torch"]
    assert torch.verdict == "bad"
    assert torch.advice == 'Run: pip install "torch>=2.9"'


def test_a_folder_that_cannot_be_written_is_not_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda place, _: Path(place) != tmp_path)
    here, models = doctor._disk()
    assert "free at" in here.found
    assert models.verdict == "note"
    assert models.found.endswith("cannot be written") and "HF_HOME" in models.advice


def test_python_that_cannot_load_a_model_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "obstacle", lambda: "Python strips docstrings.")
    python = next(check for check in doctor.examine() if check.name == "python")
    assert python.verdict == "bad" and python.advice == "Python strips docstrings."


def test_the_torch_that_a_new_process_imports_is_told() -> None:
    torch, device, _ = doctor._torch()
    assert torch.verdict == device.verdict == "ok"
    assert torch.found.startswith(metadata.version("torch")) and torch.found.endswith(", 1 threads") and device.found
