"""What a rollout is worth against the others of its group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.training.grpo.launch import make_trainer
from qzoom_agent.training.rewards import Rollout
from tests.training.grpo.grpo_script import AGENT, scripted, tiny_recipe
from tests.training.processes import log_of


def equal(rollouts: Sequence[Rollout]) -> list[float]:
    """A sum whose mean over eight is another number in float32."""
    return [0.7] * len(rollouts)


def half_equal(rollouts: Sequence[Rollout]) -> list[float]:
    return [1.0] * 4 + [0.0, 1.0, 1.0, 1.0]


def partly(rollouts: Sequence[Rollout]) -> list[float | None]:
    return [0.0, 1.0, 0.0, None, 0.0, 1.0, 0.0, None]


def single(rollouts: Sequence[Rollout]) -> list[float | None]:
    return [1.0, None, None, None] * 2


def step(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Take a step with eight rollouts, which all say the same; return their advantages, and what is logged."""
    given = {"prompts": 2, "num_generations": 4, "per_device_train_batch_size": 8, "agent": {**AGENT}, "tower": False}
    trainer = make_trainer(tiny_recipe(folder, "qwen2_5_vl", **{**given, **changes}), folder / "out")
    scripted(patch, trainer.backend.codec.tokenizer, [["<answer>407</answer>"] * 8])
    trainer.train()
    return [*trainer._logs["advantages"]], log_of(folder / "out")[0]


def test_equal_rewards_move_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, log = step(tmp_path, monkeypatch, rewards=[{"name": equal}], prompts=1, num_generations=8)
    assert log["reward"] == pytest.approx(0.7) and log["frac_reward_zero_std"] == 1.0
    assert log["weights/changed"] == 0.0


def test_a_reward_that_is_only_logged_changes_no_advantage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _ = step(tmp_path / "alone", monkeypatch, rewards=[{"name": partly}])
    logged = [{"name": partly}, {"name": "accuracy", "weight": 0}]
    beside, log = step(tmp_path / "beside", monkeypatch, rewards=logged)
    assert beside == alone and alone[3] == alone[7] == 0.0 and alone[1] > 1.0
    assert log["reward"] == pytest.approx(1 / 3, abs=1e-4) and log["rewards/accuracy/mean"] == 1.0


@pytest.mark.parametrize(
    ("reward", "loss", "share"),
    [
        (half_equal, {"scale_rewards": "batch"}, 0.5),
        (half_equal, {"multi_objective_aggregation": "normalize_then_sum"}, 0.5),
        (single, {}, 1.0),
    ],
)
def test_groups_that_teach_nothing_are_counted(
    reward: Any, loss: dict[str, Any], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, log = step(tmp_path, monkeypatch, rewards=[{"name": reward}], loss=loss)
    assert log["frac_reward_zero_std"] == share
