"""Zoom and propose: the tools a model may call, and their schemas."""

if __name__ != "qzoom_agent.tools":
    raise ImportError(
        "this folder is the package qzoom_agent.tools: write 'import qzoom_agent.tools' (not 'import tools')"
    )

from qzoom_agent.tools.propose import Proposals, Propose, propose_schema
from qzoom_agent.tools.schema import as_langchain_tool, zoom_schema
from qzoom_agent.tools.zoom import Zoom, ZoomConfig, ZoomPlan, ZoomResult

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
