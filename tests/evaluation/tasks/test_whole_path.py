"""Every public task from its file to the report, with an agent that is right on every second question."""

from __future__ import annotations

from pathlib import Path

import pytest

from qzoom_agent.agent import Agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.report import write_run_report
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.runner import evaluate, rescore
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from tests.evaluation.tasks import fixtures


@pytest.mark.parametrize("name", fixtures.WRITERS)
def test_from_the_file_to_the_report(name: str, tmp_path: Path) -> None:
    task, place = TASKS[name], str(fixtures.WRITERS[name](tmp_path / name))
    samples = list(task.load(TaskSource(path=place)))
    asked = 0

    def reply(messages: list[Message]) -> str:
        nonlocal asked
        asked += 1
        return samples[asked - 1].answer if asked % 2 else "No idea whatsoever"

    out = tmp_path / "run"
    results = evaluate(Agent(ScriptedBackend(reply)), [task], out=out, paths={name: place})
    result = results.tasks[name]
    assert asked == len(samples)
    assert result.scorer == next(iter(task.scorers))
    assert set(result.scores) == set(task.scorers)
    assert result.marks.accuracy.mean == pytest.approx((len(samples) + 1) // 2 / len(samples))
    assert result.part.coarse_tokens == task.coarse_tokens
    assert bool(result.marks.published) == (task.aggregate is not None)
    assert (result.perception.recall is not None) == any(sample.boxes for sample in samples)
    folder = RunFolder(out)
    assert rescore(folder, [task]) == results
    assert asked == len(samples)
    text = write_run_report(folder).read_text(encoding="utf-8")
    assert text.count('data-verdict="') == len(samples)
