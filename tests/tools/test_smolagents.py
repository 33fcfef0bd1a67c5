"""The zoom tool in smolagents: the model is shown each crop in the step that asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qzoom_agent.zoom import ImageZoom
from tests.models.replies import turn
from tests.tools.support import PICTURE, documented, images_in, needs, run_documented, scripted, zooms

smolagents = needs("smolagents", "smolagents")
FINAL = {"id": "call_9", "name": "final_answer", "arguments": '{"answer": "42"}'}


def test_an_agent_zooms_and_sees_the_crop() -> None:
    import smolagents_tool

    zoom = ImageZoom(PICTURE)
    with scripted(*zooms("chat")[:2], turn("chat", "", FINAL)) as server:
        model = smolagents.OpenAIModel("served", api_base=server.url, api_key="none")
        assert smolagents_tool.answer(model, zoom, "which number?") == "42"
        bodies = [one.body for one in server.requests]
    assert [images_in(body["messages"]) for body in bodies] == [1, 2, 2]
    assert {tool["function"]["name"] for tool in bodies[0]["tools"]} == {zoom.name, "final_answer"}
    told = str(bodies[2]["messages"])
    assert "View 'crop1'" in told and "could not be read" in told
    assert len(zoom.crops) == 1 and zoom.crops[0].box[0] == 120


def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "smolagents_tool" in documented("smolagents")
    with scripted(*zooms("chat")[:2], turn("chat", "", FINAL)) as server:
        printed = run_documented("smolagents", server, tmp_path, monkeypatch, capsys)
    assert printed.strip().endswith("42")
