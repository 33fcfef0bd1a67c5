"""The zoom task in OpenEnv: a real server, its client, and the environment that TRL is given."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from qzoom_agent.cli.serve import listen
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.integrations.zoom_task import ZoomQuestions
from tests.evaluation.player import numbers
from tests.tools.support import needs

needs("openenv", "openenv")


def task() -> Task:
    """Return the task of the questions: ten small pictures with numbers."""
    return numbers(10)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import uvicorn

    import openenv_zoom

    app = openenv_zoom.make_app(ZoomQuestions(f"{__name__}:task"))
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


def test_an_episode_over_the_network_is_scored_as_the_evaluation_scores_it(url: str) -> None:
    import openenv_zoom

    questions = ZoomQuestions(f"{__name__}:task")
    with openenv_zoom.ZoomClient(url).sync() as client:
        begun = client.reset(index=4)
        assert [part["type"] for part in begun.observation.content] == ["image", "text"] and not begun.done
        assert begun.observation.content[1]["text"] == questions[4].question
        zoomed = client.step(openenv_zoom.ZoomAction(bbox_2d=[0, 0, 500, 500]))
        assert [part["type"] for part in zoomed.observation.content] == ["text", "image"] and zoomed.reward == 0
        missed = client.step(openenv_zoom.ZoomAction(bbox_2d=[1, 2]))
        assert "could not be read" in missed.observation.content[0]["text"]
        assert client.state().boxes == [[0, 0, 84, 56]] and client.state().step_count == 2
        ended = client.step(openenv_zoom.ZoomAction(answer=questions[4].answer))
        assert ended.done and ended.reward == 1.0
        client.reset(index=5)
        assert client.step(openenv_zoom.ZoomAction(answer="nothing")).reward == 0.0


def test_the_environment_for_trl_uses_that_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import openenv_zoom

    monkeypatch.setenv("OPENENV_URL", url)
    env = openenv_zoom.RemoteZoomEnv()
    first, question = env.reset(index=7)
    assert isinstance(first["image"], Image.Image) and question["type"] == "text"
    text, crop = env.image_zoom_in_tool([0, 0, 500, 500])
    assert "View 'crop1'" in text["text"] and isinstance(crop["image"], Image.Image)
    text, _ = env.image_zoom_in_tool([0, 0, 500, 500], view="crop1")
    assert "View 'crop2'" in text["text"] and "[0, 0, 42, 28]" in text["text"], text
    assert env.get_reward() == 0.0
    env.submit_answer(ZoomQuestions(f"{__name__}:task")[7].answer)
    assert env.get_reward() == 1.0
    methods: dict[str, Any] = dict(inspect.getmembers(type(env), predicate=inspect.isfunction))
    assert {name for name in methods if not name.startswith("_")} == {
        *("reset", "get_reward", "image_zoom_in_tool", "submit_answer")
    }


def test_the_server_lists_its_questions(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/health").json()["status"] == "healthy"
        assert "content" in str(client.get("/schema").json())
