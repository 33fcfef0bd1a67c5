"""The six runs of GRPO with gate and SD-RPN in the loop: their tables, from logs and rows."""

import json
from pathlib import Path
from typing import Any

import pytest

import branches_in_loop as loop
from qzoom_agent.errors import ConfigError
from qzoom_agent.training.grpo.grpo_recipe import load_grpo_recipe


@pytest.mark.parametrize("name", loop.RUNS)
def test_every_run_has_its_recipe_policy_and_rewards(name: str) -> None:
    run = loop.RUNS[name]
    recipe = load_grpo_recipe(Path("rl/recipes/nano") / f"{run.recipe}.yaml")
    assert recipe.agent["policy"] == run.policy
    assert set(recipe.needle or {}) == set(loop.TASKS)
    rewards = {entry.name for entry in recipe.rewards} - {"format"}
    assert len(rewards) == len(run.rewards.split(", ")) and "accuracy" in rewards


def test_the_curve_is_the_mean_of_the_seeds_and_costs_are_of_the_last_ten_steps(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.7)):
        rows = [
            {"step": 0, "of": 20, "eval_zoom/accuracy": 0.2},
            {"step": 20, "of": 20, "eval_zoom/accuracy": accuracy},
        ]
        for step in range(1, 21):
            tokens = 100 if step > 10 else 900
            rows.append(
                {"step": step, "of": 20, "step_time": 2.0 + seed, "zoom/visual_tokens": tokens, "zoom/turns": 2}
            )
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = loop.training_table({"a": [tmp_path / "0", tmp_path / "1"]}).splitlines()[-1]
    assert line == "| a | `explicit` | accuracy | 20.0 (0), 60.0 (20) | 100 | 2.00 | 2.5 |"


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run z"):
        loop.main([str(tmp_path), "--out", str(tmp_path), "--runs", "a,z"])
    with pytest.raises(ConfigError, match="no trained model"):
        loop.main([str(tmp_path), "--out", str(tmp_path), "--runs", "a", "--table"])


def test_models_are_compared_under_their_own_policy_with_the_control_first() -> None:
    rows = {policy: [policy] for policy in ("explicit", "hybrid", "implicit")}
    found: Any = {"start": [rows], "a": [rows, rows], "e": [rows], "f": [rows]}
    *_, (title, own) = loop.sides(found)
    assert "control" in title
    assert [side.name for side in own[:3]] == ["a under hybrid", "a under explicit", "start under implicit"]
    assert [side.name for side in own[3:]] == ["e under implicit", "f under hybrid"]
    assert own[0].rows == ["hybrid", "hybrid"]
