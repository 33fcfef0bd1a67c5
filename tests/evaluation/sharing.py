"""One of several processes of a run, for `accelerate launch -m tests.evaluation.sharing FOLDER SAMPLES`."""

import os
import subprocess
import sys
from pathlib import Path

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.runner import Shard, evaluate
from tests.evaluation.player import numbers, player

ROOT = Path(__file__).resolve().parents[2]


def two_processes(module: str, *args: str) -> str:
    """Run a module in two processes of accelerate, and return what they print."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", module, *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


if __name__ == "__main__":
    shard = Shard.launched()
    print(f"process {shard.index} of {shard.count}", flush=True)
    agent = player(lambda i: i % 3 > 0, zooms=lambda i: i % 2 > 0)
    evaluate(agent, [numbers()], out=Path(sys.argv[1]), source=TaskSource(n=int(sys.argv[2])), shard=shard)
