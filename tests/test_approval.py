"""A person in the loop: what is asked, what a decision does, and runs that stop and go on in another process."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.approval import Decide, Decision, read_decision
from qzoom_agent.cli.ask import describe, read_line
from qzoom_agent.cli.main import main
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.messages import Message
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import Approval, PendingCall, PerceptionRecord

IMAGE = Image.linear_gradient("L").resize((800, 600)).convert("RGB")


def zoom(*box: int, **more: Any) -> str:
    call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box, "label": "the sign", **more}}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


FIRST, SECOND = zoom(0, 0, 300, 300), zoom(600, 600, 900, 900)
TURNED = '<tool_call>{"name": "rotate", "arguments": {"degrees": 180}}</tool_call>'


def asking(*decisions: Decision) -> tuple[list[PendingCall], Decide]:
    """Return a list of calls to come, and a function that decides on them in order."""
    asked: list[PendingCall] = []

    def decide(call: PendingCall) -> Decision:
        asked.append(call)
        return decisions[len(asked) - 1]

    return asked, decide


def agent(replies: Any, **options: Any) -> Agent:
    options = {"protocol": "qwen3vl", "policy": "explicit", **options}
    return Agent(ScriptedBackend(replies), **options)


def test_a_look_calls_nothing_that_somebody_would_decide_on() -> None:
    looks = [PerceptionRecord(score=0.1, threshold=0.5)]
    backend = ScriptedBackend(["42"], protocol="qwen3vl", looks=lambda messages: looks)
    assert Agent(backend, policy="hybrid", approve=True).look(IMAGE, "Which?").record.score == 0.1


def decided(answer: Answer) -> list[tuple[Any, ...]]:
    calls = [call for turn in answer.trace.turns for call in turn.calls]
    return [(call.decision, call.code, call.served, call.approval and call.approval.action) for call in calls]


def last_text(messages: list[Message]) -> str:
    return json.dumps([message["content"] for message in messages if message["role"] == "tool"])


def test_a_call_is_approved_moved_or_refused() -> None:
    asked, decide = asking(True, (100, 100, 300, 250), "that is private")
    script = iter([f"I look twice. {FIRST}{SECOND}", zoom(400, 400, 600, 600), None])
    answer = agent(lambda messages: next(script) or last_text(messages), approve=decide).run(IMAGE, "what?")
    assert decided(answer) == [
        ("served", "", (0, 0, 240, 180), "approve"),
        ("snapped", "person", (100, 100, 300, 250), "move"),
        ("refused", "person", None, "refuse"),
    ]
    assert [(call.box, call.label) for call in asked][:2] == [
        ((0, 0, 240, 180), "the sign"),
        ((480, 360, 720, 540), "the sign"),
    ]
    assert asked[0].thought == "I look twice." and asked[0].tokens == answer.trace.views[2].tokens
    assert [view.parent for view in answer.trace.views if view.kind == "crop"] == ["coarse", "coarse"]
    assert "A person moved the box to [125, 167, 375, 417]." in answer.text, "in the model's own frame"
    assert "Error: A person refused this call: that is private" in answer.text
    assert answer.usage.seconds.act < 5 and answer.trace.config["approve"] is True


@pytest.mark.parametrize("protocol", ["qwen3vl", "deepeyes", "nano"])
def test_approved_calls_are_run_as_they_would_have_been(protocol: str) -> None:
    call = {"nano": "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>", "deepeyes": zoom(10, 10, 90, 70)}
    replies = [
        call.get(protocol, f"{FIRST}{SECOND}{FIRST}"),
        call.get(protocol, zoom(0, 0, 2, 2)),
        "<answer>42</answer>",
    ]
    plain = agent(replies, protocol=protocol).run(IMAGE, "what?")
    approved = agent(replies, protocol=protocol, approve=lambda call: True).run(IMAGE, "what?")
    assert [view.digest for view in approved.trace.views] == [view.digest for view in plain.trace.views]
    for one, other in zip(plain.trace.turns, approved.trace.turns, strict=True):
        calls = [call.model_copy(update={"approval": None}) for call in other.calls]
        assert calls == one.calls
    assert any(call[3] for call in decided(approved))


def test_a_box_that_was_moved_out_of_a_crop_names_the_image_that_its_numbers_are_of() -> None:
    _, decide = asking(True, (100, 100, 300, 250))
    first, second = "ZOOM: 0, 0, 500, 500", "ZOOM crop1: 0, 0, 500, 500"
    answer = agent([first, second, "42"], protocol="plain", approve=decide).run(IMAGE, "what?")
    moved = answer.trace.turns[1].calls[0]
    assert (moved.view, moved.served) == ("crop1", (100, 100, 300, 250))
    assert "A person moved the box to [125, 167, 375, 417] of the first image." in moved.reason


def test_a_format_without_notes_is_told_that_a_person_moved_the_box() -> None:
    script = iter(["<zoom><loc_84><loc_112><loc_140><loc_154></zoom>", None])
    moved = agent(
        lambda messages: next(script) or json.dumps(messages[-1]), protocol="nano", approve=lambda call: (0, 0, 90, 90)
    )
    answer = moved.run(IMAGE, "what?")
    assert '{"type": "image", "view": "crop1"}' in answer.text and "A person moved the box to [0, 0, " in answer.text


def test_what_the_review_decides_is_asked_about_as_decided() -> None:
    look = PerceptionRecord(score=0.9, threshold=0.5, boxes=[(0, 0, 112, 112)], cells=[(0, 0, 4, 4)], route="zoom")
    backend = ScriptedBackend([zoom(0, 0, 60, 1000), zoom(0, 0, 60, 1000), "42"], looks=lambda messages: [look])
    asked, decide = asking(True, True)
    hybrid = Agent(backend, protocol="qwen3vl", policy="hybrid", approve=decide, review={"insert": False})
    answer = hybrid.run(IMAGE, "what?")
    assert asked[0].code == "cut" and asked[0].reason in asked[0].notes
    first = answer.trace.turns[0].calls[0]
    assert (first.decision, first.code, first.served) == ("snapped", "cut", asked[0].box)
    assert first.reason == asked[0].reason


def test_calls_that_cannot_be_served_are_not_asked_about() -> None:
    asked, decide = asking(True)
    replies = [FIRST, zoom(1200, 0, 1300, 90), FIRST + SECOND, "42"]
    answer = agent(replies, approve=decide, budget={"max_views": 2}).run(IMAGE, "what?")
    assert len(asked) == 1 and [call[0] for call in decided(answer)] == ["served", *["refused"] * 3]
    assert answer.status == "budget"
    tight = agent([FIRST, "42"], approve=lambda call: (0, 0, 800, 600), budget={"max_visual_tokens": 118})
    assert decided(tight.run(IMAGE, "what?"))[0][:2] == ("refused", "budget"), "a moved box has to fit too"


def test_own_tools_are_asked_about_too() -> None:
    asked, decide = asking(True, "not again", True)
    zoomed = zoom(0, 0, 300, 300, img_idx=1)
    answer = agent([TURNED, TURNED, zoomed, "42"], tools=["rotate"], approve=decide).run(IMAGE, "what?")
    assert [call[0] for call in decided(answer)] == ["served", "refused", "served"]
    assert asked[0].box is None and json.loads(asked[0].arguments or "") == {"degrees": 180}
    assert (asked[2].source, asked[2].inside, asked[2].box) == ("source1", (0, 0, 240, 180), (560, 420, 800, 600))
    assert answer.trace.views[-1].inside == asked[2].inside and answer.boxes == [asked[2].box]
    with pytest.raises(ConfigError, match="'rotate' has no box that could be moved"):
        agent([TURNED], tools=["rotate"], approve=lambda call: (0, 0, 9, 9)).run(IMAGE, "what?")


def test_a_run_stops_before_a_call_and_goes_on_with_a_decision(tmp_path: Path) -> None:
    first = agent([FIRST + SECOND], approve=True, state_dir=tmp_path)
    with pytest.raises(ConfigError, match="Give the agent a state_dir and the run a thread"):
        first.run(IMAGE, "what?")
    answer = first.run(IMAGE, "what?", thread="a")
    first.close()
    assert (answer.status, str(answer)) == ("waiting", "no answer (waiting)")
    assert answer.waiting is not None and answer.waiting.box == (0, 0, 240, 180)
    assert [view.id for view in answer.trace.views] == ["original", "coarse"] and len(answer.trace.turns) == 1
    saved = Answer.load(answer.save(tmp_path / "saved"))
    assert saved.waiting == answer.waiting
    assert "Waits for a decision" in answer.report(tmp_path / "r.html").read_text(encoding="utf-8")
    with agent(["42"], approve=True, state_dir=tmp_path) as other:
        assert other.resume("a").waiting == answer.waiting, "without a decision it goes on waiting"
        for wrong, told in (((0, 0, 9), "decision about a call"), ((900, 0, 990, 50), "lies outside the image")):
            with pytest.raises(ConfigError, match=told):
                other.resume("a", wrong)
        second = other.resume("a", True, call=answer.waiting)
        assert second.waiting is not None and second.waiting.box == (480, 360, 720, 540)
        with pytest.raises(ConfigError, match=r"about the call .*240.*, and the run waits before the call .*480"):
            other.resume("a", True, call=answer.waiting)  # sent again, as its reply was lost
        assert other.resume("a").waiting == second.waiting
        done = other.resume("a", Box(0, 0, 0.5, 0.5, "unit"))
        assert decided(done)[1] == ("snapped", "person", (0, 0, 400, 300), "move") and done.text == "42"
        with pytest.raises(ConfigError, match="'a' does not wait for a decision"):
            other.resume("a", True)
        assert other.resume("a").trace == done.trace


def test_a_waiting_run_can_be_handed_to_a_callback(tmp_path: Path) -> None:
    with agent([FIRST], approve=True, state_dir=tmp_path) as first:
        assert first.run(IMAGE, "what?", thread="a").status == "waiting"
    asked, decide = asking(False)
    with agent(["42"], approve=decide, state_dir=tmp_path) as other:
        answer = other.resume("a")
    assert len(asked) == 1 and decided(answer) == [("refused", "person", None, "refuse")] and answer.text == "42"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to be killed")
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_dies_while_somebody_decides_is_resumed(tmp_path: Path, number: int) -> None:
    child = os.fork()
    if not child:
        asked: list[PendingCall] = []

        def die(call: PendingCall) -> bool:
            asked.append(call)
            if len(asked) > number:
                os._exit(9)
            return True

        agent([FIRST + SECOND], approve=die, state_dir=tmp_path).run(IMAGE, "what?", thread="a")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    again, decide = asking(True, True)
    with agent(["42"], approve=decide, state_dir=tmp_path) as other:
        answer = other.resume("a")
    assert [call.box for call in again] == [(0, 0, 240, 180), (480, 360, 720, 540)][number:]
    whole = agent([FIRST + SECOND, "42"]).run(IMAGE, "what?")
    assert [view.digest for view in answer.trace.views] == [view.digest for view in whole.trace.views]
    assert answer.text == "42" and answer.usage.served == 2


def test_a_conversation_asks_its_callback() -> None:
    asked, decide = asking(True, "no more")
    with agent([FIRST, "42", SECOND, "43"], approve=decide).chat(IMAGE) as chat:
        assert [chat.ask("what?").text, chat.ask("and then?").text] == ["42", "43"]
    assert len(asked) == 2
    with pytest.raises(ConfigError, match="cannot stop before a call"):
        agent([], approve=True).chat(IMAGE)


async def agrees(call: PendingCall) -> Decision:
    """Decide in the event loop, with a thread of it, as to ask a server for its address."""
    await asyncio.to_thread(lambda: None)
    return (0, 0, 400, 300) if call.box == (0, 0, 240, 180) else True


class Agrees:
    async def __call__(self, call: PendingCall) -> Decision:
        return await agrees(call)


@pytest.mark.parametrize("decide", [agrees, Agrees(), partial(agrees)])
def test_an_asynchronous_function_decides_in_the_event_loop(decide: Any, tmp_path: Path) -> None:
    one = agent(lambda messages: FIRST if len(messages) < 3 else "42", approve=decide, state_dir=tmp_path)

    async def ways() -> list[Answer]:
        run = await one.arun(IMAGE, "what?", thread="a")
        last = [event async for event in one.astream(IMAGE, "what?")][-1]
        assert last.answer is not None
        many = await asyncio.gather(*(one.arun(IMAGE, "what?") for _ in range(40)))  # more than the loop has threads
        return [run, last.answer, *many, *await one.abatch([(IMAGE, "what?")] * 3, workers=2)]

    for answer in asyncio.run(ways()):
        assert decided(answer) == [("snapped", "person", (0, 0, 400, 300), "move")] and answer.text == "42"
    assert one.threads() == ["a"]


@pytest.mark.parametrize("way", ["arun", "astream"])
def test_a_cancelled_task_does_not_wait_for_a_decision(way: str, tmp_path: Path) -> None:
    """The question to the person is cancelled; a saved run can be gone on with once its thread has seen that."""
    cancelled: list[bool] = []

    async def main() -> None:
        asked = asyncio.Event()

        async def never(call: PendingCall) -> Decision:
            asked.set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.append(True)
            return True

        one = agent([FIRST], approve=never, state_dir=tmp_path)

        async def follow() -> None:
            if way == "arun":
                await one.arun(IMAGE, "what?", thread="a")
            async for _ in one.astream(IMAGE, "what?", thread="a"):
                pass

        task = asyncio.create_task(follow())
        await asked.wait()
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.cancelled()

    asyncio.run(main())
    assert cancelled == [True]
    if way == "arun":  # waits for no thread
        return
    answer = agent(["42"], approve=lambda call: True, state_dir=tmp_path).resume("a")
    assert (answer.text, answer.usage.served) == ("42", 1)


@pytest.mark.filterwarnings("error")
def test_an_asynchronous_function_is_refused_where_nobody_awaits_it(tmp_path: Path) -> None:
    """Before the model is asked; a function that merely returns a coroutine is found out at the first call."""
    one = agent([], approve=agrees, state_dir=tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: one.run(IMAGE, "what?"),
        lambda: one.stream(IMAGE, "what?"),
        lambda: one.batch([(IMAGE, "what?")]),
        lambda: one.chat(IMAGE),
        lambda: one.resume("a"),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match="only arun, astream and abatch await"):
            call()
    with pytest.raises(ConfigError, match="returned a coroutine instead of a decision"):
        agent([FIRST], approve=lambda call: agrees(call)).run(IMAGE, "what?")
    gc.collect()


def test_the_report_says_who_decided(tmp_path: Path) -> None:
    decide = asking(True, (0, 0, 100, 100), "private")[1]
    answer = agent([FIRST, SECOND, zoom(400, 400, 600, 600), "42"], approve=decide).run(IMAGE, "what?")
    page = answer.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for action in ("approved", "moved", "refused"):
        assert f"{action} by a person" in page


PENDING = PendingCall(name="zoom", box=(0, 0, 9, 9))


@settings(max_examples=25)
@given(st.one_of(st.none(), st.floats(), st.text(), st.lists(st.one_of(st.floats(), st.none()), max_size=5)))
def test_any_decision_is_read_or_refused(given_: Any) -> None:
    size = Size(800, 600)
    try:
        found = read_decision(given_, PENDING, size)
    except ConfigError:
        assert not isinstance(given_, str)
        return
    assert found.action == ("refuse" if isinstance(given_, str) else "move")
    if found.box is not None:
        x1, y1, x2, y2 = found.box
        assert 0 <= x1 < x2 <= 800 and 0 <= y1 < y2 <= 600
    assert read_decision(found, PENDING, size) == found


@pytest.mark.parametrize(
    ("line", "decision"),
    [
        ("y\n", True),
        (" No ", False),
        ("1,2, 30 40", [1, 2, 30, 40]),
        ("[1.5, 2, 3, 4]", [1.5, 2, 3, 4]),
        ("", None),
        ("1.2.3 4 5 6", None),
    ],
)
def test_a_line_of_a_terminal_decides(line: str, decision: Any) -> None:
    assert read_line(line, movable=True) == decision


def test_ask_asks_at_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = str(tmp_path / "board.png")
    IMAGE.save(path)

    def scripted(model: str = "nano", *, config: Any = None, **_: Any) -> Agent:
        return Agent(ScriptedBackend([FIRST, SECOND, TURNED, "42"]), config=config)

    monkeypatch.setattr(Agent, "from_pretrained", scripted)
    how = ["--protocol", "qwen3vl", "--tool", "rotate", "--save", str(tmp_path / "s")]
    flags = ["ask", path, "what?", "--approve", *how]
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("\ny\n9,9,9,9\n900,0,999,9\n0,0,100,100\n0,0,100,100\ntoo \x1bprivate\n")
    )
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert captured.out == "42\n"
    assert (
        'call image_zoom_in_tool "the sign" [0,0,240,180] of 800x600 px, 9.0% of image, +54 visual tokens'
        in captured.err
    )
    assert 'call rotate {"degrees": 180}' in captured.err and captured.err.count("run it?") == 7
    assert "[9.0, 9.0, 9.0, 9.0] has no area" in captured.err and "lies outside the image" in captured.err
    assert [call[0::3] for call in decided(Answer.load(tmp_path / "s"))] == [
        ("served", "approve"),
        ("snapped", "move"),
        ("refused", "refuse"),
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(flags) == 2 and "Nobody decided on the call" in capsys.readouterr().err
    assert main(["ask", "-", *flags[2:]]) == 2 and "Give the image as a file" in capsys.readouterr().err


def test_an_approval_without_its_box_is_none() -> None:
    with pytest.raises(ConfigError, match="decision about a call"):
        read_decision(Approval(action="move"), PENDING, Size(80, 60))


def test_a_person_is_told_which_image_a_box_is_in() -> None:
    call = PendingCall(name="zoom", box=(0, 0, 20, 10), tokens=4)
    (first,) = describe(call, (100, 50))
    (second,) = describe(call.model_copy(update={"image": 1}), (100, 50))
    assert first == "call zoom [0,0,20,10] of 100x50 px, 4.0% of image, +4 visual tokens"
    assert second == "call zoom [0,0,20,10] of image 2, 100x50 px, 4.0% of image, +4 visual tokens"
