"""A perceiver looks, another model answers: the result is that of one model, and nothing of the object is trusted."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.cli.ask import follow
from qzoom_agent.cli.console import Console
from qzoom_agent.cli.main import main
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import fingerprint, weights_of, weights_of_agent
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.perceiver import LocalPerceiver, load_perceiver
from qzoom_agent.models.scheduler import batched
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import PerceptionRecord, Trace, by_digest

IMAGE = Image.effect_noise((900, 600), 60).convert("RGB")
HOT = (600.0, 100.0, 800.0, 300.0)


class Finder:
    """A perceiver that proposes what it is told to."""

    def __init__(self, *boxes: tuple[float, ...], **fields: Any) -> None:
        self.found: Any = PerceptionRecord.model_construct(
            **{**PerceptionRecord(**fields).__dict__, "boxes": list(boxes)}
        )
        self.asked: list[tuple[tuple[int, int], str, PerceptionConfig]] = []
        self.settings = {"perception.gate_threshold": 0.25}

    def look(
        self, image: Image.Image, question: str, *, options: PerceptionConfig, map_always: bool = False
    ) -> PerceptionRecord:
        self.asked.append((image.size, question, options))
        return self.found  # type: ignore[no-any-return]


def answering(asked: list[list[Message]]) -> ScriptedBackend:
    def reply(messages: list[Message]) -> str:
        asked.append(messages)
        return "42"

    return ScriptedBackend(reply)


def test_a_model_without_branches_is_shown_what_a_perceiver_proposes() -> None:
    finder, asked = Finder(HOT, (800.0, 500.0, 700.0, 650.0), score=0.9, threshold=0.5), list[list[Message]]()
    agent = Agent(answering(asked), perceiver=finder, perception={"max_regions": 2})
    events = list(agent.stream(IMAGE, "which?"))
    assert agent.config.policy == "implicit" and agent.perceives
    assert agent.config.perceiver == f"{__name__}:Finder"
    ((size, question, options),) = finder.asked
    assert (size, question) == (IMAGE.size, "which?")
    assert (options.gate_threshold, options.max_regions) == (0.25, 2)
    assert [view_ids(messages) for messages in asked] == [["coarse", "crop1", "crop2"]]
    answer = events[-1].answer
    assert answer is not None and answer.trace.views[2].box == HOT
    look = answer.trace.perception
    assert look is not None and (look.perceiver, look.route) == (agent.config.perceiver, "zoom")
    assert look.boxes[1] == (700, 500, 800, 600)  # corners in order, inside the image
    assert [event.data["perceiver"] for event in events if event.kind == "look"] == [look.perceiver]
    page = render_html(answer.trace, by_digest(answer.trace.views, answer.store.image))
    assert f"perceived by {look.perceiver}" in page
    assert Trace.model_validate_json(answer.trace.model_dump_json()) == answer.trace


def test_the_steps_name_the_perceiver(capsys: pytest.CaptureFixture[str]) -> None:
    agent = Agent(answering([]), perceiver=Finder(HOT, score=0.9, threshold=0.5, reason="there"))
    follow(agent.stream(IMAGE, "which?"), Console(verbosity=1), [IMAGE.width * IMAGE.height])
    assert f"{__name__}:Finder gate 0.90 of 0.50: there" in capsys.readouterr().err


def test_budgets_and_policies_hold_for_its_crops() -> None:
    asked: list[list[Message]] = []
    agent = Agent(answering(asked), perceiver=Finder(HOT), budget={"max_views": 1})
    answer = agent.run(IMAGE, "which?")
    assert (answer.status, view_ids(asked[0])) == ("budget", ["coarse"])
    assert agent.replace(policy="direct").run(IMAGE, "which?").trace.perception is None
    hybrid = agent.replace(policy="hybrid", **{"budget.max_views": 4}).run(IMAGE, "which?")
    assert hybrid.trace.usage.inserted == 1
    assert Agent(answering([]), perceiver=Finder()).run(IMAGE, "which?").trace.usage.inserted == 0


def test_a_perceiver_may_shrink_the_image_that_it_is_given(tmp_path: Path) -> None:
    class Small(Finder):
        def look(self, image: Image.Image, *given: Any, **options: Any) -> PerceptionRecord:
            image.thumbnail((64, 64))
            return super().look(image, *given, **options)

    answer = Agent(answering([]), perceiver=Small(HOT)).run(IMAGE, "which?")
    assert answer.boxes == [HOT]
    assert Answer.load(answer.save(tmp_path)).boxes == [HOT]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([HOT], "returned a list from look"),
        (Finder((0, 0, float("nan"), 9)).found, "not finite"),
        (Finder((0, 0, float("inf"), 9)).found, "not finite"),
        (Finder(HOT, extent=(0, 0, 900, 0)).found, "extent without an area"),
    ],
)
def test_what_a_perceiver_returns_is_checked(found: Any, said: str) -> None:
    finder = Finder()
    finder.found = found
    answer = Agent(answering([]), perceiver=finder).run(IMAGE, "which?")
    assert answer.status == "error" and said in str(answer.trace.error)


def test_cells_are_those_of_a_map_that_reaches_beyond_the_image() -> None:
    finder = Finder(HOT, heat=[[0, 1, 0]] * 3, extent=(0, -150, 900, 750))
    look = Agent(answering([]), perceiver=finder).look(IMAGE, "which?").record
    assert look.cells == [pytest.approx((2, 250 / 300, 800 / 300, 450 / 300))]


def test_a_perceiver_may_be_a_class() -> None:
    class Corner(Finder):
        def __init__(self) -> None:
            super().__init__(HOT)

    agent = Agent(answering([]), perceiver=Corner)
    assert agent.run(IMAGE, "which?").boxes == agent.replace(seed=2).run(IMAGE, "which?").boxes == [HOT]


def test_an_object_that_cannot_look_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks look"):
        Agent(answering([]), perceiver=object())
    with pytest.raises(ConfigError, match="has no branches"):
        LocalPerceiver(answering([]))


def test_a_saved_run_goes_on_with_its_perceiver_alone(tmp_path: Path) -> None:
    replies: list[str] = []  # runs out at once: the answer fails after the look

    def agent(**how: Any) -> Agent:
        return Agent(ScriptedBackend(replies), state_dir=tmp_path, **how)

    finder = Finder(HOT)
    assert agent(perceiver=finder).run(IMAGE, "which?", thread="one").status == "error"
    replies.append("42")
    with pytest.raises(ConfigError, match=rf"begun with the perceiver {__name__}:Finder, and the agent has none"):
        agent(policy="explicit").resume("one")
    other = Finder()
    answer = agent(perceiver=other).resume("one")
    assert (answer.text, len(other.asked)) == ("42", 0)  # the look is not done again
    assert answer.trace.perception is not None and answer.trace.perception.perceiver == f"{__name__}:Finder"


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    return HFBackend.load("nano", device="cpu", check=False)


def test_a_local_model_looks_for_another_as_for_itself(nano: HFBackend) -> None:
    question = "what is the code on the orange circle?"
    own = Agent(nano).look(IMAGE, question)
    agent = Agent(ScriptedBackend(["42"]), perceiver=LocalPerceiver(nano))
    seen = agent.look(IMAGE, question)
    assert seen.model == "nano" == seen.record.perceiver
    same = {"exclude": {"seconds", "perceiver"}}
    assert json.loads(seen.record.model_dump_json(**same)) == json.loads(own.record.model_dump_json(**same))
    wide = LocalPerceiver(nano, views=nano.defaults.model_copy(update={"coarse_max_tokens": 100}))
    assert Agent(ScriptedBackend(["42"]), perceiver=wide).look(IMAGE, question).record.visual_tokens > 64


def test_a_name_is_a_model_or_a_reference(monkeypatch: pytest.MonkeyPatch, nano: HFBackend) -> None:
    assert isinstance(load_perceiver(f"{__name__}:Finder"), Finder)
    monkeypatch.setattr("qzoom_agent.models.hf.load_backend", lambda model, **how: nano)
    agent = Agent(ScriptedBackend(["42"]), config=AgentConfig(perceiver="nano"))
    assert agent.replace(seed=1).perceiver is agent.perceiver
    assert agent.replace(perceiver=None, policy="direct").perceiver is None


def test_the_weights_of_a_run_are_those_of_both_models() -> None:
    assert weights_of(AgentConfig()) == fingerprint("nano")
    assert weights_of(AgentConfig(model="served", perceiver="nano")) == f"unknown+{fingerprint('nano')}"
    assert weights_of(AgentConfig(model="served", perceiver="m:p")) is None


def test_an_agent_with_other_branches_is_of_other_weights(nano: HFBackend, tmp_path: Path) -> None:
    assert nano.branches is not None
    nano.branches.save(tmp_path)
    agent = Agent.from_pretrained("nano", branches=tmp_path, check=False)
    looking = LocalPerceiver(agent.backend)
    assert weights_of_agent(agent) == weights_of(agent.config, tmp_path) != weights_of_agent(Agent(nano))
    assert weights_of_agent(agent.replace(backend=batched(agent.backend, 2))) == weights_of_agent(agent)
    served = Agent(ScriptedBackend(["42"]), perceiver=looking)
    assert weights_of_agent(served) == weights_of(served.config, tmp_path) != weights_of(served.config)
    assert weights_of_agent(Agent(nano)) == fingerprint("nano")


def test_the_command_line_takes_a_perceiver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], nano: HFBackend
) -> None:
    monkeypatch.setattr("qzoom_agent.models.hf.load_backend", lambda model, **how: nano)
    IMAGE.save(tmp_path / "board.png")
    asked = ["look", str(tmp_path / "board.png"), "which?", "--server", "http://127.0.0.1:9/v1", "--model", "served"]
    assert main([*asked, "--perceiver", "nano"]) == 0
    assert "gate" in capsys.readouterr().out
    assert main([*asked, "--perceiver", "nanu"]) == 2
    assert "There is no model 'nanu'" in capsys.readouterr().err
    assert main([*asked, "--branches", str(tmp_path)]) == 2
    assert "--perceiver" in capsys.readouterr().err
