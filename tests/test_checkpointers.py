"""Steps in any checkpointer of LangGraph, and callbacks of LangChain."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.errors import ConfigError
from tests.test_resume import IMAGE, SCRIPT, recording


def interrupted_run_resumes(checkpointer: BaseCheckpointSaver[str], folder: Path | None) -> None:
    """Leave a run after its first call, and finish it with another agent that asks only what is missing."""
    turns: list[int] = []
    agent = Agent(recording(turns), state_dir=folder, checkpointer=checkpointer)
    for event in agent.stream(IMAGE, "What?", thread="one"):
        if event.kind == "call":
            break
    asked = len(turns)
    other = (
        agent.replace(backend=recording(turns))
        if folder is None
        else Agent(recording(turns), state_dir=folder, checkpointer=checkpointer)
    )
    assert other.threads() == ["one"]
    answer = other.resume("one")
    assert (answer.text, answer.status) == ("42", "answered")
    assert turns[:asked] == list(range(asked)) and turns[asked:] == list(range(turns[asked], len(SCRIPT)))
    whole = Agent(recording([])).run(IMAGE, "What?")
    assert [turn.text for turn in answer.trace.turns] == [turn.text for turn in whole.trace.turns]
    assert other.resume("one").trace == answer.trace, "a finished run is not asked again"
    with pytest.raises(ConfigError, match="already a run 'one'"):
        other.run(IMAGE, "What?", thread="one")


def test_a_run_resumes_from_a_checkpointer_that_is_given() -> None:
    saver = InMemorySaver()
    other: Any = {"configurable": {"thread_id": "of another graph", "checkpoint_ns": ""}}
    interrupted_run_resumes(saver, None)
    assert saver.get_tuple(other) is None
    assert not list(Path().glob("episodes.sqlite"))


def test_its_images_may_outlive_the_agent(tmp_path: Path) -> None:
    interrupted_run_resumes(InMemorySaver(), tmp_path)
    assert list((tmp_path / "one").glob("*.png")) and not (tmp_path / "episodes.sqlite").exists()


def test_a_run_and_another_graph_may_have_one_name_in_one_checkpointer() -> None:
    saver = InMemorySaver()
    agent, thread = Agent(recording([]), checkpointer=saver), {"configurable": {"thread_id": "one"}}

    def node(state: dict[str, Any]) -> dict[str, Any]:
        return {"first": agent.run(IMAGE, "What?", thread="one").text}

    graph = StateGraph(dict).add_node("ask", node).add_node("wait", lambda state: {**state, "said": interrupt("?")})
    around = graph.add_edge(START, "ask").add_edge("ask", "wait").compile(checkpointer=saver)
    around.invoke({}, thread)  # type: ignore[call-overload]
    assert agent.threads() == ["one"] and agent.resume("one").text == "42"
    assert around.invoke(Command(resume="yes"), thread) == {"first": "42", "said": "yes"}  # type: ignore[call-overload]
    assert agent.resume("one").text == "42"


@pytest.mark.parametrize("form", ["run", "stream", "chat"])
def test_a_node_of_another_graph_that_is_run_again_asks_again(form: str) -> None:
    """The checkpoints of the graph around it are not those of the run."""
    agent, records = Agent(recording([])), list[Answer]()

    def node(state: dict[str, Any]) -> dict[str, Any]:
        question = f"What? {len(records)}"
        if form == "run":
            records.append(agent.run(IMAGE, question))
        elif form == "chat":
            records.append(agent.chat(IMAGE).ask(question))
        else:
            *events, last = agent.stream(IMAGE, question)
            assert last.answer is not None and "view" in {event.kind for event in events}
            records.append(last.answer)
        return {"said": interrupt("Is that right?")}

    around = StateGraph(dict).add_node("ask", node).add_edge(START, "ask").compile(checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "one"}}
    around.invoke({}, thread)
    assert around.invoke(Command(resume="yes"), thread) == {"said": "yes"}
    first, second = records
    assert (first.record.question, second.record.question) == ("What? 0", "What? 1")
    assert second.boxes == first.boxes and len(second.store.shown) == len(first.store.shown) > 1


def test_anything_else_is_no_checkpointer() -> None:
    with pytest.raises(ConfigError, match=r"one of LangGraph.*got str"):
        Agent(recording([]), checkpointer="sqlite")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of Postgres of its own, at a socket; it does not run as root."""
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    if not all(programs.values()):
        pytest.skip("no Postgres on the PATH")
    folder = tmp_path_factory.mktemp("postgres")
    folder.chmod(0o777)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)
    data, who = folder / "data", ["setpriv", "--reuid=65534", "--clear-groups"]

    def run(*command: str) -> None:
        subprocess.run([*who, *command], check=True, capture_output=True, cwd=folder)

    run(str(programs["initdb"]), "-D", str(data), "-U", "qzoom", "--auth=trust")
    run(str(programs["pg_ctl"]), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -h ''", "start")
    yield f"host={folder} user=qzoom dbname=postgres"
    run(str(programs["pg_ctl"]), "-D", str(data), "-m", "immediate", "stop")


@pytest.mark.slow
def test_a_run_resumes_from_postgres(postgres: str, tmp_path: Path) -> None:
    savers = pytest.importorskip("langgraph.checkpoint.postgres")
    with savers.PostgresSaver.from_conn_string(postgres) as saver:
        saver.setup()
        interrupted_run_resumes(saver, tmp_path)


class Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.nodes: list[str] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **how: Any) -> None:
        self.nodes.append(str(how.get("name")))


def test_callbacks_hear_every_step() -> None:
    heard = Heard()
    agent = Agent(recording([]), callbacks=[heard])
    assert agent.replace(policy="explicit").run(IMAGE, "What?").text == "42"
    assert heard.nodes[0] == "qzoom" and heard.nodes[-1] == "finish"
    assert heard.nodes.count("think") == len(SCRIPT) and "act" in heard.nodes and "perceive" in heard.nodes
