"""Protocol: how one model family is asked, writes a zoom call, and reads its result.

A protocol is one immutable object: the opening messages, a parser, and the turns that carry a crop, a refusal or the
last request. The agent loop, the evaluations and the RL environment all speak to a model through it and know nothing
about tags, frames or index bases.

Invariants, for every protocol:
- `parse` accepts every `str`, never raises, and takes time linear in the text's length.
- A parsed reply is never nothing: it has an answer, or at least one call, or at least one problem.
- With a call in hand there is no answer: a reply that has both is a call, unless it holds an `<answer>`, with which the
  model says that it is done. `repairs` names what was dropped.
- Every call returned can be handed to the zoom tool. Corners may be swapped and a box may lie outside: the tool mends
  that, and tells.
- A stop string may be missing from the text (the backend cut it off) or present: both parse alike.

A protocol does not judge a box, count a budget or resolve pixels.
"""

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from qzoom_agent.geometry import Box, Frame
from qzoom_agent.messages import Message
from qzoom_agent.views import View


class ToolCall(BaseModel):
    """A zoom the model asked for, as data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The tool as the model named it; protocols without tool names use "zoom"."""
    box: tuple[float, float, float, float] | None
    """x1, y1, x2, y2 as written, in `frame` of `view`; finite, possibly swapped or outside. Parsers always set it."""
    frame: Frame = "pixel"
    """Coordinate frame of `box`."""
    view: str = "coarse"
    """Id of the view that `box` refers to."""
    label: str = ""
    """What the model says it is looking for."""
    raw: str = ""
    """The exact text of the call."""

    @property
    def as_box(self) -> Box | None:
        """The box with its frame and view."""
        return None if self.box is None else Box(*self.box, frame=self.frame, view=self.view)


class Parsed(BaseModel):
    """A reply, read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thought: str = ""
    """Reasoning and any text around the calls."""
    answer: str | None = None
    """The final answer; None when the reply calls a tool or cannot be read."""
    calls: list[ToolCall] = []
    """Calls to serve, in order, at most `max_calls_per_turn`."""
    problems: list[str] = []
    """Texts for the model: calls that could not be read or are too many, and what to write instead."""
    repairs: list[str] = []
    """What was mended on the way: for the trace, not for the model."""


class ZoomProtocol(Protocol):
    """One model family's text format."""

    @property
    def name(self) -> str:
        """Key in `PROTOCOLS`."""
        ...

    @property
    def frame(self) -> Frame:
        """Frame of the boxes that the model writes."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings after which a reply is complete, beyond the end-of-turn token."""
        ...

    @property
    def max_calls_per_turn(self) -> int:
        """Calls served from one reply; further ones become a problem."""
        ...

    def opening(self, question: str, views: Sequence[View], *, tools: bool) -> list[Message]:
        """System message (if the family has one) and first user turn with `views` in order; `tools`: zooming is "
        "offered."""
        ...

    def parse(self, text: str, views: Sequence[View]) -> Parsed:
        """Read a reply; `views` are all views shown so far, in order, the coarse view first."""
        ...

    def result(self, view: View, index: int, notes: Sequence[str]) -> list[Message]:
        """The turn that shows crop number `index` (from 0) of this episode, with what the tool noted about it."""
        ...

    def refusal(self, text: str) -> list[Message]:
        """The turn that tells the model why no crop came."""
        ...

    def final(self) -> list[Message]:
        """The last turn: answer now, zooming is over."""
        ...

    def view_name(self, index: int) -> str:
        """What the model calls view number `index` (the coarse view is 0), as part of a sentence to it."""
        ...


def counted(index: int) -> str:
    """The name of a view in families that do not number images: the first image, crop 1, crop 2 and so on."""
    return f"crop {index}" if index else "the first image"
