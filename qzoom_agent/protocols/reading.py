"""Reading model text: tags, numbers and boxes, shared by all parsers.

Everything here takes any string, never raises and is linear in its length: tags are found by a regex whose repetitions
are bounded, numbers by one whose alternatives cannot overlap. What is mended is written down in a `Reading`; what cannot
be mended becomes a problem there.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from qzoom_agent.images import View
from qzoom_agent.protocols.base import Parsed, ToolCall

EMPTY_REPLY = "The reply was empty. Answer the question."
MAX_CALLS_READ = 16
"""Call spans looked at in one reply; more is a degenerate reply, and reading them all would help nobody."""
_LARGEST = 1e9
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")
_CORNERS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))


@dataclass(slots=True)
class Reading:
    """What has been made of a reply so far."""

    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    def parsed(self, *, thought: str = "", answer: str | None = None) -> Parsed:
        """The finished reading; a reply that gave nothing at all gets the empty-reply problem."""
        if answer is None and not self.calls and not self.problems:
            self.problems.append(EMPTY_REPLY)
        return Parsed(thought=thought, answer=answer, calls=self.calls, problems=self.problems, repairs=self.repairs)

    def keep(self, limit: int) -> None:
        """Keep the first `limit` calls; the rest becomes a problem."""
        if len(self.calls) > limit:
            some = "one call" if limit == 1 else f"{limit} calls"
            self.problems.append(f"At most {some} a turn: the first of {len(self.calls)} calls was taken, in order.")
            del self.calls[limit:]


@dataclass(frozen=True, slots=True)
class Span:
    """A tagged stretch of a text: `text[start:end]` with its tags, `body` without them."""

    body: str
    raw: str
    start: int
    end: int
    closed: bool


@cache
def _tag(name: str) -> re.Pattern[str]:
    return re.compile(rf"<\s{{0,8}}(/?)\s{{0,8}}{name}\s{{0,8}}>", re.IGNORECASE)


def spans(text: str, tag: str, *, limit: int = MAX_CALLS_READ) -> list[Span]:
    """The first `limit` spans opened by `<tag>`; each ends at its closing tag, the next opening tag, or with the text."""
    found: list[Span] = []
    opening: re.Match[str] | None = None
    for mark in _tag(tag).finditer(text):
        closes = bool(mark[1])
        if opening is not None:
            end = mark.end() if closes else mark.start()
            found.append(
                Span(text[opening.end() : mark.start()], text[opening.start() : end], opening.start(), end, closes)
            )
        opening = None if closes else mark
        if len(found) == limit:
            return found
    if opening is not None:
        found.append(Span(text[opening.end() :], text[opening.start() :], opening.start(), len(text), False))
    return found


def outside(text: str, taken: Sequence[Span]) -> str:
    """The text around these spans (in order, not overlapping), joined by newlines."""
    edges = [0, *(edge for span in taken for edge in (span.start, span.end)), len(text)]
    pieces = [text[start:end].strip() for index, (start, end) in enumerate(pairwise(edges)) if index % 2 == 0]
    return "\n".join(piece for piece in pieces if piece)


def first_view(views: Sequence[View]) -> str:
    """Id of the first view shown."""
    return views[0].id if views else "coarse"


def numbers_in(text: str) -> list[str]:
    """The decimal numbers written in a text, in order."""
    return _NUMBER.findall(text)


def read_box(value: object, into: Reading, *, how: str) -> tuple[float, float, float, float] | None:
    """Four finite coordinates from whatever a model gave for a box, or None with a problem that ends in `how`.

    Mended: numbers as strings, a box as a string, as an object with named corners, as two points, or as a list of boxes
    (the first is taken). Swapped corners are kept and noted; the zoom tool orders them.
    """
    values = _flat(value, into)
    numbers = [_number(item, into) for item in values] if len(values) == 4 else []
    given = [number for number in numbers if number is not None]
    if len(given) != 4:
        into.problems.append(f"The box could not be read: it must be four finite numbers x1, y1, x2, y2. {how}")
        return None
    x1, y1, x2, y2 = given
    if x2 < x1 or y2 < y1:
        into.repairs.append("box corners were swapped")
    return x1, y1, x2, y2


def _flat(value: object, into: Reading) -> list[object]:
    if isinstance(value, str):
        into.repairs.append("box read from a string")
        return list(numbers_in(value))
    if isinstance(value, dict):
        lowered = {str(key).lower().replace("_", ""): item for key, item in value.items()}
        names = next((names for names in _CORNERS if all(name in lowered for name in names)), ())
        into.repairs.append("box read from an object")
        return [lowered[name] for name in names]
    if not isinstance(value, list):
        return []
    if value and all(isinstance(item, list) for item in value):
        if all(len(item) == 2 for item in value):
            into.repairs.append("box read from points")
            return [number for item in value for number in item]
        into.repairs.append(f"box taken from a list of {len(value)}")
        return list(value[0])
    return value


def _number(value: object, into: Reading) -> float | None:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            return None
        into.repairs.append("number read from a string")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= _LARGEST else None
