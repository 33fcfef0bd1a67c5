"""The measure of the loop's own cost: it counts the steps that there are, and prints what it says it prints."""

from pathlib import Path
from statistics import median

import pytest
from PIL import Image

import overhead
from qzoom_agent.agent import Agent
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.models.scripted import ScriptedBackend


def test_an_episode_takes_the_steps_it_is_divided_by() -> None:
    times = overhead.milliseconds_a_step(2)
    assert len(times) == 2
    assert all(0 < each < 1000 for each in times)
    image = Image.new("RGB", (700, 660))
    answer = Agent(ScriptedBackend(list(overhead._REPLIES))).run(image, "what is there?")
    served = [turn for turn in answer.trace.turns if turn.calls]
    assert [view.kind for view in answer.trace.views] == ["original", "coarse", *["crop"] * 4]
    assert len(["perceive", "finish"]) + len(answer.trace.turns) + len(served) == overhead.STEPS


def test_a_sample_is_timed_without_its_episode(tmp_path: Path) -> None:
    found = overhead.harness(tmp_path, 20)
    assert len(found.milliseconds) == 20
    assert all(0 < each < 1000 for each in found.milliseconds)
    assert all(megabytes > 10 for megabytes in found.megabytes)
    rows = RunFolder(tmp_path).latest()
    assert len({row.image for row in rows}) == 20, "every sample has a picture of its own to keep"
    assert {(row.zooms, row.answer) for row in rows} == {(1, "done")}
    assert median(found.milliseconds) < 1000 * median(row.elapsed for row in rows)


def test_the_command_prints_the_medians(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overhead, "milliseconds_a_step", lambda: [4.0, 1.0, 2.0, 3.0, 90.0])
    monkeypatch.setattr(overhead, "harness", lambda _: overhead.Harness([1.0, 2.0, 6.0], (100.0, 101.0)))
    assert overhead.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "3.00 ms a step (quartiles 1.50 to 47.00; 5 episodes of 11 steps)",
        "2.00 ms a sample (quartiles 1.00 to 6.00; 3 samples)",
        "100 MB after a tenth of the samples, 101 MB after all",
    ]
