"""nano: the format of the model that ships with the package, fixed by its training.

Opening: no system message; the images, then the question, followed by " You may zoom." when zooming is offered. Call:
`<zoom><loc_84><loc_112><loc_140><loc_154></zoom>`, x1 y1 x2 y2 in shown pixels of the coarse view; of several images it
names the second and further ones: `<zoom>2<loc_84>...`. Plain numbers and a missing opening tag are accepted. Result: a
user turn with the crop alone. Refusal: "No crop.", after which it answers or calls again. Any other text is the answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.boxes import numbers_in, read_box
from qzoom_agent.protocols.interface import Parsed, ToolCall, counted
from qzoom_agent.protocols.parsing import (
    FOREIGN_CALL,
    MAX_CALLS_READ,
    ParsedReply,
    TagSpan,
    first_view,
    foreign_call,
    outside,
    own_turn,
    spans,
    tag,
)
from qzoom_agent.views import View

REFUSAL: Final = "No crop."
UNKNOWN: Final = "i do not know."
"""The answer of nano where what it is shown does not hold what it is asked."""
LOCATION_STEP: Final = 7
"""Pixels between two neighbouring location tokens."""
_HOW = "Write <zoom><loc_x1><loc_y1><loc_x2><loc_y2></zoom>."
_LOC = re.compile(r"<loc_([-+]?\d+)>")
_IMAGE = re.compile(r"\s*(\d{1,3})\s*<loc_")


@dataclass(frozen=True, slots=True)
class Nano:
    """Location tokens in a `<zoom>` tag."""

    name: str = "nano"
    frame: Frame = "pixel"
    stop: tuple[str, ...] = ()
    max_calls_per_turn: int = 1
    history: bool = False
    """It was trained on conversations with one question each."""

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        asked = f"{question} You may zoom." if tools else question
        return [message("user", *(image_part(view.id) for view in views), asked)]

    def locate(self, question: str, views: Sequence[View], *, limit: int) -> list[Message]:
        """Ask where to look: nano writes boxes as calls alone, see `locate`."""
        return self.opening(question, views, tools=True)

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        reply = ParsedReply()
        text = own_turn(text, reply.repairs)
        found = spans(text, "zoom", limit=MAX_CALLS_READ)
        if not found and (found := _unopened(text)):
            reply.repairs.append("opening <zoom> added")
        for span in found:
            if not span.closed:
                reply.repairs.append("closing </zoom> added")
            self._read(span, views, reply)
        reply.keep(self.max_calls_per_turn)
        if not found and (found := foreign_call(text)):
            reply.problems.append(f"{FOREIGN_CALL} {_HOW}")
        if found:
            return reply.parsed(thought=outside(text, found))
        return reply.parsed(answer=text.strip() or None)

    def _read(self, span: TagSpan, views: Sequence[View], reply: ParsedReply) -> None:
        value: object = [float(number) for number in _LOC.findall(span.body)]
        given = [view for view in views if view.kind == "coarse"] or views[:1]
        number = _IMAGE.match(span.body)
        image = int(number[1]) if number else 1
        if not value:
            value = span.body
            reply.repairs += ["plain numbers read instead of location tokens"] if numbers_in(span.body) else []
        try:
            if given and not 1 <= image <= len(given):
                raise BoxError(f"There is no image {image}: the images are numbered from 1 to {len(given)}.")
            size = given[image - 1].size if given else None
            box, frame = read_box(value, self.frame, reply.repairs, size=size)
        except BoxError as error:
            reply.problems.append(f"{error} {_HOW}")
        else:
            view = first_view(given[image - 1 :])
            reply.calls.append(ToolCall(name="zoom", box=box, frame=frame, view=view, raw=span.raw))

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        return [message("user", image_part(view.id))]

    def refusal(self, text: str) -> list[Message]:
        return [message("user", REFUSAL)]

    def final(self) -> list[Message]:
        return [message("user", "Answer now.")]

    def view_name(self, index: int) -> str:
        return counted(index)


def _unopened(text: str) -> list[TagSpan]:
    """Return the part of a text without `<zoom>` from its first location token or closing tag to the last of them."""
    closing = list(tag("zoom").finditer(text))
    marks = [*_LOC.finditer(text), *closing]
    if not marks:
        return []
    start, end = min(mark.start() for mark in marks), max(mark.end() for mark in marks)
    stretch = text[start:end]
    return [TagSpan(stretch, stretch, start, end, bool(closing))]
