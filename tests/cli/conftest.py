"""What the tests of the command line share: a model that plays a script, a board, an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.models.scripted import ScriptedBackend
from tests.cli.test_cli import Replies


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Replies | list[str]], None]:
    """Let every agent the command line makes answer from a script."""

    def install(replies: Replies | list[str]) -> None:
        def scripted(model: str = "nano", *, config: Any = None, **_: Any) -> Agent:
            return Agent(ScriptedBackend(replies, name=model), config=config)

        monkeypatch.setattr(Agent, "from_pretrained", scripted)

    return install


@pytest.fixture
def board(tmp_path: Path) -> str:
    path = tmp_path / "board.png"
    Image.effect_noise((640, 480), 60).save(path)
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder: runs go into runs/ there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
