"""Saved runs of an agent: each step in a SQLite file, each view in a folder named after the run."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph

from qzoom_agent.errors import ConfigError
from qzoom_agent.graph import Context, State, compile_graph

if TYPE_CHECKING:
    from langgraph.checkpoint.sqlite import SqliteSaver

Graph = CompiledStateGraph[State, Context, State, State]

_STEPS = "episodes.sqlite"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class SavedRuns:
    """The runs saved in one folder, by the name of their thread. All methods raise ConfigError for a damaged file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._graph: Graph | None = None
        self._saver: SqliteSaver | None = None

    def names(self) -> list[str]:
        """Return the names of all saved runs, sorted."""
        if not (self.path / _STEPS).is_file():
            return []
        with self.translating_errors():
            return sorted({saved.config["configurable"]["thread_id"] for saved in self._open().list(None)})

    def folder(self, thread: str) -> Path:
        """Return the folder of a run's views. Raises ConfigError for a name that is not legal."""
        if not _NAME.fullmatch(thread) or thread.lower().startswith(_STEPS):
            raise ConfigError(
                f"{thread!r} cannot name a run: use up to 100 letters, digits, '.', '_' and '-', the first of them a "
                f"letter, a digit or '_', and not {_STEPS}, the file of saved steps."
            )
        return self.path / thread

    def graph(self) -> Graph:
        """Return the graph that saves each of its steps here."""
        if self._graph is None:
            self._graph = compile_graph(self._open())
        return self._graph

    def state(self, thread: str) -> State:
        """Return the state after the last saved step of a run; empty if there is none."""
        self.folder(thread)
        with self.translating_errors():
            return cast(State, self.graph().get_state(run_config(thread)).values)

    def before_failure(self, thread: str) -> tuple[RunnableConfig, State]:
        """Return the last saved step of a run before the one that failed, and the state after it."""
        with self.translating_errors():
            steps = self.graph().get_state_history(run_config(thread))
            return next((step.config, cast(State, step.values)) for step in steps if step.values["error"] is None)

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

    def _open(self) -> SqliteSaver:
        from langgraph.checkpoint.sqlite import SqliteSaver

        if self._saver is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._saver = SqliteSaver(sqlite3.connect(self.path / _STEPS, check_same_thread=False))
            except (OSError, sqlite3.Error) as error:
                raise ConfigError(f"Cannot save runs in {self.path}: {error}. Choose another state_dir.") from None
        return self._saver


def run_config(thread: str) -> RunnableConfig:
    """Return LangGraph's configuration of a run."""
    return {"configurable": {"thread_id": thread}}
