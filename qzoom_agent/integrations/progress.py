"""What a page shows about one question: the steps so far, the picture with map and boxes, the crops, and the answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final, Literal, NamedTuple

from PIL import Image

from qzoom_agent.answer import Answer, Event
from qzoom_agent.geometry import Box
from qzoom_agent.images import cut
from qzoom_agent.report import page
from qzoom_agent.report.look import compared, verdict
from qzoom_agent.report.overlay import MAX_SIDE, overlay
from qzoom_agent.trace import CallRecord, PendingCall, PerceptionRecord, Quad, Turn
from qzoom_agent.views import View

_CROP_BYTES: Final = 40_000


class Note(NamedTuple):
    """A step, as one line of the page."""

    kind: str
    """Class of the style sheet."""
    title: str
    detail: str = ""


class Progress:
    """One question from its first step to its answer. Its texts are a model's or a visitor's: Jinja escapes them."""

    answer: Answer | None = None
    error: str = ""
    """One sentence on what went wrong, in place of an answer."""
    writing: str = ""
    """Text of the turn that the model is writing."""
    waiting: PendingCall | None = None
    """The call that a person has to decide on."""
    proposed: Quad | None = None
    """The box that would be shown for it, in pixels of the image."""
    corner: tuple[float, float] | None = None
    """A corner of another box, which the person has pointed at."""

    def __init__(self, question: str, image: Image.Image, *, earlier: Sequence[tuple[str, str]] = ()) -> None:
        """`earlier` are the questions before it in the same conversation, each with its answer."""
        self.question, self.earlier, self._image = question, list(earlier), image
        self.notes: list[Note] = []
        self.look = PerceptionRecord()
        self.boxes: list[Quad] = []
        self.crops: list[page.Thumbnail] = []
        self._small = image.copy()
        self._small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        self._scale = self._small.width / image.width, self._small.height / image.height

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self._image.size

    @property
    def drawn(self) -> tuple[int, int, Quad | None, tuple[float, float] | None]:
        """Changes when the picture does."""
        return len(self.look.heat), len(self.boxes), self.proposed, self.corner

    def picture(self, opacity: float) -> Image.Image:
        """Return the image with the heat map and the boxes over it, at most `MAX_SIDE` pixels a side."""
        marks = [*self.boxes, *([self.proposed] if self.proposed else [])]
        if self.corner:
            x, y = self.corner
            marks[len(self.boxes) :] = [(x - 3, y - 3, x + 3, y + 3)]
        (across, down), extent = self._scale, self.look.extent or (0, 0, *self.size)
        covered, *scaled = [(x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in (extent, *marks)]
        drawn = PerceptionRecord(heat=self.look.heat, extent=covered, boxes=scaled)
        return overlay(self._small, drawn, opacity=opacity)

    def point(self, x: float, y: float) -> None:
        """Take a corner of the proposed box, in pixels of the picture; the second one makes the box."""
        x, y = x / self._scale[0], y / self._scale[1]
        if self.corner is None:
            self.corner = (x, y)
            return
        (left, top), self.corner = self.corner, None
        self.proposed = (min(left, x), min(top, y), max(left, x), max(top, y))

    def wait(self, call: PendingCall | None) -> None:
        """Show a call that a person has to decide on; None: it was decided."""
        self.waiting, self.proposed, self.corner = call, call.box if call else None, None

    def add(self, event: Event) -> None:
        """Take a step of the run."""
        if event.kind == "token":
            self.writing += event.data["text"]
        elif event.kind == "view":
            self._view(View(**event.data))
        elif event.kind == "look":
            look = PerceptionRecord(**event.data)
            self.look = self.look if self.look.heat else look
            title = f"Gate: {verdict(look, further=bool(self.boxes))}"
            self.notes.append(Note("gate", title, page.dots([compared(look), look.reason])))
        elif event.kind == "turn":
            turn, self.writing = Turn(**event.data), ""
            self.notes += [
                Note("wrote", "The model writes", turn.text),
                *(Note("bad", "Unreadable", problem) for problem in turn.problems),
            ]
        elif event.kind == "call":
            self._call(CallRecord(**event.data))
        elif event.answer is not None:
            self._end(event.answer)

    @property
    def status(self) -> str:
        """The state of the question, in a word: also the class of the style sheet."""
        if self.error:
            return "error"
        if self.answer is None:
            return "waiting" if self.waiting else "running"
        return self.answer.status

    @property
    def facts(self) -> str:
        """The cost of the answer, on one line."""
        if self.answer is None:
            return ""
        usage, record = self.answer.usage, self.answer.record
        zooms, whole = usage.served + usage.inserted, page.full_tokens(self.answer.trace.all_views)
        of = f" ({page.share(usage.visual_tokens, whole)} of full size)" if whole else ""
        sure = None if record.confidence is None else f"confidence {record.confidence:.2f}"
        return page.dots(
            [
                None if record.status == "answered" else record.status,
                f"{zooms} zoom{'' if zooms == 1 else 's'}",
                f"{usage.visual_tokens:,} visual tokens{of}",
                page.seconds(usage.seconds.total),
                sure,
            ]
        )

    def html(self, part: Literal["card", "steps", "zooms", "call"]) -> str:
        """Return a part: question and answer, the steps, the crops, or the call that waits for a decision."""
        parts = page.environment().get_template("web.html.jinja").module
        return str(getattr(parts, part)(self))

    def _view(self, view: View) -> None:
        if view.kind == "crop":
            self.boxes.append(view.box)
            share = page.share(view.region.area, self._image.width * self._image.height)
            detail = f"{page.listed(view.box)} px, {share} of the image, {view.tokens:,} visual tokens"
            self.notes.append(Note("zoom", f"Zoom {len(self.boxes)}", detail))
            self.crops.append(self._crop(cut(self._image, Box(*view.box)), f"Zoom {len(self.boxes)}"))
        elif view.kind != "original":
            title = "The image, reduced" if view.kind == "coarse" else "Image of a tool"
            self.notes.append(Note("look", title, f"{view.width} x {view.height} px, {view.tokens:,} visual tokens"))

    def _call(self, call: CallRecord) -> None:
        if call.approval is not None:
            done = {"approve": "approved", "move": "moved", "refuse": "refused"}[call.approval.action]
            self.notes.append(Note("person", f"You {done} the call", call.approval.reason))
        if not call.serves:
            title = f"Call {call.decision}" + (f": {call.code}" if call.code else "")
            self.notes.append(Note("bad", title, call.reason))

    def _end(self, answer: Answer) -> None:
        self.answer = answer
        if answer.status == "error":
            self.error = f"The model failed: {answer.record.error}"
        zooms = count(1)
        self.crops = [
            self._crop(answer.store.image(view.id), f"Zoom {next(zooms)}" if view.kind == "crop" else "Image of a tool")
            for view in answer.record.views
            if view.kind in ("crop", "tool")
        ]

    def _crop(self, image: Image.Image, title: str) -> page.Thumbnail:
        return page.thumbnail(image, title, title, [], limit=_CROP_BYTES)
