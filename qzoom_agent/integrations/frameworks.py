"""The zoom tool for agent frameworks, and the agent as a node or runnable of LangGraph.

    zoom = ImageZoom("receipt.jpg")
    agent = create_agent("openai:gpt-5-mini", tools=[langchain_tool(zoom)])

Each function imports its framework when it is called. An image goes to the model in the form that the framework passes
on: an image block of the tool's message (LangChain), a part of the function's output (OpenAI Agents), content beside it
(pydantic-ai), or an image of the step's observations (smolagents).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tools import StructuredTool

from qzoom_agent.errors import ConfigError
from qzoom_agent.zoom.image_zoom import ImageZoom, image_block, png
from qzoom_agent.zoom.langchain import as_langchain_tool

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent

_ABSENT: Final = object()


def langchain_tool(zoom: ImageZoom) -> StructuredTool:
    """Return the tool for `create_agent` and any other agent of LangChain or LangGraph."""
    return as_langchain_tool(zoom.tool, zoom.store, frame=zoom.frame)


def langchain_message(zoom: ImageZoom, question: str) -> dict[str, Any]:
    """Return the user message of LangChain: the coarse view and the question."""
    return {"role": "user", "content": [image_block(zoom.coarse), {"type": "text", "text": question}]}


def smolagents_tool(zoom: ImageZoom) -> Any:
    """Return a `smolagents.Tool`; its `show`, as a step callback of the agent, shows the crops to the model.

    smolagents gives a tool's text to the model alone, so the callback adds each new crop to the step's observations.
    """
    from smolagents import Tool

    class ZoomTool(Tool):  # type: ignore[misc,unused-ignore]
        name = zoom.name
        description = zoom.description
        inputs = {  # noqa: RUF012
            "bbox_2d": {"type": "array", "items": {"type": "number"}, "description": "[x1, y1, x2, y2]"},
            "view": {"type": "string", "description": "view that the numbers refer to", "nullable": True},
            "label": {"type": "string", "description": "what you expect there", "nullable": True},
        }
        output_type = "string"
        shown = 0

        def forward(self, bbox_2d: list[float], view: str | None = None, label: str | None = None) -> str:
            given = {"bbox_2d": bbox_2d, "view": view, "label": label}
            return zoom({key: value for key, value in given.items() if value is not None}).text

        def show(self, step: Any, agent: Any = None) -> None:
            """Add the crops of a step to its observations, and take out the coarse view, which the task has shown."""
            new = [zoom.store.image(view.id) for view in zoom.crops[self.shown :]]
            self.shown = len(zoom.crops)
            others = [image for image in step.observations_images or [] if image != zoom.coarse]
            step.observations_images = [*others, *new] or None

    return ZoomTool()


def openai_agents_tool(zoom: ImageZoom) -> Any:
    """Return an `agents.FunctionTool`; its output is a text and, for a crop, a `ToolOutputImage`."""
    from agents import FunctionTool, ToolOutputImage, ToolOutputText

    async def invoke(_: Any, arguments: str) -> list[Any]:
        reply = zoom(arguments)
        return [ToolOutputText(text=reply.text), *([ToolOutputImage(image_url=reply.url)] if reply.url else [])]

    return FunctionTool(
        name=zoom.name,
        description=zoom.description,
        params_json_schema=zoom.parameters,
        on_invoke_tool=invoke,
        strict_json_schema=False,
    )


def pydantic_ai_tool(zoom: ImageZoom) -> Any:
    """Return a `pydantic_ai.Tool`; it returns a text with the crop as `BinaryContent`."""
    from pydantic_ai import BinaryContent, Tool, ToolReturn

    def call(**arguments: Any) -> Any:
        reply = zoom(arguments)
        image = [] if reply.image is None else [BinaryContent(png(reply.image), media_type="image/png")]
        return ToolReturn(reply.text, content=image)

    return Tool.from_schema(call, name=zoom.name, description=zoom.description, json_schema=zoom.parameters)


def as_node(
    agent: Agent | Callable[[], Agent],
    *,
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    trace: str = "trace",
) -> Runnable[Any, dict[str, Any]]:
    """Return a node of somebody else's LangGraph graph that asks the agent.

    Args:
        agent: The agent, or a function that returns it when the node first runs, because servers of graphs do not wait
            for weights to load.
        image: Key of the state with the path of the image; pixels do not belong into a state that is stored.
        question: Key of the state with the question.
        answer: Key that is set to the text of the answer.
        trace: Key that is set to the record of the run, as JSON.

    The node raises ConfigError where the state lacks image or question.
    """

    lock, load = Lock(), cache(agent if callable(agent) else lambda: agent)

    def node(state: Any) -> dict[str, Any]:
        with lock:
            asked = load()
        found = asked.run(_value(state, image), _value(state, question))
        return {answer: found.text, trace: found.trace.model_dump(mode="json")}

    return RunnableLambda(node, name="qzoom")


def _value(state: Any, key: str) -> Any:
    """Return a value of a graph's state: a mapping, or an object such as a dataclass or a model of pydantic."""
    found = state.get(key, _ABSENT) if isinstance(state, Mapping) else getattr(state, key, _ABSENT)
    if found is _ABSENT:
        raise ConfigError(
            f"The state has no {key!r}. Put it there, or give as_node the names that it has: image=..., question=...."
        )
    return found


def as_runnable(agent: Agent | Callable[[], Agent]) -> Runnable[Any, dict[str, Any]]:
    """Return the agent as a LangChain runnable of {"image", "question"}; it returns {"answer", "trace"}."""
    return as_node(agent)
