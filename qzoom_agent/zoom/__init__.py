"""Zoom and propose: the tools a model may call, and their schemas."""

from qzoom_agent.zoom.propose import Proposals, Propose, propose_schema
from qzoom_agent.zoom.schema import as_langchain_tool, zoom_schema
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig, ZoomPlan, ZoomResult

__all__ = [
    "Proposals",
    "Propose",
    "Zoom",
    "ZoomConfig",
    "ZoomPlan",
    "ZoomResult",
    "as_langchain_tool",
    "propose_schema",
    "zoom_schema",
]
