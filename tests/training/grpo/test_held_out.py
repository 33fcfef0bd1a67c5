"""Figures of held-out questions, and the checkpoint that is chosen by them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.launch import make_trainer
from qzoom_agent.training.rewards import Rollout
from tests.training.grpo.grpo_script import AGENT, tiny_recipe

WORTH = {"0": 0.0, "1": 1.0, "2": 5.0}


def worth(rollouts: Sequence[Rollout]) -> list[float]:
    """Value of the question, whatever is answered."""
    return [WORTH[one.trace.question[-1]] for one in rollouts]


def sometimes(rollouts: Sequence[Rollout]) -> list[float | None]:
    """The same, for two of the questions."""
    return [value if value else None for value in worth(rollouts)]


def evaluated(folder: Path, **changes: Any) -> GRPORecipe:
    given: dict[str, Any] = {
        "agent": {**AGENT, "policy": "direct", "generation": {"max_new_tokens": 4}},
        "tower": False,
        "evaluation": {"eval_steps": 1, "questions": 3, "data": [{"path": str(folder / "questions")}]},
    }
    return tiny_recipe(folder, "qwen2_5_vl", **{**given, **changes})


def test_figures_are_means_over_questions_and_not_over_batches(tmp_path: Path) -> None:
    """Three questions in batches of two and one."""
    recipe = evaluated(tmp_path, rewards=[worth, {"name": sometimes, "weight": 0.5}], rollouts={"rows": 2})
    found = make_trainer(recipe, tmp_path / "out").evaluate()
    first, second = (f"eval_rewards/{one.name}" for one in recipe.rewards)
    assert found["eval_reward"] == pytest.approx((0 + 1.5 + 7.5) / 3)
    assert found[f"{first}/mean"] == pytest.approx(2) and found[f"{second}/mean"] == pytest.approx(3)
    assert found[f"{first}/std"] == pytest.approx(7**0.5) and found["eval_zoom/turns"] >= 1
