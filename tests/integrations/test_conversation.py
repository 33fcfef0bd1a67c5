"""One visitor's conversation: its steps, a person's decisions, and what a page shows of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image, ImageChops, ImageDraw

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Event
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations.conversation import Conversation
from qzoom_agent.integrations.progress import Progress
from qzoom_agent.messages import Message, plain_text
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import PendingCall, PerceptionRecord

PICTURE = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
ZOOM = "<zoom>28 28 112 112</zoom>"


def replies(messages: list[Message]) -> str:
    """Zoom once unless the question is a quick one, then answer with text that must not become markup."""
    return "<b>seven</b>" if any(word in plain_text(one) for one in messages for word in (ZOOM, "quick")) else ZOOM


@pytest.fixture
def agent() -> Agent:
    return Agent(ScriptedBackend(replies), policy="explicit")


def played(steps: Iterator[Event | PendingCall], progress: Progress | None = None) -> Event | PendingCall:
    last = None
    for last in steps:
        if progress is not None:
            progress.wait(last) if isinstance(last, PendingCall) else progress.add(last)
    assert last is not None
    return last


def test_steps_lead_to_the_answer_and_questions_add_up(agent: Agent, tmp_path: Path) -> None:
    conversation = Conversation(agent, PICTURE)
    assert conversation.earlier == []
    with pytest.raises(ConfigError, match="No question of this conversation"):
        conversation.report(tmp_path / "report.html")
    progress = Progress("which number?", PICTURE)
    last = played(conversation.ask("which number?"), progress)
    assert isinstance(last, Event) and last.answer is not None and last.answer.text == "<b>seven</b>"
    assert conversation.earlier == [("which number?", "<b>seven</b>")]
    assert "which number?" in conversation.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert [note.title for note in progress.notes if note.kind == "zoom"] == ["Zoom 1"]
    assert len(progress.crops) == 1 and progress.facts.startswith("1 zoom")
    assert "&lt;b&gt;seven&lt;/b&gt;" in progress.html("card") and "<b>seven" not in progress.html("card")
    assert "&lt;zoom&gt;" in progress.html("steps")
    with pytest.raises(ConfigError, match="question"):
        conversation.ask(" ")


@pytest.mark.parametrize(("decision", "action"), [(True, "approve"), ((10, 20, 300, 200), "move"), ("no", "refuse")])
def test_a_person_decides_on_a_call(agent: Agent, decision: object, action: str) -> None:
    conversation = Conversation(agent, PICTURE, asks=True)
    call = played(conversation.ask("which number?"))
    assert isinstance(call, PendingCall) and conversation.waiting == call
    with pytest.raises(ConfigError, match="outside the image"):
        conversation.decide((5000, 5000, 6000, 6000))
    last = played(conversation.decide(decision))  # type: ignore[arg-type]
    assert isinstance(last, Event) and last.answer is not None
    (made,) = last.answer.record.turns[0].calls
    assert made.approval is not None and made.approval.action == action
    with pytest.raises(ConfigError, match="No call waits"):
        conversation.decide(True)


def test_a_second_click_decides_on_no_later_call() -> None:
    views = [ZOOM, "<zoom>112 56 168 140</zoom>", "seven"]
    conversation = Conversation(Agent(ScriptedBackend(views), policy="explicit"), PICTURE, asks=True)
    played(conversation.ask("which number?"))
    steps = conversation.decide(True)
    with pytest.raises(ConfigError, match="No call waits"):
        conversation.decide(True)
    second = played(steps)
    assert isinstance(second, PendingCall) and conversation.waiting == second
    conversation.leave()  # or Python waits for its thread


def test_two_questions_at_once_are_answered_one_after_the_other(agent: Agent) -> None:
    conversation = Conversation(agent, PICTURE)
    stream, running, most = conversation._chat.stream, [0], [0]

    def slowly(question: str) -> Iterator[Event]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            time.sleep(0.05)
            yield from stream(question)
        finally:
            running[0] -= 1

    def begin(question: str) -> Iterator[Event]:
        time.sleep(0.05)
        return slowly(question)

    conversation._chat.stream = begin  # type: ignore[assignment]
    askers = [Thread(target=lambda: list(conversation.ask("quick: which number?"))) for _ in range(4)]
    for one in askers:
        one.start()
    for one in askers:
        one.join()
    assert most == [1] and conversation.earlier


def test_nobody_decides_in_time(agent: Agent) -> None:
    conversation = Conversation(agent, PICTURE, asks=True, patience=0.05)
    played(conversation.ask("which number?"))
    for _ in range(200):
        if conversation.waiting is None:
            break
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="No call waits"):
        conversation.decide(True)


def test_a_question_that_is_left_does_not_hold_up_the_next(agent: Agent) -> None:
    conversation = Conversation(agent, PICTURE, asks=True)
    assert isinstance(played(conversation.ask("which number?")), PendingCall)
    last = played(conversation.ask("quick: which number?"))
    assert isinstance(last, Event) and last.answer is not None and conversation.waiting is None
    assert [question for question, _ in conversation.earlier] == ["quick: which number?"]
    next(conversation.ask("another?"))  # a reader that goes away
    assert isinstance(played(conversation.ask("quick: again?")), Event)


def test_the_map_of_an_image_that_was_shown_padded_lies_where_the_model_saw_it() -> None:
    progress = Progress("where?", Image.new("RGB", (3200, 1600), "white"))
    progress.look = PerceptionRecord(heat=[[0, 0, 0, 0], [0, 1, 0, 0], [0] * 4, [0] * 4], extent=(0, -800, 3200, 2400))
    drawn = progress.picture(0.5)
    assert drawn.getbbox() == (0, 0, 1600, 800)
    assert ImageChops.invert(drawn).getbbox() == (400, 0, 800, 400)


def test_boxes_keep_their_place_on_a_long_thin_picture() -> None:
    progress = Progress("where?", Image.new("RGB", (43, 8000), "white"))  # 9 x 1600 as drawn, not 8.6 x 1600
    progress.wait(PendingCall(name="zoom", box=(0, 4000, 43, 6000)))
    drawn = ImageChops.invert(progress.picture(0.5)).getbbox()
    assert drawn is not None and drawn[3] == pytest.approx(1200, abs=8)
    progress.point(0, 400)
    progress.point(9, 800)
    assert progress.proposed == pytest.approx((0, 2000, 43, 4000))


def test_two_corners_make_a_box_in_pixels_of_the_image() -> None:
    wide = Image.new("RGB", (3200, 800), "white")
    ImageDraw.Draw(wide).rectangle((100, 100, 200, 200), fill="black")
    progress = Progress("where?", wide)
    progress.wait(PendingCall(name="zoom", box=(0, 0, 400, 400)))
    plain = progress.picture(0.5)
    assert plain.size == (1600, 400) and progress.status == "waiting"
    progress.point(500, 300)
    assert progress.proposed == (0, 0, 400, 400)
    marked = progress.picture(0.5)
    progress.point(300, 100)
    assert progress.proposed == (600, 200, 1000, 600) and progress.corner is None
    assert len({picture.tobytes() for picture in (plain, marked, progress.picture(0.5))}) == 3
    progress.wait(None)
    assert progress.proposed is None and progress.status == "running"
