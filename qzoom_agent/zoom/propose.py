"""Propose: a tool that answers a question about an image with the boxes to look at.

For models and frameworks that zoom by themselves but miss the right place. A perceiver (any model with branches) takes
one coarse look and names the regions that stand out; nothing is cut:

    propose = Propose(lambda image, question: agent.look(image, question).record)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import BaseModel

from qzoom_agent.geometry import Box, Frame
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.image_zoom import function_schema

if TYPE_CHECKING:
    from langchain_core.tools import StructuredTool

NAME = "image_region_proposal_tool"
DESCRIPTION = (
    "Says where in the image to look closer for a question: boxes, best first, or that no closer look is needed."
)
Looker = Callable[[Image.Image, str], PerceptionRecord]
"""Looks at an image for a question."""


class ProposeArguments(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The arguments of the propose tool."""

    question: str
    """The question you want to answer, in full."""


class Proposals(BaseModel, frozen=True):
    """The regions that deserve a closer look, and a text about them for a model."""

    boxes: list[tuple[float, float, float, float]]
    """In pixels of the original, best first; empty when the coarse view suffices."""
    score: float | None
    """The gate's probability that the question needs more detail; None without a gate."""
    text: str


class Propose:
    """The propose tool of one perceiver."""

    def __init__(self, look: Looker, *, frame: Frame = "per_mille") -> None:
        """Write boxes in `frame` of the whole image: pixel, unit or per_mille."""
        self._look = look
        self._frame: Frame = frame

    def __call__(self, store: ViewStore, question: str) -> Proposals:
        """Return boxes for a question about the store's image. Raises what the perceiver raises."""
        original = store.view("original")
        record = self._look(store.image("original"), question)
        if not record.boxes:
            text = f"No region stands out: {record.reason}. Answer from what you see."
            return Proposals(boxes=[], score=record.score, text=text)
        listed, digits = [], 6 if self._frame == "pixel" else 4
        for box in record.boxes:
            numbers = Box(*box).to_frame(self._frame, original.size).as_list()
            listed.append("[" + ", ".join(f"{number:.{digits}g}" for number in numbers) + "]")
        sure = "" if record.score is None else f" (more detail is needed with probability {record.score:.2f})"
        text = f"Look closer at {', then '.join(listed)}, in {self._frame} of the whole image{sure}."
        return Proposals(boxes=list(record.boxes), score=record.score, text=text)

    def as_langchain_tool(self, store: ViewStore) -> "StructuredTool":
        """Return the tool for one run of a LangChain agent; its content is the text, its artifact the `Proposals`."""
        from langchain_core.tools import StructuredTool

        def call(question: str) -> tuple[str, Proposals]:
            found = self(store, question)
            return found.text, found

        return StructuredTool.from_function(
            func=call,
            name=NAME,
            description=DESCRIPTION,
            args_schema=ProposeArguments,
            response_format="content_and_artifact",
        )


def propose_schema() -> dict[str, Any]:
    """Return the tool as an OpenAI function schema."""
    return function_schema(NAME, DESCRIPTION, ProposeArguments)
