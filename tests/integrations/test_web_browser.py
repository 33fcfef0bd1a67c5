"""The page of `qzoom web` in headless Chromium, with nano, at the width of a desktop and of a phone.

It needs the extra `[web]`, playwright, and Chromium; QZOOM_SHOTS=FOLDER keeps a screenshot of each state.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("gradio", reason="the extra [web] is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("QZOOM_SHOTS")
PATIENCE = 120_000
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "qzoom_agent", "web", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found, "the server did not start"
            yield found[0]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def tab(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, height = request.param
    with browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True) as context:
        context.set_default_timeout(PATIENCE)
        tab = context.new_page()
        asked, failed = [], []
        tab.on("request", lambda sent: asked.append(sent.url))
        tab.on("pageerror", lambda error: failed.append(str(error)))
        tab.goto(address)
        tab.locator(".qz-example").first.wait_for()
        tab.wait_for_timeout(500)
        yield tab
        outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert not outside, "the page asks nothing but its own server"
        assert not failed


def settled(tab: Any, name: str) -> None:
    """Check that nothing is wider than the window and no column too thin to read, and keep a screenshot."""
    tab.wait_for_timeout(700)
    assert tab.locator("#qz-ask").bounding_box()["width"] > 330
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if SHOTS:
        tab.screenshot(path=Path(SHOTS) / f"{tab.viewport_size['width']}-{name}.png")


def inside(tab: Any, selector: str) -> bool:
    """Return whether an element is wholly in the window."""
    box = tab.locator(selector).bounding_box()
    size = tab.viewport_size
    return bool(box and box["y"] >= 0 and box["x"] >= 0 and box["y"] + box["height"] <= size["height"])


def test_an_example_is_answered_at_once_and_followed_up(tab: Any, tmp_path: Path) -> None:
    settled(tab, "empty")
    tab.locator(".qz-example").nth(1).click()
    tab.locator(".qz-card.answered").wait_for()
    assert tab.locator(".qz-answer").inner_text() == "05N"
    settled(tab, "answer")
    assert inside(tab, ".qz-card") and inside(tab, "#qz-shown img"), "answer and picture are seen without scrolling"
    assert tab.locator(".qz-zooms img").count() == 1 and "Gate: look closer" in tab.locator(".qz-steps").inner_text()

    before = tab.locator("#qz-shown img").get_attribute("src")
    slider = tab.locator("#qz-tools input[type=range]")
    slider.focus()
    slider.press("Home")  # the keyboard moves it to 0 %
    tab.wait_for_function("old => document.querySelector('#qz-shown img').src !== old", arg=before)

    with tab.expect_download() as report:
        tab.get_by_role("button", name="Download the report").click()
    report.value.save_as(tmp_path / "report.html")
    assert "05N" in (tmp_path / "report.html").read_text(encoding="utf-8")

    further = tab.get_by_placeholder("Ask another question")
    further.fill("what is the code on the green square?")
    further.press("Enter")
    tab.locator(".qz-earlier").wait_for()
    tab.locator(".qz-card.answered").wait_for()
    assert tab.locator(".qz-answer").inner_text() == "VJC"
    settled(tab, "further")


def test_a_person_approves_moves_and_refuses(tab: Any) -> None:
    tab.get_by_text("Policy and budget").click()
    tab.get_by_label("Ask me before each zoom").check()
    tab.locator(".qz-example").nth(2).click()
    tab.locator(".qz-card.waiting").wait_for()
    settled(tab, "call")
    tab.get_by_role("button", name="Approve").click()
    tab.locator(".qz-steps li.zoom").wait_for()
    tab.locator("#qz-approval").wait_for()
    first = tab.get_by_label("Box").input_value()
    corners = ((0.62, 0.45), (0.95, 0.62))
    for x, y in corners:  # two taps draw another box
        tab.locator("#qz-shown img").scroll_into_view_if_needed()
        box = tab.locator("#qz-shown img").bounding_box()
        shown = tab.locator("#qz-shown img").get_attribute("src")
        tab.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        tab.wait_for_function("old => document.querySelector('#qz-shown img').src !== old", arg=shown)
    tab.wait_for_timeout(500)
    assert tab.get_by_label("Box").input_value() != first
    settled(tab, "moved")
    tab.get_by_role("button", name="Use my box").click()
    tab.locator(".qz-card.answered").wait_for()
    assert "You moved the call" in tab.locator(".qz-steps").inner_text()

    further = tab.get_by_placeholder("Ask another question")
    further.fill("what is the code on the cyan triangle?")
    further.press("Enter")
    tab.locator(".qz-card.waiting").wait_for()
    tab.get_by_label("Reason to refuse").fill("look at the left")
    tab.get_by_role("button", name="Refuse").click()
    tab.locator(".qz-steps li.person", has_text="look at the left").wait_for()
    settled(tab, "refused")


def test_a_bad_picture_is_one_sentence(tab: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
    tab.wait_for_timeout(1500)
    tab.get_by_label("Question").fill("what is this?")
    tab.get_by_label("Question").press("Enter")
    tab.locator(".qz-error").wait_for()
    assert "Not an image that can be read" in tab.locator(".qz-error").inner_text()
    settled(tab, "bad")
