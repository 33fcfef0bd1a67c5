"""The zoom tool in the OpenAI Agents SDK: a crop is an image of the function's output."""

from __future__ import annotations

from pathlib import Path

import pytest

from qzoom_agent.zoom import ImageZoom
from tests.tools.support import PICTURE, images_in, needs, run_documented, scripted, zooms

agents = needs("agents", "openai_agents")


def test_an_agent_zooms_and_the_crop_stands_in_the_output() -> None:
    from openai import AsyncOpenAI

    import openai_agents_tool

    agents.set_tracing_disabled(True)
    zoom = ImageZoom(PICTURE)
    with scripted(*zooms("responses")) as server:
        client = AsyncOpenAI(base_url=server.url, api_key="none")
        model = agents.OpenAIResponsesModel("served", openai_client=client)
        assert openai_agents_tool.answer(model, zoom, "which number?") == "42"
        bodies = [one.body for one in server.requests]
    assert [images_in(body["input"]) for body in bodies] == [1, 2, 2]
    outputs = [one for one in bodies[-1]["input"] if one.get("type") == "function_call_output"]
    assert [part["type"] for part in outputs[0]["output"]] == ["input_text", "input_image"]
    assert "could not be read" in str(outputs[1]["output"])
    assert bodies[0]["tools"][0]["name"] == zoom.name and len(zoom.crops) == 1


def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*zooms("responses")) as server:
        assert run_documented("openai_agents", server, tmp_path, monkeypatch, capsys).strip().endswith("42")
