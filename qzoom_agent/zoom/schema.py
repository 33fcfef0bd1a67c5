"""The zoom tool as other software sees it: a function schema, and a LangChain tool.

Both are made from one pydantic model of the arguments, so what a model is told and what is checked cannot differ. This
is for chat servers and agent frameworks that speak tool calls natively; the model families' own text formats are in
`qzoom_agent.protocols`. Arguments that do not validate come back to the model as text, like every other bad call.
"""

import base64
import io
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qzoom_agent.geometry import Box, Frame
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomResult

if TYPE_CHECKING:
    from langchain_core.tools import StructuredTool

NAME = "image_zoom_in_tool"
"""The name the Qwen models were trained with."""

_FRAME_TEXT: dict[Frame, str] = {
    "pixel": "pixels of the view, as shown",
    "unit": "fractions of the view's width and height, 0 to 1",
    "per_mille": "thousandths of the view's width and height, 0 to 1000",
    "cell": "columns and rows of the view's token grid",
}


class ZoomArguments(BaseModel):
    """What a model passes to the zoom tool."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    bbox_2d: Annotated[list[float], Field(min_length=4, max_length=4)]
    """The region to look at, as [x1, y1, x2, y2]: left, top, right, bottom."""
    view: str = "coarse"
    """The view the numbers refer to: "coarse" for the first image, "crop1" for the first crop, and so on."""
    label: str = ""
    """What you expect to find there."""


def zoom_schema(style: Literal["openai"] = "openai", *, frame: Frame = "per_mille") -> dict[str, Any]:
    """The tool as an OpenAI function schema, with box coordinates in `frame`."""
    return function_schema(NAME, describe(frame), ZoomArguments)


def function_schema(name: str, description: str, arguments: type[BaseModel]) -> dict[str, Any]:
    """An OpenAI function schema of these arguments, without the noise that pydantic adds."""
    parameters = arguments.model_json_schema()
    for noise in ("title", "description"):
        parameters.pop(noise)
    for field in parameters["properties"].values():
        field.pop("title")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def as_langchain_tool(zoom: Zoom, store: ViewStore, *, frame: Frame = "per_mille") -> "StructuredTool":
    """The tool for one run, with box coordinates in `frame`.

    The content of its message is a text block and, if a crop was served, an image block (PNG, base64); the artifact is
    the `ZoomResult`. Where nothing can be cut the text is that result's `error`. Bad arguments give a message with
    status "error" whose text says what to write.
    """
    from langchain_core.tools import StructuredTool

    def call(bbox_2d: list[float], view: str, label: str) -> tuple[list[dict[str, Any]], ZoomResult]:
        x1, y1, x2, y2 = bbox_2d
        result = zoom(store, Box(x1, y1, x2, y2, frame=frame, view=view), label=label)
        return _blocks(result, store), result

    return StructuredTool.from_function(
        func=call,
        name=NAME,
        description=describe(frame),
        args_schema=ZoomArguments,
        response_format="content_and_artifact",
        handle_validation_error=lambda error: _explain(error, frame),
    )


def describe(frame: Frame) -> str:
    """What the tool does, for the model."""
    return (
        "Zoom in on a region of an image: returns that region cut from the full-resolution original. "
        f"Coordinates are {_FRAME_TEXT[frame]}."
    )


def caption(view: View, original: View) -> str:
    """Where a crop lies, as a sentence for the model."""
    x1, y1, x2, y2 = (f"{value:g}" for value in view.box)
    return (
        f"View '{view.id}' ({view.width}x{view.height} px) shows [{x1}, {y1}, {x2}, {y2}] of the original "
        f"{original.width}x{original.height} px."
    )


def _blocks(result: ZoomResult, store: ViewStore) -> list[dict[str, Any]]:
    if result.view is None:
        return [{"type": "text", "text": result.error}]
    told = " ".join([caption(result.view, store.view("original")), *result.notes])
    png = io.BytesIO()
    store.image(result.view.id).save(png, format="PNG", compress_level=1)
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return [{"type": "text", "text": told}, {"type": "image", "base64": data, "mime_type": "image/png"}]


def _explain(error: Any, frame: Frame) -> str:
    problems = ""
    if isinstance(error, ValidationError):
        problems = " ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}." for one in error.errors())
    return (
        f"The zoom call could not be read. {problems} Pass bbox_2d as four numbers [x1, y1, x2, y2], "
        f"{_FRAME_TEXT[frame]}, and optionally view and label."
    )
