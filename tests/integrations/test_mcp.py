"""The MCP tools without MCP, and with its official client over stdio and HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ImageError, QzoomError
from qzoom_agent.integrations.mcp_server import ImageAccess, ImageTools
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.zoom.image_zoom import data_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.linear_gradient("L").resize((1000, 500)).save(inside / "picture.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "link.pdf").symlink_to(tmp_path / "secret.pdf")
    return inside


def tools(folder: Path, *replies: str) -> ImageTools:
    looked = PerceptionRecord(boxes=[(28, 28, 56, 56)], cells=[(1, 1, 2, 2)], score=0.9, threshold=0.5, heat=[[0, 1]])
    backend = ScriptedBackend(list(replies), protocol="plain", looks=lambda messages: [looked])
    return ImageTools(lambda: Agent(backend), ImageAccess(folders=(folder,)))


def test_each_tool_returns_a_text_and_an_image(folder: Path) -> None:
    used = tools(folder, "42")
    text, coarse = used.look("picture.png")
    assert "1000x500 px" in text and coarse.size[0] < 1000
    text, crop = used.zoom("picture.png", [0, 0, 500, 500], label="left")
    assert "[0, 0, 500, 250]" in text and crop.size == (504, 252)
    text, drawn = used.propose(str(folder / "picture.png"), "which number?")
    assert "Look closer at [" in text and "0.90" in text and drawn.width == 768
    text, drawn = used.ask("picture.png", "which number?")
    assert text.startswith("42\n") and "looked closer at [" in text and drawn.width == 768
    assert used.look(data_url(Image.new("RGB", (60, 60))))[0].startswith("The image has 60x60 px")


def test_the_map_of_an_image_that_was_shown_padded_lies_where_the_model_saw_it(folder: Path) -> None:
    heat = [[0, 0, 0, 0], [0, 0, 0, 1], [0] * 4, [0] * 4]
    look = PerceptionRecord(view="coarse", score=0.1, threshold=0.5, heat=heat, extent=(0, -84, 308, 224))
    backend = ScriptedBackend(["42"], looks=lambda messages: [look])
    used = ImageTools(lambda: Agent(backend, policy="implicit"), ImageAccess(folders=(folder,)))
    _, drawn = used.ask("picture.png", "which number?")
    plain = Image.open(folder / "picture.png").convert("RGB").resize(drawn.size)
    changed = (np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)) > 60).any(axis=-1)
    width, height = drawn.size
    assert changed[2 : height // 5, width * 7 // 8].all() and not changed[height * 5 // 8 :, :].any()


def test_a_box_in_an_earlier_crop_is_not_read_as_one_of_the_image(folder: Path) -> None:
    used = tools(folder)
    text, crop = used.zoom("picture.png", [0, 0, 500, 500], view="coarse")
    assert "crop1" not in text and crop.size == (504, 252), "no crop is named that a later call could refer to"
    with pytest.raises(ImageError, match=r"no view 'crop1'; the views are original, coarse"):
        used.zoom("picture.png", [0, 0, 500, 500], view="crop1")


def test_a_question_may_be_about_several_images(folder: Path) -> None:
    Image.new("RGB", (300, 600)).save(folder / "second.png")
    agent = Agent(ScriptedBackend(["ZOOM image 2: 0, 0, 500, 500", "42"], protocol="plain"), policy="explicit")
    used = ImageTools(lambda: agent, ImageAccess(folders=(folder,)))
    text, first, second = used.ask("picture.png", "which number?", ["second.png"])
    assert text.startswith("42\n") and " of image 2." in text
    assert first.width == 768 and second.size == (300, 600)
    with pytest.raises(ImageError, match="at most 8 images; got 9"):
        used.ask("picture.png", "which number?", ["second.png"] * 8)


def test_an_image_may_be_named_by_its_file_address(folder: Path) -> None:
    (folder / "picture.png").rename(folder / "a b ü.png")
    address = (folder / "a b ü.png").resolve().as_uri()
    assert "%20" in address
    access = ImageAccess(folders=(folder,))
    for name in (address, address.replace("file://", "FILE://localhost")):
        assert access.load(name).size == (1000, 500)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.png", "file:///%65tc/passwd", "/etc/passwd", "~/x.png", "file:///etc/passwd", "\0"),
        *("link.png", "link.pdf", "link.pdf#page=1", "../secret.pdf#page=1"),
    ],
)
def test_files_outside_the_folders_are_not_read(folder: Path, name: str) -> None:
    with pytest.raises(ImageError, match=r"outside|no path"):
        tools(folder).look(name)


def test_what_went_wrong_is_told(folder: Path) -> None:
    with pytest.raises(ImageError, match="There is no image file"):
        tools(folder).look("nothing.png")
    with pytest.raises(ImageError, match="reads no files"):
        ImageAccess().load("picture.png")
    with pytest.raises(ImageError, match="URLs are off"):
        ImageAccess().load("http://localhost/x.png")
    with pytest.raises(ImageError, match="cannot be meant"):
        tools(folder).zoom("picture.png", [2000, 2000, 3000, 3000])
    with pytest.raises(QzoomError, match="The model failed"):
        tools(folder).ask("picture.png", "which number?")


@contextmanager
def at_http(command: list[str]) -> Iterator[str]:
    """Run a server over HTTP; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *command, "--http", "--port", str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/mcp"
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_official_client_uses_the_tools(transport: str, tmp_path: Path) -> None:
    """With nano, in a process of its own."""
    mcp = pytest.importorskip("mcp", reason="the extra [mcp] is not installed")
    import anyio

    from qzoom_agent.evaluation.tasks.needle import sample

    board = sample("needle-scene", 3, split="test")
    board.image.save(tmp_path / "board.png")
    command = ["-m", "qzoom_agent", "mcp", "--folder", str(tmp_path), "--device", "cpu"]
    started = nullcontext(mcp.StdioServerParameters(command=sys.executable, args=command, env=None))

    async def use(server: Any) -> dict[str, Any]:
        async with mcp.Client(server) as client:
            listed = await client.list_tools()
            found: dict[str, Any] = {tool.name: tool.input_schema for tool in listed.tools}
            image = {"image": "board.png"}
            found["looked"] = await client.call_tool("look", image)
            found["zoomed"] = await client.call_tool("zoom", {**image, "bbox_2d": [0, 0, 500, 500]})
            found["nested"] = await client.call_tool("zoom", {**image, "bbox_2d": [0, 0, 500, 500], "view": "crop1"})
            found["missed"] = await client.call_tool("zoom", {**image, "bbox_2d": [0, 0]})
            found["proposed"] = await client.call_tool("propose", {**image, "question": board.question})
            found["asked"] = await client.call_tool("ask", {**image, "question": board.question})
            return found

    with started if transport == "stdio" else at_http(command) as server:
        found = anyio.run(use, server)
    assert set(found["zoom"]["required"]) == {"image", "bbox_2d"}
    for name in ("looked", "zoomed", "proposed", "asked"):
        text, image = found[name].content
        assert not found[name].is_error and (text.type, image.type, image.mime_type) == ("text", "image", "image/png")
    assert found["missed"].is_error and "four numbers" in found["missed"].content[0].text
    assert found["nested"].is_error and "no view 'crop1'" in found["nested"].content[0].text
    answer = Agent.from_pretrained("nano", device="cpu").run(board.image, board.question)
    assert found["asked"].content[0].text.startswith(answer.text) and answer.boxes
