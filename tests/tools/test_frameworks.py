"""The scripts of tools/: each runs offline with a scripted model, or with nano, and zooms for real."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from PIL import Image

import langchain_tool
import langgraph_node
import openai_loop
from qzoom_agent import Agent
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.zoom.schema import NAME


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((900, 700)).convert("RGB")


def test_a_graph_asks_again_with_larger_budgets(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    call = "ZOOM: 100, 100, 300, 300"
    short = Agent(ScriptedBackend([call, call, ""], protocol="plain")).replace(
        policy="explicit", budget={"max_turns": 1}
    )
    long = Agent(ScriptedBackend([call, "4711"], protocol="plain")).replace(policy="explicit")
    done = langgraph_node.build(short, long).invoke({"image": str(path), "question": "which number?"})
    assert (done["answer"], done["status"], len(done["traces"])) == ("4711", "answered", 2)
    assert json.loads(json.dumps(done)) == done


class Calls(BaseChatModel):
    """A chat model that zooms once and then answers with the number of images it was shown."""

    @property
    def _llm_type(self) -> str:
        return "calls"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        assert [tool.name for tool in tools] == [NAME]
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> ChatResult:
        if isinstance(messages[-1], ToolMessage):
            message = AIMessage("done")
        else:
            call = {"name": NAME, "args": {"bbox_2d": [0, 0, 500, 500]}, "id": "1"}
            message = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=message)])


def test_a_chat_model_of_langchain_zooms(picture: Image.Image) -> None:
    store, model = langchain_tool.look(picture), Calls()
    done = langchain_tool.build(model, store).invoke({"messages": [langchain_tool.question(store, "what?")]})
    assert done["messages"][-1].content == "done"
    result = done["messages"][-2]
    assert [block["type"] for block in result.content] == ["text", "image"]
    assert store.view("crop1").box == (0, 0, 450, 350)


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


def test_the_plain_loop_shows_crops_in_a_user_message(picture: Image.Image) -> None:
    client = Client(reply('{"bbox_2d": [0, 0, 500, 500]}', '{"bbox_2d": [1, 2]}'), reply(content="42"))
    text, store = openai_loop.answer(client, "any", image=picture, question="what?")
    assert text == "42" and store.view("crop1").box == (0, 0, 450, 350)
    *_, good, bad, crop = client.requests[1]["messages"]
    assert (good["role"], good["tool_call_id"]) == ("tool", "call-0") and "crop1" in good["content"]
    assert "could not be read" in bad["content"]
    assert crop["role"] == "user" and [block["type"] for block in crop["content"]] == ["image_url"]


def test_the_plain_loop_ends_without_the_tool(picture: Image.Image) -> None:
    client = Client(*[reply('{"bbox_2d": [0, 0, 500, 500]}')] * openai_loop.MOST_CALLS, reply(content="enough"))
    text, _ = openai_loop.answer(client, "any", image=picture, question="what?")
    assert text == "enough" and len(client.requests) == openai_loop.MOST_CALLS + 1
    assert "tools" in client.requests[0] and "tools" not in client.requests[-1]
