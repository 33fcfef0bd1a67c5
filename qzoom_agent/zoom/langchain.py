"""The zoom tool for LangChain and LangGraph agents.

Bad calls never raise: what the text protocols mend is mended here too, and for the rest the model reads a text that
says what to write.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import StructuredTool, ToolException

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Box, Frame
from qzoom_agent.protocols.boxes import BOX_KEYS, box_argument, read_index
from qzoom_agent.protocols.calls import INDEX_NAMES, read_label
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom import schema
from qzoom_agent.zoom.zoom import Tool, ZoomConfig, ZoomResult

_CORNER_KEYS = ("x", "y", "w", "h", "width", "height", "left", "top", "right", "bottom")


def as_langchain_tool(zoom: Tool, store: ViewStore, *, frame: Frame = "per_mille") -> StructuredTool:
    """Return the zoom tool for one run.

    The content of its message is a text block and, if a crop was served, an image block (PNG, base64); the artifact is
    the `ZoomResult`. Where nothing was cut, the message has status "error".

    Args:
        zoom: The tool that plans and cuts a crop.
        store: The views of the run. It must hold the original; a missing coarse view is added at the tool's budget.
        frame: How the model writes boxes.
    """
    if "coarse" not in store:
        budget = getattr(zoom, "config", None) or ZoomConfig()
        store.add_coarse(factor=budget.factor, min_tokens=budget.min_tokens, max_tokens=budget.max_tokens)

    def call(**arguments: Any) -> tuple[list[dict[str, Any]], ZoomResult]:
        notes: list[str] = []
        try:
            box = _read(arguments, store, frame, notes)
        except BoxError as error:
            raise ToolException(_explain(str(error), frame)) from error
        result = zoom.cut(store, zoom.plan(store, box), label=read_label(arguments))
        return _blocks(result, store, [_SHARES] if box.frame != frame else []), result

    return _ZoomTool(
        func=call,
        name=schema.NAME,
        description=schema.describe(frame),
        args_schema=schema.zoom_schema(frame=frame)["function"]["parameters"],
        response_format="content_and_artifact",
        handle_tool_error=True,
    )


class _ZoomTool(StructuredTool):
    """A tool whose message has status "error" where nothing was cut."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return _with_status(super().run(*args, **kwargs))

    async def arun(self, *args: Any, **kwargs: Any) -> Any:
        return _with_status(await super().arun(*args, **kwargs))


def _with_status(message: Any) -> Any:
    if isinstance(message, ToolMessage) and isinstance(message.artifact, ZoomResult) and message.artifact.error:
        message.status = "error"
    return message


_SHARES = "The numbers were read as shares of the image."


def _read(arguments: dict[str, Any], store: ViewStore, frame: Frame, notes: list[str]) -> Box:
    """Return the box of a call. Raises BoxError with a text for the model."""
    known = {"view", "label", *INDEX_NAMES, *BOX_KEYS}
    unknown = [name for name in arguments if name not in known and not _names_corner(name)]
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


def _names_corner(name: str) -> bool:
    return name.lower() in _CORNER_KEYS or (name[:1].lower() in "xy" and len(name) <= 5)


def _caption(view: View, original: View) -> str:
    x1, y1, x2, y2 = (f"{value:g}" for value in view.box)
    return (
        f"View '{view.id}' ({view.width}x{view.height} px) shows [{x1}, {y1}, {x2}, {y2}] of the original "
        f"{original.width}x{original.height} px."
    )


def _blocks(result: ZoomResult, store: ViewStore, notes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the content of the tool's message."""
    if result.view is None:
        return [{"type": "text", "text": result.error}]
    text = " ".join([_caption(result.view, store.view("original")), *notes, *result.notes])
    png = io.BytesIO()
    store.image(result.view.id).save(png, format="PNG", compress_level=1)
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return [{"type": "text", "text": text}, {"type": "image", "base64": data, "mime_type": "image/png"}]


def _explain(problem: str, frame: Frame) -> str:
    """Return a text for the model about arguments that could not be read."""
    return (
        f"The zoom call could not be read. {problem} Pass bbox_2d as four numbers [x1, y1, x2, y2], "
        f"{schema.FRAME_TEXT[frame]}, and optionally view and label."
    )
