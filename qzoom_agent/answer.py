"""What a run gives: the answer with its record, the events of a stream, and the result of a look alone."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qzoom_agent.config import AgentConfig
from qzoom_agent.episode_state import EventKind
from qzoom_agent.trace import PerceptionRecord, Status, Trace, Usage, by_digest
from qzoom_agent.views import ViewStore


@dataclass(frozen=True)
class Answer:
    """The result of one episode."""

    text: str
    """The answer; empty if there is none."""
    status: Status
    trace: Trace
    store: ViewStore
    """The pixels of every view on the trace."""

    @property
    def usage(self) -> Usage:
        """Visual tokens, calls, crops and seconds of the run."""
        return self.trace.usage

    def save(self, folder: str | Path) -> Path:
        """Write trace.json, images/ and config.yaml into `folder`; return it. Raises TraceError."""
        path = self.trace.save(folder, by_digest(self.trace.views, self.store.image))
        AgentConfig.model_validate(self.trace.config).save(path / "config.yaml")
        return path

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file that shows where the model looked; return its path."""
        from qzoom_agent.report.episode import write_report

        write_report(self.trace, by_digest(self.trace.views, self.store.image), path)
        return Path(path)

    def __str__(self) -> str:
        if self.status == "answered":
            return self.text
        return f"{self.text or 'no answer'} ({self.status}{f': {self.trace.error}' if self.trace.error else ''})"

    def _repr_html_(self) -> str:
        usage = self.trace.usage
        return (
            f"<p><i>{html.escape(self.trace.question)}</i></p><p><b>{html.escape(str(self))}</b></p>"
            f"<p>{usage.served + usage.inserted} crops, {usage.visual_tokens} visual tokens, "
            f"{usage.seconds.total:.2f} s</p>"
        )


@dataclass(frozen=True)
class LookResult:
    """Result of `Agent.look`: the record of one look, with the pixels it was about."""

    record: PerceptionRecord
    store: ViewStore
    """The pixels of the original and the coarse view."""
    question: str
    model: str


class Event(BaseModel):
    """A step of a streamed run.

    Its data, by kind: view: a `View` that the model is shown; look: a `PerceptionRecord`; token: {turn, text} as it is
    written; turn: a `Turn`; call: a `CallRecord` with its turn; answer: {status, answer, error}, always the last.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    kind: EventKind
    data: dict[str, Any]
    answer: Answer | None = Field(default=None, exclude=True, repr=False)
    """The whole `Answer`, with the event of that kind; not part of the JSON."""
