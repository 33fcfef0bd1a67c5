"""The page of `qzoom web` without a browser: its handlers, its limits, and what visitors cannot reach."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.scripted import ScriptedBackend

gr = pytest.importorskip("gradio", reason="the extra [web] is not installed")

from gradio.state_holder import StateHolder  # noqa: E402

from qzoom_agent.integrations.limits import WebConfig  # noqa: E402
from qzoom_agent.integrations.web.handlers import Page, Visit, create_app  # noqa: E402
from qzoom_agent.integrations.web.layout import changes, policies  # noqa: E402
from tests.models.misbehaving import Misbehaving  # noqa: E402

SETTINGS = ("explicit", False, 5, 0, 0)


def replies(messages: list[Any]) -> str:
    return "<zoom>28 28 112 112</zoom>" if "<zoom>" not in str(messages) else "seven"


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(Agent(ScriptedBackend(replies), policy="explicit"), WebConfig(max_pixels=400_000))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.linear_gradient("L").resize((640, 480)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def shown(page: Page, updates: Iterator[dict[Any, Any]]) -> dict[str, Any]:
    """Return what the components show in the end, by their names."""
    names = {component: name for name, component in vars(page.layout).items() if isinstance(component, gr.blocks.Block)}
    names[page.visit] = "visit"
    return {names[component]: value for update in updates for component, value in update.items()}


def test_an_answer_with_picture_crops_steps_and_report(page: Page, picture: str) -> None:
    visit = Visit()
    found = shown(page, page.ask(visit, picture, "which number?", 55, *SETTINGS))
    assert "seven" in found["card"] and "answered" in found["card"]
    assert found["shown"]["value"].size == (640, 480) and "<img" in found["crops"] and "Zoom 1" in found["steps"]
    assert found["report"].endswith("report.html") and found["tools"]["visible"] and not found["panel"]["visible"]
    further = shown(page, page.ask_further(visit, "and now?", 55, *SETTINGS))
    assert "1 earlier question" in further["card"] and "which number?" in further["card"]


def test_a_call_waits_and_is_moved(page: Page, picture: str) -> None:
    visit = Visit()
    found = shown(page, page.ask(visit, picture, "which number?", 55, "explicit", True, 5, 0, 0))
    assert found["panel"]["visible"] and "waits" in found["card"] and found["box"]["value"].count(",") == 3
    assert "four numbers" in shown(page, page.decide("move", visit, "1, 2", "", 55))["card"]
    assert "outside the image" in shown(page, page.decide("move", visit, "900, 900, 950, 950", "", 55))["card"]
    done = shown(page, page.decide("move", visit, "10, 20, 300, 200", "", 55))
    assert "You moved the call" in done["steps"] and "seven" in done["card"] and not done["panel"]["visible"]


def test_what_cannot_be_answered_is_one_sentence(page: Page, picture: str, tmp_path: Path) -> None:
    bad, large = tmp_path / "bad.png", tmp_path / "large.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    Image.new("RGB", (800, 800)).save(large)
    for path, question, told in (
        (None, "which?", "There is no picture yet"),
        (str(bad), "which?", "Not an image that can be read"),
        (str(large), "which?", "over the limit"),
        (picture, " ", "question"),
    ):
        card = shown(page, page.ask(Visit(), path, question, 55, *SETTINGS))["card"]
        assert told in card and "Traceback" not in card and str(tmp_path) not in card


def test_visitors_see_their_own_pictures_alone(page: Page, picture: str) -> None:
    mine, other = Visit(), Visit()
    shown(page, page.ask(mine, picture, "which number?", 55, *SETTINGS))
    assert "There is no picture yet" in shown(page, page.ask_further(other, "what do they see?", 55, *SETTINGS))["card"]
    assert page.redraw(other, 55) == gr.skip() and other.conversation is None
    (state,) = [block for block in page.layout.blocks.blocks.values() if isinstance(block, gr.State)]
    assert state.value.conversation is None, "the first value is copied for each session"


def test_visitors_change_policy_and_budget_within_limits(page: Page) -> None:
    assert [name for _, name in policies(page.agent)] == ["direct", "explicit", "locate"]
    changed = changes(page.config, policy="direct", zooms=400, visual=10**9, coarse=0)
    assert changed["budget.max_views"] == 12 and changed["budget.max_visual_tokens"] == 16_384
    limited = page.agent.replace(**{"budget.max_visual_tokens": 200})
    free = limited.replace(**changes(page.config, policy="direct", zooms=1, visual=0, coarse=0))
    assert free.config.budget.max_visual_tokens is None  # as the page says of 0
    assert "budget.coarse_tokens" not in changed and changed["budget.max_seconds"] == 300
    with pytest.raises(ConfigError, match="oracle"):
        Page(page.agent.replace(policy="oracle"))


def test_a_visitors_server_never_gets_the_operators_key(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-operator")
    visit = Visit()
    with Misbehaving(lambda asked: asked.reply({}, status="401 Unauthorized")) as server:
        _, about, _ = page.use_model(visit, "served", server.url, "")
        assert "served" in about and visit.agent is not None
        answer = visit.agent.run(Image.new("RGB", (64, 64)), "which?")
    assert answer.status == "error" and [one.key for one in server.requests] == ["Bearer none"]
    assert "qz-error" in page.use_model(visit, "served", "no address", "")[1]


def test_models_on_the_disk_of_the_page_are_not_a_visitors(page: Page, tmp_path: Path) -> None:
    for name in (str(tmp_path), "~", "..", str(tmp_path / "nothing")):
        visit = Visit()
        _, told, _ = page.use_model(visit, name, "", "")
        assert "qz-error" in told and visit.agent is None
    assert "on the disk of this page" in page.use_model(visit, str(tmp_path), "", "")[1]


def test_visitors_who_choose_one_model_share_it_in_batches(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    class Batched(ScriptedBackend):
        workers = 8

        def together(self, size: int) -> ScriptedBackend:
            return ScriptedBackend(replies, name=f"batches of {size}")

    monkeypatch.setattr(Agent, "from_pretrained", lambda model: Agent(Batched(replies), policy="explicit"))
    one, other = Visit(), Visit()
    for visit in (one, other):
        page.use_model(visit, "somebody/model", "", "")
    assert one.agent is other.agent is not None and one.agent.backend.name == "batches of 4"


def test_a_visitor_who_left_is_forgotten(page: Page, picture: str) -> None:
    """An hour after the last question, with the question under way."""
    holder = StateHolder()
    holder.set_blocks(page.layout.blocks)
    session = holder["a tab"]
    asked = [fn for fn in page.layout.blocks.fns.values() if getattr(fn.fn, "__name__", "") in ("ask", "use_model")]
    assert asked and all(page.visit in fn.outputs for fn in asked)
    for updates in page.ask(session[page.visit._id], picture, "which number?", 55, "explicit", True, 5, 0, 0):
        for component in updates.keys() & {page.visit}:
            session[component._id] = updates[component]
    visit = session[page.visit._id]
    assert visit.conversation.waiting is not None
    holder.delete_all_expired_state()
    assert session[page.visit._id] is visit, "the tab is still open"
    session.is_closed, session.STATE_TTL_WHEN_CLOSED = True, -1
    holder.delete_all_expired_state()
    assert visit.conversation._left.is_set() and session[page.visit._id].conversation is None


def test_a_long_conversation_begins_anew_and_needs_no_file(page: Page, picture: str) -> None:
    visit, limit = Visit(), WebConfig(questions=2, max_pixels=400_000)
    small = Page(page.agent, limit)
    for _ in range(2):
        found = shown(small, small.ask(visit, picture, "which number?", 55, *SETTINGS))
    assert "1 earlier question" in found["card"]
    Path(picture).unlink()
    found = shown(small, small.ask(visit, picture, "which number?", 55, *SETTINGS))
    assert "answered" in found["card"] and "earlier" not in found["card"]
    assert "kept for an hour" in shown(small, small.ask(Visit(), picture, "which?", 55, *SETTINGS))["card"]


def test_so_many_questions_wait_as_the_page_says(page: Page) -> None:
    assert page.layout.blocks._queue.max_size == page.config.queue == 32
    with pytest.raises(ConfigError, match=r"web\.queue"):
        WebConfig(queue=0)


def test_addresses_are_not_fetched(page: Page) -> None:
    with pytest.raises(gr.Error, match="fetches no addresses"):
        asyncio.run(page.layout.picture.async_move_resource_to_block_cache("http://example.com/picture.png"))


def test_the_page_is_served_and_offers_no_api(page: Page) -> None:
    transport = httpx.ASGITransport(create_app(page.agent, page.config))

    async def fetch() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            paths = ("/", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/openapi.json")
            return [await client.get(path) for path in paths]

    page_itself, info, file, description = asyncio.run(fetch())
    assert '"title":"qzoom"' in page_itself.text and "qz-example" in page_itself.text
    assert info.json()["named_endpoints"] == {}
    assert file.status_code in (403, 404) and description.status_code == 404
