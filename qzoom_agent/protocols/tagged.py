"""Tagged: formats whose calls stand between tags and whose crops come back in a turn of their own.

Seven published families differ only in data: the tag, the wording of each turn, the frame, and two functions, one
that reads what is between the tags and one that turns its arguments into a box of a view. So they are seven objects
of one class, each defined beside the functions that only it needs.

Chat templates are not trusted with tools: Qwen2.5-VL's has no place for them, others print them in their own way. The
schema is therefore part of the system text here, and calls and results are ordinary text and images. Only where a
family was trained with results in role "tool" (qwen3vl, qwen3_5) do results carry that role: their own templates turn
it into a user turn with `<tool_response>`. Use those two only with a template that knows role "tool" and images in
it.

Instructions are in our own words except where checkpoints depend on the letter: schema shape, tags, the sentences
that introduce a result, and one-line format reminders.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.interface import Parsed, ToolCall, counted
from qzoom_agent.protocols.parsing import (
    MAX_CALLS_READ,
    MAX_NAME,
    ParsedReply,
    TagSpan,
    foreign_call,
    read_label,
    read_reply,
    readable,
    spans,
    tag,
)
from qzoom_agent.views import View

Arguments = dict[str, object]


class Payload(NamedTuple):
    """What stands between the tags: a tool name, empty if none was given, and its arguments."""

    name: str
    arguments: Arguments


class CallRegion(NamedTuple):
    """Where a call points."""

    box: tuple[float, float, float, float]
    frame: Frame
    view: str


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """The texts of a family. Pieces are joined as they stand, so line breaks between them are written here."""

    system: str
    """System message when zooming is offered."""
    plain_system: str = ""
    """System message when it is not; empty for none."""
    before: str = ""
    """First user turn: text before the images, when zooming is offered."""
    plain_before: str = ""
    """The same when it is not."""
    between: str = ""
    """First user turn: text between the images and the question."""
    after: str = ""
    """First user turn: text after the question, when zooming is offered."""
    plain_after: str = ""
    """The same when it is not."""
    result_before: str = ""
    """Result turn: text before the crop; may use {action} (crops before this one), {observation} (crops with this one),
    {width} and {height} (of the crop as shown)."""
    result_after: str = ""
    """Result turn: text right after the crop; what the tool noted follows it."""
    result_end: str = ""
    """Result turn: the rest."""
    refusal_before: str = ""
    refusal_after: str = ""
    final: str = "Zooming is over. Answer the question now."


@dataclass(frozen=True, slots=True)
class Tagged:
    """One family."""

    name: str
    frame: Frame
    tools: tuple[str, ...]
    """Names a call may use; the first is taken when a call has none."""
    how: str
    """What a well-formed call looks like: the last sentence of every problem."""
    wording: PromptTexts
    payloads: Callable[[str, ParsedReply], list[Payload]]
    """Read the body between the tags."""
    region: Callable[[Arguments, Sequence[View], ParsedReply, str], CallRegion | None]
    """Resolve a call's arguments among the views; None with a problem that ends in the last argument."""
    loose: Callable[[str], TagSpan | None]
    """Find a call that lost its tags."""
    tag: str = "tool_call"
    stop: tuple[str, ...] = ()
    max_calls_per_turn: int = 1
    result_role: Literal["user", "tool"] = "user"
    mark: Literal["answer", "boxed"] | None = "answer"
    """How the family marks an answer; see `read_reply`."""
    names: Callable[[int], str] = counted
    """What the family calls view number 0 (coarse), 1 and so on, as part of a sentence."""

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        say = self.wording
        system = say.system if tools else say.plain_system
        before = say.before if tools else say.plain_before
        asked = say.between + question + (say.after if tools else say.plain_after)
        user = message("user", before, *(image_part(view.id) for view in views), asked)
        return [message("system", system), user] if system else [user]

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        return read_reply(
            text,
            find=self._find,
            read=lambda span, reading: self._read(span, views, reading),
            limit=self.max_calls_per_turn,
            mark=self.mark,
        )

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        say = self.wording
        numbers = {"action": index, "observation": index + 1, "width": view.width, "height": view.height}
        after = say.result_after + "".join(f"\n{note}" for note in notes) + say.result_end
        return [message(self.result_role, say.result_before.format(**numbers), image_part(view.id), after)]

    def refusal(self, text: str) -> list[Message]:
        return [message(self.result_role, self.wording.refusal_before + text + self.wording.refusal_after)]

    def final(self) -> list[Message]:
        return [message("user", self.wording.final)]

    def view_name(self, index: int) -> str:
        return self.names(index)

    def _find(self, text: str, reading: ParsedReply) -> list[TagSpan]:
        found = spans(text, self.tag, limit=MAX_CALLS_READ)
        if len(found) > 1 and not found[-1].body.strip():
            reading.repairs.append(f"<{self.tag}> written for </{self.tag}>")
            found.pop()
        if found:
            return found
        bare = self.loose(text)
        if bare is not None:
            reading.repairs.append("call without its tags read")
            return [bare]
        closing = tag(self.tag).search(text)
        if closing is None:
            return foreign_call(text)
        reading.repairs.append(f"opening <{self.tag}> added")
        return [TagSpan(text[: closing.start()], text[: closing.end()], 0, closing.end(), True)]

    def _read(self, span: TagSpan, views: Sequence[View], reading: ParsedReply) -> None:
        if not span.closed and f"</{self.tag}>" not in self.stop:
            reading.repairs.append(f"closing </{self.tag}> added")
        payloads = self.payloads(span.body, reading)
        if not payloads:
            reading.problems.append(f"The call could not be read. {self.how}")
        for payload in payloads:
            name = readable(payload.name).strip()[:MAX_NAME]
            if not name:
                name = self.tools[0]
            elif name not in self.tools:
                reading.problems.append(f"There is no tool {name!r}. {self.how}")
                continue
            region = self.region(payload.arguments, views, reading, self.how)
            if region is not None:
                label = read_label(payload.arguments)
                call = ToolCall(
                    name=name, box=region.box, frame=region.frame, view=region.view, label=label, raw=span.raw
                )
                reading.calls.append(call)


def tool_schema(name: str, description: str, properties: dict[str, object], *, required: Sequence[str]) -> str:
    """One line of JSON in the shape of the OpenAI function schema, which all Qwen templates print."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return json.dumps(
        {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    )


def box_schema(meaning: str, *, number: Literal["number", "integer"] = "number") -> dict[str, object]:
    """Schema of a box argument; `meaning` says in which frame."""
    said = f"The region to look at, as [x1, y1, x2, y2] (top-left and bottom-right corner), {meaning}."
    return {"type": "array", "items": {"type": number}, "minItems": 4, "maxItems": 4, "description": said}
