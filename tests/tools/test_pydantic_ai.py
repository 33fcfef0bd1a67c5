"""The zoom tool in pydantic-ai, with its model of a function and with an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.zoom import ImageZoom
from tests.tools.support import PICTURE, images_in, needs, run_documented, scripted, zooms

pydantic_ai = needs("pydantic_ai", "pydantic_ai")


def test_an_agent_zooms_and_the_crop_is_binary_content() -> None:
    from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
    from pydantic_ai.models.function import FunctionModel

    import pydantic_ai_tool

    seen: list[Any] = []

    def model(messages: Any, info: Any) -> Any:
        seen.append(messages)
        boxes: list[list[float]] = [[0, 0, 500, 500], [1, 2]]
        if len(seen) > len(boxes):
            return ModelResponse(parts=[TextPart("42")])
        return ModelResponse(parts=[ToolCallPart(info.function_tools[0].name, {"bbox_2d": boxes[len(seen) - 1]})])

    zoom = ImageZoom(PICTURE)
    assert pydantic_ai_tool.answer(FunctionModel(model), zoom, "which number?") == "42"
    told = str(seen[-1])
    assert told.count("media_type='image/png'") == 2 and "View 'crop1'" in told and "could not be read" in told
    assert len(zoom.crops) == 1 and zoom.crops[0].box == (0, 0, 600, 450)


def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*zooms("chat")) as server:
        assert run_documented("pydantic_ai", server, tmp_path, monkeypatch, capsys).strip().endswith("42")
        assert [images_in(one.body["messages"]) for one in server.requests] == [1, 2, 2]
