"""GRPO whose turns a real vLLM writes in the trainer's own process. `.ci/engines` installs it and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from yaml import safe_dump

ENGINES = Path(os.environ.get("QZOOM_ENGINES", ""))
ON_CPU = Path(__file__).with_name("vllm_on_cpu.py")
REPOSITORY = ON_CPU.parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("QZOOM_ENGINES" not in os.environ, reason="run .ci/engines, which installs the engines"),
]


def test_vllm_samples_from_the_model_that_is_trained(tmp_path: Path) -> None:
    """With crops, hot enough to differ in a group, and with the last weights: at this rate older ones would show."""
    recipe = {
        "model": "nano",
        "seed": 0,
        "max_steps": 3,
        "prompts": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "needle": {"needle-hop": 0.5, "needle-scene": 0.5},
        "agent": {"policy": "explicit", "budget": {"max_turns": 4}, "generation": {"max_new_tokens": 12}},
        "rewards": [{"name": "format"}, {"name": "crop-price", "weight": -1.0, "cost": 0.2}],
        "learning_rate": 1e-3,
        "rollouts": {"by": "generate", "temperature": 2.0, "vllm": {"mode": "colocate", "max_model_length": 2048}},
    }
    (tmp_path / "recipe.yaml").write_text(safe_dump(recipe))
    own = {
        "ACCELERATE_USE_CPU": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    command = [ENGINES / "bin" / "python", ON_CPU, REPOSITORY / "rl" / "train_grpo.py"]
    command += ["--config", tmp_path / "recipe.yaml", "--output", tmp_path / "run"]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [one for one in steps if "loss" in one]
    apart = [one["rollout/logp_difference"] for one in steps]
    assert len(steps) == 3 and max(apart) < 0.02, apart
    assert max(one["zoom/served"] for one in steps) > 0, "no crop was shown"
    assert steps[-1]["weights/changed"] > 0.3
    print("log-probabilities apart, mean of each step:", apart)
