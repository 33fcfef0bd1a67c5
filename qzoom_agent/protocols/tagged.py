"""Protocols whose calls stand between tags and whose crops come back in a turn of their own.

Seven published families differ only in data: `families.yaml` holds their wording, tags, frames, and the names of the
two functions in `calls` that read the text between the tags and turn its arguments into a box of a view.

The tool's schema is part of the system text, since chat templates print tools in different ways. Results carry the
role "tool" only in families trained with it (qwen3vl, qwen3_5). The wording is ours except where checkpoints depend on
the letter: schema shape, tags, the sentences around a result, and one-line format reminders.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, Self

import yaml
from pydantic import BaseModel

from qzoom_agent.errors import BoxError, ConfigError
from qzoom_agent.files import valid_unicode
from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.boxes import box_argument
from qzoom_agent.protocols.calls import (
    HINTS,
    INDEX_NAMES,
    LOOSE,
    PAYLOADS,
    REGIONS,
    Arguments,
    CallRegion,
    own_arguments,
    read_label,
    several,
)
from qzoom_agent.protocols.interface import Parsed, ToolCall
from qzoom_agent.protocols.parsing import (
    MAX_CALLS_READ,
    MAX_NAME,
    ParsedReply,
    TagSpan,
    foreign_call,
    read_reply,
    spans,
    tag,
)
from qzoom_agent.views import View

_IMAGE_INDEX: Final = {"type": "number", "description": "Which of the user's images is meant, counted from 0."}
_OWN: Final = "tool_call"
"""Tag of calls of own tools, also in a family whose zoom calls have another."""


class PromptTexts(BaseModel, frozen=True, extra="forbid"):
    """The texts of a family. They are joined without separators, so line breaks are part of them."""

    system: str
    """System message when zooming is offered; {schema} is the tool's schema as one line of JSON."""
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
    tool_before: str = ""
    """Turn with the result of an own tool: text before its image and its text."""
    tool_after: str = ""
    """The same after them."""
    own_tools: str = ""
    """Added to the system message where own tools are offered, for a family whose own call has no place for a name;
    {schema} are their schemas, one a line."""
    final: str = "Zooming is over. Answer the question now."


class Tagged(BaseModel, frozen=True, extra="forbid"):
    """The protocol of one family."""

    name: str
    frame: Frame
    tools: tuple[str, ...]
    """Names a call may use; the first is taken when a call has none."""
    how: str
    """Description of a well-formed call: the last sentence of every problem."""
    region: Literal["user_image", "first_image", "named_source", "padded_target", "whole_image"]
    """The way in which arguments say which region is meant, see `calls`."""
    wording: PromptTexts
    function: dict[str, Any] = {}
    """The tool as an OpenAI function schema."""
    payload: Literal["json", "bare", "function"] = "json"
    """The way in which a call is written between the tags, see `calls`."""
    tag: str = "tool_call"
    stop: tuple[str, ...] = ()
    max_calls_per_turn: int = 1
    result_role: Literal["user", "tool"] = "user"
    mark: Literal["answer", "boxed"] | None = "answer"
    """The family's way to mark an answer; see `read_reply`."""
    first_name: str = "the first image"
    """The family's name of the coarse view, as part of a sentence."""
    crop_name: str = "crop {index}"
    """The same of a crop; {index} counts crops from 1, {number} all images."""
    image_name: str = "image {number}"
    """The same of one of several images; {index} counts them from 0, {number} from 1."""
    counts_all: bool = False
    """Names of crops count the user's images too."""
    own: dict[str, str] = {}
    """Function schemas of own tools in JSON, by name."""

    def with_tools(self, tools: Mapping[str, str]) -> Self:
        """Return the family with own tools. Raises ConfigError for a name that its zoom tool has."""
        if taken := next((name for name in tools if name in self.tools), None):
            raise ConfigError(f"{taken!r} is the name of the zoom tool of '{self.name}'. Rename the tool.")
        stop = (*self.stop, f"</{_OWN}>") if self.stop and f"</{_OWN}>" not in self.stop else self.stop
        return self.model_copy(update={"own": dict(tools), "stop": stop})

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        say = self.wording
        system = say.system.replace("{schema}", self.schema_for(views)) if tools else say.plain_system
        if tools and self.own:
            system += say.own_tools.replace("{schema}", "\n".join(self.own.values()))
        before = say.before if tools else say.plain_before
        asked = say.between + question + (say.after if tools else say.plain_after)
        user = message("user", before, *(image_part(view.id) for view in views), asked)
        return [message("system", system), user] if system else [user]

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        return read_reply(
            text,
            find=self._find,
            read=lambda span, reply: self._read(span, views, reply),
            how=self.how,
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

    def tool_result(self, text: str, view: View | None) -> list[Message]:
        say = self.wording
        if view is None:
            return [message(self.result_role, say.tool_before + text + say.tool_after)]
        return [message(self.result_role, say.tool_before, image_part(view.id), f"\n{text}{say.tool_after}")]

    def zoom_hint(self, view: View, views: Sequence[View]) -> str:
        return HINTS[self.region](view, views)

    def final(self) -> list[Message]:
        return [message("user", self.wording.final)]

    def view_name(self, index: int) -> str:
        return self.crop_name.format(index=index, number=index + 1) if index else self.first_name

    def tool_schema(self) -> str:
        """Return the schema of each tool as all Qwen templates print it, one a line."""
        return self.schema_for(())

    def schema_for(self, views: Sequence[View]) -> str:
        """Return the schemas for a conversation that begins with `views`: of several images, a call says which."""
        function = self.function
        if function and self.region in ("first_image", "whole_image") and several(views):
            parameters = function["parameters"]
            properties = {**parameters["properties"], "img_idx": _IMAGE_INDEX}
            function = {**function, "parameters": {**parameters, "properties": properties}}
        zoom = json.dumps({"type": "function", "function": function})
        return "\n".join([*([zoom] if self.function or not self.own else []), *self.own.values()])

    def native(self) -> "Tagged":
        """Return the family for native tool calls. Raises ConfigError if it has no schema."""
        if not self.function:
            raise ConfigError(
                f"The format '{self.name}' has no schema of its tool, so a server cannot be given it natively. Use "
                "tools 'text' (--tools text), or another protocol such as qwen3vl."
            )
        say = self.wording
        blank = ("result_before", "result_after", "result_end", "refusal_after", "tool_before", "tool_after")
        plain = dict.fromkeys((*blank, "own_tools"), "")
        wording = say.model_copy(update={**plain, "system": say.plain_system, "refusal_before": "Error: "})
        how = f"Call {self.tools[0]} with arguments as its schema says."
        return self.model_copy(update={"wording": wording, "how": how, "payload": "json", "tag": "tool_call"})

    def _find(self, text: str, reply: ParsedReply) -> list[TagSpan]:
        found = spans(text, self.tag, limit=MAX_CALLS_READ)
        if self.own and self.tag != _OWN:
            found = sorted([*found, *spans(text, _OWN, limit=MAX_CALLS_READ)], key=lambda span: span.start)
        if len(found) > 1 and not found[-1].body.strip():
            reply.repairs.append(f"<{self.tag}> written for </{self.tag}>")
            found.pop()
        if len(full := [span for span in found if span.body.strip()]) < len(found) and full:
            reply.repairs.append(f"empty <{self.tag}> left out")
            found = full
        found = found or foreign_call(text, known=False)
        if found:
            return found
        at = 0
        while len(found) < MAX_CALLS_READ and (bare := LOOSE[self.payload](text[at:], (*self.tools, *self.own))):
            found.append(replace(bare, start=at + bare.start, end=at + bare.end))
            at += bare.end
        if found:
            reply.repairs.append("call without its tags read")
            return found
        closing = tag(self.tag).search(text)
        if closing is None:
            return foreign_call(text)
        reply.repairs.append(f"opening <{self.tag}> added")
        return [TagSpan(text[: closing.start()], text[: closing.end()], 0, closing.end(), True)]

    def _read(self, span: TagSpan, views: Sequence[View], reply: ParsedReply) -> None:
        other = self.tag != _OWN and bool(tag(_OWN).match(span.raw))
        closing = f"</{_OWN if other else self.tag}>"
        if not span.closed and closing not in self.stop:
            reply.repairs.append(f"closing {closing} added")
        payloads = PAYLOADS["json" if other else self.payload](span.body, reply.repairs)
        if not payloads:
            reply.problems.append(f"The call could not be read. {self.how}")
        for payload in payloads:
            name = valid_unicode(payload.name).strip()[:MAX_NAME] or self.tools[0]
            if not payload.name and any(own in span.body for own in self.own):  # its arguments are no box of zoom
                reply.problems.append(f"The call could not be read. {self.how}")
                continue
            if name in self.own:
                given = own_arguments(payload, self.own[name])
                reply.calls.append(ToolCall(id=payload.id, name=name, box=None, arguments=given, raw=span.raw))
                continue
            if name not in self.tools:
                known = f" There are {', '.join((self.tools[0], *self.own))}." if self.own else ""
                reply.problems.append(f"There is no tool {name!r}.{known} {self.how}")
                continue
            try:
                box, frame, view = self._region(payload.arguments, views, reply.repairs)
            except BoxError as error:
                reply.problems.append(f"{error} {self.how}")
                continue
            label = read_label(payload.arguments)
            reply.calls.append(
                ToolCall(id=payload.id, name=name, box=box, frame=frame, view=view, label=label, raw=span.raw)
            )

    def _region(self, arguments: Arguments, views: Sequence[View], repairs: list[str]) -> CallRegion:
        """Return the region of a zoom call: of the image that the family's way names, or of a named tool's image."""
        named = arguments.get("view") if self.own or several(views) else None
        if isinstance(named, str):
            name = named.strip()
            found = next((one for one in views if name in (one.id, one.kind == "coarse" and one.origin)), None)
            if found is None:
                known = ", ".join(view.id for view in views)
                raise BoxError(f"There is no view {valid_unicode(named[:MAX_NAME])!r}. There are {known}.")
            return CallRegion(*box_argument(arguments, self.frame, repairs, size=found.size), found.id)
        # An index that the schema leaves optional is no correction where there is one image.
        optional = INDEX_NAMES[0] not in self.function.get("parameters", {}).get("required", ())
        if self.region == "user_image" and optional and not several(views) and not arguments.keys() & {*INDEX_NAMES}:
            arguments = {INDEX_NAMES[0]: 0, **arguments}
        return REGIONS[self.region](arguments, views, self.frame, repairs)


@cache
def published_families() -> dict[str, Tagged]:
    """Return the published families by name."""
    text = (files("qzoom_agent") / "protocols" / "families.yaml").read_text(encoding="utf-8")
    return {name: Tagged(name=name, **fields) for name, fields in yaml.safe_load(text).items() if name[0] != "_"}
