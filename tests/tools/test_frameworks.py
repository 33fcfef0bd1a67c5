"""The scripts of tools/ that need no framework, and the form in which each framework is given the tool."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from pydantic import BaseModel

import langgraph_node
import openai_loop
from qzoom_agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations.frameworks import as_node, as_runnable, langchain_message, langchain_tool, smolagents_tool
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.zoom import ImageZoom
from qzoom_agent.zoom.image_zoom import NAME
from tests.tools.support import PICTURE, documented

FRAMEWORKS = ("langchain", "langgraph", "smolagents", "openai_agents", "pydantic_ai", "openai")


@pytest.fixture
def zoom() -> ImageZoom:
    return ImageZoom(PICTURE)


def test_a_graph_asks_again_with_larger_budgets(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    call = "ZOOM: 100, 100, 300, 300"
    short = Agent(ScriptedBackend([call, call, ""], protocol="plain")).replace(
        policy="explicit", budget={"max_turns": 1}
    )
    long = Agent(ScriptedBackend([call, "4711"], protocol="plain")).replace(policy="explicit")
    done = langgraph_node.build(short, long).invoke({"image": str(path), "question": "which number?"})
    assert (done["answer"], done["trace"]["status"]) == ("4711", "answered")
    assert json.loads(json.dumps(done)) == done


def test_the_agent_is_a_runnable() -> None:
    agent = Agent(ScriptedBackend(["4711", "12"], protocol="plain"), policy="direct")
    chain = as_runnable(agent) | (lambda found: found["answer"] + "!")
    asked = {"image": PICTURE, "question": "which number?"}
    assert [chain.invoke(asked), chain.invoke(asked)] == ["4711!", "12!"]


def test_a_function_that_makes_the_agent_is_called_once() -> None:
    made: list[Agent] = []

    def make() -> Agent:
        made.append(Agent(ScriptedBackend(["4711", "12"], protocol="plain"), policy="direct"))
        return made[-1]

    runnable = as_runnable(make)
    assert not made
    asked = {"image": PICTURE, "question": "which number?"}
    assert [runnable.invoke(asked)["answer"] for _ in range(2)] == ["4711", "12"] and len(made) == 1


@dataclass(slots=True)
class Listed:
    image: Any
    question: str
    answer: str = ""


class Modelled(BaseModel):
    image: Any
    question: str
    answer: str = ""


@pytest.mark.parametrize("kind", [dict, Listed, Modelled])
def test_the_state_of_a_graph_may_be_an_object(kind: Any) -> None:
    agent = Agent(ScriptedBackend(["4711"], protocol="plain"), policy="direct")
    node = as_node(agent)
    graph = StateGraph(kind).add_node("read", node).add_edge(START, "read").compile()
    done = graph.invoke(kind(image=PICTURE, question="which number?"))
    assert done["answer"] == "4711"
    with pytest.raises(ConfigError, match="The state has no 'asked'"):
        as_node(agent, question="asked").invoke(kind(image=PICTURE, question="which number?"))


def test_langchain_is_given_blocks(zoom: ImageZoom) -> None:
    found = langchain_tool(zoom).invoke(
        {"name": NAME, "args": {"bbox_2d": [0, 0, 500, 500]}, "id": "1", "type": "tool_call"}
    )
    assert [block["type"] for block in found.content] == ["text", "image"] and len(zoom.crops) == 1
    assert [part["type"] for part in langchain_message(zoom, "what?")["content"]] == ["image", "text"]


def test_smolagents_is_shown_the_coarse_view_once(zoom: ImageZoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smolagents", SimpleNamespace(Tool=object))
    tool, other = smolagents_tool(zoom), PICTURE.copy()
    tool.forward([0, 0, 500, 500])
    step = SimpleNamespace(observations_images=[zoom.coarse, other])
    tool.show(step)
    assert step.observations_images == [other, zoom.store.image("crop1")]
    tool.show(step := SimpleNamespace(observations_images=[zoom.coarse]))
    assert step.observations_images is None


@pytest.mark.parametrize("arguments", ['{"bbox_2d": [0, 0', "[1]", "null", '{"bbox_2d": "left"}', '{"box": 3}', {}])
def test_arguments_that_make_no_sense_are_explained(zoom: ImageZoom, arguments: Any) -> None:
    reply = zoom(arguments)
    assert reply.image is None and reply.url is None and "Pass bbox_2d as four numbers" in reply.text
    assert not zoom.crops


def test_a_crop_may_be_zoomed_into(zoom: ImageZoom) -> None:
    assert zoom(bbox_2d=[0, 0, 500, 500]).url is not None
    reply = zoom('{"bbox_2d": [500, 500, 1000, 1000], "view": "crop1", "label": "total"}')
    assert reply.result is not None and reply.result.served == (300, 225, 600, 450) and reply.result.label == "total"


def reply(*calls: str, content: str | None = None) -> SimpleNamespace:
    made = [
        SimpleNamespace(id=f"call-{number}", function=SimpleNamespace(name=NAME, arguments=arguments))
        for number, arguments in enumerate(calls)
    ]
    message = SimpleNamespace(role="assistant", content=content, tool_calls=made or None)
    return SimpleNamespace(choices=[SimpleNamespace(message=message)])


class Client:
    """The part of `openai.OpenAI` that the loop uses, with scripted replies."""

    def __init__(self, *replies: SimpleNamespace) -> None:
        self.replies = list(replies)
        self.requests: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request: Any) -> SimpleNamespace:
        self.requests.append({**request, "messages": list(request["messages"])})
        return self.replies[min(len(self.requests), len(self.replies)) - 1]


def test_the_plain_loop_shows_crops_in_a_user_message(zoom: ImageZoom) -> None:
    client = Client(reply('{"bbox_2d": [0, 0, 500, 500]}', '{"bbox_2d": [1, 2]}'), reply(content="42"))
    assert openai_loop.answer(client, "any", zoom, "what?") == "42"
    assert zoom.store.view("crop1").box == (0, 0, 600, 450)
    *_, good, bad, crop = client.requests[1]["messages"]
    assert (good["role"], good["tool_call_id"]) == ("tool", "call-0") and "crop1" in good["content"]
    assert "could not be read" in bad["content"]
    assert crop["role"] == "user" and [block["type"] for block in crop["content"]] == ["image_url"]


def test_the_plain_loop_ends_without_the_tool(zoom: ImageZoom) -> None:
    client = Client(*[reply('{"bbox_2d": [0, 0, 500, 500]}')] * openai_loop.MOST_CALLS, reply(content="enough"))
    assert openai_loop.answer(client, "any", zoom, "what?") == "enough"
    assert len(client.requests) == openai_loop.MOST_CALLS + 1
    assert "tools" in client.requests[0] and "tools" not in client.requests[-1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_page_shows_a_short_loop(framework: str) -> None:
    assert documented(framework)
