"""`qzoom look` and its page: they say what the record says, and take nothing from it but text and numbers."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.errors import ConfigError, TraceError
from qzoom_agent.geometry import Box
from qzoom_agent.report.look import MAX_CROPS, compared, render_look, verdict, write_look
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import ViewStore
from tests.report.pages import Page

FOUND: dict[str, Any] = {
    "score": 0.83, "threshold": 0.5, "heat": [[0, 0.1, 0], [0, 0.9, 0.4]], "cutoff": 0.2, "route": "zoom",
    "cells": [(1, 1, 3, 2)], "boxes": [(133, 150, 400, 300)], "reason": "the gate asks for more detail",
    "prompt_tokens": 92, "visual_tokens": 12, "token_layers": 1234.0, "seconds": 0.21,
}  # fmt: skip
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)> \u202e'
ANY = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308])


def record(**changes: Any) -> PerceptionRecord:
    return PerceptionRecord.model_validate(FOUND | changes)


def seen(width: int = 400, height: int = 300) -> ViewStore:
    store = ViewStore()
    store.add_original(Image.effect_noise((width, height), 60))
    store.add_coarse(factor=28, min_tokens=4, max_tokens=12)
    return store


def html(found: PerceptionRecord, *, question: str = "Which code?", model: str = "nano") -> str:
    return render_look(found, seen(), question, model)


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_found() -> None:
    page = Page(html(record(), model="some model"))
    for part in (
        "Which code?", "some model", "Zoom, 1 place", "0.83 >= 0.50", "look closer", "the gate asks for more detail",
        "1 proposed box", "hottest cell 0.9", "cut-off 0.2", "12 visual of 92 tokens", "1,234 token-layers", "0.21 s",
        "[133, 150, 400, 300] in original px", "[1, 1, 3, 2] in cells", "33% of the image", "Coarse view",
    ):  # fmt: skip
        assert part in page.text, part
    assert [mark["href"] for mark in page.having("served")] == ["#turn-1"]
    assert ".m0{left:33.250%;top:50.000%;width:66.750%;height:50.000%}" in page.inline["style"]


def test_the_dial_is_hidden_until_a_script_can_follow_it_and_the_switch_is_not() -> None:
    page = Page(html(record()))
    inputs = {attrs["id"]: attrs for attrs in page.attributes("input")}
    assert inputs["warmth"]["type"] == "checkbox" and "checked" in inputs["warmth"]
    assert inputs["opacity"]["type"] == "range" and "hidden" in page.having("dial")[0]
    assert not Page(html(record(heat=[]))).having("dial")


def test_a_cell_is_a_pixel_of_the_heat_map() -> None:
    (layer,) = Page(html(record())).having("heat")
    image = Image.open(io.BytesIO(base64.b64decode((layer["src"] or "").split(",")[1])))
    assert image.size == (3, 2)


def test_the_heat_map_lies_where_the_model_saw_it() -> None:
    page = Page(html(record(extent=(0, -50, 400, 350))))
    assert ".stage .heat{left:0.000%;top:-16.667%;width:100.000%;height:133.333%}" in page.inline["style"]


def test_nothing_was_proposed() -> None:
    page = Page(html(record(score=0.2, cells=[], boxes=[], route="direct", reason="the coarse view will do")))
    for part in ("0.20 < 0.50", "the coarse view suffices", "Answer from the coarse view", "0 proposed boxes"):
        assert part in page.text
    assert not page.having("served") and len(page.having("turn")) == 1
    bare = Page(html(PerceptionRecord()))
    assert "no gate was asked" in bare.text and "no map was made" in bare.text and not bare.having("heat")


def test_hostile_texts_stay_texts() -> None:
    tame, hostile = (
        Page(html(record(reason=text), question=text, model=text)) for text in ("x" * len(HOSTILE), HOSTILE)
    )
    assert [(tag, attrs.keys()) for tag, attrs in hostile.tags] == [(tag, attrs.keys()) for tag, attrs in tame.tags]
    assert hostile.text.count("[U+202E]") == 4


def test_what_a_box_shows_is_cut_along_its_pixels() -> None:
    store = ViewStore()
    store.add_original(Image.new("RGB", (1234, 40)))  # 1234 * (21 / 1234) is a little less than 21
    page = Page(render_look(record(boxes=[(21, 0, 28, 7)]), store, "Which code?", "nano"))
    (src,) = [attrs["src"] for tag, attrs in page.tags if tag == "img" and attrs["alt"] == "Box 1, cut out"]
    assert Image.open(io.BytesIO(base64.b64decode((src or "").split(",")[1]))).size == (7, 7)


def test_many_boxes_are_drawn_and_counted_but_not_all_cut_out() -> None:
    source = html(record(boxes=[(i, 10, i + 30, 40) for i in range(200)], cells=[]))
    page = Page(source)
    assert len(page.having("served")) == 200 and len(page.having("crop")) == 1 + MAX_CROPS
    assert f"{200 - MAX_CROPS} more boxes" in page.text
    assert len(source) < 1_000_000


@settings(max_examples=20, deadline=None)
@given(
    numbers=st.fixed_dictionaries(
        dict.fromkeys(("score", "threshold", "cutoff", "token_layers", "seconds"), ANY)
        | {key: st.lists(st.tuples(ANY, ANY, ANY, ANY), max_size=3) for key in ("boxes", "cells")}
        | {"heat": st.lists(st.tuples(ANY, ANY).map(list), max_size=3)}
    )
)
def test_any_numbers_make_a_page(numbers: dict[str, Any]) -> None:
    page = Page(html(record(**numbers)))
    places = re.findall(
        r"\.m\d+\{left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%\}", page.inline["style"]
    )
    assert len(places) == len(page.having("served"))


@pytest.mark.parametrize(
    ("score", "threshold", "said", "meant"),
    [
        (0.83, 0.5, "0.83 >= 0.50", "look closer"),
        (0.5, 0.5, "0.50 >= 0.50", "look closer"),
        (0.4996, 0.5, "0.4996 < 0.5000", "the coarse view suffices"),
        (0.4999999, 0.5, "0.4999999 < 0.5", "the coarse view suffices"),
        (0.4, None, "0.40", "no threshold was given"),
        (None, None, "none", "no gate was asked"),
    ],
)
def test_score_and_threshold_agree_with_the_decision(
    score: float | None, threshold: float | None, said: str, meant: str
) -> None:
    found = record(score=score, threshold=threshold)
    assert (compared(found), verdict(found)) == (said, meant)


def test_a_page_is_written_or_says_why_not(tmp_path: Path) -> None:
    store = seen()
    path = write_look(record(), store, "?", "nano", tmp_path / "new" / "look.html")
    assert path.read_text("utf-8") == render_look(record(), store, "?", "nano")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match=r"Cannot write .*look\.html: there is a file .* Choose"):
        write_look(record(), store, "?", "nano", tmp_path / "file" / "look.html")


# ---- the verb ------------------------------------------------------------------------------------------------------


@dataclass
class FakeLook:
    record: PerceptionRecord
    store: ViewStore
    question: str
    model: str


class FakeAgent:
    """Looks at nothing and finds what it was told to; the real one needs a model with branches."""

    def __init__(self, found: PerceptionRecord | None) -> None:
        self.found = found

    def look(self, image: Image.Image, question: str) -> FakeLook:
        if self.found is None:
            raise ConfigError("This model has no branches - nano - give it some.")
        return FakeLook(self.found, seen(*image.size), question, "nano")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[PerceptionRecord | None], None]:
    def patch(found: PerceptionRecord | None) -> None:
        monkeypatch.setattr(Agent, "from_pretrained", lambda *args, **options: FakeAgent(found))

    return patch


@pytest.fixture
def board(tmp_path: Path) -> str:
    path = tmp_path / "board.png"
    Image.effect_noise((400, 300), 60).save(path)
    return str(path)


def test_look_prints_aligned_lines(install: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    install(record())
    assert main(["look", board, "which code?"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "gate           0.83 >= 0.50, look closer",
        "decision       zoom: the gate asks for more detail",
        "box 1          [133, 150, 400, 300] px, cells [1, 1, 3, 2]",
        "visual tokens  12",
        "prompt tokens  92",
        "token-layers   1,234",
        "seconds        0.21",
    ]
    assert captured.err == ""


def test_look_json_is_the_record_and_nothing_else(
    install: Any, board: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(record())
    assert main(["look", board, "?", "--json", "--png", str(tmp_path / "look.png")]) == 0
    assert PerceptionRecord.model_validate_json(capsys.readouterr().out) == record()


def test_look_writes_its_pictures_and_says_so(
    install: Any, board: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(record())
    png, page = tmp_path / "new" / "look.png", tmp_path / "new" / "look.html"
    assert main(["look", board, "which code?", "--png", str(png), "--html", str(page)]) == 0
    assert capsys.readouterr().err.splitlines() == [f"png     {png}", f"html    {page}"]
    with Image.open(png) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (400, 300))
    assert "which code?" in Page(page.read_text("utf-8")).text
    assert sorted(path.name for path in png.parent.iterdir()) == ["look.html", "look.png"]


def test_a_reason_cannot_move_the_cursor(install: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    install(record(reason="a\x1b[2Jb\nc"))
    assert main(["look", board, "?"]) == 0
    assert "decision       zoom: a\\x1b[2Jb\\nc" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("flag", ["--png", "--html"])
def test_a_place_that_cannot_be_written_is_2(
    flag: str, install: Any, board: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(record())
    assert main(["look", board, "?", flag, f"{board}/inside"]) == 2
    assert re.search(r"qzoom look: Cannot write into .*board\.png.*Choose another folder", capsys.readouterr().err)


def test_mistakes_are_2(install: Any, board: str, capsys: pytest.CaptureFixture[str]) -> None:
    install(None)
    assert main(["look", board, "?"]) == 2
    assert "no branches" in capsys.readouterr().err
    assert main(["look", "missing.png", "?"]) == 2
    assert "missing.png" in capsys.readouterr().err


def test_a_real_box_of_cells_is_the_same_place_in_pixels() -> None:
    # What the record promises and the page relies on: cells of the coarse view's grid cover the whole original.
    coarse = seen().view("coarse")
    box = coarse.to_original(Box(1, 1, 3, 2, frame="cell", view="coarse"))
    assert box.as_list() == pytest.approx([100, 100, 300, 200], abs=0.01)
