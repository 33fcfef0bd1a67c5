"""Files of saved runs that are damaged, hostile, old, shared by processes, or many."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import process_time, sleep
from typing import Any

import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from PIL import Image

from qzoom_agent import Agent
from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.graph import compile_graph
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.saved_runs import JsonTypesSerializer, SavedRuns

IMAGE = Image.linear_gradient("L").resize((200, 150)).convert("RGB")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def scripted(folder: Path, *replies: str) -> Agent:
    return Agent(ScriptedBackend(list(replies or ("42",))), state_dir=folder)


def planted(call: Callable[..., Any], *arguments: Any) -> dict[str, tuple[str, Any]]:
    """Stored values that LangGraph's own serializer turns into a call."""
    name = (call.__module__, call.__qualname__)
    codes = {0: (*name, arguments[0]), 1: (*name, arguments), 2: (*name, {"mode": 0o700}), 3: (*name, *arguments)}
    values = {
        f"ext {code}": ("msgpack", ormsgpack.packb({"v": [ormsgpack.Ext(code, ormsgpack.packb(content))]}))
        for code, content in codes.items()
    }
    constructor = {"lc": 2, "type": "constructor", "id": list(name), "args": list(arguments)}
    pickled = f"c{name[0]}\n{name[1]}\n(S'{arguments[0]}'\ntR.".encode()
    return {**values, "json": ("json", json.dumps(constructor).encode()), "pickle": ("pickle", pickled)}


@pytest.mark.parametrize("table", ["checkpoints", "writes"])
@pytest.mark.parametrize("kind", [*planted(str, ""), "of another library"])
def test_a_call_planted_in_a_saved_step_is_refused(kind: str, table: str, tmp_path: Path) -> None:
    import os

    canary = tmp_path / "canary"
    values = planted(os.mkdir, str(canary))
    stored = values.get(kind, ("arrow", b"\0"))
    with scripted(tmp_path / "state") as agent:
        state, context = agent.begin(IMAGE, "What?", thread="one")
        saved = SavedRuns(tmp_path / "state")
        saved.graph().invoke(state, config=saved.run_config("one"), context=context, interrupt_before=["think"])
        saved.close()
    with closing(sqlite3.connect(tmp_path / "state" / "episodes.sqlite")) as steps:
        change = {
            "checkpoints": "UPDATE checkpoints SET type = ?, checkpoint = ?",
            "writes": "INSERT INTO writes (thread_id, checkpoint_id, task_id, idx, channel, type, value) "
            "SELECT thread_id, max(checkpoint_id), 'task', 0, 'views', ?, ? FROM checkpoints",
        }[table]
        assert steps.execute(change, stored).rowcount
        steps.commit()
    with scripted(tmp_path / "state") as agent:
        agent.threads()
        for use in (lambda: agent.resume("one"), lambda: agent.run(IMAGE, "What?", thread="one")):
            with pytest.raises(QzoomError, match=r"damaged or was changed: .* under another name"):
                use()
    assert not canary.exists()


@pytest.mark.parametrize("key", ["tool", "protocol", "review.rule"])
def test_a_module_named_in_a_saved_step_is_not_imported(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of saved runs from elsewhere may hold a module beside them, and be the working directory."""
    module = f"planted_{key[0]}"  # imported at most once
    (tmp_path / f"{module}.py").write_text("import pathlib\n\npathlib.Path('canary').touch()\nfound = print\n")
    monkeypatch.chdir(tmp_path)
    with scripted(tmp_path) as agent:
        state, context = agent.begin(IMAGE, "What?", thread="one")
        config = AgentConfig.model_validate(state["config"]).replace(**{key: f"{module}:found"})
        state["config"] = config.model_dump(mode="json")
        saved = SavedRuns(tmp_path)
        saved.graph().invoke(state, config=saved.run_config("one"), context=context, interrupt_before=["think"])
        saved.close()
    with scripted(tmp_path) as agent, pytest.raises(ConfigError, match=f"begun with the {key} {module}:found"):
        agent.resume("one")
    assert not (tmp_path / "canary").exists()


@given(JSON)
@settings(max_examples=15, deadline=None)
def test_json_values_come_back_as_they_were_stored(value: Any) -> None:
    serializer = JsonTypesSerializer()
    stored = serializer.dumps_typed(value)
    assert serializer.loads_typed(stored) == value
    if value is not None:
        assert serializer.loads_typed(JsonPlusSerializer().dumps_typed(value)) == value
    for damaged in (stored[1][:-1], stored[1][:-2] + bytes(255 - byte for byte in stored[1][-2:])):
        with pytest.raises(ConfigError, match="damaged"):
            serializer.loads_typed((stored[0], damaged))


def test_only_json_types_are_stored() -> None:
    serializer = JsonTypesSerializer()
    assert "no room" in serializer.loads_typed(serializer.dumps_typed(MemoryError("no room")))
    with pytest.raises(ormsgpack.MsgpackEncodeError, match="not msgpack serializable: PosixPath"):
        serializer.dumps_typed({"path": Path("/")})


def _packed(**changes: Any) -> bytes:
    empty: dict[str, Any] = {"channel_values": {}, "channel_versions": {}, "versions_seen": {}}
    return ormsgpack.packb({"v": 4, "id": "x", "ts": "", **empty, **changes})


@pytest.mark.parametrize(
    "stored",
    [b"", b"\0" * 50, None, "text", 7, ormsgpack.packb({}), ormsgpack.packb(5), _packed(channel_values={"id": 5}),
     _packed(channel_values=[1]), _packed(channel_values={"views": [{"digest": "../../x"}], "turns": 3})],
    ids=range(10),
)  # fmt: skip
def test_damaged_steps_say_what_to_do(stored: Any, tmp_path: Path) -> None:
    with scripted(tmp_path) as agent:
        agent.run(IMAGE, "What?", thread="one")
    with closing(sqlite3.connect(tmp_path / "episodes.sqlite")) as steps:
        steps.execute("UPDATE checkpoints SET type = 'msgpack', checkpoint = ?", (stored,))
        steps.commit()
    with scripted(tmp_path) as agent:
        assert agent.threads() == ["one"]
        with pytest.raises(ConfigError, match=r"damaged.* Ask the question again under another name"):
            agent.resume("one")
        assert agent.run(IMAGE, "What?", thread="two").text == "42", "other runs go on"


@pytest.mark.parametrize("change", ["metadata = 'torn {'", "thread_id = x'ff', parent_checkpoint_id = '1'"])
def test_damaged_columns_say_what_to_do(change: str, tmp_path: Path) -> None:
    with scripted(tmp_path) as agent:
        agent.run(IMAGE, "What?", thread="one")
    with closing(sqlite3.connect(tmp_path / "episodes.sqlite")) as steps:
        steps.execute(f"UPDATE checkpoints SET {change}")
        steps.commit()
    with scripted(tmp_path) as agent, pytest.raises(ConfigError, match=r"damaged|There is no run"):
        agent.threads()
        agent.resume("one")


def test_runs_saved_by_earlier_versions_go_on(tmp_path: Path) -> None:
    """They were stored by LangGraph's serializer, with all their steps."""
    with scripted(tmp_path) as agent:
        state, context = agent.begin(IMAGE, "What?", thread="old")
        with closing(sqlite3.connect(tmp_path / "episodes.sqlite", check_same_thread=False)) as steps:
            graph = compile_graph(SqliteSaver(steps))
            graph.invoke(state, config=SavedRuns(tmp_path).run_config("old"), context=context)
            unfinished, context = agent.begin(IMAGE, "And this?", thread="stopped")
            graph.invoke(
                unfinished,
                config=SavedRuns(tmp_path).run_config("stopped"),
                context=context,
                interrupt_before=["think"],
            )
    with scripted(tmp_path, "43") as agent:
        assert agent.threads() == ["old", "stopped"]
        assert agent.resume("old").text == "42"
        assert agent.resume("stopped").text == "43"


def test_a_run_at_a_step_of_a_later_version_says_so(tmp_path: Path) -> None:
    with scripted(tmp_path) as agent:
        state, context = agent.begin(IMAGE, "What?", thread="later")
        with closing(sqlite3.connect(tmp_path / "episodes.sqlite", check_same_thread=False)) as steps:
            saver = SqliteSaver(steps, serde=JsonTypesSerializer())
            config = SavedRuns(tmp_path).run_config("later")
            compile_graph(saver).invoke(state, config=config, context=context, interrupt_before=["think"])
            for row, kind, stored in steps.execute("SELECT rowid, type, checkpoint FROM checkpoints").fetchall():
                step = saver.serde.loads_typed((kind, stored))
                for part in (step["channel_values"], step["channel_versions"]):
                    for name in [name for name in part if name == "branch:to:think"]:
                        part["branch:to:verify"] = part.pop(name)
                changed = saver.serde.dumps_typed(step)[1]
                steps.execute("UPDATE checkpoints SET checkpoint = ? WHERE rowid = ?", (changed, row))
            steps.commit()
    with (
        scripted(tmp_path) as agent,
        pytest.raises(ConfigError, match=r"'later' is at a step .* a later release saved it"),
    ):
        agent.resume("later")


PROCESS = """
import sys, time
from pathlib import Path
from PIL import Image
from qzoom_agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.scripted import ScriptedBackend
folder, count = Path(sys.argv[1]), int(sys.argv[2])
agent = Agent(ScriptedBackend(lambda messages: "42"), state_dir=folder / "state")
(folder / sys.argv[3]).touch()
while len(list(folder.glob("ready*"))) < 2: time.sleep(0.005)
for i in range(count):
    try:
        agent.run(Image.new("RGB", (80, 60), (i, 0, 0)), "What?", thread=f"t{i}")
        print(i)
    except ConfigError as error:
        assert "already a run" in str(error) or "being worked on" in str(error), error
"""


def test_of_several_processes_one_gets_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new process and this one."""
    count = 6
    mine, theirs = ([str(tmp_path), str(count), f"ready{i}"] for i in range(2))
    monkeypatch.setattr(sys, "argv", ["-c", *mine])
    with subprocess.Popen([sys.executable, "-c", PROCESS, *theirs], stdout=subprocess.PIPE, text=True) as other:
        exec(PROCESS, {})
        said, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    answered = [int(line) for line in [*capsys.readouterr().out.split(), *said.split()]]
    assert sorted(answered) == list(range(count)), "each name is answered once"
    with scripted(tmp_path / "state") as agent:
        assert len(agent.threads()) == count
        assert {agent.resume(name).text for name in agent.threads()} == {"42"}


def test_a_run_at_work_is_refused_to_others(tmp_path: Path) -> None:
    with scripted(tmp_path) as agent, scripted(tmp_path) as other:
        events = agent.stream(IMAGE, "What?", thread="one")
        next(events)
        for use in (lambda: other.resume("one"), lambda: other.run(IMAGE, "What?", thread="one")):
            with pytest.raises(ConfigError, match=r"being worked on|already a run"):
                use()
        assert [event.kind for event in events][-1] == "answer"
        assert other.resume("one").text == "42"


def test_threads_that_save_their_first_steps_at_once_share_one_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened, connect = list[Any](), sqlite3.connect

    def slow(*where: Any, **how: Any) -> Any:
        sleep(0.05)
        opened.append(connect(*where, **how))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", slow)
    agent = Agent(ScriptedBackend(lambda messages: "42"), state_dir=tmp_path)
    with agent, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: agent.run(IMAGE, "What?", thread=name), "abcdefgh"))
        assert (len(opened), agent.threads()) == (1, list("abcdefgh"))
    assert {answer.text for answer in answers} == {"42"}


def test_many_runs_are_small_and_quick_to_list(tmp_path: Path) -> None:
    zoom = "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>"
    with Agent(ScriptedBackend(lambda m: zoom if len(m) < 4 else "42"), state_dir=tmp_path) as agent:
        first = agent.run(IMAGE, "What?", thread="t0")
        assert len(first.trace.turns) > 1
    with closing(sqlite3.connect(tmp_path / "episodes.sqlite")) as steps:
        for i in range(1, 301):
            steps.execute(
                "INSERT INTO checkpoints SELECT ?, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, "
                "checkpoint, metadata FROM checkpoints WHERE thread_id = 't0'", (f"t{i}",)
            )  # fmt: skip
        assert steps.execute("SELECT count(*) FROM checkpoints").fetchone() == (301,)
        assert steps.execute("SELECT count(*) FROM writes").fetchone() == (0,)
        steps.commit()
    size = sum(path.stat().st_size for path in tmp_path.glob("episodes.sqlite*"))
    assert size / 301 < 5_000
    with scripted(tmp_path) as agent:
        began = process_time()
        assert len(agent.threads()) == 301
        assert process_time() - began < 0.2
        assert agent.resume("t0").trace == first.trace


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "episodes.sqlite").mkdir(parents=True)
    (tmp_path / "lock" / ".lock").mkdir(parents=True)
    (tmp_path / "thread").mkdir()
    (tmp_path / "thread" / "one").touch()
    for name in ("file", "taken", "lock", "thread"):
        with scripted(tmp_path / name) as agent, pytest.raises(QzoomError, match=r"Choose another|choose another"):
            agent.run(IMAGE, "What?", thread="one")
    assert SavedRuns(tmp_path / "file").names() == []
