"""The scripts in rl/ train what the commands train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from yaml import safe_dump, safe_load

import train_branches
import train_grpo
import train_sft
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import sole_writer
from qzoom_agent.training.branches import stages
from qzoom_agent.training.grpo import launch
from qzoom_agent.training.sft import fine_tune
from tests.tiny_models import build
from tests.training.branches.test_branch_stages import RECIPE as BRANCHES
from tests.training.grpo.grpo_script import AGENT, tiny_recipe
from tests.training.sft.test_fine_tune import RECIPE as COLDSTART


def arguments(folder: Path, recipe: dict[str, Any], out: str, *more: str) -> list[str]:
    (folder / "recipe.yaml").write_text(safe_dump(recipe))
    return ["--config", str(folder / "recipe.yaml"), "--output", str(folder / out), *more]


def same_weights(folder: Path) -> None:
    weights = [load_file(folder / run / "final" / "model.safetensors") for run in ("script", "command")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_grpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = {**AGENT, "generation": {"max_new_tokens": 6}}
    loss = {"entropy_coef": 0.1, "mask_truncated": False}  # a random model is never right: only entropy has a gradient
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", agent=agent, loss=loss, max_steps=5).model_dump(mode="json")
    for name, main in (("script", train_grpo.main), ("command", launch.main)):
        assert main(arguments(tmp_path, recipe, name, "--set", "max_steps=1", "--set", "loss.beta=0.01")) == 0
    same_weights(tmp_path)
    written = safe_load((tmp_path / "script" / "recipe.yaml").read_text())
    assert written["max_steps"] == 1 and written["loss"]["beta"] == 0.01
    assert train_grpo.main(arguments(tmp_path, recipe, "script", "--set", "loss.beta=0.01")) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_sft(tmp_path: Path) -> None:
    recipe = {**COLDSTART, "model": str(build("qwen2_5_vl", tmp_path / "model", prompts=True))}
    for name, main in (("script", train_sft.main), ("command", fine_tune.main)):
        assert main(arguments(tmp_path, recipe, name)) == 0
    same_weights(tmp_path)


@pytest.mark.slow
def test_branches(tmp_path: Path) -> None:
    recipe = {**BRANCHES, "stages": ["select-heads", "label"]}
    assert train_branches.main(arguments(tmp_path, recipe, "script")) == 0
    assert stages.main(["branches", *arguments(tmp_path, recipe, "command")]) == 0
    chosen = [(tmp_path / run / "heads.json").read_text() for run in ("script", "command")]
    assert chosen[0] == chosen[1] and (tmp_path / "script" / "labels").is_dir()


@pytest.mark.parametrize(
    ("script", "name"), [(train_grpo, "grpo"), (train_sft, "coldstart"), (train_branches, "branches")]
)
def test_a_dry_run_trains_nothing_and_a_second_run_does_not_write_into_the_folder_of_the_first(
    script: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(script.__file__).parent / "recipes" / "nano" / f"{name}.yaml"
    command = ["--config", str(config), "--output", str(tmp_path / "out")]
    assert script.main([*command, "--dry-run"]) == 0
    assert "nano" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with (
        sole_writer(tmp_path / "out", flag="--output"),
        pytest.raises(ConfigError, match="Another process is writing into"),
    ):
        script.main(command)
    assert not (tmp_path / "out" / "recipe.yaml").exists()
