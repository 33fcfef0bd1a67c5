"""Propose: where should one look? A tool that answers with boxes instead of pixels.

For models and frameworks that zoom by themselves but look in the wrong place: a perceiver (any model with branches)
takes one coarse look for the question and names the regions that stand out, with how sure it is. The caller decides;
nothing is cut. What does the looking is passed in, so this module knows no model:

    propose = Propose(lambda image, question: agent.look(image, question).record)
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict

from qzoom_agent.geometry import Frame
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.schema import function_schema

if TYPE_CHECKING:
    from langchain_core.tools import StructuredTool

NAME = "image_region_proposal_tool"
Looker = Callable[[Image.Image, str], PerceptionRecord]
"""Looks at an image for a question."""


class ProposeArguments(BaseModel):
    """What a model passes to the propose tool."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    question: str
    """What you want to find out, as a full question."""


class Proposals(BaseModel):
    """Where a closer look may pay, and the text that says so to a model."""

    model_config = ConfigDict(frozen=True)

    boxes: list[tuple[float, float, float, float]]
    """In pixels of the original, best first; empty when the coarse view suffices."""
    score: float | None
    """The gate's probability that the question needs more detail; None without a gate."""
    text: str


class Propose:
    """The propose tool of one perceiver."""

    def __init__(self, look: Looker, *, frame: Frame = "per_mille") -> None:
        """`frame` is how boxes are written in the text: pixels of the original, unit or per_mille."""
        self._look = look
        self._frame: Frame = frame

    def __call__(self, store: ViewStore, question: str) -> Proposals:
        """Boxes for a question about the store's image. Raises what the perceiver raises."""
        original = store.view("original")
        record = self._look(store.image("original"), question)
        if not record.boxes:
            told = f"No region stands out: {record.reason}. Answer from what you see."
            return Proposals(boxes=[], score=record.score, text=told)
        listed = []
        for x1, y1, x2, y2 in record.boxes:
            scale_x, scale_y = (
                (1.0, 1.0) if self._frame == "pixel" else tuple(_UNITS[self._frame] / side for side in original.size)
            )
            numbers = (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y)
            listed.append("[" + ", ".join(f"{number:.4g}" for number in numbers) + "]")
        sure = "" if record.score is None else f" (more detail is needed with probability {record.score:.2f})"
        told = f"Look closer at {', then '.join(listed)}, in {self._frame} of the whole image{sure}."
        return Proposals(boxes=list(record.boxes), score=record.score, text=told)

    def as_langchain_tool(self, store: ViewStore) -> "StructuredTool":
        """The tool for one run; its content is the text, its artifact the `Proposals`."""
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


_UNITS: dict[Frame, float] = {"unit": 1.0, "per_mille": 1000.0}
DESCRIPTION = (
    "Says where in the image to look closer for a question: boxes, best first, or that no closer look is needed."
)


def propose_schema() -> dict[str, Any]:
    """The tool as an OpenAI function schema."""
    return function_schema(NAME, DESCRIPTION, ProposeArguments)
