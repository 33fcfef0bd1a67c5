"""The zoom tool on one image, for loops that are not the agent's: other frameworks, servers, a loop of your own.

    zoom = ImageZoom("receipt.jpg")
    zoom.coarse                                  # the small view to show the model first
    reply = zoom(bbox_2d=[0, 0, 500, 500])       # what the model asked for
    reply.text, reply.image                      # what it is told and shown

Bad calls never raise: what the text protocols mend is mended here too, and for the rest the model reads a text that
says what to write. `zoom_schema` is the tool as an OpenAI function schema, for servers and frameworks with native tool
calls; the text formats of model families are in `qzoom_agent.protocols`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Box, Frame
from qzoom_agent.images import ImageSource, load_image
from qzoom_agent.protocols.boxes import BOX_KEYS, box_argument, names_side, read_index
from qzoom_agent.protocols.calls import INDEX_NAMES, read_label
from qzoom_agent.protocols.json_repair import read_json
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Tool, Zoom, ZoomConfig, ZoomResult

NAME = "image_zoom_in_tool"
"""The name the Qwen models were trained with."""
FRAME_TEXT: dict[Frame, str] = {
    "pixel": "pixels of the view, as shown",
    "unit": "fractions of the view's width and height, 0 to 1",
    "per_mille": "thousandths of the view's width and height, 0 to 1000",
    "cell": "columns and rows of the view's token grid",
}
_SHARES = "The numbers were read as shares of the image."


class ZoomArguments(BaseModel, extra="forbid", use_attribute_docstrings=True):
    """The arguments of the zoom tool."""

    bbox_2d: Annotated[list[float], Field(min_length=4, max_length=4)]
    """The region to look at, as [x1, y1, x2, y2]: left, top, right, bottom."""
    view: str = "coarse"
    """The view the numbers refer to: "coarse" for the first image, "crop1" for the first crop, and so on."""
    label: str = ""
    """The thing you expect to find there."""


@dataclass(frozen=True)
class ZoomReply:
    """The reply to a zoom call."""

    text: str
    """What the model is told: the place of the crop, or why there is none and what to write."""
    image: Image.Image | None = None
    """The crop."""
    result: ZoomResult | None = None
    """The record of the crop; None where the arguments could not be read."""

    @property
    def url(self) -> str | None:
        """The crop as a data URI."""
        return None if self.image is None else data_url(self.image)


class ImageZoom:
    """One image, its coarse view and the zoom tool on it."""

    name = NAME

    def __init__(
        self,
        image: ImageSource,
        *,
        coarse_tokens: tuple[int, int] = (64, 256),
        crop: ZoomConfig | None = None,
        frame: Frame = "per_mille",
    ) -> None:
        """
        Args:
            image: As `load_image` takes it.
            coarse_tokens: Least and most visual tokens of the coarse view.
            crop: Budget and shape of crops; None: 64 to 1024 tokens.
            frame: How the model writes boxes.

        Raises:
            ImageError: The image cannot be read.
        """
        self.store = ViewStore()
        self.frame: Frame = frame
        self.tool: Tool = Zoom(crop := crop or ZoomConfig(min_tokens=64, max_tokens=1024))
        self.store.add_original(load_image(image))
        self.store.add_coarse(factor=crop.factor, min_tokens=coarse_tokens[0], max_tokens=coarse_tokens[1])

    @property
    def coarse(self) -> Image.Image:
        """The small view of the whole image."""
        return self.store.image("coarse")

    @property
    def url(self) -> str:
        """The coarse view as a data URI."""
        return data_url(self.coarse)

    @property
    def crops(self) -> list[View]:
        """The crops so far."""
        return [view for view in self.store.views if view.kind == "crop"]

    @property
    def description(self) -> str:
        """What a model is told about the tool."""
        return describe(self.frame)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as an OpenAI function schema."""
        return zoom_schema(frame=self.frame)

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        found: dict[str, Any] = self.schema["function"]["parameters"]
        return found

    def __call__(self, arguments: str | Mapping[str, Any] | None = None, /, **named: Any) -> ZoomReply:
        """Serve a call, whose arguments are JSON, a mapping or named. Never raises on what a model wrote."""
        given: Any = _parsed(arguments) if isinstance(arguments, str) else arguments
        if isinstance(given, list | tuple):
            given = {"bbox_2d": list(given)}
        if not isinstance(given, Mapping | None):
            return ZoomReply(explain("The arguments are no JSON object.", self.frame))
        return serve(self.tool, self.store, {**(given or {}), **named}, frame=self.frame)


def _parsed(text: str) -> Any:
    """Return the JSON in a text, mended as in a reply; the text itself if there is none."""
    for _ in range(2):  # a text may hold JSON as a text
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            repaired = read_json(text)
            return text if repaired is None else repaired.value
        if not isinstance(found, str):
            return found
        text = found
    return text


def zoom_schema(*, frame: Frame = "per_mille") -> dict[str, Any]:
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


def serve(tool: Tool, store: ViewStore, arguments: dict[str, Any], *, frame: Frame) -> ZoomReply:
    """Read the arguments of a call, mended where their meaning is plain, and cut the crop."""
    notes: list[str] = []
    try:
        box = _read(arguments, store, frame, notes)
    except BoxError as error:
        return ZoomReply(explain(str(error), frame))
    result = tool.cut(store, tool.plan(store, box), label=read_label(arguments))
    if result.view is None:
        return ZoomReply(result.error or "", result=result)
    told = [_SHARES, *result.notes] if box.frame != frame else result.notes
    return ZoomReply(_caption(result.view, store.original(result.view.id), told), store.image(result.view.id), result)


def png(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    image.save(data := io.BytesIO(), format="PNG", compress_level=1)
    return data.getvalue()


def data_url(image: Image.Image) -> str:
    """Return an image as a data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def image_block(image: Image.Image) -> dict[str, Any]:
    """Return an image as a content block of LangChain."""
    return {"type": "image", "base64": base64.b64encode(png(image)).decode("ascii"), "mime_type": "image/png"}


def explain(problem: str, frame: Frame) -> str:
    """Return a text for the model about arguments that could not be read."""
    return (
        f"The zoom call could not be read. {problem} Pass bbox_2d as four numbers [x1, y1, x2, y2], "
        f"{FRAME_TEXT[frame]}, and optionally view and label."
    )


def _read(arguments: dict[str, Any], store: ViewStore, frame: Frame, notes: list[str]) -> Box:
    """Return the box of a call. Raises BoxError with a text for the model."""
    known = {"view", "label", *INDEX_NAMES, *BOX_KEYS}
    unknown = [name for name in arguments if name not in known and not names_side(name)]
    if unknown:
        raise BoxError(f"There is no argument {unknown[0][:80]!r}.")
    if read_index(arguments, INDEX_NAMES, notes, default=0) != 0:
        raise BoxError("img_idx counts the user's images from 0, and there is one. Name a crop with view, as 'crop1'.")
    view = arguments.get("view")
    name = "coarse" if view is None else view.strip() if isinstance(view, str) else str(view)
    if name not in store:
        raise BoxError(f"There is no view {name[:80]!r}; the views are {', '.join(one.id for one in store.views)}.")
    found = box_argument(arguments, frame, notes, size=store.view(name).size)
    return Box(*found.box, frame=found.frame, view=name)


def _caption(view: View, original: View, notes: Sequence[str]) -> str:
    x1, y1, x2, y2 = (f"{value:g}" for value in view.box)
    place = (
        f"View '{view.id}' ({view.width}x{view.height} px) shows [{x1}, {y1}, {x2}, {y2}] of the {original.id} "
        f"{original.width}x{original.height} px."
    )
    return " ".join([place, *notes])
