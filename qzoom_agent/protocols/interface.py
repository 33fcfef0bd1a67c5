"""The interface of a protocol: how one model family is asked, calls tools and reads results.

A protocol is one immutable object. The loop, evaluations and training speak to a model through it alone. `parse` takes
any text, never raises, and is linear in its length. A parsed reply has an answer, a call or a problem, and never both
an answer and a call: `<answer>` beats a call, a call beats other text, and `repairs` names what was dropped. Boxes may
be swapped or outside, which the tool corrects; stop strings may be present or cut off.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from pydantic import BaseModel, Field

from qzoom_agent.geometry import Box, Frame
from qzoom_agent.messages import Message
from qzoom_agent.views import View


class ToolCall(BaseModel, frozen=True, extra="forbid"):
    """A call of the model, as data: of zoom, or of an own tool."""

    id: str = Field(default="", exclude_if=operator.not_)
    """The server's id of a native tool call."""
    name: str
    """The tool as the model named it; protocols without tool names use "zoom"."""
    box: tuple[float, float, float, float] | None
    """x1, y1, x2, y2 as written, in `frame` of `view`; finite, possibly swapped or outside. Parsers always set it, but
    for an own tool."""
    frame: Frame = "pixel"
    """Coordinate frame of `box`."""
    view: str = "coarse"
    """Id of the view that `box` refers to."""
    label: str = ""
    """The model's words for what it looks for."""
    raw: str = ""
    """The exact text of the call."""
    arguments: dict[str, Any] | None = Field(default=None, exclude=True)
    """Arguments of an own tool, as written; None: it is a zoom call."""

    @property
    def as_box(self) -> Box | None:
        """The box with its frame and view."""
        return None if self.box is None else Box(*self.box, frame=self.frame, view=self.view)


class Parsed(BaseModel, frozen=True, extra="forbid"):
    """A parsed reply."""

    thought: str = ""
    """Reasoning and any text around the calls."""
    answer: str | None = None
    """The final answer; None when the reply calls a tool or cannot be read."""
    calls: list[ToolCall] = []
    """Calls to serve, in order, at most `max_calls_per_turn`."""
    problems: list[str] = []
    """Texts for the model: calls that could not be parsed or are too many, and the form to use instead."""
    repairs: list[str] = []
    """Corrections made while parsing: for the trace, not for the model."""


class ZoomProtocol(Protocol):
    """The text format of one model family; any object with these members will do."""

    @property
    def name(self) -> str:
        """Name of the format, for traces and messages."""

    @property
    def frame(self) -> Frame:
        """Frame of the boxes that the model writes."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings after which a reply is complete, beyond the end-of-turn token."""

    @property
    def max_calls_per_turn(self) -> int:
        """Calls served from one reply; further ones become a problem."""

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        """Return the system message, if any, and the first user turn with `views` in order; `tools` offers zooming."""

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        """Parse a reply; `views` are all views shown so far, in order, the coarse view first."""

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        """Return the turn that shows crop number `index` (from 0) of this episode, with the tool's notes."""

    def refusal(self, text: str) -> list[Message]:
        """Return the turn that tells the model why there is no crop."""

    def final(self) -> list[Message]:
        """Return the last turn: zooming is over, answer now."""

    def view_name(self, index: int) -> str:
        """Return the model's name of view number `index` (the coarse view is 0), as part of a sentence."""


@runtime_checkable
class ToolProtocol(ZoomProtocol, Protocol):
    """A protocol in which own tools can be offered beside zoom."""

    def with_tools(self, tools: Mapping[str, str]) -> Self:
        """Return the protocol with these tools in its prompt and its grammar: function schemas in JSON, by name."""

    def tool_result(self, text: str, view: View | None) -> list[Message]:
        """Return the turn with what an own tool returned: a text, and the view of its image if it made one."""

    def zoom_hint(self, view: View, views: Sequence[View]) -> str:
        """Return how a zoom call names a tool's image, as a sentence; empty if none can. `views` are all shown."""


@runtime_checkable
class NativeProtocol(ZoomProtocol, Protocol):
    """A protocol whose tool can also be called natively: the server gets its schema and returns calls and their ids."""

    def tool_schema(self) -> str:
        """Return the tool as an OpenAI function schema in one line of JSON; each own tool is a further line."""

    def native(self) -> "NativeProtocol":
        """Return the protocol for native calls: no schema in the text, and results without marks of a format.

        Raises:
            ConfigError: It has no schema.
        """


def schema_of(protocol: ZoomProtocol, views: Sequence[View]) -> str:
    """Return the function schemas of a protocol's tools, one a line, for a conversation about these views; else "".

    A protocol may have `schema_for(views)`, which says how a call names one of several images.
    """
    made: Callable[..., str] | None = getattr(protocol, "schema_for", None)
    if made is not None:
        return made(views)
    return protocol.tool_schema() if isinstance(protocol, NativeProtocol) else ""


def view_names(protocol: ZoomProtocol, views: Sequence[View]) -> list[str]:
    """Return the model's names of views, in order.

    Of several images, a protocol may have `image_name`: {index} counts images from 0, {number} from 1. Crops are then
    counted by themselves, unless `counts_all` says that their names count all images.
    """
    if sum(view.kind == "coarse" for view in views) < 2:
        return [protocol.view_name(at) for at in range(len(views))]
    named, every = getattr(protocol, "image_name", "image {number}"), getattr(protocol, "counts_all", False)
    names, crops = list[str](), 0
    for at, view in enumerate(views):
        crops += view.kind != "coarse"
        numbers = {"index": view.image, "number": view.image + 1}
        name = named.format(**numbers) if view.kind == "coarse" else protocol.view_name(at if every else crops)
        names.append(name)
    return names


def counted(index: int) -> str:
    """Return the name of a view in families that do not number images: the first image, crop 1, crop 2 and so on."""
    return f"crop {index}" if index else "the first image"
