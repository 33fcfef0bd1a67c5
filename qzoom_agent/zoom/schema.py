"""The zoom tool as an OpenAI function schema, for servers and frameworks with native tool calls.

The schema and the check of arguments are made from one pydantic model, so they cannot differ. The text formats of model
families are in `qzoom_agent.protocols`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qzoom_agent.geometry import Frame

NAME = "image_zoom_in_tool"
"""The name the Qwen models were trained with."""
FRAME_TEXT: dict[Frame, str] = {
    "pixel": "pixels of the view, as shown",
    "unit": "fractions of the view's width and height, 0 to 1",
    "per_mille": "thousandths of the view's width and height, 0 to 1000",
    "cell": "columns and rows of the view's token grid",
}


class ZoomArguments(BaseModel):
    """The arguments of the zoom tool."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    bbox_2d: Annotated[list[float], Field(min_length=4, max_length=4)]
    """The region to look at, as [x1, y1, x2, y2]: left, top, right, bottom."""
    view: str = "coarse"
    """The view the numbers refer to: "coarse" for the first image, "crop1" for the first crop, and so on."""
    label: str = ""
    """The thing you expect to find there."""


def zoom_schema(style: Literal["openai"] = "openai", *, frame: Frame = "per_mille") -> dict[str, Any]:
    """Return the zoom tool as an OpenAI function schema, with box coordinates in `frame`."""
    return function_schema(NAME, describe(frame), ZoomArguments)


def function_schema(name: str, description: str, arguments: type[BaseModel]) -> dict[str, Any]:
    """Return an OpenAI function schema of these arguments, without the titles that pydantic adds."""
    parameters = arguments.model_json_schema()
    for noise in ("title", "description"):
        parameters.pop(noise)
    for field in parameters["properties"].values():
        field.pop("title")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def describe(frame: Frame) -> str:
    """Return the description of the zoom tool that a model reads."""
    return (
        "Zoom in on a region of an image: returns that region cut from the full-resolution original. "
        f"Coordinates are {FRAME_TEXT[frame]}."
    )
