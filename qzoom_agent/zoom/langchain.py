"""The zoom tool for LangChain and LangGraph agents.

Bad calls never raise: the model reads a text that says what to write.
"""

import base64
import io
from typing import Any

from langchain_core.tools import StructuredTool
from pydantic import ValidationError

from qzoom_agent.geometry import Box, Frame
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom import schema
from qzoom_agent.zoom.zoom import Tool, ZoomResult


def as_langchain_tool(zoom: Tool, store: ViewStore, *, frame: Frame = "per_mille") -> StructuredTool:
    """Return the zoom tool for one run.

    The content of its message is a text block and, if a crop was served, an image block (PNG, base64); the artifact is
    the `ZoomResult`. Arguments that do not validate give a message with status "error".

    Args:
        zoom: The tool that plans and cuts a crop.
        store: The views of the run; it must hold the original and the coarse view.
        frame: How the model writes boxes.
    """

    def call(bbox_2d: list[float], view: str, label: str) -> tuple[list[dict[str, Any]], ZoomResult]:
        x1, y1, x2, y2 = bbox_2d
        plan = zoom.plan(store, Box(x1, y1, x2, y2, frame=frame, view=view))
        result = zoom.cut(store, plan, label=label)
        return _blocks(result, store), result

    return StructuredTool.from_function(
        func=call,
        name=schema.NAME,
        description=schema.describe(frame),
        args_schema=schema.ZoomArguments,
        response_format="content_and_artifact",
        handle_validation_error=lambda error: _explain(error, frame),
    )


def _caption(view: View, original: View) -> str:
    x1, y1, x2, y2 = (f"{value:g}" for value in view.box)
    return (
        f"View '{view.id}' ({view.width}x{view.height} px) shows [{x1}, {y1}, {x2}, {y2}] of the original "
        f"{original.width}x{original.height} px."
    )


def _blocks(result: ZoomResult, store: ViewStore) -> list[dict[str, Any]]:
    """Return the content of the tool's message."""
    if result.view is None:
        return [{"type": "text", "text": result.error}]
    text = " ".join([_caption(result.view, store.view("original")), *result.notes])
    png = io.BytesIO()
    store.image(result.view.id).save(png, format="PNG", compress_level=1)
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return [{"type": "text", "text": text}, {"type": "image", "base64": data, "mime_type": "image/png"}]


def _explain(error: Any, frame: Frame) -> str:
    """Return a text for the model about arguments that did not validate."""
    problems = ""
    if isinstance(error, ValidationError):
        problems = " ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}." for one in error.errors())
    return (
        f"The zoom call could not be read. {problems} Pass bbox_2d as four numbers [x1, y1, x2, y2], "
        f"{schema.FRAME_TEXT[frame]}, and optionally view and label."
    )
