"""Gate `answer` and policy `locate` through the whole loop, on a scripted model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent, Answer
from qzoom_agent.cli.ask import follow, replay
from qzoom_agent.cli.console import Console
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message, plain_text, view_ids
from qzoom_agent.models.interface import ImageSource, OnText, Reply, SamplingParams, Session
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import PerceptionRecord, Trace, by_digest
from tests.models.test_perceiver import Finder

IMAGE = Image.effect_noise((900, 600), 60).convert("RGB")
HOT = (600.0, 100.0, 800.0, 300.0)
BOX = '{"bbox_2d": [667, 167, 888, 500], "label": "the sign"}'
SURE, UNSURE = -0.01, -1.0
GATE = {"perception.gate": "answer"}


class Telling(ScriptedBackend):
    """A scripted model that tells the log-probability of its replies, each of one token, and notes what it is asked."""

    def __init__(self, replies: Sequence[str | Exception], logprob: float | None, **how: Any) -> None:
        self.asked: list[list[Message]] = []
        self.left = list(replies)
        super().__init__(self._next, protocol="plain", **how)
        self.logprob = logprob

    def _next(self, messages: list[Message]) -> str:
        self.asked.append(messages)
        said = self.left.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    def session(self, image: ImageSource) -> Session:
        opened: Any = super().session(image)
        plain = opened.reply

        def reply(messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
            found: Reply = plain(messages, settings=settings, on_text=on_text)
            told = settings.logprobs and self.logprob is not None
            return found.model_copy(update={"logprobs": [(found.text, self.logprob)]}) if told else found

        opened.reply = reply
        return opened  # type: ignore[no-any-return]


def run(model: Telling, **how: Any) -> Answer:
    return Agent(model, **how).run(IMAGE, "which?")


def turns(answer: Answer) -> list[str]:
    return [turn.text for turn in answer.trace.turns]


# ---- gate `answer` -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["implicit", "hybrid", "explicit", "locate", "masked", "blind"])
def test_a_sure_answer_is_kept_and_nothing_else_is_asked(policy: str) -> None:
    model = Telling(["42"], SURE)
    answer = run(model, policy=policy, perceiver=Finder(HOT), **GATE)
    assert (answer.text, answer.status, len(model.asked)) == ("42", "answered", 1)
    assert plain_text(model.asked[0][0]) == "which?"
    look = answer.trace.perception
    assert look is not None and look.fired is False and look.score == pytest.approx(0.00995, abs=1e-4)
    assert answer.trace.turns[0].confidence == pytest.approx(0.99005, abs=1e-4)
    assert answer.trace.usage.visual_tokens == answer.trace.views[1].tokens


def test_an_unsure_one_looks_with_the_perceiver() -> None:
    model = Telling(["41", "42"], UNSURE)
    events = list(Agent(model, perceiver=Finder(HOT, reason="there", score=0.2), **GATE).stream(IMAGE, "which?"))
    answer = events[-1].answer
    assert answer is not None and (answer.text, turns(answer)) == ("42", ["41", "42"])
    assert [view_ids(messages) for messages in model.asked] == [["coarse"], ["coarse", "crop1"]]
    assert len(model.asked[1]) == 1  # the first answer is not shown to the model
    look = answer.trace.perception
    assert look is not None and look.fired and look.score == pytest.approx(0.632, abs=1e-3)
    assert look.reason == "the model is unsure of its first answer; there" and look.perceiver
    kinds = [event.kind for event in events if event.kind != "token"]
    assert kinds == ["view", "turn", "look", "look", "view", "turn", "answer"]
    assert [view.id for view in answer.trace.views] == ["original", "coarse", "crop1"]
    assert Trace.model_validate_json(answer.trace.model_dump_json()) == answer.trace
    page = render_html(answer.trace, by_digest(answer.trace.views, answer.store.image))
    assert "least likely token 0.37" in page and "perceived by" in page


def test_the_threshold_is_a_setting_and_always_asks_no_gate() -> None:
    assert turns(run(Telling(["42"], UNSURE), perceiver=Finder(HOT), **GATE, **{"perception.confidence": 0.3})) == [
        "42"
    ]
    assert turns(run(Telling(["42"], SURE), policy="always", perceiver=Finder(HOT), **GATE)) == ["42"]
    direct = run(Telling(["42"], UNSURE), policy="direct", **GATE)
    assert direct.trace.perception is None and turns(direct) == ["42"]


def test_an_unsure_answer_stands_where_there_is_nothing_to_see() -> None:
    for how in ({"perceiver": Finder()}, {"perceiver": Finder(HOT), "budget.max_views": 1}):
        answer = run(Telling(["42"], UNSURE), **how, **GATE)
        assert (answer.text, turns(answer)) == ("42", ["42"])
    assert answer.status == "budget"


def test_an_unsure_model_with_the_tool_may_zoom() -> None:
    model = Telling(["41", "ZOOM: 667, 167, 888, 500", "42"], UNSURE)
    answer = run(model, policy="explicit", **GATE)
    assert (answer.text, answer.trace.usage.served) == ("42", 1)
    assert "ZOOM" not in plain_text(model.asked[0][0]) and "ZOOM" in plain_text(model.asked[1][0])


def test_a_model_without_log_probabilities_is_told_of() -> None:
    answer = run(Telling(["42"], None), perceiver=Finder(HOT), **GATE)
    assert answer.status == "error" and "gave no log-probabilities" in str(answer.trace.error)


def test_a_spent_budget_keeps_the_first_answer() -> None:
    answer = run(Telling(["42"], UNSURE), perceiver=Finder(HOT), **GATE, **{"budget.max_turns": 1})
    assert (answer.text, answer.status, turns(answer)) == ("42", "budget", ["42"])


# ---- policy `locate` -----------------------------------------------------------------------------------------------


def test_the_model_names_a_box_sees_the_crop_and_answers() -> None:
    model = Telling([BOX, "42"], None)
    events = list(Agent(model, policy="locate").stream(IMAGE, "which?"))
    answer = events[-1].answer
    assert answer is not None and (answer.text, answer.status) == ("42", "answered")
    assert [view_ids(messages) for messages in model.asked] == [["coarse"], ["coarse", "crop1"]]
    assert "Do not answer yet" in plain_text(model.asked[0][0]) and plain_text(model.asked[1][0]) == "which?"
    (call,) = answer.trace.turns[0].calls
    assert (call.decision, call.label, call.result) == ("served", "the sign", "crop1")
    assert answer.trace.views[2].box == (600, 100, 800, 300)
    assert (answer.trace.usage.served, answer.trace.usage.inserted) == (1, 0)
    kinds = [event.kind for event in events if event.kind != "token"]
    assert kinds == ["view", "turn", "call", "view", "turn", "answer"]


def test_its_steps_are_shown_as_they_happen_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    answer = follow(Agent(Telling([BOX, "42"], None), policy="locate").stream(IMAGE, "which?"), console, [540000])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["look", "zoom"]
    replay(answer.trace, answer.record, console)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["look", "zoom"]


def test_several_parts_are_shown_up_to_the_limit() -> None:
    text = f'[{BOX}, {{"bbox_2d": [0, 0, 200, 300]}}, {{"bbox_2d": [0, 500, 200, 900]}}]'
    model = Telling([text, "42"], None)
    answer = run(model, policy="locate", **{"perception.max_regions": 2})
    assert view_ids(model.asked[1]) == ["coarse", "crop1", "crop2"] and answer.trace.usage.served == 2


@pytest.mark.parametrize("said", ['{"bbox_2d": null}', "all of it", '{"bbox_2d": [9, 9, 99999, 9]}'])
def test_without_a_box_it_answers_from_the_coarse_view(said: str) -> None:
    model = Telling([said, "42"], None)
    answer = run(model, policy="locate")
    assert (answer.text, answer.status) == ("42", "answered")
    assert [view_ids(messages) for messages in model.asked] == [["coarse"], ["coarse"]]


def test_a_crop_beyond_the_budget_is_refused() -> None:
    answer = run(Telling([BOX, "42"], None), policy="locate", **{"budget.max_views": 1})
    (call,) = answer.trace.turns[0].calls
    assert (call.decision, call.code, answer.text, answer.status) == ("refused", "budget", "42", "budget")


def test_both_together_take_three_requests() -> None:
    model = Telling(["41", BOX, "42"], UNSURE)
    answer = run(model, policy="locate", **GATE)
    assert turns(answer) == ["41", BOX, "42"] and answer.text == "42"
    assert [turn.index for turn in answer.trace.turns] == [0, 1, 2]
    kept = run(Telling(["41", "nowhere"], UNSURE), policy="locate", **GATE)
    assert (kept.text, kept.status) == ("41", "answered")


# ---- saved runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_failed_goes_on_where_it_was(step: int, tmp_path: Path) -> None:
    replies = ["41", BOX, "42"]
    how: dict[str, Any] = {"policy": "locate", "state_dir": tmp_path, **GATE}
    broken = Telling([*replies[:step], BackendError("broken")], UNSURE)
    assert Agent(broken, **how).run(IMAGE, "which?", thread="one").status == "error"
    model = Telling(replies[step:], UNSURE)
    answer = Agent(model, **how).resume("one")
    assert (answer.text, turns(answer), len(model.asked)) == ("42", replies, 3 - step)
    assert [view.id for view in answer.trace.views] == ["original", "coarse", "crop1"]
    assert isinstance(answer.trace.perception, PerceptionRecord) and answer.trace.perception.fired
