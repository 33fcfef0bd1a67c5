"""One self-contained HTML page per episode: where the model looked, what it said, and what that cost.

The page is a view of a `Trace`, nothing more: left the original with a numbered box for every crop and a colour for
every turn, right the turns in order. It opens from disk, asks the network for nothing, and reads without scripts.

Invariants
- A trace is untrusted text: `markup.el` escapes whatever it is not told is markup, and the page's own policy (CSP)
  allows exactly one script and one style sheet, by hash, so that even markup that slipped through could not run,
  load or restyle anything.
- Positions live in the generated style sheet, as numbers formatted here; no element carries a style of its own.
- The size is bounded: images are scaled and compressed to a share of a fixed number of bytes, long texts are cut with
  a note of what is missing (the trace keeps all of it).
Deliberately not here: scoring. `expected` is shown next to the answer and marked only if the two are the same text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from qzoom_agent.errors import TraceError
from qzoom_agent.geometry import Box
from qzoom_agent.markup import Html, bounded, cut, el
from qzoom_agent.trace import CallRecord, Images, PerceptionRecord, Quad, Trace, Turn, Usage
from qzoom_agent.views import View

COLOURS = 8
"""Turns take the colours .c0 to .c7 of report.css in order, then again from the first."""
MAX_SIDE = 1600
_FOLD = 420
_ORIGINAL_BYTES = 480_000
_CROP_BYTES = 160_000
_HEAT_SIDE = 160
_HEAT_STOPS = ((255, 214, 102, 0), (255, 196, 70, 25), (255, 160, 50, 95), (240, 90, 40, 135), (200, 20, 60, 165))
"""Red, green, blue and opacity at equal steps from the coldest cell to the hottest."""


def write_report(trace: Trace, image: Images, path: Path | str, *, expected: str | None = None) -> Path:
    """Write the page for `trace` to `path` (folders are created) and return it.

    `image` maps a digest to its image (`trace.by_digest`, `trace.saved_images`); `expected` is shown beside the answer.
    TraceError if the file cannot be written.
    """
    path = Path(path)
    page = render_html(trace, image, expected=expected)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        raise TraceError(f"A report could not be written - {path}: {error} - choose another place for it.") from error
    return path


def render_html(trace: Trace, image: Images, *, expected: str | None = None) -> str:
    """The page as a string; see `write_report`."""
    marks = _marks(trace)
    style = _asset("report.css") + "".join(mark.rule(index) for index, mark in enumerate(marks))
    original = next((view for view in trace.views if view.kind == "original"), None)
    if original is not None:
        style += _stage_rule(original.width / max(1, original.height))
    script = _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", cut(trace.question, 120) + " - qzoom"),
        el("style", Html(style)),
    )
    columns = el(
        "main",
        _figure(trace, original, image, marks) if original is not None else None,
        _timeline(trace, image),
        cls=None if original is not None else "plain",
    )
    body = el("body", _header(trace, expected), columns, _footer(trace), el("script", Html(script)))
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def _said(text: str, cls: str) -> Html | None:
    """A text of the model: whole when short, folded when long."""
    text = text.strip()
    if not text:
        return None
    if len(text) <= _FOLD:
        return el("p", text, cls=cls, dir="auto")
    return el(
        "details",
        el("summary", el("span", cut(text, 260), cls="excerpt", dir="auto"), el("span", cls="more")),
        el("p", bounded(text), cls=cls, dir="auto"),
        cls="fold",
    )


def _asset(name: str) -> str:
    return resources.files("qzoom_agent").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(inline: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


# -- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def _list(box: Sequence[float]) -> str:
    return "[" + ", ".join(_number(value) for value in box) + "]"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def _share(part: float, whole: float) -> str:
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"


def _facts(facts: Iterable[str | None]) -> Html | None:
    items = [el("li", fact) for fact in facts if fact]
    return el("ul", items, cls="facts") if items else None


# -- images ----------------------------------------------------------------------------------------------------------


def _jpeg(image: PIL.Image.Image, side: int, limit: int) -> str:
    """A data URI of `image`, at most `side` px and about `limit` bytes; never enlarged."""
    data = b""
    for scale, quality in ((1.0, 86), (1.0, 74), (0.8, 70), (0.6, 62), (0.4, 55), (0.2, 50)):
        small = image.convert("RGB")
        small.thumbnail((max(1, int(side * scale)),) * 2, PIL.Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Not optimize=True: Pillow then fails on noise, whose JPEG outgrows the buffer it guesses.
        small.save(buffer, format="JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _heat_png(heat: Sequence[Sequence[float]]) -> str:
    """The heat map as a small transparent image: clear where cold, amber to crimson where hot."""
    grid = np.nan_to_num(np.asarray(heat, dtype=np.float64), posinf=0.0, neginf=0.0).clip(-1e30, 1e30)
    grid -= grid.min()
    grid /= max(float(grid.max()), 1e-12)
    # Enlarged before it is coloured: a browser would blend the colours of neighbouring cells into bands.
    scale = _HEAT_SIDE / max(grid.shape)
    size = (max(1, round(grid.shape[1] * scale)), max(1, round(grid.shape[0] * scale)))
    smooth = np.asarray(PIL.Image.fromarray(grid.astype(np.float32)).resize(size, PIL.Image.Resampling.BICUBIC)).clip(
        0, 1
    )
    stops = np.linspace(0, 1, len(_HEAT_STOPS))
    channels = [np.interp(smooth, stops, values) for values in zip(*_HEAT_STOPS, strict=True)]
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- boxes on the original -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """A box drawn over the original; fractions of its width and height, x1 y1 x2 y2."""

    kind: str
    turn: int | None
    label: str
    title: str
    box: Quad

    def rule(self, index: int) -> str:
        x1, y1, x2, y2 = (100 * value for value in self.box)
        return f".m{index}{{left:{x1:.3f}%;top:{y1:.3f}%;width:{x2 - x1:.3f}%;height:{y2 - y1:.3f}%}}\n"

    def html(self, index: int) -> Html:
        side = ["in"] if self.box[1] < 0.05 else []
        side += ["rt"] if self.box[0] > 0.92 else []
        return el(
            "a" if self.turn is not None else "div",
            el("span", self.label) if self.label else None,
            cls=" ".join(["box", self.kind, f"m{index}", _colour(self.turn), *side]),
            href=f"#turn-{self.turn}" if self.turn is not None else None,
            data_turn=str(self.turn) if self.turn is not None else None,
            title=self.title,
            aria_label=self.title if self.turn is not None else None,
        )


def _colour(turn: int | None) -> str:
    """Turns count from 1; 0 is the first look, before the model spoke."""
    return f"c{(turn - 1) % COLOURS}" if turn else "cx"


def _marks(trace: Trace) -> list[_Mark]:
    original = next((view for view in trace.views if view.kind == "original"), None)
    if original is None:
        return []
    numbers, marks = _crop_numbers(trace), []

    def add(kind: str, turn: int | None, label: str, title: str, box: Sequence[float] | None) -> None:
        clipped = _fractions(box, original)
        if clipped is not None:
            marks.append(_Mark(kind, turn, label, title, clipped))

    for box in trace.gold:
        add("gold", None, "", "Known place of the answer", box)
    for rank, box in enumerate(trace.perception.boxes if trace.perception else [], start=1):
        add("proposed", 0, "", f"Proposed box {rank}", box)
    for number, view in enumerate((view for view in trace.views if view.kind == "crop"), start=1):
        if view.id not in {call.result for turn in trace.turns for call in turn.calls}:
            add("served", 0, str(number), f"Crop {number}, shown by the policy", view.box)
    for position, turn in enumerate(trace.turns, start=1):
        for call in turn.calls:
            crop = trace.view(call.result) if call.result else None
            if crop is not None and crop.id in numbers:
                label = str(numbers[crop.id])
                add("served", position, label, f"Crop {label}, turn {position}", crop.box)
            if call.decision != "served":
                kind = "asked" if call.decision == "grown" else "denied"
                cross = "" if call.decision == "grown" else "\u00d7"
                add(kind, position, cross, f"Asked in turn {position}, {call.decision}", _asked(trace, call))
    return marks


def _crop_numbers(trace: Trace) -> dict[str, int]:
    crops = [view.id for view in trace.views if view.kind == "crop"]
    return {id: number for number, id in enumerate(crops, start=1)}


def _asked(trace: Trace, call: CallRecord) -> list[float] | None:
    """The box of a call in original pixels; None if it has none that can be drawn."""
    view = trace.view(call.view)
    if view is None or call.box is None or not all(abs(value) < 1e7 for value in call.box):
        return None
    if call.frame == "cell" and not 0 < view.tokens <= view.width * view.height:
        return None
    return view.to_original(Box(*call.box, frame=call.frame, view=call.view).ordered()).as_list()


def _fractions(box: Sequence[float] | None, original: View) -> Quad | None:
    if box is None or not all(math.isfinite(value) for value in box) or original.width < 1 or original.height < 1:
        return None
    x1, x2 = sorted(min(max(value / original.width, 0.0), 1.0) for value in (box[0], box[2]))
    y1, y2 = sorted(min(max(value / original.height, 0.0), 1.0) for value in (box[1], box[3]))
    return x1, y1, x2, y2


def _stage_rule(ratio: float) -> str:
    # Percent positions only fit if the stage has the image's shape, also when the height is what limits it.
    return f".stage{{aspect-ratio:{ratio:.5f};max-width:calc(var(--tall) * {ratio:.5f})}}\n"


# -- the page's parts ------------------------------------------------------------------------------------------------


def _header(trace: Trace, expected: str | None) -> Html:
    known = None
    if expected is not None:
        same = trace.answer is not None and trace.answer.split() == expected.split()
        sign = el("span", "\u2713", cls="tick", title="the same text", aria_label="the same text") if same else None
        known = el("div", el("dt", "Expected"), el("dd", cut(expected, 400), " ", sign, dir="auto"))
    answer = el("i", "none") if trace.answer is None else cut(trace.answer.strip(), 1200) or el("i", "empty")
    release = trace.environment.get("qzoom-agent")
    names = [
        _name("model", trace.model),
        _name("policy", trace.policy),
        _name("protocol", trace.protocol),
        _name("seed", str(trace.seed)),
        _name("qzoom-agent", release or ""),
    ]
    return el(
        "header",
        el("p", _logo(), el("b", "qzoom"), el("span", "episode ", cut(trace.id, 80)), cls="brand"),
        el("h1", cut(trace.question, 2000), dir="auto"),
        el("dl", el("div", el("dt", "Answer"), el("dd", answer, dir="auto"), cls="answer"), known, cls="verdict"),
        el("p", bounded(trace.error), cls="error", dir="auto") if trace.error else None,
        el("ul", el("li", el("span", trace.status, cls=f"badge {trace.status}")), names, cls="names"),
        _totals(trace),
    )


def _logo() -> Html:
    frame = el("rect", x="1", y="1", width="18", height="18", rx="4", cls="frame")
    crop = el("rect", x="10", y="5", width="5", height="5", rx="1", cls="level")
    return el("svg", frame, crop, viewBox="0 0 20 20", cls="logo", aria_hidden="true")


def _name(what: str, value: str) -> Html | None:
    return el("li", el("span", what), " ", cut(value, 120)) if value else None


def _totals(trace: Trace) -> Html:
    usage = trace.usage
    spent = usage.seconds
    zooms = [
        f"{usage.requested} asked" if usage.requested else None,
        f"{usage.refused} refused" if usage.refused else None,
        f"{usage.failed} failed" if usage.failed else None,
        f"{usage.inserted} shown unasked" if usage.inserted else None,
    ]
    return el(
        "dl",
        _total("Visual tokens", f"{usage.visual_tokens:,}", (usage.coarse_tokens, usage.crop_tokens), _whole(trace)),
        _total("Crops", f"{usage.served + usage.inserted}", (), _dots(zooms) or "no zoom asked for"),
        _total("Text tokens", f"{usage.text_tokens:,}", (), f"{usage.written_tokens:,} written by the model"),
        _total(
            "Time",
            _seconds(spent.total),
            (spent.perceive, spent.think, spent.act),
            _dots([f"look {spent.perceive:.2f}", f"think {spent.think:.2f}", f"act {spent.act:.2f}"]),
        ),
        cls="totals",
    )


def _whole(trace: Trace) -> str:
    """What the visual tokens are made of, and what the original would have cost at the same pixels per token."""
    parts = _dots([f"coarse {trace.usage.coarse_tokens:,}", f"crops {trace.usage.crop_tokens:,}"])
    original = next((view for view in trace.views if view.kind == "original"), None)
    coarse = next((view for view in trace.views if view.kind == "coarse" and view.tokens), None)
    if original is None or coarse is None:
        return parts
    full = coarse.tokens * original.width * original.height / max(1, coarse.width * coarse.height)
    return _dots([parts, f"{_share(trace.usage.visual_tokens, full)} of full size"])


def _dots(parts: Iterable[str | None]) -> str:
    return " \u00b7 ".join(part for part in parts if part)


def _total(what: str, value: str, split: Sequence[float], note: str) -> Html:
    whole, start, bars = sum(split), 0.0, []
    for index, part in enumerate(split):
        if whole > 0 and part > 0 and math.isfinite(whole):
            width = 100 * part / whole
            bars.append(el("rect", x=f"{start:.2f}", width=f"{width:.2f}", height="4", cls=f"s{index}"))
            start += width
    bar = el("svg", bars, viewBox="0 0 100 4", preserveAspectRatio="none", aria_hidden="true") if bars else None
    return el("div", el("dt", what), el("dd", value, cls="big"), el("dd", note, bar, cls="note"))


def _figure(trace: Trace, original: View, image: Images, marks: Sequence[_Mark]) -> Html:
    heat = trace.perception.heat if trace.perception and any(trace.perception.heat) else None
    kinds = {mark.kind for mark in marks}
    toggles = [
        _toggle("boxes", "Boxes", True) if kinds & {"served", "asked", "denied"} else None,
        _toggle("proposals", "Proposals", False) if "proposed" in kinds else None,
        _toggle("known", "Known place", True) if "gold" in kinds else None,
        _toggle("warmth", "Heat map", False) if heat else None,
    ]
    size = f"{original.width} x {original.height}"
    crops = len(_crop_numbers(trace))
    stage = el(
        "div",
        el(
            "img",
            src=_jpeg(image(original.digest), MAX_SIDE, _ORIGINAL_BYTES),
            alt=f"The original image, {size} pixels, with the boxes of {crops} crops drawn on it",
            cls="original",
        ),
        el("img", src=_heat_png(heat), alt="Heat map of where detail is needed", cls="heat") if heat else None,
        [mark.html(index) for index, mark in enumerate(marks)],
        cls="stage",
    )
    caption = el(
        "figcaption",
        el("span", f"Original, {size} px"),
        el("span", toggles, cls="toggles"),
        el("span", el("kbd", "\u2190"), el("kbd", "\u2192"), " between turns", cls="keys", hidden=True),
    )
    return el("figure", stage, caption, cls="picture")


def _toggle(id: str, label: str, on: bool) -> Html:
    return el("label", el("input", type="checkbox", id=id, checked=on), label)


def _timeline(trace: Trace, image: Images) -> Html:
    crops = len(_crop_numbers(trace))
    draw = _Drawing(trace, image, _CROP_BYTES // max(1, crops + 1))
    items = [_first_look(trace, draw)]
    items += [_turn(draw, turn, position) for position, turn in enumerate(trace.turns, start=1)]
    return el("ol", items, cls="turns")


@dataclass(frozen=True)
class _Drawing:
    """What the parts of the timeline need to show a view."""

    trace: Trace
    image: Images
    limit: int

    def thumbnail(self, view: View, name: str, facts: Iterable[str | None], cls: str) -> Html:
        alt = f"{name}, {view.width} x {view.height} pixels as shown to the model"
        return el(
            "figure",
            el("img", src=_jpeg(self.image(view.digest), 448, self.limit), alt=alt),
            el("figcaption", el("b", name), _facts(facts)),
            cls=cls,
        )

    def crop(self, view: View) -> Html:
        original = next((each for each in self.trace.views if each.kind == "original"), None)
        coarse = next((each for each in self.trace.views if each.kind == "coarse"), None)
        wide, high = view.box[2] - view.box[0], view.box[3] - view.box[1]
        closer = None
        if coarse is not None and wide > 0 and coarse.width > 0:
            factor = view.width / wide * (coarse.box[2] - coarse.box[0]) / coarse.width
            closer = f"{factor:.1f}x closer than the coarse view"
        part = None
        if original is not None and original.width * original.height > 0:
            part = f"{_share(wide * high, original.width * original.height)} of the image"
        blind = "withheld: the model saw a grey image" if self.trace.policy == "blind" else None
        facts = [f"{_list(view.box)} in original px", part, closer, f"{view.tokens:,} visual tokens", blind]
        return self.thumbnail(view, f"Crop {_crop_numbers(self.trace)[view.id]}", facts, "crop")


def _item(id: str, position: int | None, title: str, cost: str | None, body: Sequence[str | None]) -> Html:
    return el(
        "li",
        el(
            "div",
            el("span", str(position) if position else "", cls="dot"),
            el("h2", title),
            el("span", cost, cls="cost") if cost else None,
            cls="bar",
        ),
        body,
        id=f"turn-{id}",
        cls=f"turn {_colour(position)}",
        data_turn=id,
    )


def _first_look(trace: Trace, draw: _Drawing) -> Html | None:
    asked = {call.result for turn in trace.turns for call in turn.calls}
    coarse = [view for view in trace.views if view.kind == "coarse"]
    inserted = [view for view in trace.views if view.kind == "crop" and view.id not in asked]
    if not coarse and not inserted and trace.perception is None:
        return None
    body: list[str | None] = [_gate(trace.perception) if trace.perception else None]
    for view in coarse:
        facts = [f"{view.width} x {view.height} px as shown", f"{view.tokens:,} visual tokens"]
        body.append(draw.thumbnail(view, "Coarse view", facts, "crop"))
    body += [draw.crop(view) for view in inserted]
    seconds = trace.usage.seconds.perceive
    tokens = sum(view.tokens for view in (*coarse, *inserted))
    return _item("0", None, "First look", _cost(tokens, 0, seconds), body)


def _cost(visual: int, written: int, seconds: float) -> str:
    return _dots(
        [f"{visual:,} visual" if visual else None, f"{written:,} written" if written else None, _seconds(seconds)]
    )


def _gate(perception: PerceptionRecord) -> Html | None:
    if perception.score is None:
        return None
    verdict = {True: "look closer", False: "the coarse view suffices", None: ""}[perception.fired]
    scale = max(1.0, perception.score) if math.isfinite(perception.score) else 1.0
    level = 100 * min(max(perception.score / scale, 0.0), 1.0) if math.isfinite(perception.score) else 0.0
    mark = None
    compare = f"{perception.score:.2f}"
    if perception.threshold is not None and math.isfinite(perception.threshold):
        x = 100 * min(max(perception.threshold / scale, 0.0), 1.0)
        mark = el("rect", x=f"{x - 0.4:.2f}", width="0.8", height="6", cls="mark")
        compare += f" {'>' if perception.fired else '<='} {perception.threshold:.2f}"
    meter = el(
        "svg",
        el("rect", width="100", height="6", cls="track"),
        el("rect", width=f"{level:.2f}", height="6", cls="level"),
        mark,
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return el("p", el("span", "Gate"), meter, el("b", compare), el("span", verdict), cls="gate")


def _turn(draw: _Drawing, turn: Turn, position: int) -> Html:
    if turn.calls:
        title = "Zoom" if any(call.result for call in turn.calls) else "Zoom, not served"
    else:
        title = "Answer" if turn.answer is not None else "Unreadable" if turn.problems else "Text"
    notes = ["last turn, without tools" if turn.forced else None, "cut off" if turn.finish == "length" else None]
    body: list[str | None] = [_said(turn.thought, "thought")]
    if turn.answer is not None:
        body.append(_said(turn.answer, "reply") or el("p", el("i", "an empty answer"), cls="reply"))
    if not turn.calls and turn.answer is None and not turn.thought.strip():
        body.append(_said(turn.text, "thought"))
    body += [_call(draw, call) for call in turn.calls]
    body += [el("p", bounded(problem), cls="problem", dir="auto") for problem in turn.problems]
    body += [el("p", bounded(repair), cls="repair", dir="auto") for repair in turn.repairs]
    if turn.text.strip() not in ("", turn.thought.strip(), (turn.answer or "").strip()):
        raw = el("pre", bounded(turn.text), dir="auto")
        body.append(el("details", el("summary", "As written"), raw, cls="raw"))
    title = _dots([title, *notes])
    # A crop is counted where it was asked for; the trace's `visual_tokens` count it a turn later, where it is encoded.
    tokens = sum(view.tokens for view in draw.trace.views if view.id in {call.result for call in turn.calls})
    cost = _cost(tokens, turn.new_tokens, turn.seconds + turn.act_seconds)
    return _item(str(position), position, title, cost, body)


def _call(draw: _Drawing, call: CallRecord) -> Html:
    view = draw.trace.view(call.result) if call.result else None
    box = el("code", _list(call.box)) if call.box is not None else el("i", "no box")
    frame = {"pixel": "px", "unit": "of 1", "per_mille": "of 1000", "cell": "cells"}[call.frame]
    numbers = [f"{cut(key, 60).replace('_', ' ')} {_number(value)}" for key, value in list(call.numbers.items())[:12]]
    return el(
        "div",
        el(
            "p",
            el("b", cut(call.name, 80)),
            " ",
            box,
            f" {frame} in ",
            el("code", cut(call.view, 80)),
            [" ", el("q", cut(call.label, 200), dir="auto")] if call.label else None,
            el("span", call.decision, cls=f"decision {call.decision}"),
            cls="ask",
        ),
        _said(call.reason, "reason"),
        _facts(numbers),
        draw.crop(view) if view is not None and view.kind == "crop" else None,
        cls="call",
    )


def _footer(trace: Trace) -> Html:
    rows = [
        el("tr", [el("td", cell) for cell in (view.id, view.parent or "", _list(view.box), _shown(view))])
        for view in trace.views[:200]
    ]
    table = el(
        "table",
        el("thead", el("tr", [el("th", name) for name in ("view", "cut from", "box in original px", "as shown")])),
        el("tbody", rows),
    )
    return el(
        "footer",
        _detail("Views", table),
        _detail("Configuration", el("pre", bounded(_json(trace.config)))),
        _detail("Environment", el("pre", bounded(_json(trace.environment)))),
        _detail("Usage", el("pre", bounded(_json(trace.usage)))),
    )


def _shown(view: View) -> str:
    return f"{view.width} x {view.height} px, {view.tokens:,} tokens" if view.kind != "original" else "not shown"


def _json(value: Usage | dict[str, Any]) -> str:
    plain = value.model_dump() if isinstance(value, Usage) else value
    return json.dumps(plain, indent=2, ensure_ascii=False)


def _detail(summary: str, body: str) -> Html:
    return el("details", el("summary", summary), body)
