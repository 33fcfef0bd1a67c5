"""The files of docs/extend.md are complete: each is written as it stands, and used as the page says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from yaml import safe_load

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.data.samples import Sample
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.training.reward_list import build, read_reward
from qzoom_agent.training.rewards import Rollout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+\.py) -->\n```python\n(.*?)^```$", PAGE, re.M | re.S))

ZOOM = {"bbox_2d": [0, 0, 500, 500], "label": "", "img_idx": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page in the working directory."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(language: str, having: str) -> str:
    """Return the block of a language that holds a text."""
    (found,) = [text for text in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S) if having in text]
    return str(found)


def test_every_kind_has_a_file() -> None:
    kinds = ("reward", "scorer", "task", "protocol", "rule", "own_tool", "tool", "perceiver")
    assert set(FILES) == {f"my_{kind}.py" for kind in kinds}


@pytest.mark.usefixtures("here")
def test_the_reward_of_the_recipe() -> None:
    entries = safe_load(block("yaml", "my_reward"))["rewards"]
    *_, short = build([read_reward(entry) for entry in entries])
    agent = Agent(ScriptedBackend(["a short one", "a much longer answer"], protocol="plain"))
    sample = Sample(id="", task="", kind="", image=Image.new("RGB", (64, 64)), question="what?", answer="x")
    traces = [agent.run(sample.image, sample.question, seed=0).trace for _ in range(2)]
    assert short.weight == 0.2
    assert short.reward([Rollout(trace, sample) for trace in traces]) == [1.0, 0.0]


def test_the_task_and_the_scorer(here: Path) -> None:
    assert "--scorer my_scorer:contains" in PAGE
    line = "eval my_task:numbers --n 2 --policy direct --scorer my_scorer:contains --no-traces --out run"
    assert main(line.split()) == 0
    result = json.loads((here / "run" / "results.json").read_text())["tasks"]["numbers"]
    assert result["n"] == 2 and set(result["scores"]) == {"exact", "my_scorer:contains"}


@pytest.mark.usefixtures("here")
def test_the_tool_beside_zoom() -> None:
    assert len(FILES["my_own_tool.py"].splitlines()) <= 10
    names = re.findall(r"--tool (\S+)", PAGE)
    calls = [{"name": "negative", "arguments": {}}, {"name": "image_zoom_in_tool", "arguments": ZOOM}]
    replies = [f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls]
    agent = Agent(ScriptedBackend([*replies, "42"], protocol="qwen3vl"), tools=names)
    answer = agent.run(Image.new("RGB", (1000, 1000), "black"), "what?")
    assert answer.trace.config["own_tools"] == ["my_own_tool:negative", "rotate"]
    assert answer.boxes == [(0, 0, 500, 500)] and answer.store.image("crop1").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.usefixtures("here")
def test_the_protocol_the_rule_and_the_tool() -> None:
    settings = dict(re.findall(r"--(protocol|set review.rule|set tool)[ =](my_\w+:\w+)", PAGE))
    call = "<look>400,400,600,600</look>"
    agent = Agent(
        ScriptedBackend([call, "<look>0,0,300,300</look>", "<look>600,600,900,900</look>", "42"]),
        protocol=settings["protocol"],
        rule=settings["set review.rule"],
        tool=settings["set tool"],
    )
    answer = agent.run(Image.linear_gradient("L").resize((1000, 1000)), "what?")
    assert (answer.text, answer.trace.protocol) == ("42", "look")
    calls = [call for turn in answer.trace.turns for call in turn.calls]
    assert [call.code for call in calls] == ["", "", "enough"]
    assert calls[0].raw == call and calls[0].served == (350, 350, 650, 650)


@pytest.mark.usefixtures("here")
def test_the_perceiver() -> None:
    (name,) = re.findall(r"--perceiver (my_\w+:\w+)", PAGE)
    image = Image.new("RGB", (800, 600), "white")
    image.paste("black", (620, 110, 680, 190))
    answer = Agent(ScriptedBackend(["42"]), perceiver=name).run(image, "what?")
    look = answer.trace.perception
    assert look is not None and look.perceiver == name and look.boxes == [(600, 100, 700, 200)]
    assert answer.trace.usage.inserted == 1
