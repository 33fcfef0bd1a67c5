"""The report shows an episode, stays small, and takes nothing from a trace but text."""

import base64
import hashlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from qzoom_agent.errors import TraceError
from qzoom_agent.geometry import Box
from qzoom_agent.report.episode import render_html, write_report
from qzoom_agent.report.markdown import percent
from qzoom_agent.report.page import COLOURS, MAX_TEXT, asset, environment, legible, listed, number, write_page
from qzoom_agent.trace import CallRecord, Images, PerceptionRecord, QuestionRecord, Trace, Turn, Usage, by_digest
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom.shipped_tools import rotate
from tests.report.pages import Page

HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></title></pre><img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)> ' onmouseover='alert(1) `",
    "]]> --> <!-- <![CDATA[ &lt;b&gt; &#60;b&#62; \x00\x1b[31m\u202e\u2066\ufeff\u2028",
    "javascript:alert(1) {{7*7}} ${7} %3Cscript%3E",
]
"""Texts that would become markup, if anything could."""
TEMPLATE = environment().from_string('<p title="{{ attribute }}">{{ text }}<b>x</b></p>')


def episode(image: Image.Image | None = None, *, text: str = "some text", **changes: Any) -> tuple[Trace, Images]:
    """Four turns: a served zoom, a grown one, a refused one with a broken call beside it, an answer."""
    store = ViewStore()
    store.add_original(image or Image.effect_noise((400, 300), 60))
    store.add_coarse(factor=28, min_tokens=4, max_tokens=12)
    store.add_crop(Box(200, 150, 300, 225), factor=28, min_tokens=4, max_tokens=16)
    store.add_crop(Box(0, 0, 40, 30), factor=28, min_tokens=4, max_tokens=16)

    def call(**fields: Any) -> CallRecord:
        written = {"name": text, "raw": text, "label": text, "reason": text, "numbers": {text: 0.25}}
        return CallRecord.model_validate({**written, **fields})

    served = call(decision="served", box=(500, 500, 750, 750), frame="per_mille", view="coarse", result="crop1")
    grown = call(decision="grown", box=(0, 0, 0.01, 0.01), frame="unit", view="original", result="crop2")
    refused = call(decision="refused", box=(1, 1, 2, 2), frame="cell", view="coarse")
    turns = [
        Turn(index=0, text=f"a{text}", thought=text, calls=[served]),
        Turn(index=1, text=f"b{text}", calls=[grown], repairs=[text]),
        Turn(index=2, text=f"c{text}", calls=[refused, call(decision="failed")], problems=[text]),
        Turn(index=3, text=f"d{text}", answer=text, finish="length", forced=True),
    ]
    fields = {
        "question": text, "status": "budget", "answer": text, "views": store.views, "turns": turns, "model": text,
        "policy": text, "protocol": text, "id": text, "config": {text: text}, "error": text,
        "environment": {"qzoom-agent": text, text: text}, "gold": [(210, 160, 240, 190)],
        "usage": Usage.tally(store.views, turns, perceive=0.5),
        "perception": PerceptionRecord(
            score=0.8, threshold=0.5, heat=[[0, 1], [2, 3]], boxes=[(100, 100, 200, 200)], route="zoom",
            reason="the gate asks", prompt_tokens=80, visual_tokens=12, token_layers=960,
        ),
    }  # fmt: skip
    return Trace.model_validate(fields | changes), by_digest(store.views, store.image)


def page(*args: Any, expected: str | None = None, **changes: Any) -> Page:
    trace, images = episode(*args, **changes)
    return Page(render_html(trace, images, expected=expected))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_element_or_attribute_comes_from_a_hostile_trace(text: str) -> None:
    found, tame = page(text=text, expected=text), page(text="x" * len(text.strip()), expected="x" * len(text.strip()))
    assert found.shape() == tame.shape()
    assert found.inline == tame.inline
    assert found.text.count(legible(text.strip())) >= 15


def test_a_hundred_kilobytes_of_hostile_text_are_cut_and_still_text() -> None:
    text = "<b onclick='x'>\u202e\"&" * 6000
    trace, images = episode(text=text)
    source = render_html(trace, images)
    assert Page(source).shape() == page(text="x" * len(text)).shape()
    assert f"[{len(text) - MAX_TEXT:,} more characters are in the trace]" in source
    assert len(source) < 2_000_000


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=80), attribute=st.text(max_size=80))
def test_a_template_gives_back_exactly_its_text_and_attribute(text: str, attribute: str) -> None:
    found = Page(TEMPLATE.render(text=text, attribute=attribute))
    assert found.tags == [("p", {"title": legible(attribute).replace("\r", "\n")}), ("b", {})]
    assert found.text == legible(text) + "x"


def test_only_markup_of_templates_is_markup() -> None:
    inner = Markup("<b>{}</b>").format("1 < 2")
    assert TEMPLATE.render(text=inner, attribute="a\"'<>&") == (
        '<p title="a&#34;&#39;&lt;&gt;&amp;"><b>1 &lt; 2</b><b>x</b></p>'
    )
    assert TEMPLATE.render(text=str(inner), attribute="") == ('<p title="">&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;<b>x</b></p>')
    with pytest.raises(UndefinedError, match="attribute"):
        TEMPLATE.render(text="a value that is not there is an error")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x00b", "a[U+0000]b"),
        ("\u202eevil\u2069", "[U+202E]evil[U+2069]"),
        ("\ufeff\u200b\u00ad", "[U+FEFF][U+200B][U+00AD]"),
        ("\U000e0041", "[U+E0041]"),
        ("tab\tline\n caf\u00e9 \u4e2d \u05d0 \U0001f468\u200d\U0001f469", None),
    ],
)
def test_unseen_characters_are_spelled_out(text: str, seen: str | None) -> None:
    assert legible(text) == (text if seen is None else seen)


def test_the_page_can_reach_nothing_and_runs_only_its_own_script() -> None:
    trace, images = episode()
    found = Page(render_html(trace, images))
    policy = next(attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
        for tag, inline in found.inline.items()
    }
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
        "style-src": hashes["style"], "script-src": hashes["script"],
    }  # fmt: skip
    for tag, attrs in found.tags:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base", "image", "use")
        assert not {"style", "srcset", "action", "xlink:href"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert (attrs.get("src") or "data:image/").startswith("data:image/")
        assert (attrs.get("href") or "#").startswith("#")
    assert "url(" not in found.inline["style"] and "@import" not in found.inline["style"]
    assert not re.search(r"fetch|XMLHttp|innerHTML|eval|https?:", found.inline["script"])


def test_a_four_turn_run_on_a_large_noisy_photo_stays_under_a_megabyte(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), dtype=np.uint8))
    trace, images = episode(noise, text="word " * 400)
    path = write_report(trace, images, tmp_path / "deep" / "run.html")
    assert path.stat().st_size < 1_000_000
    widths = [Image.open(io.BytesIO(base64.b64decode(data))).width for data in jpegs(Page(path.read_text("utf-8")))]
    assert max(widths) <= 1600 and len(widths) == 4
    assert not list(path.parent.glob("*.part"))


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(TraceError, match=r"Cannot write .*taken: Is a directory"):
        write_page("<p>", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def jpegs(found: Page) -> list[str]:
    sources = [attrs["src"] or "" for tag, attrs in found.tags if tag == "img"]
    return [source.split(",")[1] for source in sources if source.startswith("data:image/jpeg")]


def test_a_small_image_is_not_enlarged() -> None:
    first = jpegs(page(Image.effect_noise((120, 90), 50)))[0]
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (120, 90)


def test_everything_that_happened_is_on_the_page() -> None:
    found = page(
        expected="other", question="What is it?", answer="A kite", error=None, status="budget", policy="hybrid"
    )
    for part in (
        "What is it?", "A kite", "Expected", "other", "budget", "hybrid", "First look", "0.80 >= 0.50", "look closer",
        "served", "grown", "refused", "failed", "no box", "[500, 500, 750, 750] of 1000 in coarse", "6.2% of the image",
        "1 proposed box", "zoom", "the gate asks", "12 visual of 80 tokens", "960 token-layers", "hottest cell 3",
        "last turn, without tools", "cut off", "4 asked", "1 refused", "1 failed", "Crop 1", "Crop 2", "Heat map",
    ):  # fmt: skip
        assert part in found.text, part
    assert len(found.having("turn")) == 5
    assert [len(found.having(kind)) for kind in ("gold", "proposed", "served")] == [1, 1, 2 + 1]


@pytest.mark.parametrize(("calibrated", "shown"), [(0.8, "confidence 0.80"), (None, "least likely token 0.97")])
def test_a_page_calls_confidence_what_the_answer_does(calibrated: float | None, shown: str) -> None:
    turns = [Turn(index=at, text="1", answer="1", confidence=sure) for at, sure in enumerate((0.6, 0.97))]
    text = page(turns=turns, confidence=calibrated).text
    assert "least likely token 0.60" in text, "an answer that was not kept"
    assert shown in text and text.count("confidence 0.") == (calibrated is not None)


def position(found: Page, mark: dict[str, str | None]) -> list[float]:
    name = next(name for name in (mark["class"] or "").split() if re.fullmatch(r"m\d+", name))
    rule = re.search(
        rf"\.{name}{{left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%}}", found.inline["style"]
    )
    assert rule is not None
    return [float(value) for value in rule.groups()]


def test_boxes_lie_where_the_crops_were_cut_and_where_the_model_asked() -> None:
    found = page()
    served = [mark for mark in found.having("served") if "box" in (mark["class"] or "")]
    assert [position(found, mark) for mark in served] == [[50, 50, 25, 25], [0, 0, 10, 10]]
    assert [mark["data-turn"] for mark in served] == ["1", "2"]
    assert position(found, found.having("asked")[0]) == [0, 0, 1, 1]
    columns, rows = 4, 3
    asked_in_cells = [100 / columns, 100 / rows, 100 / columns, 100 / rows]
    assert position(found, found.having("denied")[0]) == pytest.approx(asked_in_cells, abs=0.01)
    targets = {attrs.get("id") for _, attrs in found.tags}
    assert all((attrs["href"] or "")[1:] in targets for tag, attrs in found.tags if tag == "a")


def test_a_crop_over_another_of_the_same_place_has_both_numbers() -> None:
    trace, images = episode()
    again = trace.views[2].model_copy(update={"id": "crop3"})
    text = render_html(trace.model_copy(update={"views": [*trace.views, again]}), images)
    labels = re.findall(r'aria-label="Crop (\d+)[^>]*><span>([^<]*)</span>', text)
    assert labels == [("3", "3"), ("1", "1, 3"), ("2", "2")]


def test_every_turn_has_its_own_colour_and_every_image_a_description() -> None:
    found = page()
    colours = [
        [name for name in (turn["class"] or "").split() if re.fullmatch(r"c[\dx]", name)]
        for turn in found.having("turn")
    ]
    assert colours == [["cx"], ["c0"], ["c1"], ["c2"], ["c3"]]
    assert all(attrs.get("alt") for tag, attrs in found.tags if tag == "img")


@pytest.mark.parametrize("degrees", [0, 90, 45])
def test_a_crop_is_as_close_as_its_pixels_are_however_a_tool_turned_them(degrees: int) -> None:
    store, image = ViewStore(), Image.new("RGB", (1000, 600), "white")
    store.add_original(image)
    coarse = store.add_coarse(factor=28, min_tokens=60, max_tokens=60)
    turned = rotate(image, degrees)
    assert isinstance(turned.image, Image.Image)
    made = store.add_tool_image(turned.image, factor=28, min_tokens=60, max_tokens=60, matrix=turned.matrix)
    crop = store.add_crop(made.extent.scale(0.5, turned.image.size), factor=28, min_tokens=99, max_tokens=99)
    trace, _ = episode(views=store.views, turns=[])
    text = Page(render_html(trace, by_digest(store.views, store.image))).text
    told = re.findall(r"([\d.]+)x closer", text)
    closer = math.sqrt(crop.size.area / crop.extent.area * image.width * image.height / coarse.size.area)
    assert [float(factor) for factor in told] == [pytest.approx(closer, rel=0.1)]


def test_the_cost_of_several_images_is_a_share_of_all_of_them() -> None:
    store = ViewStore()
    for place in range(2):
        store.add_original(Image.new("RGB", (560, 560)), number=place)
        store.add_coarse(factor=28, min_tokens=100, max_tokens=100, number=place)
    trace, _ = episode(views=store.views, turns=[], usage=Usage.tally(store.views, []))
    text = Page(render_html(trace, by_digest(store.views, store.image))).text
    assert "25% of full size" in text, "both are shown at half their sides"


def test_crops_nobody_asked_for_belong_to_the_first_look() -> None:
    trace, images = episode()
    found = Page(render_html(trace.model_copy(update={"turns": trace.turns[3:]}), images))
    served = [mark for mark in found.having("served") if "box" in (mark["class"] or "")]
    assert [mark["data-turn"] for mark in served] == ["0", "0"]


def test_a_page_of_several_images_shows_the_look_at_each_and_one_set_of_switches() -> None:
    store, looks = ViewStore(), list[PerceptionRecord]()
    for place, score in enumerate((0.9, 0.2)):
        store.add_original(Image.new("RGB", (560, 560)), number=place)
        store.add_coarse(factor=28, min_tokens=100, max_tokens=100, number=place)
        looks.append(PerceptionRecord(score=score, threshold=0.5, heat=[[0, 1]], boxes=[(0, 0, 90, 90)], image=place))
    look = looks[0].model_copy(update={"others": looks[1:]})
    trace, _ = episode(views=store.views, turns=[], perception=look)
    found = Page(render_html(trace, by_digest(store.views, store.image)))
    for part in ("0.90 >= 0.50", "gate of image 2 0.20 < 0.50", "Coarse view of image 2"):
        assert part in found.text, part
    assert [len(found.having(kind)) for kind in ("pictures", "picture", "heat", "proposed")] == [1, 2, 2, 2]
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"warmth", "proposals", "opacity"} <= set(ids)
    switched = re.findall(r"([^\s{}]*):has\(#(?:boxes|known|proposals|warmth)", found.inline["style"])
    assert set(switched) == {"main"}, "the switches hold for every picture"


def test_crops_of_a_further_question_belong_to_its_own_look() -> None:
    trace, images = episode()
    first = {"views": trace.views[:-1], "turns": trace.turns[3:]}
    further = QuestionRecord(question="And then?", status="answered", views=trace.views[-1:])
    found = Page(render_html(trace.model_copy(update={**first, "follow_ups": [further]}), images))
    served = [mark for mark in found.having("served") if "box" in (mark["class"] or "")]
    assert [mark["href"] for mark in served] == ["#turn-0", "#turn-look-2"]
    assert {"turn-0", "turn-look-2"} <= {attrs.get("id") for _, attrs in found.tags}
    assert "Answer to the first question" in found.text and "2, with the cost of all" in found.text
    assert "of all" not in page().text and "Answer to" not in page().text


def test_a_blind_run_says_that_its_crops_were_withheld() -> None:
    blind = page(policy="blind")
    assert "withheld" in blind.text
    alts = [attrs["alt"] or "" for tag, attrs in blind.tags if tag == "img"]
    assert sum("withheld from the model" in alt for alt in alts) == 2, "of both crops, and not of the coarse view"
    assert "withheld" not in page(policy="explicit").text


def test_boxes_of_any_numbers_are_drawn_inside_or_not_at_all() -> None:
    values = [math.nan, math.inf, -math.inf, 1e300, -5.0, 0.0, 10.0, 500.0]
    trace, images = episode()
    calls = [
        CallRecord(name="zoom", decision="refused", frame=frame, view=view, box=(a, b, b, a))
        for a in values
        for b in values
        for frame, view in (("pixel", "original"), ("cell", "coarse"), ("cell", "original"), ("unit", "gone"))
    ]
    boxes = [(a, b, a, b) for a in values for b in values]
    odd = PerceptionRecord(
        score=math.nan, threshold=math.inf, heat=[[math.nan, math.inf], [1e308, -1e308]], boxes=boxes
    )
    changes = {"turns": [Turn(index=0, text="", calls=calls, seconds=math.nan)], "gold": boxes, "perception": odd}
    found = Page(render_html(trace.model_copy(update=changes), images))
    places = [position(found, mark) for mark in found.having("box")]
    assert len(places) > 50
    assert all(0 <= x <= x + w <= 100.001 and 0 <= y <= y + h <= 100.001 for x, y, w, h in places)


@pytest.mark.parametrize("heat", [[], [[]], [[], []], [[0.0]], [[1.0, 1.0]], [[-3.0, 2.0]] * 3])
def test_a_heat_map_of_any_shape(heat: list[list[float]]) -> None:
    found = page(perception=PerceptionRecord(heat=heat))
    assert len(found.having("heat")) == int(any(heat))


@pytest.mark.parametrize(("score", "said"), [(0.51, "0.51 >= 0.50look closer"), (0.5, "0.50 >= 0.50look closer"),
                                             (0.49, "0.49 < 0.50the coarse view suffices")])  # fmt: skip
def test_the_gate_is_shown_as_it_decided(score: float, said: str) -> None:
    found = page(perception=PerceptionRecord(score=score, threshold=0.5, reason="because"))
    assert said in found.text and "because" in found.text
    assert len(found.having("direct")) == 1


def test_a_reason_is_text_and_shown_even_without_a_gate() -> None:
    found = page(perception=PerceptionRecord(reason=HOSTILE[0]))
    assert HOSTILE[0] in found.text and not found.having("gate")


def test_the_heat_map_fades_by_script_and_switches_without() -> None:
    found = page()
    inputs = {attrs["id"]: attrs for tag, attrs in found.tags if tag == "input"}
    assert inputs["warmth"]["type"] == "checkbox" and "checked" not in inputs["warmth"]
    assert inputs["opacity"]["type"] == "range" and "hidden" in found.having("dial")[0]
    assert not page(perception=PerceptionRecord()).having("dial")


def test_a_trace_of_almost_nothing_still_makes_a_page() -> None:
    trace = Trace(question="", status="error", error="The model could not be loaded.")
    found = Page(render_html(trace, lambda digest: pytest.fail("no image to ask for")))
    assert "The model could not be loaded." in found.text and not found.having("stage")
    trace = Trace(question="?", status="refused", turns=[Turn(index=0, text="  ", answer=" ")])
    assert "an empty answer" in Page(render_html(trace, lambda digest: pytest.fail("none"))).text


@pytest.mark.parametrize(("answer", "same"), [("EXIT 24", 1), (" EXIT  24\n", 1), ("exit 24", 0), (None, 0)])
def test_expected_is_ticked_only_if_it_is_the_same_text(answer: str | None, same: int) -> None:
    assert len(page(answer=answer, expected="EXIT 24").having("tick")) == same


def test_a_saved_and_loaded_trace_makes_the_same_page(tmp_path: Path) -> None:
    trace, images = episode()
    loaded = Trace.load(trace.save(tmp_path, images))
    assert render_html(loaded, images) == render_html(trace, images)


def test_the_bar_of_the_visual_tokens_has_those_of_tools() -> None:
    parts = page(usage=Usage(coarse_tokens=50, crop_tokens=25, tool_tokens=25)).having("s2")
    assert [float(part["width"] or 0) for part in parts] == [25.0]


def test_usage_on_the_page_is_json() -> None:
    found = page()
    assert json.loads(found.text[found.text.rindex("Usage") + len("Usage") :].strip())["requested"] == 4


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    trace, images = episode()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match=r"Cannot write .*run\.html: there is a file .* Choose"):
        write_report(trace, images, tmp_path / "file" / "run.html")


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.9967, 0, "99.7%"), (0.99961, 1, "99.96%"), (1.0, 1, "100.0%"), (0.0004, 0, "0.04%"), (0.0, 0, "0%"),
        (0.42, 0, "42%"), (3.17, 0, "317%"), (1e-17, 1, "0.0%"),
    ],
)  # fmt: skip
def test_a_share_is_rounded_neither_to_none_nor_to_all(value: float, digits: int, shown: str) -> None:
    assert percent(value, digits) == shown


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_stand_out_from_what_is_behind_them() -> None:
    style = asset("report.css")
    assert len(turns := re.findall(r"\.c[\dx] { --c: (#\w{6})", style)) == COLOURS + 1
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in turns), "numbers of turns and crops are white"
    themes = [dict(re.findall(r"--(\w+): (#\w{6})\b", part)) for part in style.split("}")[:2]]
    for theme in themes:
        behind = [(ink, ground) for ink in ("soft", "faint", "ink") for ground in ("paper", "card", "wash")]
        behind += [(ink, "card") for ink in ("good", "warn", "bad", "s1")]
        assert all(contrast(theme[ink], theme[ground]) >= 4.5 for ink, ground in behind), theme


def test_numbers_and_boxes_are_written_out() -> None:
    assert [number(value) for value in (0.12345, 12.345, 201.75, 1096.86, 12345, 2e12)] == [
        "0.123",
        "12.3",
        "202",
        "1,097",
        "12,345",
        "2e+12",
    ]
    assert listed((201.75, 916, 807, 1096.86)) == "[202, 916, 807, 1097]"
