"""What a run gives: the answer with its record, the events of a stream, and the result of a look alone."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageDraw
from pydantic import BaseModel, Field

from qzoom_agent.config import AgentConfig
from qzoom_agent.episode_state import EventKind
from qzoom_agent.errors import ConfigError, TraceError
from qzoom_agent.files import atomic_write
from qzoom_agent.trace import PendingCall, PerceptionRecord, QuestionRecord, Status, Trace, Usage, by_digest
from qzoom_agent.views import ViewStore, original_id

_PICTURE = 480
"""Longer side in pixels of the picture in a notebook."""


@dataclass(frozen=True)
class Answer:
    """The result of one question: of a run, or the last of a conversation."""

    text: str
    """The answer; empty if there is none."""
    status: Status
    """How the run ended: "answered", "budget", "refused", "waiting" or "error"."""
    trace: Trace
    """The whole record, of a conversation with all questions so far."""
    store: ViewStore
    """The pixels of every view on the trace."""

    @classmethod
    def of(cls, trace: Trace, store: ViewStore) -> Answer:
        """Return the answer to the last question of a trace."""
        last = trace.questions[-1]
        return cls(text=last.answer or "", status=last.status, trace=trace, store=store)

    @property
    def record(self) -> QuestionRecord:
        """The part of the trace that is about this question."""
        return self.trace.questions[-1]

    @property
    def waiting(self) -> PendingCall | None:
        """The call that a person has to decide on (`Agent.resume`), with status "waiting"."""
        return self.record.waiting

    @property
    def usage(self) -> Usage:
        """Tokens, requests, calls, crops and seconds of this question; `trace.total` has those of a conversation."""
        return self.record.usage

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Boxes of the crops that were shown for this question, as x1, y1, x2, y2 in pixels of the original."""
        return [box for _, box in self.evidence]

    @property
    def evidence(self) -> list[tuple[int, tuple[float, float, float, float]]]:
        """The number of the image, counted from 0, and the box of each crop that was shown for this question."""
        return [(view.image, view.box) for view in self.record.views if view.kind == "crop"]

    @property
    def confidence(self) -> float | None:
        """Calibrated probability that the answer is right, 0 to 1; None for a model without a calibration.

        Of such a model, `record.answer_probability` is the probability of the answer's least likely token.
        """
        return self.record.confidence

    def text_until(self, stops: str | Sequence[str] | None) -> str:
        """Return the text of the answer before the first of these texts."""
        text = self.text
        for stop in [stops] if isinstance(stops, str) else stops or ():
            text = text.partition(stop)[0] if stop else text
        return text

    def to_detections(self, label: str | None = None, *, image: int = 0) -> str:
        """Return `boxes` as JSON in the form of Qwen3-VL: "bbox_2d" in thousandths of the image's sides, and "label".

        `supervision.Detections.from_vlm(VLM.QWEN_3_VL, answer.to_detections(), resolution_wh=image.size)` reads it.

        Args:
            label: Label of each box; None: the answer.
            image: Number of the image, counted from 0, whose boxes are returned.

        Raises:
            ConfigError: The question was about fewer images.
        """
        count = len(self.store.originals)
        if not count:  # of a batch, a pair whose image could not be read
            return "[]"
        if image not in range(count):
            raise ConfigError(f"The question was about {count} image{'s'[: count != 1]}, counted from 0; got {image}.")
        width, height = self.store.view(original_id(image)).size
        scale = (1000 / width, 1000 / height) * 2
        own = [box for number, box in self.evidence if number == image]
        found = [[round(side * by) for side, by in zip(box, scale, strict=True)] for box in own]
        return json.dumps([{"bbox_2d": box, "label": self.text if label is None else label} for box in found])

    @classmethod
    def load(cls, folder: str | Path) -> Answer:
        """Read what `save` wrote into a folder. Raises TraceError or ImageError for a missing or damaged file."""
        trace = Trace.load(folder)
        held = Path(folder).parent if Path(folder).is_file() else Path(folder)
        return cls.of(trace, ViewStore.restore(held / "images", trace.all_views))

    def save(self, folder: str | Path) -> Path:
        """Write trace.json, images/ and config.yaml into `folder`; return it. Raises TraceError."""
        config = AgentConfig.model_validate(self.trace.config).to_yaml()
        with atomic_write(Path(folder) / "config.yaml", error=TraceError) as part:
            part.write_text(config, encoding="utf-8")
        return self.trace.save(folder, by_digest(self.trace.all_views, self.store.image))  # with the record last

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file that shows where the model looked; return its path."""
        from qzoom_agent.report.episode import write_report

        write_report(self.trace, by_digest(self.trace.all_views, self.store.image), path)
        return Path(path)

    def __str__(self) -> str:
        if self.status == "answered":
            return self.text
        return f"{self.text or 'no answer'} ({self.status}{f': {self.record.error}' if self.record.error else ''})"

    def __repr__(self) -> str:
        error = f", error={self.record.error!r}" if self.record.error else ""
        return f"Answer(text={self.text!r}, status={self.status!r}{error})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def _repr_html_(self) -> str:
        usage = self.usage
        crops = usage.served + usage.inserted
        return (
            f"{self._picture()}<p><i>{html.escape(self.record.question)}</i></p><p><b>{html.escape(str(self))}</b></p>"
            f"<p>{crops} crop{'s'[: crops != 1]}, {usage.visual_tokens} visual tokens, "
            f"{usage.seconds.total:.2f} s</p>"
        )

    def _picture(self) -> str:
        """Return an `<img>` of each original with the boxes of the crops."""
        found = []
        for view in self.store.originals:
            image = self.store.image(view.id)
            image.thumbnail((_PICTURE, _PICTURE))
            across, down = image.width / view.width, image.height / view.height
            for x1, y1, x2, y2 in (box for number, box in self.evidence if number == view.image):
                corners = (x1 * across, y1 * down, max(x1, x2 - 1) * across, max(y1, y2 - 1) * down)
                ImageDraw.Draw(image).rectangle(corners, outline="red", width=3)
            image.save(data := io.BytesIO(), "JPEG")
            source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
            found.append(f'<img alt="The image with the boxes of its crops" src="{source}">')
        return "".join(found)


@dataclass(frozen=True)
class LookResult:
    """Result of `Agent.look`: the record of one look, with the pixels it was about."""

    record: PerceptionRecord
    store: ViewStore
    """The pixels of the original and the coarse view."""
    question: str
    model: str
    """Name of the model or perceiver that looked."""


class Event(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """A step of a streamed run.

    Its data, by kind: view: a `View` that the model is shown; look: a `PerceptionRecord`; token: {turn, text} as it is
    written; turn: a `Turn`; waiting: the `PendingCall` that a run with `approve=True` stops before; call: a
    `CallRecord` with its turn; answer: {status, answer, error}, always the last.
    """

    kind: EventKind
    data: dict[str, Any]
    answer: Answer | None = Field(default=None, exclude=True, repr=False)
    """The whole `Answer`, with the event of that kind; not part of the JSON."""
