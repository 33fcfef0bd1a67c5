"""The plain loop of tools/openai_loop.py with the real client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.zoom import ImageZoom
from tests.tools.support import PICTURE, images_in, needs, run_documented, scripted, zooms


@pytest.fixture(autouse=True)
def openai() -> Any:
    """The package, which only the worker imports that runs these tests: it takes a second."""
    return needs("openai", "openai")


def test_the_loop_zooms_and_shows_the_crop_in_a_user_message(openai: Any) -> None:
    import openai_loop

    zoom = ImageZoom(PICTURE)
    with scripted(*zooms("chat")) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        assert openai_loop.answer(client, "served", zoom, "which number?") == "42"
        bodies = [one.body for one in server.requests]
    assert [images_in(body["messages"]) for body in bodies] == [1, 2, 2]
    assert [one["role"] for one in bodies[-1]["messages"]] == ["user", "assistant", "tool", "user", "assistant", "tool"]


def test_a_server_of_your_own_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import openai_loop

    PICTURE.save(tmp_path / "receipt.png")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with scripted(*zooms("chat")) as server:
        words = [str(tmp_path / "receipt.png"), "which number?", "--model", "served", "--url", server.url]
        monkeypatch.setattr("sys.argv", ["openai_loop.py", *words])
        openai_loop.main()
    assert capsys.readouterr().out.startswith("42\n")


def test_the_loop_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(*zooms("chat")) as server:
        assert run_documented("openai", server, tmp_path, monkeypatch, capsys).strip().endswith("42")
