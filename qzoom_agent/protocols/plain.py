"""plain: for models without training in tool calls. One line, `ZOOM: x1, y1, x2, y2`, in thousandths.

The first user turn explains it (some templates have no system role). Boxes are measured on the first image, unless the
line names another. A line that starts with the word ZOOM and has a colon, or exactly four numbers beside the name of an
image, is a call; brackets, bold marks and bullets around it are accepted. Anything else is the answer, after `Answer:`
if the reply begins so. A call of an own tool is a line `TOOL: name {"argument": value}`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Self

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.boxes import numbers_in, read_box
from qzoom_agent.protocols.calls import several
from qzoom_agent.protocols.interface import Parsed, ToolCall, counted
from qzoom_agent.protocols.json_repair import read_json
from qzoom_agent.protocols.parsing import MAX_CALLS_READ, ParsedReply, TagSpan, first_view, foreign_call, read_reply
from qzoom_agent.views import View

_LINE = re.compile(
    r"^(?:[ \t>*_`#\-]{0,8}|[ \t]{0,8}\d{1,2}[.)][ \t*_`]{0,8}|[ \t*_`]{0,8}action[ \t*_`]{0,4}:[ \t*_`]{0,8})"
    r"zoom\b([^\n]{0,300})",
    re.IGNORECASE | re.MULTILINE,
)
"""A line that asks for a crop, also as an item of a list or after "Action:"."""
_IMAGE = re.compile(
    r"\(?\b(?:(image|picture|photo|page|crop|tool|coarse)[ _#]{0,3}(\d{1,4})|(coarse))\b(?:\)|[ \t]{0,4}:)?",
    re.IGNORECASE,
)
"""The name of an image: a word and its number."""
_ONE_OF = re.compile(r"(?<!first )\bimage\b", re.IGNORECASE)
"""An image without its number."""
_TOOL = re.compile(
    r"^[ \t>*_`#\-]{0,8}tool[ \t*_`]{0,4}[:\uff1a][ \t*_`]{0,4}([A-Za-z_][\w-]{0,63})"
    r"(?:[ \t*_`(:,\uff1a]{0,8}(?:\s{0,8}(?:```(?:json)?\s{0,8})?(?=\{)|\)?[ \t*_`.]{0,4}$)|\b([^\n]{0,300}))",
    re.IGNORECASE | re.MULTILINE,
)
"""The head of a line that calls an own tool: up to the arguments or the end of the line, else with what follows."""
_COUNTED = ("image", "picture", "photo", "page")
_COLON = re.compile(r"[*_` ]{0,4}[:\uff1a]")
_ANSWER = re.compile(r"[*_ ]{0,4}(?:final )?answer[*_ ]{0,4}[:\uff1a][*_]{0,4}", re.IGNORECASE)
_HOW = "Write a line ZOOM: x1, y1, x2, y2 with numbers from 0 to 1000."
_OFFER = (
    "\n\nIf something in the image is too small to be sure, do not answer yet: reply with one line\n"
    "ZOOM: x1, y1, x2, y2\n"
    "and you will see that part enlarged. x1, y1 is the part's top-left and x2, y2 its bottom-right corner, in "
    "thousandths of the first image's width and height: 0, 0, 1000, 1000 is all of it. Otherwise reply with the answer "
    "only."
)
_SEVERAL = (
    "\nThere are several images. To look at another than the first, name it by its number: ZOOM image 2: x1, y1, x2, "
    "y2, in thousandths of that image."
)
_TOOLS = (
    "\n\nYou can also use these tools:\n{schema}\nTo use one, do not answer yet: reply with one line\n"
    'TOOL: name {"argument": value}\nand you will get its result.'
)


@dataclass(frozen=True, slots=True)
class Plain:
    """`ZOOM:` lines."""

    name: str = "plain"
    frame: Frame = "per_mille"
    stop: tuple[str, ...] = ()
    max_calls_per_turn: int = 1
    own: Mapping[str, str] = field(default_factory=dict)
    """Function schemas of own tools in JSON, by name."""

    def with_tools(self, tools: Mapping[str, str]) -> Self:
        return replace(self, own=tools)

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        offer = _OFFER if tools else ""
        if tools and several(views):
            offer += _SEVERAL
        if tools and self.own:
            offer += _TOOLS.replace("{schema}", "\n".join(self.own.values()))
        return [message("user", *(image_part(view.id) for view in views), question + offer)]

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        def read(span: TagSpan, reply: ParsedReply) -> None:
            if self.own and (called := _TOOL.match(span.raw)):
                return self._call(called[1], span, reply)
            try:
                view = _named(span.body, views)
                box, frame = read_box(
                    _IMAGE.sub(" ", span.body), self.frame, reply.repairs, size=view.size if view else None
                )
            except BoxError as error:
                reply.problems.append(f"{error} {_HOW}")
            else:
                id = view.id if view else first_view(views)
                reply.calls.append(ToolCall(name="zoom", box=box, frame=frame, view=id, raw=span.raw))

        def find(text: str, reply: ParsedReply) -> list[TagSpan]:
            calls, zooms = _tool_lines(text, self.own), _find(text, reply)
            own = [*calls, *(span for span in zooms if not span.foreign)] if calls else zooms
            return sorted(own, key=lambda span: span.start)

        parsed = read_reply(text, find=find, read=read, how=_HOW, limit=self.max_calls_per_turn, mark=None)
        lead = _ANSWER.match(parsed.answer or "")
        if lead is None or parsed.answer is None or not parsed.answer[lead.end() :].strip():
            return parsed
        return parsed.model_copy(update={"answer": parsed.answer[lead.end() :].strip()})

    def _call(self, name: str, span: TagSpan, reply: ParsedReply) -> None:
        parsed = read_json(span.body) if span.body else None
        arguments = parsed.value if parsed else {} if not span.body else None
        if name not in self.own:
            reply.problems.append(f"There is no tool {name!r}. There are ZOOM, {', '.join(self.own)}.")
        elif not isinstance(arguments, dict):
            reply.problems.append('The arguments could not be read. Write a line TOOL: name {"argument": value}.')
        else:
            reply.calls.append(ToolCall(name=name, box=None, arguments=arguments, raw=span.raw))

    def tool_result(self, text: str, view: View | None) -> list[Message]:
        shown = [image_part(view.id)] if view else []
        return [message("user", "Result of the tool:\n", *shown, f"{text}\nUse a tool again, or answer.")]

    def zoom_hint(self, view: View, views: Sequence[View]) -> str:
        return f"To zoom into it, write ZOOM {view.id}: x1, y1, x2, y2."

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        noted = "".join(f"\n{note}" for note in notes)
        return [
            message(
                "user", "The part you asked for, enlarged:", image_part(view.id), f"{noted}\nZoom again, or answer."
            )
        ]

    def refusal(self, text: str) -> list[Message]:
        return [message("user", f"No zoom: {text}\nZoom again, or answer.")]

    def final(self) -> list[Message]:
        return [message("user", "Do not zoom any more. Reply with the answer only.")]

    def view_name(self, index: int) -> str:
        return counted(index)


def _tool_lines(text: str, own: Mapping[str, str]) -> list[TagSpan]:
    """Return the lines that call a tool; one with other words behind the name calls it if it is one of `own`."""
    found: list[TagSpan] = []
    for line in islice(_TOOL.finditer(text), MAX_CALLS_READ) if own else ():
        opens = text.startswith("{", line.end())
        parsed = read_json(text, line.end()) if opens else None
        end = parsed.end if parsed else len(text) if opens else line.end()
        body = line[2] if line[2] is not None else text[line.end() : end]
        if line[2] is None or line[1] in own:
            found.append(TagSpan(body, text[line.start() : end], line.start(), end, True))
    return found


def _named(body: str, views: Sequence[View]) -> View | None:
    """Return the view that a ZOOM line names, else the first; None if there are no views.

    Raises:
        BoxError: It names none of the views, or several.
    """
    names = {"coarse" if one[3] else f"{one[1].lower()}{int(one[2])}" for one in _IMAGE.finditer(body)}
    if not views or not (names or (several(views) and _ONE_OF.search(body))):
        return views[0] if views else None
    images = [view.id for view in views if view.kind == "coarse"]
    known = {f"{word}{at}": id for word in _COUNTED for at, id in enumerate(images, 1)} | {
        one.id: one.id for one in views
    }
    meant = {known.get(name) for name in names}
    found = next((view for view in views if meant == {view.id}), None)
    if found is None:
        named = [*(f"image {at}" for at, _ in enumerate(images, 1)), *(one.id for one in views if one.kind != "coarse")]
        raise BoxError(f"A line names one image that there is, before its colon: {', '.join(named)}.")
    return found


def _find(text: str, reply: ParsedReply) -> list[TagSpan]:
    calls = (
        TagSpan(line[1], line[0].strip(), line.start(), line.end(), True)
        for line in _LINE.finditer(text)
        if _COLON.match(line[1]) or len(numbers_in(_IMAGE.sub(" ", line[1]))) == 4
    )
    found = list(islice(calls, MAX_CALLS_READ))
    wrapped = foreign_call(text, known=False)
    if not found or (wrapped and wrapped[0].start < found[0].start):
        return wrapped or foreign_call(text)
    return found
