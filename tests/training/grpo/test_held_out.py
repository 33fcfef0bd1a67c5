"""Figures of held-out questions, and the checkpoint that is chosen by them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.launch import make_trainer, train
from qzoom_agent.training.rewards import Rollout
from tests.training.grpo.grpo_script import AGENT, tiny_recipe
from tests.training.grpo.test_grpo import KilledInStep, even
from tests.training.processes import log_of

WORTH = {"0": 0.0, "1": 1.0, "2": 5.0, "3": 0.0}


def worth(rollouts: Sequence[Rollout]) -> list[float]:
    """Value of the question, whatever is answered."""
    return [WORTH[one.trace.question[-1]] for one in rollouts]


def sometimes(rollouts: Sequence[Rollout]) -> list[float | None]:
    """The same, for two of the questions."""
    return [value if value else None for value in worth(rollouts)]


def silent(rollouts: Sequence[Rollout]) -> list[None]:
    """Nothing to say of any reply."""
    return [None for _ in rollouts]


def evaluated(folder: Path, **changes: Any) -> GRPORecipe:
    given: dict[str, Any] = {
        "agent": {**AGENT, "policy": "direct", "generation": {"max_new_tokens": 4}},
        "tower": False,
        "evaluation": {"eval_steps": 1, "questions": 3, "data": [{"path": str(folder / "questions")}]},
    }
    return tiny_recipe(folder, "qwen2_5_vl", **{**given, **changes})


def chosen_by(reward: int, recipe: GRPORecipe) -> GRPORecipe:
    """The recipe, whose best model is that with most of one of its rewards."""
    metric = {"metric_for_best_model": f"rewards/{recipe.rewards[reward].name}/mean"}
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=metric)})


def test_figures_are_means_over_questions_and_not_over_batches(tmp_path: Path) -> None:
    """Three questions in batches of two and one."""
    recipe = evaluated(tmp_path, rewards=[worth, {"name": sometimes, "weight": 0.5}], rollouts={"rows": 2})
    found = make_trainer(recipe, tmp_path / "out").evaluate()
    first, second = (f"eval_rewards/{one.name}" for one in recipe.rewards)
    assert found["eval_reward"] == pytest.approx((0 + 1.5 + 7.5) / 3)
    assert found[f"{first}/mean"] == pytest.approx(2) and found[f"{second}/mean"] == pytest.approx(3)
    assert found[f"{first}/std"] == pytest.approx(7**0.5) and found["eval_zoom/turns"] >= 1


def test_a_moved_run_is_finished_with_its_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was killed after its last checkpoint, which is not the best, and resumed in another folder."""
    constant = {"name": worth, "weight": 0}
    recipe = chosen_by(
        1, evaluated(tmp_path, max_steps=2, rewards=[even, constant], lora={"r": 2}, loss={"mask_truncated": False})
    )
    make_trainer(recipe, tmp_path / "out").train()
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    told = json.loads(state.read_text())
    assert told["best_global_step"] == 1, "of equal ones the first"
    (tmp_path / "out").rename(tmp_path / "moved")
    train(recipe, tmp_path / "moved")
    weights = [
        load_file(tmp_path / "moved" / name / "adapter_model.safetensors")
        for name in ("adapter", "checkpoint-1", "checkpoint-2")
    ]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert not all(value.equal(weights[2][name]) for name, value in weights[0].items())
    assert "best: step 1" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "moved" / "checkpoint-1")
    shutil.rmtree(tmp_path / "moved" / "final")
    train(recipe, tmp_path / "moved")
    assert "The checkpoint of step 1 is gone, so final/ is the last model." in capsys.readouterr().out


def test_a_metric_without_a_value_chooses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(chosen_by(1, evaluated(tmp_path, rewards=[worth, silent])), tmp_path / "out")
    told = capsys.readouterr().out
    assert "best: unknown, as no held-out reply has a value" in told and "inf" not in told


def test_what_was_asked_before_a_run_that_begins_anew_is_logged_once(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint asks the held-out questions once more."""
    recipe = evaluated(tmp_path, rewards=[worth])
    trainer = make_trainer(recipe, tmp_path / "out")
    trainer.add_callback(KilledInStep(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    train(recipe, tmp_path / "out")
    assert [line["step"] for line in log_of(tmp_path / "out") if "eval_reward" in line] == [0, 1]
