"""`qzoom calibrate`: new thresholds for the branches that ship, on a handful of boards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump

from qzoom_agent.cli.main import main as qzoom
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import NANO_FOLDER
from qzoom_agent.perception.branch_config import BranchConfig
from qzoom_agent.training.branches import calibrate
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from tests.training.branches.conftest import picture

SHIPPED = NANO_FOLDER / "branches"
BOXES = {"held_out": [{"path": "needle", "limit": 8, "a_board": 4, "seed": 1}]}


def command(folder: Path, recipe: dict[str, Any], *more: str) -> list[str]:
    (folder / "mine.yaml").write_text(safe_dump(recipe))
    return ["calibrate", "--config", str(folder / "mine.yaml"), "--output", str(folder / "out"), *more]


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "branches.json").read_text())
    return found


def test_a_recipe_of_nothing_but_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule of the map stays the branches' own, the weights are theirs byte for byte, and what is written loads."""
    assert qzoom(command(tmp_path, {**BOXES, "calibration": {"zoom_share": 0.5}})) == 0
    told = capsys.readouterr().out
    assert "8 questions" in told and "learned gate at" in told and "written" in told
    final, before = tmp_path / "out" / "final", config(SHIPPED)
    after = config(final)
    assert (final / "branches.safetensors").read_bytes() == (SHIPPED / "branches.safetensors").read_bytes()
    assert after["evidence"]["questions"] == 8 and after["evidence"]["target"]["zoom_share"] == 0.5
    assert after["peak_share"] == after["evidence"]["threshold"] and after["evidence"]["relative"]
    assert after["gate_threshold"] == after["evidence"]["gate"]["threshold"] != before["gate_threshold"]
    changed = {"peak_share", "gate_threshold", "evidence"}
    assert {key: value for key, value in after.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    backend = HFBackend.load("nano", branches=final)
    assert backend.branches is not None and backend.branches.config.gate_threshold == after["gate_threshold"]
    assert qzoom(command(tmp_path, BOXES)) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_the_recipe_says_comes_before_the_branches_own(
    tmp_path: Path, boxless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Branches in a folder of their own, questions without boxes, and an absolute threshold."""
    shutil.copytree(SHIPPED, tmp_path / "branches")
    recipe = {
        "held_out": [{"path": str(boxless)}],
        "gate": {"tokens": [48, 64], "with_crop": True, "max_new_tokens": 8},
        "calibration": {"margins": [0.05, 0.1]},
        "peak_share": None,
        "max_regions": 3,
    }
    flags = ("--model", "nano", "--branches", str(tmp_path / "branches"))
    assert qzoom(command(tmp_path, recipe, *flags)) == 0
    assert "answers choose the map's threshold" in capsys.readouterr().out
    after = config(tmp_path / "out" / "final")
    assert after["max_regions"] == 3
    assert after["peak_share"] is None and after["margin"] in (0.05, 0.1) and after["box"] == [0.3, 0.2]
    assert after["threshold"] == after["evidence"]["threshold"] and after["evidence"]["crops"]["right"] > 0


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"calibration": {}}, "held_out"),
        ({**BOXES, "surprise": 1}, "surprise"),
        ({**BOXES, "model": "nanno"}, "Did you mean 'nano'"),
    ],
)
def test_a_recipe_that_will_not_do(
    tmp_path: Path, recipe: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qzoom(command(tmp_path, recipe)) != 0
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_branches_needs_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare").mkdir()
    assert qzoom(command(tmp_path, BOXES, "--model", str(tmp_path / "bare"))) == 2
    assert "--branches" in capsys.readouterr().err


def test_questions_that_cannot_tell_say_what_to_change(
    tmp_path: Path, boxless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"held_out": [{"path": str(boxless), "limit": 1}], "gate": {"tokens": [16, 32]}}
    assert qzoom(command(tmp_path, recipe)) == 2
    told = capsys.readouterr().err
    assert "64 visual tokens" in told and "higher_tokens" in told and "with_crop" in told


def test_answers_to_other_questions_are_not_taken_for_those_of_a_mended_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers are kept where calibration fails, and the file of the questions has the same path once mended."""
    picture(0).save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "what?", "answer": "wrong"}) + "\n")

    def answered(backend: HFBackend, recipe: BranchRecipe, folder: Path) -> BranchConfig:
        (folder / "answers").mkdir(exist_ok=True)
        raise ConfigError("Of 1 held-out questions none needs a zoom.")

    monkeypatch.setattr(calibrate, "with_thresholds", answered)
    recipe = {"held_out": [{"path": str(rows)}]}
    for _ in range(2):
        assert qzoom(command(tmp_path, recipe)) == 2
        assert "none needs a zoom" in capsys.readouterr().err
    rows.write_text(rows.read_text().replace("wrong", "right"))
    assert qzoom(command(tmp_path, recipe)) == 2
    assert "answers was begun with other data or weights" in capsys.readouterr().err
