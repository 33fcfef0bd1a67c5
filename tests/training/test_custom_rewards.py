"""Rewards from outside the package: as objects, as `module:function`, and as entry points."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump

from qzoom_agent import extensions
from qzoom_agent.errors import ConfigError
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.launch import train
from qzoom_agent.training.reward_list import build, read_reward
from qzoom_agent.training.rewards import Accuracy, Rollout
from tests.training.grpo.grpo_script import AGENT, tiny_recipe
from tests.training.processes import log_of
from tests.training.test_rewards import CROP, cut, rollout

FOUR = [rollout("407"), rollout("a long answer"), rollout(None), rollout("9", crops=[CROP])]


def short_answer(rollouts: Sequence[Rollout], limit: int = 5) -> list[float | None]:
    """None without an answer, else 1 if it is short."""
    texts = [one.trace.answer for one in rollouts]
    return [None if text is None else float(len(text) <= limit) for text in texts]


def as_for_trl(completions: Sequence[list[dict[str, str]]], answer: Sequence[str], **columns: Any) -> list[float]:
    """Written for TRL: the number of turns, more if the gold answer is a number."""
    assert {"prompts", "question", "boxes"} <= columns.keys() and "completions" not in columns
    return [len(turns) + 10.0 * gold.isdigit() for turns, gold in zip(completions, answer, strict=True)]


class Constant:
    """A reward with a state of its own."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self.value for _ in rollouts]


NAMED = f"{__name__}:short_answer"


def test_a_function_an_object_and_a_reference() -> None:
    for entry in (short_answer, {"name": short_answer}, {"name": NAMED}):
        one = read_reward(entry)
        assert one(FOUR) == [1.0, 0.0, None, 1.0]
        assert one.model_dump(mode="json") == {"name": NAMED, "weight": 1.0}
    assert read_reward({"name": NAMED, "limit": 2, "weight": 0.5})(FOUR) == [0.0, 0.0, None, 1.0]
    assert read_reward(Constant(0.25))(FOUR) == [0.25] * 4
    assert read_reward(as_for_trl)([rollout(), rollout(crops=[CROP], gold="red")]) == [11.0, 2.0]


def test_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("short", NAMED, "qzoom_agent.rewards"), EntryPoint("number", "math:pi", "qzoom_agent.rewards")]
    monkeypatch.setattr(extensions, "entry_points", lambda group: EntryPoints(points).select(group=group))
    assert read_reward({"name": "short"})(FOUR) == [1.0, 0.0, None, 1.0]
    with pytest.raises(ConfigError, match="'number' is a float, not a function"):
        read_reward({"name": "number"})


def test_rollouts_that_are_cut_off_are_not_given_to_it() -> None:
    (one,) = build([read_reward(Constant(1.0))])
    assert one.reward([cut(rollout()), rollout()]) == [None, 1.0]
    assert one.reward([cut(rollout())]) == [None]


def no_input(answer: Sequence[str]) -> list[float]:
    return [0.0 for _ in answer]


def needs_a_setting(rollouts: Sequence[Rollout], threshold: float) -> list[float]:
    return [threshold for _ in rollouts]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": no_input}, r"no_input', which takes \(answer.*it has no parameter `rollouts` or `completions`"),
        ({"name": needs_a_setting}, r"missing a required argument: 'threshold' \(it is neither set"),
        ({"name": short_answer, "limits": 3}, r"which takes \(.*limit: .int. = 5\).*has no setting limits\."),
        ({"name": "no_such_module:reward"}, r"reward 'no_such_module:reward' cannot be imported: ModuleNotFoundError"),
        ({"name": "short"}, r"no reward 'short'.*write 'module:name'.*'qzoom_agent.rewards'"),
        ({"name": short_answer, "weight": "much"}, r"'reward.weight': Input should be a valid number.*; got 'much'"),
    ],
)
def test_what_does_not_fit_is_named(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_reward(entry)


@pytest.mark.parametrize(
    "values",
    [
        *([1.0], 1.0, None, ["1", "1", "1", "1"], [[], [], [], []], [1, 0, math.nan, 0]),
        *(dict.fromkeys(range(4), 1.0), {0.0, 0.2, 0.4, 0.6}),
    ],
)
def test_a_wrong_result_is_named(values: Any) -> None:
    def broken(rollouts: Sequence[Rollout]) -> Any:
        return values

    with pytest.raises(ConfigError, match=r"broken' returned .* for 4 rollouts. Return a list with a finite number or"):
        read_reward(broken)(FOUR)


def test_an_error_of_its_own_is_named_with_its_place() -> None:
    def broken(rollouts: Sequence[Rollout]) -> list[float]:
        return [1 / len(one.crops) for one in rollouts]

    with pytest.raises(ConfigError, match=r"broken' failed with ZeroDivisionError.*test_custom_rewards\.py, line \d+"):
        read_reward(broken)(FOUR)


def test_an_asynchronous_function_as_trl_takes_it() -> None:
    async def slow(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [0.5 for _ in completions]

    assert read_reward(slow)(FOUR) == [0.5] * 4

    async def cell_of_a_notebook() -> object:
        return read_reward(slow)(FOUR)

    assert asyncio.run(cell_of_a_notebook()) == [0.5] * 4


def test_rewards_without_any_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"accuracy.* have weight 0"):
        build([Accuracy(weight=0)])


def test_held_out_replies_that_were_cut_off_count() -> None:
    (accuracy,) = build([Accuracy()])
    torn = [cut(rollout("9"))]
    assert accuracy.reward(torn) == [None] and accuracy.reward(torn, masks=False) == [0.0]


def test_a_recipe_in_yaml_keeps_its_reward(tmp_path: Path) -> None:
    entries = [{"name": "accuracy"}, {"name": NAMED, "weight": 0.1, "limit": 2}]
    given = {"max_steps": 1, "needle": {"needle-hop": 1}, "rewards": entries}
    (tmp_path / "grpo.yaml").write_text(safe_dump(given))
    recipe = load_grpo_recipe(tmp_path / "grpo.yaml")
    assert recipe.rewards[1](FOUR) == [0.0, 0.0, None, 1.0]
    assert recipe.model_dump(mode="json")["rewards"][1] == entries[1]
    again = GRPORecipe(**{**given, "rewards": [Accuracy(), {"name": short_answer, "weight": 0.1, "limit": 2}]})
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")


@pytest.mark.slow
def test_grpo_learns_from_it(tmp_path: Path) -> None:
    agent = {**AGENT, "generation": {"max_new_tokens": 6}}
    recipe = tiny_recipe(tmp_path, "qwen2_5_vl", agent=agent, max_steps=2, loss={"mask_truncated": False})
    train(recipe, tmp_path / "out", rewards=[Constant(0.5), {"name": as_for_trl, "weight": 2.0}])
    steps = [line for line in log_of(tmp_path / "out") if "loss" in line]
    assert len(steps) == 2 and all(math.isfinite(line["loss"]) for line in steps)
    for line in steps:
        turns = line[f"rewards/{__name__}:as_for_trl/mean"]
        assert line[f"rewards/{__name__}:Constant/mean"] == 0.5 and turns >= 11
        assert line["reward"] == pytest.approx(0.5 + 2 * turns, rel=1e-3)
