"""What the tests of frameworks share: a scripted OpenAI server, a picture, and the blocks of docs/frameworks.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.models.misbehaving import Misbehaving
from tests.models.replies import call, replay, turn

PAGE = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
PICTURE = Image.linear_gradient("L").resize((1200, 900)).convert("RGB")
MOST_LINES = 10


def needs(package: str, framework: str) -> Any:
    """Import a package of a framework; without it skip the tests, unless `.ci/frameworks` runs them."""
    if os.environ.get("QZOOM_FRAMEWORK") == framework:
        return __import__(package)
    return pytest.importorskip(package, reason=f"run by .ci/frameworks {framework}")


def scripted(*replies: dict[str, Any]) -> Misbehaving:
    """Return a server of these replies of `turn` in their order, then the last again."""
    return Misbehaving(replay(*replies))


def zooms(api: str, answer: str = "42", *, more: tuple[dict[str, Any], ...] = ()) -> tuple[dict[str, Any], ...]:
    """Return the replies of a model that zooms, writes a wrong call, and answers."""
    return (turn(api, "", call(0)), turn(api, "", call(1, '{"bbox_2d": [1, 2]}')), *more, turn(api, answer))


def documented(framework: str) -> str:
    """Return the loop of a framework that the page shows."""
    pattern = rf"<!-- not run: by \.ci/frameworks {framework} -->\n```python\n(.*?)^```$"
    (block,) = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for line in str(block).splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES, f"{framework}: {len(lines)} lines"
    return str(block)


def run_documented(
    framework: str,
    server: Misbehaving,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run that loop at the scripted server, on receipt.jpg; return what it prints."""
    PICTURE.save(folder / "receipt.jpg")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    exec(compile(documented(framework), f"docs/frameworks.md, {framework}", "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out


def images_in(value: Any) -> int:
    """Return the number of images in the body of a request, wherever they stand."""
    return json.dumps(value).count("data:image/")
