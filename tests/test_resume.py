"""An episode survives the death of its process: nothing done is done again, and the outcome is the same."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langgraph.checkpoint.base import id as step_ids
from PIL import Image

from qzoom_agent import Agent, AgentConfig
from qzoom_agent.answer import Answer
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.messages import Message
from qzoom_agent.models.interface import ImageSource, Reply, Session
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import PerceptionRecord

IMAGE = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
SCRIPT = [
    "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>",
    "<zoom><loc_7><loc_14><loc_70><loc_77></zoom>",
    "<zoom><loc_900><loc_900><loc_990><loc_990></zoom>",
    "42",
]
CONFIG = AgentConfig(seed=3)

# Runs this very file's script in a process of its own; the reply of turn `slow` never comes.
CHILD = """
import runpy, sys, time
from pathlib import Path
here = runpy.run_path(sys.argv[1])
folder, slow = Path(sys.argv[2]), int(sys.argv[3])
def reply(messages):
    turn = here["turn_of"](messages)
    (folder / "asked").write_text(str(turn))
    time.sleep(60 if turn == slow else 0)
    return here["SCRIPT"][turn]
agent = here["Agent"](here["ScriptedBackend"](reply), config=here["CONFIG"], state_dir=folder / "state")
agent.run(here["IMAGE"], "What?", thread="one")
"""


def turn_of(messages: list[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def recording(turns: list[int]) -> ScriptedBackend:
    """The same model, noting which turns it is asked for."""

    def reply(messages: list[Message]) -> str:
        turns.append(turn_of(messages))
        return SCRIPT[turns[-1]]

    return ScriptedBackend(reply)


def run_and_kill(folder: Path, slow: int) -> None:
    """Run the episode in a child process and kill it while its model is busy with turn `slow`."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, __file__, str(folder), str(slow)])
    try:
        asked, patience = folder / "asked", time.monotonic() + 60
        while not (asked.exists() and asked.read_text() == str(slow)):
            assert child.poll() is None, "the child ended by itself"
            assert time.monotonic() < patience, "the child never came to that turn"
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def essence(answer: Answer) -> dict[str, object]:
    """The record without names and times, which differ between two runs of the same episode."""
    trace = answer.trace.model_dump(exclude={"id": True, "usage": {"seconds"}, "environment": True})
    for turn in trace["turns"]:
        # A resumed session computes the whole conversation anew.
        for key in ("act_seconds", "cached_tokens", "visual_tokens"):
            del turn[key]
    return trace


@pytest.mark.parametrize("slow", [1, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (0, 3))])
def test_a_killed_episode_is_finished_by_another_process(tmp_path: Path, slow: int) -> None:
    run_and_kill(tmp_path, slow)
    turns: list[int] = []
    with Agent(recording(turns), state_dir=tmp_path / "state") as agent:
        assert agent.threads() == ["one"]
        answer = agent.resume("one")
    assert turns == list(range(slow, 4))
    assert (answer.status, answer.text, answer.trace.id) == ("answered", "42", "one")
    whole = Agent(recording([]), config=CONFIG).run(IMAGE, "What?")
    assert essence(answer) == essence(whole)
    for view in whole.trace.views:
        assert answer.store.image(view.id) == whole.store.image(view.id)


def test_saved_steps_are_small(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        assert len(agent.run(IMAGE, "What?", thread="one").trace.turns) == 4
    assert sum(path.stat().st_size for path in tmp_path.glob("episodes.sqlite*")) < 200_000
    with closing(sqlite3.connect(tmp_path / "episodes.sqlite")) as saved:
        steps, largest = saved.execute("select count(*), max(length(checkpoint)) from checkpoints").fetchone()
    assert steps == 1, "of a finished run only the last step is kept"
    assert largest < 10_000


def test_a_finished_run_is_returned_without_asking_the_model(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        first = agent.run(IMAGE, "What?", thread="one")
    turns: list[int] = []
    with Agent(recording(turns), state_dir=tmp_path) as agent:
        again = agent.resume("one")
    assert turns == []
    assert again.trace == first.trace


@pytest.mark.parametrize("broken", [0, 2])
def test_a_run_that_its_model_ended_goes_on_where_it_failed(tmp_path: Path, broken: int) -> None:
    def reply(messages: list[Message]) -> str:
        if turn_of(messages) == broken:
            raise ConnectionError("the server is away")
        return SCRIPT[turn_of(messages)]

    with Agent(ScriptedBackend(reply), config=CONFIG, state_dir=tmp_path) as agent:
        for answer in (agent.run(IMAGE, "What?", thread="one"), agent.resume("one")):  # it may fail again
            assert answer.status == "error" and "away" in str(answer)
            assert len(answer.trace.turns) == broken
    turns: list[int] = []
    with Agent(recording(turns), state_dir=tmp_path) as agent:
        answer = agent.resume("one")
        assert turns == list(range(broken, 4)), "turns that are done are not asked for again"
        assert agent.resume("one").trace == answer.trace and len(turns) == 4 - broken
    assert essence(answer) == essence(Agent(recording([]), config=CONFIG).run(IMAGE, "What?"))


def test_a_look_that_failed_is_looked_again(tmp_path: Path) -> None:
    found = PerceptionRecord(
        view="coarse", score=0.1, threshold=0.5, heat=[], cutoff=None, reason="", aligned=False,
        prompt_tokens=9, visual_tokens=9, token_layers=9.0, seconds=0.0,
    )  # fmt: skip
    sights: list[Exception | list[PerceptionRecord]] = [MemoryError("no room"), [found]]

    def look(messages: list[Message]) -> list[PerceptionRecord]:
        seen = sights.pop(0)
        if isinstance(seen, Exception):
            raise seen
        return seen

    with Agent(ScriptedBackend(["42"], looks=look), state_dir=tmp_path) as agent:
        assert agent.run(IMAGE, "What?", thread="one").status == "error"
        answer = agent.resume("one")
    assert answer.text == "42" and answer.trace.perception is not None
    assert [view.id for view in answer.trace.views] == ["original", "coarse"]


def set_clock_back(patch: pytest.MonkeyPatch, hours: int) -> None:
    """Give the steps of this process the ids of a new process whose clock is behind."""
    patch.setattr(step_ids, "_last_v6_timestamp", None)
    patch.setattr(step_ids, "time", SimpleNamespace(time_ns=lambda: time.time_ns() - hours * 3600 * 10**9))


def test_a_run_goes_on_where_the_clock_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    for event in Agent(recording(turns), state_dir=tmp_path).stream(IMAGE, "What?", thread="one"):
        if event.kind == "call":
            break
    set_clock_back(monkeypatch, 1)
    with Agent(recording(turns), state_dir=tmp_path) as agent:
        answer, asked = agent.resume("one"), len(turns)
        assert answer.text == "42"
        set_clock_back(monkeypatch, 2)
        assert agent.resume("one").trace == answer.trace and len(turns) == asked


def test_a_conversation_and_a_decision_count_where_the_clock_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Agent(ScriptedBackend(["1"]), state_dir=tmp_path) as agent, agent.chat(IMAGE, thread="talk") as chat:
        chat.ask("One?")
    waits = Agent(ScriptedBackend([SCRIPT[0]]), state_dir=tmp_path, approve=True)
    assert waits.run(IMAGE, "What?", thread="call").status == "waiting"
    set_clock_back(monkeypatch, 1)
    assert Agent(ScriptedBackend(["42"]), state_dir=tmp_path, approve=True).resume("call", True).text == "42"
    with Agent(ScriptedBackend(["2"]), state_dir=tmp_path) as agent, agent.chat(thread="talk") as chat:
        chat.ask("Two?")
    answer = Agent(ScriptedBackend(["3"]), state_dir=tmp_path).chat(thread="talk").answer
    assert answer is not None and [one.answer for one in answer.trace.questions] == ["1", "2"]


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        one = agent.run(IMAGE, "What?", thread="one")
        two = agent.run(IMAGE.rotate(90), "And this?", thread="two")
        assert agent.threads() == ["one", "two"]
        assert agent.resume("one").trace == one.trace
        assert agent.resume("two").trace == two.trace


def test_a_streamed_run_is_saved_too(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        *_, last = agent.stream(IMAGE, "What?", thread="one")
        assert last.answer is not None
        assert agent.resume("one").trace == last.answer.trace


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        agent.run(IMAGE, "What?", thread="one")
        with pytest.raises(ConfigError, match=r"no run 'two'.*Saved runs: one"):
            agent.resume("two")
        with pytest.raises(ConfigError, match=r"already a run 'one'.*resume\('one'\)"):
            agent.run(IMAGE, "What?", thread="one")
        for name in ("../up", "", ".", "a/b", "x" * 101, "a\n", 3, "episodes.sqlite", "Episodes.sqlite-wal"):
            with pytest.raises(ConfigError, match="cannot name a run"):
                agent.run(IMAGE, "What?", thread=name)  # type: ignore[arg-type]
        for image in (tmp_path / "one").iterdir():
            image.unlink()
        with pytest.raises(ImageError, match="missing"):
            agent.resume("one")
    other = ScriptedBackend(["42"], name="other")
    with Agent(other, state_dir=tmp_path) as agent, pytest.raises(ConfigError, match=r"'scripted'.*'other'"):
        agent.resume("one")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot save runs"):
        Agent(other, state_dir=tmp_path / "file").run(IMAGE, "What?", thread="one")


def test_a_run_that_never_began_is_not_among_the_saved_ones(tmp_path: Path) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        assert agent.threads() == []
        agent.stream(IMAGE, "What?", thread="three")
        agent.run(IMAGE, "What?", thread="one")
        assert agent.threads() == ["one"]
        with pytest.raises(ConfigError, match=r"no run 'three' .* Saved runs: one\."):
            agent.resume("three")
        assert agent.run(IMAGE, "What?", thread="three").text == "42", "its name is still free"
    assert Agent(recording([]), state_dir=tmp_path).threads() == ["one", "three"]


def test_a_damaged_file_of_steps_is_named(tmp_path: Path) -> None:
    (tmp_path / "episodes.sqlite").write_bytes(b"no database at all" * 100)
    with Agent(recording([]), state_dir=tmp_path) as agent:
        for use in (
            agent.threads,
            lambda: agent.resume("one"),
            lambda: agent.run(IMAGE, "What?", thread="one"),
            lambda: agent.stream(IMAGE, "What?", thread="one"),
        ):
            with pytest.raises(ConfigError, match=r"episodes\.sqlite cannot be used: file is not a database"):
                use()


def test_a_locked_file_of_steps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Agent(recording([]), state_dir=tmp_path) as agent:
        agent.run(IMAGE, "What?", thread="one")
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.01))
    with (
        closing(sqlite3.connect(tmp_path / "episodes.sqlite")) as other,
        Agent(recording([]), state_dir=tmp_path) as agent,
    ):
        other.execute("begin exclusive")
        with pytest.raises(ConfigError, match=r"database is locked\. If another process .* wait for it"):
            agent.run(IMAGE, "What?", thread="two")
        other.rollback()
        events = agent.stream(IMAGE, "What?", thread="two")
        other.execute("begin exclusive")
        with pytest.raises(ConfigError, match="database is locked"):
            next(events)
        other.rollback()
        assert agent.run(IMAGE, "What?", thread="two").text == "42"


class InPlace(ScriptedBackend):
    """A model whose session puts the pixels into the messages that it is given, as many chat templates want them."""

    def session(self, image: ImageSource) -> Session:
        inner = super().session(image)

        class Filling:
            close = inner.close

            def reply(self, messages: Sequence[Message], **how: Any) -> Reply:
                reply = inner.reply(deepcopy(list(messages)), **how)
                for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
                    part["image"] = image(part.pop("view"))  # type: ignore[typeddict-unknown-key,misc]
                return reply

        return Filling()


def test_a_session_may_put_pixels_into_the_messages_it_is_given(tmp_path: Path) -> None:
    agent = Agent(InPlace(SCRIPT * 3), config=CONFIG, state_dir=tmp_path)
    plain = Agent(ScriptedBackend(SCRIPT), config=CONFIG).run(IMAGE, "What?")
    answer = agent.run(IMAGE, "What?", thread="one")
    assert (answer.text, answer.boxes) == (plain.text, plain.boxes)
    assert agent.resume("one").trace == answer.trace
    with agent.chat(IMAGE, history=True) as chat:
        assert [chat.ask("What?").text, chat.ask("And now?").text] == ["42", "42"]
