"""A run that is killed at random moments ends with what an uninterrupted run ends with, and asks nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.trace import Trace
from tests.evaluation import killing
from tests.evaluation.player import lines

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"seconds", "phases", "samples_per_second", "peak_memory", "elapsed"}


def timeless(value: Any) -> Any:
    """What was written, without what a clock or the machine decides."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("samples", "kills"), [(40, 5), pytest.param(200, 50, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_change_nothing(samples: int, kills: int, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # In a process of its own: it forks, which a process with threads (torch's) must not.
    done = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.killing", str(killed), str(samples), str(kills), "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 0.8 * kills, "the kills met a run that was already over"
    killing.go_on(whole, samples)
    rows = [json.loads(line) for line in lines(killed / "samples.jsonl")]
    assert [(row["index"], row["repeat"]) for row in rows] == [(index, 0) for index in range(samples)]
    assert timeless(rows) == timeless([json.loads(line) for line in lines(whole / "samples.jsonl")])
    for name in ("results.json", "run.json"):
        assert timeless(json.loads((killed / name).read_text())) == timeless(json.loads((whole / name).read_text()))
    assert (killed / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    folder = RunFolder(killed)
    for row in folder.latest():
        assert Trace.load(folder.trace_path(row.key)).answer == row.answer
    assert not list(killed.glob("*.part"))
