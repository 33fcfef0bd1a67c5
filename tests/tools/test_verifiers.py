"""The zoom task in verifiers: `vf-eval` with its own harness, at a scripted server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.integrations.zoom_task import ZoomQuestions
from tests.evaluation.player import numbers
from tests.tools.support import images_in, needs, scripted, zooms

needs("verifiers", "verifiers")
ROOT = Path(__file__).resolve().parents[2]


def task() -> Task:
    """Return the task of the questions: ten small pictures with numbers."""
    return numbers(10)


def test_vf_eval_zooms_and_is_rewarded_by_the_evaluations_scorer(tmp_path: Path) -> None:
    name = f"{__name__}:task"
    answer = ZoomQuestions(name)[0].answer
    command = [str(Path(sys.executable).with_name("vf-eval")), "verifiers-zoom"]
    flags = ["--env.agent.harness.id", "null", "--env.agent.runtime.type", "subprocess"]
    flags += ["--env.taskset.task-name", name, "--env.taskset.count", "1"]
    flags += ["-m", "served", "-n", "1", "--no-push", "--no-rich", "-o", str(tmp_path), "--client.api-key-var", "KEY"]
    with scripted(*zooms("chat", answer)) as server:
        done = subprocess.run(
            [*command, *flags, "--client.base-url", server.url],
            cwd=ROOT / "tools",
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "KEY": "none", "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        bodies = [one.body for one in server.requests]
    said = (done.stdout + done.stderr)[-3000:]
    assert done.returncode == 0, said
    traces = [json.loads(line) for file in tmp_path.rglob("traces.jsonl") for line in file.read_text().splitlines()]
    assert len(bodies) == 3 and [images_in(body["messages"]) for body in bodies] == [1, 2, 2], said
    assert "View 'crop1'" in str(bodies[-1]["messages"]) and "could not be read" in str(bodies[-1]["messages"])
    assert '"correct": {"score": 1.0' in json.dumps(traces), json.dumps(traces)[-3000:]
