"""A run that is killed again and again: `python tests/evaluation/killing.py FOLDER SAMPLES KILLS SEED`.

Forks a process that goes on with the run, kills it with SIGKILL at a random moment after a few more samples, and starts
over, KILLS times; then lets it finish. Prints how many of the kills met a run that was still going.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.runner import evaluate
from tests.evaluation.player import numbers, player


def go_on(folder: Path, samples: int) -> None:
    agent = player(lambda i: i % 3 > 0, zooms=lambda i: i % 2 > 0)
    evaluate(agent, [numbers()], out=folder, source=TaskSource(n=samples))


def main(folder: Path, samples: int, kills: int, seed: int) -> int:
    draw = random.Random(seed)
    hit = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                go_on(folder, samples)
            finally:
                os._exit(0)
        wanted = _rows(folder) + draw.randint(0, 2 * samples // (3 * kills))
        deadline = time.monotonic() + 20
        while _rows(folder) < wanted and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.008))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        hit += os.WIFSIGNALED(status)
    go_on(folder, samples)
    return hit


def _rows(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
