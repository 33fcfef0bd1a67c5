"""GRPO on several devices, as `accelerate launch` starts it: nano, two processes on the CPU."""

from pathlib import Path

import pytest

from qzoom_agent.models.hf import HFBackend
from tests.training.processes import finished, log_of, start

RECIPE = """
model: nano
max_steps: 2
prompts: 4
num_generations: 4
per_device_train_batch_size: 2
needle: {needle-scene: 1, needle-hop: 1}
learning_rate: 1.0e-4
agent: {policy: hybrid, budget: {max_turns: 3, max_views: 3}, generation: {max_new_tokens: 12}}
rollouts: {temperature: 1.5}
rewards: [{name: accuracy}, {name: crops-among-right}, {name: redundant}]
"""


@pytest.mark.slow
def test_two_processes_learn_one_model(tmp_path: Path) -> None:
    """Groups are whole on each, episodes are shared out, and one of them writes."""
    (tmp_path / "grpo.yaml").write_text(RECIPE)
    line = ("--config", str(tmp_path / "grpo.yaml"), "--output", str(tmp_path / "out"))
    assert finished(start("qzoom_agent.training.grpo", *line, processes=2)).count("written") == 1
    steps = [entry for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2], "one process writes the log"
    assert all(0 <= entry["rewards/accuracy/mean"] <= 1 and entry["grad_norm"] > 0 for entry in steps)
    models = [HFBackend.load(name).model for name in ("nano", str(tmp_path / "out" / "final"))]
    before, after = (model.state_dict() for model in models)
    assert before.keys() == after.keys() and any(not weight.equal(after[name]) for name, weight in before.items())
