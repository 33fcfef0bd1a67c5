"""The tools a model may call, and their schemas: zoom, propose, and own tools beside them."""

from typing import Any

from qzoom_agent.zoom.image_zoom import ImageZoom, ZoomReply, zoom_schema
from qzoom_agent.zoom.propose import Proposals, Propose, propose_schema
from qzoom_agent.zoom.tool_images import AffineImage, Views
from qzoom_agent.zoom.zoom import Tool, Zoom, ZoomConfig, ZoomPlan, ZoomResult, find_tool

__all__ = [
    "AffineImage",
    "ImageZoom",
    "Proposals",
    "Propose",
    "Tool",
    "Views",
    "Zoom",
    "ZoomConfig",
    "ZoomPlan",
    "ZoomReply",
    "ZoomResult",
    "as_langchain_tool",
    "find_tool",
    "propose_schema",
    "zoom_schema",
]


def __getattr__(name: str) -> Any:
    if name != "as_langchain_tool":
        raise AttributeError(f"module 'qzoom_agent.zoom' has no attribute {name!r}")
    from qzoom_agent.zoom.langchain import as_langchain_tool  # loads LangChain

    return as_langchain_tool
