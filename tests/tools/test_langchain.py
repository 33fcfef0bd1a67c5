"""The zoom tool in LangChain's `create_agent`, the agent in LangGraph, and the server that reads langgraph.json."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from qzoom_agent.zoom import ImageZoom
from tests.tools.support import PICTURE, images_in, needs, run_documented, scripted, zooms

needs("langchain", "langchain")
TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_an_agent_zooms_and_the_crop_is_a_block_of_the_tools_message() -> None:
    from langchain_openai import ChatOpenAI

    import langchain_tool

    zoom = ImageZoom(PICTURE)
    with scripted(*zooms("chat")) as server:
        model = ChatOpenAI(model="served", base_url=server.url, api_key="none")
        assert langchain_tool.answer(model, zoom, "which number?") == "42"
        bodies = [one.body for one in server.requests]
    assert [images_in(body["messages"]) for body in bodies] == [1, 2, 2]
    result = next(one for one in bodies[-1]["messages"] if one["role"] == "tool")
    assert [part["type"] for part in result["content"]] == ["text", "image_url"]
    assert "could not be read" in str(bodies[-1]["messages"][-1]) and len(zoom.crops) == 1


def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*zooms("chat")) as server:
        assert run_documented("langchain", server, tmp_path, monkeypatch, capsys).strip().endswith("42")


def test_the_graph_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*zooms("chat")) as server:
        first, second = run_documented("langgraph", server, tmp_path, monkeypatch, capsys).split()
    assert first == second


def test_the_server_of_langgraph_runs_the_graph_with_nano(tmp_path: Path) -> None:
    """As `langgraph dev` starts it in tools/, in a process of its own."""
    needs("langgraph_api", "langchain")
    PICTURE.save(tmp_path / "picture.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "langgraph_cli", "dev", "--no-browser", "--no-reload", "--port", port]
    log = tmp_path / "log"
    with log.open("w") as written, subprocess.Popen(command, cwd=TOOLS, stdout=written, stderr=written) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
                ends = time.monotonic() + 120
                while True:
                    assert server.poll() is None and time.monotonic() < ends, log.read_text()[-3000:]
                    try:
                        client.get("/ok").raise_for_status()
                        break
                    except httpx.HTTPError:
                        time.sleep(0.5)
                asked = {"image": str(tmp_path / "picture.png"), "question": "what is the code on the red star?"}
                done = client.post("/runs/wait", json={"assistant_id": "qzoom", "input": asked}).json()
        finally:
            server.terminate()
    assert done.get("trace", {}).get("status") == "answered", json.dumps(done)[:2000] + log.read_text()[-3000:]
    assert done["trace"]["question"] == asked["question"]
