"""Parsing of model text, shared by all protocols: tags, thoughts, answers, numbers and boxes.

Everything here takes any string, never raises and is linear in its length. Corrections are noted in a `ParsedReply`;
text that cannot be parsed becomes a problem there, which the model reads.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from qzoom_agent.protocols.interface import Parsed, ToolCall
from qzoom_agent.views import View

EMPTY_REPLY = "The reply was empty. Answer the question."
ONLY_THOUGHT = "The reply ended before an answer or a call. Give one of them now."
MAX_CALLS_READ = 16
"""Calls parsed in one reply; a reply with more has degenerated."""
MAX_NAME = 80
MAX_BOXED = 2000
MAX_LABEL = 200
_LARGEST = 1e9
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4})?")
_CORNERS = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom"))
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "bbox2d", "box", "coordinates", "region")
_BOXED = "\\boxed{"
_STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_FOREIGN = re.compile(r"</?(?:tool_call|grounding)>|<function=")
_STRAY = re.compile(r"</?(?:answer|think|tool_response)>", re.IGNORECASE)


@dataclass(slots=True)
class ParsedReply:
    """The result of parsing so far."""

    calls: list[ToolCall] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)

    def parsed(self, *, thought: str = "", answer: str | None = None) -> Parsed:
        """Return the result; a reply without an answer, a call or a problem gets a problem."""
        if answer is None and not self.calls and not self.problems:
            self.problems.append(ONLY_THOUGHT if thought else EMPTY_REPLY)
        problems, repairs = list(dict.fromkeys(self.problems)), list(dict.fromkeys(self.repairs))
        return Parsed(thought=thought, answer=answer, calls=self.calls, problems=problems, repairs=repairs)

    def keep(self, limit: int) -> None:
        """Keep the first `limit` calls; further ones become a problem."""
        if len(self.calls) > limit:
            some = "call was" if limit == 1 else f"{limit} calls were"
            self.problems.append(f"Only the first {some} run: at most {limit} in a turn.")
            del self.calls[limit:]


@dataclass(frozen=True, slots=True)
class TagSpan:
    """A tagged part of a text: `text[start:end]` with its tags, `body` without them."""

    body: str
    raw: str
    start: int
    end: int
    closed: bool


def readable(text: str) -> str:
    """Return the model's own turn as valid Unicode, cut at an end-of-turn token."""
    return text.encode("utf-8", "replace").decode("utf-8").partition("<|im_end|>")[0]


@cache
def tag(name: str) -> re.Pattern[str]:
    """Return a pattern of `<name>` and `</name>`; group 1 is the slash."""
    return re.compile(rf"<\s{{0,8}}(/?)\s{{0,8}}{name}\s{{0,8}}>", re.IGNORECASE)


def spans(text: str, name: str, *, limit: int | None = None) -> list[TagSpan]:
    """Return the first `limit` spans opened by `<name>`; each ends at a closing or opening tag, or the text's end."""
    found: list[TagSpan] = []
    opening: re.Match[str] | None = None
    for mark in tag(name).finditer(text):
        closes = bool(mark[1])
        if opening is not None:
            start, end = opening.start(), mark.end() if closes else mark.start()
            found.append(TagSpan(text[opening.end() : mark.start()], text[start:end], start, end, closes))
        opening = None if closes else mark
        if len(found) == limit:
            return found
    if opening is not None:
        found.append(TagSpan(text[opening.end() :], text[opening.start() :], opening.start(), len(text), False))
    return found


def foreign_call(text: str) -> list[TagSpan]:
    """Return a call in the format of another family, without its body, whose numbers may be in another frame."""
    mark = _FOREIGN.search(text)
    return [TagSpan("", text[mark.start() :], mark.start(), len(text), True)] if mark else []


def outside(text: str, taken: Sequence[TagSpan]) -> str:
    """Return the text around these spans (in order, not overlapping), stripped and joined by newlines."""
    edges = [0, *(edge for span in taken for edge in (span.start, span.end)), len(text)]
    return _joined(*(text[start:end] for index, (start, end) in enumerate(pairwise(edges)) if index % 2 == 0))


def read_reply(
    text: str,
    *,
    find: Callable[[str, ParsedReply], list[TagSpan]],
    read: Callable[[TagSpan, ParsedReply], None],
    limit: int,
    mark: str | None,
) -> Parsed:
    """Parse a whole reply, first outside the thought (`<think>`), then, if nothing stands outside it, inside.

    1. `<answer>`: the answer; calls beside it are dropped and noted.
    2. Calls, at most `limit`; other text is thought, and a `\\boxed{}` beside a call does not end the episode.
    3. Any other text: the answer, or the content of its `\\boxed{}`.

    Args:
        text: The reply.
        find: Finds the calls in a text.
        read: Adds a call to the result, or a problem.
        limit: Calls served in one turn.
        mark: The family's way to mark an answer, "answer" or "boxed"; free text instead of it is noted. None: free
            text is the family's way.
    """
    reply = ParsedReply()
    thought, rest = _split_thought(readable(text))
    answers, blank = _answers(rest)
    inside = not answers and not outside(rest, blank)
    if inside:
        thought, rest = "", thought
        answers, blank = _answers(rest)
    calls = find(rest, reply)
    if inside and (answers or calls):
        reply.repairs.append("read from inside the thought")
    if answers:
        if calls:
            reply.repairs.append("call beside an answer not run")
        if not answers[-1].closed:
            reply.repairs.append("closing </answer> added")
        body = answers[-1].body.strip()
        return reply.parsed(thought=_joined(thought, outside(rest, answers)), answer=_boxed(body) or body)
    if calls:
        for span in calls:
            read(span, reply)
        reply.keep(limit)
        return reply.parsed(thought=_joined(thought, outside(rest, calls)))
    if inside:
        return reply.parsed(thought=rest.strip())
    free = _STRAY.sub("", rest).strip()
    boxed = _boxed(free)
    if free and (mark == "answer" or (mark == "boxed" and not boxed)):
        reply.repairs.append("free text taken as the answer")
    return reply.parsed(thought=_joined(thought, free) if boxed else thought.strip(), answer=boxed or free or None)


def _answers(text: str) -> tuple[list[TagSpan], list[TagSpan]]:
    """Return the `<answer>` spans with a body, and those without."""
    found = spans(text, "answer")
    return [span for span in found if span.body.strip()], [span for span in found if not span.body.strip()]


def _split_thought(text: str) -> tuple[str, str]:
    first = tag("think").search(text)
    head = ""
    if first is not None and first[1]:
        head, text = text[: first.start()], text[first.end() :]
    thoughts = spans(text, "think")
    return _joined(head, *(span.body for span in thoughts)), outside(text, thoughts)


def _boxed(text: str) -> str:
    """Return the content of the last `\\boxed{}`, braces balanced; empty if there is none."""
    start = text.rfind(_BOXED)
    if start < 0:
        return ""
    start += len(_BOXED)
    text = text[: start + MAX_BOXED]
    depth, end = 1, start
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    held = text[start : end - 1 if depth == 0 else end].strip()
    styled = _STYLED.fullmatch(held)
    return styled[1].strip() if styled else held


def _joined(*pieces: str) -> str:
    return "\n".join(stripped for piece in pieces if (stripped := piece.strip()))


def first_view(views: Sequence[View]) -> str:
    """Return the id of the first view shown."""
    return views[0].id if views else "coarse"


def numbers_in(text: str) -> list[str]:
    """Return the decimal numbers in a text, in order."""
    return _NUMBER.findall(text)


def read_label(arguments: Mapping[str, object]) -> str:
    """Return the model's words for what it looks for, shortened."""
    label = arguments.get("label")
    return readable(label)[:MAX_LABEL] if isinstance(label, str) else ""


def has_box(arguments: Mapping[str, object]) -> bool:
    """Return whether a box is given under any name that models use for it."""
    return any(key in arguments for key in _BOX_KEYS)


def box_argument(arguments: Mapping[str, object], reply: ParsedReply) -> object:
    """Return the value given for the box; another name than `bbox_2d` is noted. None: no box is given."""
    key = next((key for key in _BOX_KEYS if key in arguments), None)
    if key is None:
        return None
    if key != "bbox_2d":
        reply.repairs.append(f"box read from {key}")
    return arguments[key]


def read_index(
    arguments: Mapping[str, object], names: Sequence[str], reply: ParsedReply, *, default: int
) -> int | None:
    """Return the number under one of `names`, `default` if none is given, None if it is not a whole number."""
    given = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if given is None:
        reply.repairs.append(f"{names[0]} missing, {default} taken")
        return default
    number = _number(given, reply)
    return int(number) if number is not None and number.is_integer() else None


def read_box(value: object, reply: ParsedReply, *, how: str) -> tuple[float, float, float, float] | None:
    """Return four finite coordinates from the value of a box, or None with a problem that ends in `how`.

    Accepted: numbers as strings, a box as a string, as an object with named corners, as two points, or as a list of
    boxes (the first is taken). Swapped corners are kept and noted; the zoom tool orders them.
    """
    values = _flat(value, reply)
    numbers = [_number(item, reply) for item in values] if len(values) == 4 else []
    given = [number for number in numbers if number is not None]
    if len(given) != 4:
        reply.problems.append(f"The box could not be read: it must be four finite numbers x1, y1, x2, y2. {how}")
        return None
    x1, y1, x2, y2 = given
    if x2 < x1 or y2 < y1:
        reply.repairs.append("box corners were swapped")
    return x1, y1, x2, y2


def _flat(value: object, reply: ParsedReply) -> list[object]:
    if isinstance(value, str):
        reply.repairs.append("box read from a string")
        return [float(number) for number in numbers_in(value)]
    if isinstance(value, dict):
        lowered = {str(key).lower().replace("_", ""): item for key, item in value.items()}
        names = next((names for names in _CORNERS if all(name in lowered for name in names)), ())
        reply.repairs.append("box read from an object")
        return [lowered[name] for name in names]
    if not isinstance(value, list):
        return []
    if value and all(isinstance(item, list) for item in value):
        if all(len(item) == 2 for item in value):
            reply.repairs.append("box read from points")
            return [number for item in value for number in item]
        reply.repairs.append(f"box taken from a list of {len(value)}")
        return list(value[0])
    return value


def _number(value: object, reply: ParsedReply) -> float | None:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            return None
        reply.repairs.append("number read from a string")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) <= _LARGEST else None
