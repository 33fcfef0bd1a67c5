"""Memory and time of a run, from its recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.branches.cost_estimate import SHAPES
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.run_cost import describe, memory, operations, trained_weights
from qzoom_agent.training.trained_model import keep_recipe
from tests.cases import each_case
from tests.training.grpo.grpo_script import recipe

RECIPES = Path(__file__).resolve().parents[3] / "rl" / "recipes"


SIZE = SHAPES["qwen2.5-vl-7b"]


def large(**changes: Any) -> GRPORecipe:
    return recipe(model="qwen2.5-vl-7b", **{"dtype": "bfloat16", "agent": {"policy": "explicit"}, **changes})


def test_weights_that_are_trained_are_held_in_float32_with_gradients_and_two_moments() -> None:
    full = memory(large(), SIZE, tokens=1000, processes=1)
    trained = trained_weights(large(), SIZE) / 1e9
    assert trained == pytest.approx(28 * 0.233 + 0.545)
    assert (full.gradients, full.optimizer) == pytest.approx((4 * trained, 8 * trained))
    assert full.weights == pytest.approx((SIZE.base_gb or 0) + 2 * trained)
    assert full.total == full.weights + full.gradients + full.optimizer + max(full.activations, full.cache)
    upper = memory(large(from_layer=14), SIZE, tokens=1000, processes=1)
    assert upper.optimizer == pytest.approx(8 * (trained + 0.545) / 2)


def test_adapters_copies_and_checkpointing_count() -> None:
    adapted = trained_weights(large(lora={"r": 16}), SIZE)
    assert adapted == pytest.approx(40.4e6, rel=0.01), "as peft counts them, on all linear layers of the decoder"
    plain, reference = (memory(large(loss={"beta": beta}), SIZE, tokens=1000, processes=1) for beta in (0, 0.01))
    assert reference.weights == pytest.approx(plain.weights + (SIZE.base_gb or 0))
    saved = memory(large(gradient_checkpointing=True), SIZE, tokens=1000, processes=1)
    assert saved.activations == pytest.approx(plain.activations / 28)
    few = memory(large(rollouts={"rows": 1}), SIZE, tokens=1000, processes=1)
    assert few.cache == pytest.approx(plain.cache / 4)


def test_a_plan_counts_rounds_steps_and_episodes() -> None:
    told = describe(large(max_steps=6, prompts=4, num_generations=8, minibatches=2), processes=2).splitlines()
    plan = {line[:13].rstrip(): line[13:] for line in told}
    assert plan["steps"] == "6, 3 rounds of rollouts"
    assert plan["a round"] == "4 questions x 8 rollouts = 32 episodes"
    assert plan["a step"] == "16 episodes, 4 batches of 2 on each of 2 devices"
    assert plan["episodes"].startswith("96 in all, ")
    assert plan["too large"].startswith("for a device of 80 GB; take more --devices with zero3")
    assert "too large" not in describe(large(prompts=8), processes=8)


def test_hours_are_measured_or_follow_from_what_is_stated(tmp_path: Path) -> None:
    assert "hours        unknown of at most" in describe(large()) and "(--tflops)" in describe(large())
    work = operations(large(max_steps=8), SIZE, tokens=500)
    assert work == pytest.approx(2 * operations(large(), SIZE, tokens=500)) == 8 * (28 * 0.233e9 + 0.545e9) * 500 * 32
    one = work / (8 * 8)  # an operation a weight over the rollouts of one of the eight steps
    often = large(max_steps=8, loss={"beta": 0.01}, rollouts={"max_resample_times": 3}, num_iterations=2)
    assert operations(often, SIZE, tokens=500) == pytest.approx(4 * one * (2 * (4 + 1 + 1) + 2 * 6))
    held = large(max_steps=8, evaluation={"eval_steps": 3, "questions": 4})
    assert operations(held, SIZE, tokens=500) == pytest.approx(work + 2 * 4 * one), "at steps 0, 3, 6 and 8"
    assert "operations at 300 TFLOP/s a device as stated" in describe(large(), tflops=300)
    with pytest.raises(ConfigError, match="got 0"):
        describe(large(), tflops=0)
    keep_recipe(large(), tmp_path)
    times = (2700.0, 2.0, 4.0)  # the rollouts of a round are in the time of its first step
    lines = [{"step": at, "step_time": time} for at, time in enumerate(times, 1)] + [{"step": 3, "eval_reward": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"hours        1.00, at 902.0 seconds a step as logged in {tmp_path}" in describe(large(), output=tmp_path)
    assert "unknown of" in describe(large(seed=7), output=tmp_path), "the log of another recipe"


@each_case("path", sorted(RECIPES.glob("*/grpo.yaml")))
def test_every_recipe_says_its_memory_by_part(path: Path) -> None:
    said = describe(load_grpo_recipe(path), processes=2)
    assert "GB a device without sharding" in said and "optimizer" in said and "with zero3" in said
