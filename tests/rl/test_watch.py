"""What is logged while GRPO runs is what the recipe rewards, and a judge that is not there is said before it begins."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.errors import BackendError
from qzoom_agent.evals.reward_specs import AccuracySpec, accuracy_of
from qzoom_agent.evals.rewards import Rollout
from qzoom_agent.rl.grpo import run
from qzoom_agent.rl.grpo.recipe import GRPORecipe
from qzoom_agent.rl.grpo.watch import measures
from tests.evals.test_rewards import rollout

NOWHERE = "http://127.0.0.1:9/v1"


def said(*answers: str) -> list[Rollout]:
    return [replace(rollout(answer, gold="nokia"), group=str(at)) for at, answer in enumerate(answers)]


def test_accuracy_is_by_the_recipes_own_rule() -> None:
    batch, suites = said("Answer: nokia", "samsung"), ["text", "text"]
    exact, open_answer = (accuracy_of([AccuracySpec(rule=rule)]) for rule in ("exact", "open"))  # type: ignore[arg-type]
    assert measures(batch, suites, exact)["zoom/accuracy"] == 0.0
    found = measures(batch, suites, open_answer)
    assert found["zoom/accuracy"] == found["zoom/accuracy/text"] == 0.5


def test_accuracy_is_by_the_recipes_judge() -> None:
    async def agrees(question: str, answer: str, gold: str) -> bool:
        return answer == "the Finnish brand"

    asked = accuracy_of([AccuracySpec(judged=True)], judge=agrees)
    assert measures(said("the Finnish brand", "samsung"), ["", ""], asked)["zoom/accuracy"] == 0.5


def test_a_judge_is_tried_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "steps": 1,
        "needle": {"needle-hop": 1.0},
        "rewards": [{"name": "accuracy", "judged": True}],
    }
    recipe = GRPORecipe(**given, judge=NOWHERE, judge_key_variable="MY_JUDGE")
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(BackendError, match=r"gave no verdict.*MY_JUDGE"):
        run.make_trainer(recipe, tmp_path)
