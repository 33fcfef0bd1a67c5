"""GRPO on several devices, as `accelerate launch` starts it: nano, two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qzoom_agent.models.hf import HFBackend

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
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [sys.executable, *launch, "-m", "qzoom_agent.training.grpo", "--config", str(tmp_path / "grpo.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*line, "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == 1
    log = [json.loads(text) for text in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2], "one process writes the log"
    assert all(0 <= entry["rewards/accuracy/mean"] <= 1 and entry["grad_norm"] > 0 for entry in steps)
    models = [HFBackend.load(name).model for name in ("nano", str(tmp_path / "out" / "final"))]
    before, after = (model.state_dict() for model in models)
    assert before.keys() == after.keys() and any(not weight.equal(after[name]) for name, weight in before.items())
