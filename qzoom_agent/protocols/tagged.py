"""Protocols whose calls stand between tags and whose crops come back in a turn of their own.

Seven published families differ only in data: tag, wording, frame, and two functions that parse the text between the
tags and turn its arguments into a box of a view. Each is an object of `Tagged`.

The tool's schema is part of the system text, since chat templates print tools in different ways. Results carry the
role "tool" only in families trained with it (qwen3vl, qwen3_5). The wording is ours except where checkpoints depend on
the letter: schema shape, tags, the sentences around a result, and one-line format reminders.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.interface import Parsed, ToolCall, counted
from qzoom_agent.protocols.json_repair import read_json
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
_TRIES = 4


class Payload(NamedTuple):
    """A tool name, empty if none was given, and its arguments."""

    name: str
    arguments: Arguments


class CallRegion(NamedTuple):
    """The region of a call."""

    box: tuple[float, float, float, float]
    frame: Frame
    view: str


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """The texts of a family. They are joined without separators, so line breaks are part of them."""

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
    """Result turn: text right after the crop; the tool's notes follow it."""
    result_end: str = ""
    """Result turn: the rest."""
    refusal_before: str = ""
    refusal_after: str = ""
    final: str = "Zooming is over. Answer the question now."


@dataclass(frozen=True, slots=True)
class Tagged:
    """The protocol of one family."""

    name: str
    frame: Frame
    tools: tuple[str, ...]
    """Names a call may use; the first is taken when a call has none."""
    how: str
    """Description of a well-formed call: the last sentence of every problem."""
    wording: PromptTexts
    payloads: Callable[[str, ParsedReply], list[Payload]]
    """Parses the text between the tags."""
    region: Callable[[Arguments, Sequence[View], ParsedReply, str], CallRegion | None]
    """Turns the arguments of a call into a region; None with a problem that ends in the last argument."""
    loose: Callable[[str], TagSpan | None]
    """Finds a call without its tags."""
    tag: str = "tool_call"
    stop: tuple[str, ...] = ()
    max_calls_per_turn: int = 1
    result_role: Literal["user", "tool"] = "user"
    mark: Literal["answer", "boxed"] | None = "answer"
    """The family's way to mark an answer; see `read_reply`."""
    names: Callable[[int], str] = counted
    """Gives the family's name of view number 0 (coarse), 1 and so on, as part of a sentence."""

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
            read=lambda span, reply: self._read(span, views, reply),
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

    def _find(self, text: str, reply: ParsedReply) -> list[TagSpan]:
        found = spans(text, self.tag, limit=MAX_CALLS_READ)
        if len(found) > 1 and not found[-1].body.strip():
            reply.repairs.append(f"<{self.tag}> written for </{self.tag}>")
            found.pop()
        if found:
            return found
        bare = self.loose(text)
        if bare is not None:
            reply.repairs.append("call without its tags read")
            return [bare]
        closing = tag(self.tag).search(text)
        if closing is None:
            return foreign_call(text)
        reply.repairs.append(f"opening <{self.tag}> added")
        return [TagSpan(text[: closing.start()], text[: closing.end()], 0, closing.end(), True)]

    def _read(self, span: TagSpan, views: Sequence[View], reply: ParsedReply) -> None:
        if not span.closed and f"</{self.tag}>" not in self.stop:
            reply.repairs.append(f"closing </{self.tag}> added")
        payloads = self.payloads(span.body, reply)
        if not payloads:
            reply.problems.append(f"The call could not be read. {self.how}")
        for payload in payloads:
            name = readable(payload.name).strip()[:MAX_NAME]
            if not name:
                name = self.tools[0]
            elif name not in self.tools:
                reply.problems.append(f"There is no tool {name!r}. {self.how}")
                continue
            region = self.region(payload.arguments, views, reply, self.how)
            if region is not None:
                label = read_label(payload.arguments)
                call = ToolCall(
                    name=name, box=region.box, frame=region.frame, view=region.view, label=label, raw=span.raw
                )
                reply.calls.append(call)


def loose_call(*marks: str, accepts: Callable[[Arguments], bool], reach: int = 64) -> Callable[[str], TagSpan | None]:
    """Return a search for a call without tags: a JSON object with one of `marks` within `reach` of its opening brace.

    Args:
        marks: Texts near which an object may be a call.
        accepts: Decides whether an object is one.
        reach: Characters between the brace and the mark.
    """

    def find(text: str) -> TagSpan | None:
        for mark in marks:
            at = text.find(mark)
            for _ in range(_TRIES):
                if at < 0:
                    break
                start = text.rfind("{", max(0, at - reach), at)
                found = read_json(text, start) if start >= 0 else None
                if found and isinstance(found.value, dict) and accepts(found.value):
                    whole = text[start : found.end]
                    return TagSpan(whole, whole, start, found.end, True)
                at = text.find(mark, at + len(mark))
        return None

    return find


def tool_schema(name: str, description: str, properties: dict[str, object], *, required: Sequence[str]) -> str:
    """Return an OpenAI function schema as one line of JSON, as all Qwen templates print it."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return json.dumps(
        {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    )


def box_schema(meaning: str, *, number: Literal["number", "integer"] = "number") -> dict[str, object]:
    """Return the schema of a box argument; `meaning` names its frame."""
    text = f"The region to look at, as [x1, y1, x2, y2] (top-left and bottom-right corner), {meaning}."
    return {"type": "array", "items": {"type": number}, "minItems": 4, "maxItems": 4, "description": text}
