"""Conversations: what a further question reads, computes and costs, and that they are saved, resumed and shown."""

import io
import json
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.chat import Chat
from qzoom_agent.cli.main import main
from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import Message, plain_text, view_ids
from qzoom_agent.models import hf_session
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.report.episode import render_html
from qzoom_agent.trace import PerceptionRecord, Trace, by_digest
from tests.test_draft import Telling

BOARD = "2-scene.png"
IMAGE = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
ZOOM = "ZOOM: 100, 100, 400, 400"


def asked(messages: list[Message]) -> list[str]:
    """The conversation in short: role, first line of the text, views."""
    return [" ".join([one["role"], *view_ids([one]), plain_text(one).strip().split("\n")[0]]) for one in messages]


def plain(replies: Any, *, looks: Any = None, **changes: Any) -> Agent:
    return Agent(ScriptedBackend(replies, protocol="plain", looks=looks), **changes)


def test_a_further_question_is_appended_and_pays_only_for_what_is_new() -> None:
    talks: list[list[Message]] = []
    replies = iter([ZOOM, "A", "ZOOM: 500, 500, 900, 900", "B", "C"])

    def reply(messages: list[Message]) -> str:
        talks.append(messages)
        return next(replies)

    with plain(reply, policy="explicit").chat(IMAGE) as chat:
        answers = [chat.ask(question) for question in ("one?", "two?", "three?")]
    assert [answer.text for answer in answers] == ["A", "B", "C"]
    assert all(later[: len(talk)] == talk for talk, later in pairwise(talks))
    roles = asked(talks[-1])
    assert roles[0] == "user coarse one?"
    assert roles[3:] == [
        "assistant A",
        "user two?",
        "assistant ZOOM: 500, 500, 900, 900",
        *roles[6:7],
        "assistant B",
        "user three?",
    ]
    trace = chat.answer.trace if chat.answer else None
    assert trace is not None and [one.question for one in trace.questions] == ["one?", "two?", "three?"]
    assert [[view.id for view in one.views] for one in trace.questions] == [
        ["original", "coarse", "crop1"],
        ["crop2"],
        [],
    ]
    first, second, third = (one.usage for one in trace.questions)
    assert (second.coarse_tokens, third.visual_tokens, third.requested) == (0, 0, 0)
    assert trace.total.visual_tokens == first.visual_tokens + second.crop_tokens
    assert (trace.total.served, trace.total.text_tokens) == (2, third.text_tokens)
    last = trace.follow_ups[0].turns[-1]
    assert second.text_tokens == last.prompt_tokens + last.new_tokens - trace.total.visual_tokens
    assert answers[1].boxes == [trace.all_views[3].box]
    assert (trace.answer, answers[0].trace.follow_ups) == ("A", [])


def test_budgets_hold_for_each_question() -> None:
    agent = plain(
        [ZOOM, "A", "ZOOM: 500, 500, 900, 900", "B"], policy="explicit", budget={"max_views": 2, "max_turns": 2}
    )
    with agent.chat(IMAGE) as chat:
        assert [chat.ask("one?").status, chat.ask("two?").status] == ["answered", "answered"]


def test_a_question_that_fails_leaves_roles_in_turn() -> None:
    def reply(messages: list[Message]) -> str:
        if plain_text(messages[-1]).startswith("two"):
            raise OSError("gone")
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        return "yes"

    with plain(reply, policy="direct").chat(IMAGE) as chat:
        chat.ask("one?")
        failed = chat.ask("two?")
        assert (failed.status, str(failed)) == ("error", "no answer (error: OSError: gone)")
        assert chat.ask("three?").text == "yes"
        assert [one.status for one in chat.answer.trace.questions if chat.answer] == ["answered", "error", "answered"]


def looked(*box: float, fires: bool = True) -> list[PerceptionRecord]:
    cells = [(box[0] / 28, box[1] / 28, box[2] / 28, box[3] / 28)] if fires else []
    return [PerceptionRecord(score=0.9 if fires else 0.1, threshold=0.5, boxes=[box] if fires else [], cells=cells)]  # type: ignore[list-item]


def test_the_gate_is_asked_about_the_new_question_and_a_region_is_shown_once() -> None:
    looks: list[list[str]] = []
    talks: list[list[Message]] = []

    def look(messages: list[Message]) -> list[PerceptionRecord]:
        looks.append(asked(messages))
        return looked(28, 28, 84, 84, fires="enough" not in looks[-1][-1])

    def reply(messages: list[Message]) -> str:
        talks.append(messages)
        return "yes"

    with plain(reply, looks=look, policy="implicit").chat(IMAGE) as chat:
        shown = [[view.id for view in chat.ask(one).record.views] for one in ("one?", "two?", "enough?")]
    assert looks == [[f"user coarse {one}"] for one in ("one?", "two?", "enough?")]
    assert shown == [["original", "coarse", "crop1"], [], []]
    assert view_ids(talks[-1]) == ["coarse", "crop1"]
    assert chat.answer is not None
    assert "a crop would add nothing" in chat.answer.trace.follow_ups[0].looks[0].reason


def test_without_history_each_question_is_asked_as_in_a_run() -> None:
    def reply(messages: list[Message]) -> str:
        return ZOOM if len(messages) == 1 else " | ".join(asked(messages))

    agent = plain(reply, policy="explicit")
    with agent.chat(IMAGE, history=False) as chat:
        texts = [chat.ask(question).text for question in ("one?", "two?")]
    assert texts[1] == agent.run(IMAGE, "two?").text.replace("crop1", "crop2")


def test_without_history_a_call_counts_the_crops_of_its_own_question() -> None:
    first, second, inside = (
        f'<grounding>{{"bbox_2d": {box}, "source": "{source}"}}</grounding>'
        for box, source in (
            ([0.1, 0.1, 0.4, 0.4], "original_image"),
            ([0.5, 0.5, 0.9, 0.9], "original_image"),
            ([0, 0, 0.5, 0.5], "observation_1"),
        )
    )
    answer = "<answer>A</answer>"
    model = ScriptedBackend([first, answer, second, inside, answer], protocol="mini_o3")
    with Agent(model, policy="explicit").chat(IMAGE, history=False) as chat:
        records = [chat.ask(question).record for question in ("one?", "two?")]
    assert [call.view for turn in records[1].turns for call in turn.calls] == ["coarse", "crop2"]


def test_first_answers_that_are_kept_are_part_of_the_conversation() -> None:
    model = Telling(["A", "B", "C"], -0.01)
    with Agent(model, policy="explicit", perception={"gate": "answer"}).chat(IMAGE) as chat:
        assert [chat.ask(question).text for question in ("one?", "two?", "three?")] == ["A", "B", "C"]
        assert chat._state is not None
        # a first answer is asked for apart, and the conversation has it afterwards
        assert [asked(talk) for talk in model.asked] == [[f"user coarse {one}?"] for one in ("one", "two", "three")]
        assert asked(chat._state["messages"]) == ["user coarse one?", "assistant A", "user two?", "assistant B"]


def test_the_text_of_a_first_answer_that_is_kept_is_what_was_asked_apart() -> None:
    model = Telling(["hm", ZOOM, "A", "B"], -1.0)
    with Agent(model, policy="explicit", perception={"gate": "answer"}).chat(IMAGE) as chat:
        first = chat.ask("one?")
        model.logprob = -0.01
        second = chat.ask("two?")
    (turn,) = second.record.turns
    assert (first.text, second.text, first.usage.crop_tokens > 0) == ("A", "B", True)
    assert second.usage.text_tokens == turn.prompt_tokens + turn.new_tokens - first.usage.coarse_tokens > 0


def test_leaving_a_stream_early_is_as_if_the_question_had_not_been_asked() -> None:
    agent = plain(lambda messages: ZOOM if len(messages) % 4 == 1 else "done", policy="explicit")
    with agent.chat(IMAGE) as chat:
        chat.ask("one?")
        events = chat.stream("two?")
        assert next(event.kind for event in events) == "token"
        events.close()  # type: ignore[attr-defined]
        answer = chat.ask("three?")
        assert [one.question for one in answer.trace.questions] == ["one?", "three?"]
        assert [event.kind for event in chat.stream("four?")][-1] == "answer"


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_stream_that_is_left_but_still_held_is_ended_by_the_next_question(steps: int, tmp_path: Path) -> None:
    def talk() -> Chat:
        return plain(lambda messages: ZOOM if len(messages) % 4 == 1 else "done", policy="explicit").chat(IMAGE)

    with talk() as chat, talk() as other:
        for one in (chat, other):
            one.ask("one?")
        events = chat.stream("two?")
        for _ in range(steps):
            next(events)
        chat.ask("three?"), other.ask("three?")
        assert list(events) == []
        answer = chat.ask("four?")
        assert [one.question for one in answer.trace.questions] == ["one?", "three?", "four?"]
        other.ask("four?")
        assert chat._state is not None and other._state is not None
        assert chat._state["messages"] == other._state["messages"]
        assert [view.id for view in answer.trace.all_views] == [view.id for view in other.answer.trace.all_views]
        assert Answer.load(chat.save(tmp_path / "out")).trace == answer.trace


def test_what_is_opened_again_keeps_its_history_and_seed(tmp_path: Path) -> None:
    agent = plain(lambda messages: str(len(messages)), state_dir=tmp_path)
    agent.run(IMAGE, "one?", thread="run")
    assert agent.chat(thread="run", history=False).ask("two?").text == "1"
    assert agent.chat(thread="run").ask("three?").text == "1"  # as it was begun
    agent.run(IMAGE, "one?", thread="other")
    assert agent.chat(thread="other").ask("two?").text == "3"
    for wrong in ({"history": True}, {"seed": 7}):
        (name,) = wrong
        with pytest.raises(ConfigError, match=f"begun with {name}="):
            agent.chat(thread="run", **wrong)


def test_it_is_saved_and_opened_again(tmp_path: Path) -> None:
    def reply(messages: list[Message]) -> str:
        if plain_text(messages[-1]).startswith("two") and fails:
            raise OSError("gone")
        return ZOOM if plain_text(messages[-1]).startswith("one") else f"answer {len(messages)}"

    fails = True
    agent = plain(reply, policy="explicit", state_dir=tmp_path)
    with agent.chat(IMAGE, thread="talk") as chat:
        assert chat.ask("one?").text == "answer 3"
        assert chat.ask("two?").status == "error"
    fails = False
    assert agent.resume("talk").text == "answer 5"
    assert agent.threads() == ["talk"]
    with plain(reply, policy="explicit", state_dir=tmp_path).chat(thread="talk") as again:
        assert again.answer is not None and again.answer.text == "answer 5"
        answer = again.ask("three?")
        assert (answer.text, len(answer.trace.questions)) == ("answer 7", 3)
        answer.save(tmp_path / "out")
    loaded = Answer.load(tmp_path / "out")
    assert (loaded.text, loaded.trace) == ("answer 7", answer.trace)
    page = render_html(loaded.trace, by_digest(loaded.trace.all_views, loaded.store.image))
    assert all(text in page for text in ("one?", "Question 2", "three?", "answer 7"))
    assert main(["trace", "show", str(tmp_path / "out")]) == 0
    with pytest.raises(ConfigError, match="already a run 'talk'"):
        agent.chat(IMAGE, thread="talk")


def test_a_conversation_needs_an_image_or_a_name_and_a_question() -> None:
    agent = plain(["A"])
    with pytest.raises(ConfigError, match="Give an image or a thread"):
        agent.chat()
    chat: Chat = agent.chat(IMAGE)
    with pytest.raises(ConfigError, match="No question"):
        chat.report("page.html")
    with pytest.raises(ConfigError, match="not empty"):
        chat.ask(" ")


def test_the_terminal_reads_questions_until_an_empty_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = "\ufeffwhat is the code on the orange circle?\nhow many shapes are there?\n\nnot read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    board = resources.files("qzoom_agent.data") / "demo" / BOARD
    assert main(["chat", str(board), "-q", "--save", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == ["05N", "4"]
    first, _ = Trace.load(tmp_path / "out").questions
    assert first.question == "what is the code on the orange circle?", "without the mark that a file may begin with"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", "-"]) == 2


def test_the_terminal_refuses_a_question_that_is_not_utf8_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"what \xff is it?\nwhat is the code on the orange circle?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", str(resources.files("qzoom_agent.data") / "demo" / BOARD), "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "05N\n" and "valid characters" in captured.err


def test_the_terminal_keeps_what_was_answered_before_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int = -1, /) -> str:
            return super().readline(size) or (_ for _ in ()).throw(KeyboardInterrupt)

    monkeypatch.setattr("sys.stdin", Interrupted("what is the code on the orange circle?\n"))
    board = str(resources.files("qzoom_agent.data") / "demo" / BOARD)
    page = tmp_path / "page.html"
    assert main(["chat", board, "-q", "--save", str(tmp_path / "out"), "--report", str(page)]) == 130
    assert Trace.load(tmp_path / "out").answer == "05N" and "05N" in page.read_text()


@pytest.mark.parametrize("policy", ["implicit", "explicit"])
def test_nano_answers_a_further_question_as_in_a_run_and_encodes_no_view_twice(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode: Callable[..., Any] = hf_session.encode_views

    def counted(backend: Any, images: Any) -> Any:
        encoded.extend(images)
        return encode(backend, images)

    monkeypatch.setattr(hf_session, "encode_views", counted)
    board = str(resources.files("qzoom_agent.data") / "demo" / BOARD)
    agent = Agent.from_pretrained("nano", policy=policy, check=False)
    questions = (
        "what is the code on the orange circle?",
        "what is the code on the blue star?",
        "how many shapes are there?",
    )
    with agent.chat(board) as chat:
        answers = [chat.ask(question) for question in questions]
        shown = [view.id for view in chat._context.store.views if view.kind != "original"]
    assert sorted(encoded) == sorted(shown)
    assert [one.text for one in answers] == [agent.run(board, question).text for question in questions]
    assert answers[1].record.turns[0].cached_tokens > 56
    looks = answers[1].record.looks
    if looks:  # the coarse view was not run through the lower layers again
        assert looks[0].token_layers < answers[0].record.looks[0].token_layers
    assert json.loads(answers[-1].trace.model_dump_json())["follow_ups"][1]["answer"] == answers[-1].text


def test_every_format_can_ask_again() -> None:
    for name, protocol in PROTOCOLS.items():
        backend = ScriptedBackend(["<answer>A</answer>", "<answer>B</answer>"], protocol=name)
        with Agent(backend, policy="explicit").chat(IMAGE, history=True) as chat:
            chat.ask("one?")
            chat.ask("two?")
            assert chat._state is not None
            roles = [one["role"] for one in chat._state["messages"]]
        assert [role for role in roles if role != "system"] == ["user", "assistant"] * 2, protocol.name
