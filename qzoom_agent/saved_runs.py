"""Saved runs of an agent: each step in a SQLite file, each view in a folder named after the run.

A run is worked on by one process at a time, which holds a lock on `.lock` in its folder; a killed process holds
nothing. Of a finished run only the last step is kept. Nothing that is read from the file is executed. Another
checkpointer of LangGraph may hold the steps; how long it keeps them, and what it executes, is its own affair.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NotRequired, cast

import ormsgpack
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.graph.state import CompiledStateGraph
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from qzoom_agent.config import AgentConfig
from qzoom_agent.episode_state import Context, State
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.files import lock, open_lock, translating
from qzoom_agent.graph import compile_graph
from qzoom_agent.trace import Approval, PendingCall, PerceptionRecord, QuestionRecord, Turn
from qzoom_agent.views import View

if TYPE_CHECKING:
    from langgraph.checkpoint.sqlite import SqliteSaver

Graph = CompiledStateGraph[State, Context, State, State]

_STEPS = "episodes.sqlite"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_LARGEST = 1 << 28
"""Most bytes of one saved value."""


class JsonTypesSerializer:
    """A serializer of checkpoints that reads and writes JSON types alone, as compressed msgpack.

    LangGraph's own imports and calls what a stored value names. Runs that it wrote are read too.
    """

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        """Return the kind and the bytes of a value; of an exception, its text."""
        return "msgpack.zlib", zlib.compress(ormsgpack.packb(obj, default=_error_text))

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        """Return a value. Raises ConfigError for anything but JSON types, and for damaged bytes."""
        kind, stored = data
        if kind == "null":
            return None
        try:
            if kind == "msgpack.zlib":
                unpacker = zlib.decompressobj()
                stored = unpacker.decompress(stored, _LARGEST)
                if not unpacker.eof:
                    raise ValueError("it is cut off, or too large")
            elif kind != "msgpack":
                raise ValueError(f"it is of the kind {kind!r:.40}")
            return ormsgpack.unpackb(stored, ext_hook=_refuse)
        except (ValueError, TypeError, zlib.error) as error:
            raise ConfigError(f"A saved step is damaged or was changed: {error}. {_AGAIN}") from None


_AGAIN = "Ask the question again under another name."
_OURS = "qzoom/"
"""Beginning of the ids of runs in a checkpointer that other graphs may use too."""


def _refuse(kind: int, data: bytes) -> Any:
    raise ValueError("it holds an object of Python, not only JSON types")


def _error_text(value: Any) -> str:
    if isinstance(value, BaseException):
        return repr(value)
    raise TypeError(f"{type(value).__name__} is not a JSON type")


class SavedRuns:
    """The runs saved in one folder, by the name of their thread. All methods raise ConfigError for a damaged file."""

    def __init__(self, folder: Path, checkpointer: BaseCheckpointSaver[str] | None = None) -> None:
        """`checkpointer` holds the steps; None: a SQLite file in the folder. Raises ConfigError for what is none."""
        if checkpointer is not None and not isinstance(checkpointer, BaseCheckpointSaver):
            raise ConfigError(
                f"A checkpointer is one of LangGraph, such as InMemorySaver(); got {type(checkpointer).__name__}."
            )
        self.path = folder
        self._given = checkpointer
        self._graph: Graph | None = None
        self._saver: SqliteSaver | None = None
        self._opening = Lock()

    def names(self) -> list[str]:
        """Return the names of all saved runs, sorted."""
        if self._given is not None:
            steps = self._given.list(None)
            ids = {str(one.config["configurable"]["thread_id"]) for one in steps if _is_ours(one)}
            return sorted(id.removeprefix(_OURS) for id in ids if id.startswith(_OURS))
        with translating("read", self.path, "Choose another state_dir."):
            if not (self.path / _STEPS).is_file():
                return []
        # The first step, which has no parent, is before the run has a state.
        query = "SELECT DISTINCT thread_id FROM checkpoints WHERE parent_checkpoint_id IS NOT NULL"
        with self.translating_errors(), self._open().cursor(transaction=False) as steps:
            return sorted(str(name) for (name,) in steps.execute(query))

    def run_config(self, thread: str) -> RunnableConfig:
        """Return LangGraph's configuration of a run."""
        return {"configurable": {"thread_id": self._id(thread)}}

    def _id(self, thread: str) -> str:
        """Return the id of a run's steps: in a checkpointer that was given, one that no other graph has."""
        return thread if self._given is None else _OURS + thread

    def folder(self, thread: str) -> Path:
        """Return the folder of a run's views. Raises ConfigError for a name that is not legal."""
        if not isinstance(thread, str) or not _NAME.fullmatch(thread) or thread.lower().startswith(_STEPS):
            raise ConfigError(
                f"{thread!r} cannot name a run: use up to 100 letters, digits, '.', '_' and '-', the first of them a "
                f"letter, a digit or '_', and not {_STEPS}, the file of saved steps."
            )
        return self.path / thread

    @contextmanager
    def claimed(self, thread: str, *, new: bool) -> Iterator[None]:
        """Keep all others from working on a run; raise ConfigError if one does.

        `new`: raise ConfigError also if the name is taken.
        """
        path = self.folder(thread) / ".lock"
        with translating("save runs in", path.parent, "Choose another state_dir."):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_lock(path)
            held = lock(file)
        with file:
            if not held:
                raise ConfigError(
                    f"The run '{thread}' in {self.path} is being worked on by another process or agent. "
                    "Wait for it, or choose another name."
                )
            with self.translating_errors():
                if new:
                    self.require_free(thread)
                    # what a run that was killed before its first step has left
                    self._checkpointer().delete_thread(self._id(thread))
                with self._reading(thread):
                    _sort_after(self._checkpointer().get_tuple(self.run_config(thread)))
                yield

    def require_free(self, thread: str) -> None:
        """Raise ConfigError if there is a run of that name."""
        if self.state(thread):
            raise ConfigError(
                f"There is already a run '{thread}' in {self.path}. "
                f"Finish it with resume('{thread}'), or choose another name."
            )

    def graph(self) -> Graph:
        """Return the graph that saves each of its steps here."""
        if self._graph is None:
            self._graph = compile_graph(self._checkpointer())
        return self._graph

    def state(self, thread: str) -> State:
        """Return the state after the last saved step of a run; empty if there is none."""
        self.folder(thread)
        with self._reading(thread):
            last = self.graph().get_state(self.run_config(thread))
            if last.metadata is None or last.metadata["step"] < 0:  # killed before its first step
                return cast(State, {})
            return _checked(last.values)

    def update(self, thread: str, values: dict[str, Any], *, after: str) -> None:
        """Save a step that changes the state of a run, which then goes on as after this node."""
        with self._reading(thread):
            self.graph().update_state(self.run_config(thread), values, as_node=after)

    def before_failure(self, thread: str) -> tuple[RunnableConfig, State]:
        """Return the last saved step of a run before the one that failed, and the state after it."""
        with self._reading(thread):
            steps = self.graph().get_state_history(self.run_config(thread))
            return next((step.config, _checked(step.values)) for step in steps if step.values["error"] is None)

    def drop_steps(self, thread: str) -> None:
        """Drop the steps of a finished run that `resume` does not need: all but the last and one before a failure.

        A checkpointer that was given keeps them all.
        """
        if self._given is not None:
            return
        with self._reading(thread):
            last = self.graph().get_state(self.run_config(thread))
            kept = [last.config]
            if last.values["status"] == "error":
                kept.append(self.before_failure(thread)[0])
            ids = [step["configurable"]["checkpoint_id"] for step in kept]
            with self._open().cursor() as steps:
                for table in ("checkpoints", "writes"):
                    steps.execute(
                        f"DELETE FROM {table} WHERE thread_id = ? AND checkpoint_id NOT IN (?, ?)",
                        (thread, ids[0], ids[-1]),
                    )

    def close(self) -> None:
        """Close the file of saved steps; it is opened again when needed."""
        if self._saver is not None:
            self._saver.conn.close()
        self._saver = self._graph = None

    @contextmanager
    def translating_errors(self) -> Iterator[None]:
        """Raise what SQLite says of a damaged or locked file as a ConfigError."""
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"The saved steps in {self.path}/{_STEPS} cannot be used: {error}. If another process is at work "
                "there, wait for it; else choose another state_dir."
            ) from None

    @contextmanager
    def _reading(self, thread: str) -> Iterator[None]:
        try:
            with self.translating_errors():
                yield
        except QzoomError:
            raise
        except Exception as error:  # LangGraph and pydantic raise any class on steps that are not ours
            raise ConfigError(
                f"The saved steps of the run '{thread}' in {self.path} are damaged, or a later release saved them: "
                f"{type(error).__name__}. {_AGAIN}"
            ) from error

    def _checkpointer(self) -> BaseCheckpointSaver[str]:
        return self._open() if self._given is None else self._given

    def _open(self) -> SqliteSaver:
        from langgraph.checkpoint.sqlite import SqliteSaver

        with self._opening, self.translating_errors():
            if self._saver is not None:
                return self._saver
            with translating("save runs in", self.path, "Choose another state_dir."):
                self.path.mkdir(parents=True, exist_ok=True)
                with open_lock(self.path / ".lock") as file:
                    lock(file, wait=True)  # of several processes that make one database, SQLite fails all but one
                    steps = sqlite3.connect(self.path / _STEPS, check_same_thread=False)
                    saver = SqliteSaver(steps, serde=JsonTypesSerializer())
                    try:
                        saver.setup()
                    except sqlite3.Error:
                        steps.close()
                        raise
            self._saver = saver
            return saver


def _sort_after(last: CheckpointTuple | None) -> None:
    """Let this process give steps ids that sort after that of the last saved one.

    The last step of a run is the one of the highest id, and an id begins with the time: a clock that was set back, or
    that of another machine, would put new steps before the old ones.
    """
    with suppress(ImportError, AttributeError):  # a module of LangGraph's own, which a later version may not have
        from langgraph.checkpoint.base import id as step_ids

        if last is not None and (step := step_ids.UUID(last.checkpoint["id"])).version == 6:
            step_ids._last_v6_timestamp = max(step_ids._last_v6_timestamp or 0, step.time)  # type: ignore[assignment]


def _is_ours(step: CheckpointTuple) -> bool:
    """Return whether a step of a checkpointer, which other graphs may use too, is of a run that has begun."""
    return (
        step.metadata.get("step", -1) >= 0
        and {"question", "backend", "views"} <= step.checkpoint["channel_values"].keys()
    )


def _checked(values: Any) -> State:
    """Return the values of a saved step, or raise any error if they are not the state of a run."""
    TypeAdapter(State).validate_python(values)
    TypeAdapter(_Records).validate_python(values)
    return cast(State, values)


class _Records(TypedDict):
    """The parts of a state that the graph reads as these classes."""

    config: AgentConfig
    views: list[View]
    turns: list[Turn]
    turn: Turn | None
    waiting: NotRequired[PendingCall | None]
    approval: NotRequired[Approval | None]
    perception: PerceptionRecord | None
    further_looks: NotRequired[list[PerceptionRecord]]
    asked: NotRequired[list[QuestionRecord]]
