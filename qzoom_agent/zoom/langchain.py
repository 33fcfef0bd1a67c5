"""The zoom tool for LangChain and LangGraph agents: `image_zoom.ImageZoom` in the form of LangChain."""

from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import StructuredTool, ToolException

from qzoom_agent.geometry import Frame
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.image_zoom import NAME, describe, image_block, serve, zoom_schema
from qzoom_agent.zoom.zoom import Tool, ZoomConfig, ZoomResult


def as_langchain_tool(zoom: Tool, store: ViewStore, *, frame: Frame = "per_mille") -> StructuredTool:
    """Return the zoom tool for one run.

    The content of its message is a text block and, if a crop was served, an image block (PNG, base64); the artifact is
    the `ZoomResult`. Where nothing was cut, the message has status "error". What the text protocols mend is mended here
    too.

    Args:
        zoom: The tool that plans and cuts a crop.
        store: The views of the run. It must hold the original; a missing coarse view is added at the tool's budget.
        frame: How the model writes boxes.
    """
    if "coarse" not in store:
        store.add_coarse(**(getattr(zoom, "config", None) or ZoomConfig()).budget)

    def call(**arguments: Any) -> tuple[list[dict[str, Any]], ZoomResult]:
        reply = serve(zoom, store, arguments, frame=frame)
        if reply.result is None:
            raise ToolException(reply.text)
        blocks: list[dict[str, Any]] = [{"type": "text", "text": reply.text}]
        if reply.image is not None:
            blocks.append(image_block(reply.image))
        return blocks, reply.result

    return _ZoomTool(
        func=call,
        name=NAME,
        description=describe(frame),
        args_schema=zoom_schema(frame=frame)["function"]["parameters"],
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
