"""The measure of the loop's own cost: it counts the steps that there are, and prints what it says it prints."""

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.backends.scripted import ScriptedBackend
from qzoom_agent.evals import overhead


def test_an_episode_takes_the_steps_it_is_divided_by() -> None:
    times = overhead.milliseconds_a_step(2)
    assert len(times) == 2
    assert all(0 < each < 1000 for each in times)
    image = Image.new("RGB", (700, 660))
    answer = Agent(ScriptedBackend(list(overhead._REPLIES))).run(image, "what is there?")
    served = [turn for turn in answer.trace.turns if turn.calls]
    assert [view.kind for view in answer.trace.views] == ["original", "coarse", *["crop"] * 4]
    assert len(["perceive", "finish"]) + len(answer.trace.turns) + len(served) == overhead.STEPS


def test_the_command_prints_the_median(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overhead, "milliseconds_a_step", lambda: [4.0, 1.0, 2.0, 3.0, 90.0])
    assert overhead.main() == 0
    assert capsys.readouterr().out == "3.00 ms a step (quartiles 1.50 to 47.00; 5 episodes of 11 steps)\n"
