"""One self-contained HTML page per episode: where the model looked, what it said, and what that cost.

The page is a view of a `Trace`, nothing more: left the original with a numbered box for every crop and a colour for
every turn, right the turns in order. What holds for every page (no text becomes markup, nothing is fetched, the size is
bounded) is in `page.py`; long texts are cut here with a note of what is missing (the trace keeps all of it).
Deliberately not here: scoring. `expected` is shown next to the answer and marked only if the two are the same text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom_agent.geometry import Box
from qzoom_agent.report import page
from qzoom_agent.report.look import coarse_view, findings
from qzoom_agent.report.markup import Html, bounded, cut, el
from qzoom_agent.report.overlay import fractions
from qzoom_agent.trace import CallRecord, Trace, Turn, Usage
from qzoom_agent.views import View

_FOLD = 420


def write_report(trace: Trace, image: page.Pictures, path: Path | str, *, expected: str | None = None) -> Path:
    """Write the page for `trace` to `path` (folders are created) and return it.

    `image` maps a digest to its image (`trace.by_digest`, `trace.saved_images`); `expected` is shown beside the answer.
    TraceError if the file cannot be written.
    """
    return page.write_page(render_html(trace, image, expected=expected), path)


def render_html(trace: Trace, image: page.Pictures, *, expected: str | None = None, linked: bool = False) -> str:
    """The page as a string; see `write_report`. linked: `image` gives `page.ImageLink`s."""
    marks = _marks(trace)
    original = _first(trace, "original")
    columns = el(
        "main",
        _figure(trace, original, image, marks) if original is not None else None,
        _timeline(trace, image),
        cls=None if original is not None else "plain",
    )
    return page.document(
        cut(trace.question, 120) + " - qzoom",
        _header(trace, expected),
        columns,
        _footer(trace),
        rules=page.picture_rules(original, marks) if original is not None else "",
        linked=linked,
    )


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


def _first(trace: Trace, kind: str) -> View | None:
    return next((view for view in trace.views if view.kind == kind), None)


# -- boxes on the original -------------------------------------------------------------------------------------------


def _marks(trace: Trace) -> list[page.BoxMark]:
    original = _first(trace, "original")
    if original is None:
        return []
    numbers, marks = _crop_numbers(trace), []

    def add(kind: str, turn: int | None, label: str, title: str, box: Sequence[float] | None) -> None:
        clipped = fractions(box, original.size)
        if clipped is not None:
            marks.append(page.BoxMark(kind, turn, label, title, clipped))

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
                given = call.decision in ("grown", "snapped")
                cross = "" if given else "\u00d7"
                kind = "asked" if given else "denied"
                add(kind, position, cross, f"Asked in turn {position}, {_decision(call)}", _asked(trace, call))
    return marks


def _decision(call: CallRecord) -> str:
    """What became of a call, and by which rule."""
    return f"{call.decision}: {cut(call.code, 40).replace('_', ' ')}" if call.code else call.decision


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
        page.name("model", trace.model),
        page.name("policy", trace.policy),
        page.name("protocol", trace.protocol),
        page.name("seed", str(trace.seed)),
        page.name("qzoom-agent", release or ""),
    ]
    return el(
        "header",
        page.brand("episode ", cut(trace.id, 80)),
        el("h1", cut(trace.question, 2000), dir="auto"),
        el("dl", el("div", el("dt", "Answer"), el("dd", answer, dir="auto"), cls="answer"), known, cls="verdict"),
        el("p", bounded(trace.error), cls="error", dir="auto") if trace.error else None,
        el("ul", el("li", el("span", trace.status, cls=f"badge {trace.status}")), names, cls="names"),
        _totals(trace),
    )


def _totals(trace: Trace) -> Html:
    usage = trace.usage
    spent = usage.seconds
    zooms = [
        f"{usage.requested} asked" if usage.requested else None,
        f"{usage.snapped} moved" if usage.snapped else None,
        f"{usage.refused} refused{_reasons(usage)}" if usage.refused else None,
        f"{usage.failed} failed" if usage.failed else None,
        f"{usage.inserted} shown unasked" if usage.inserted else None,
    ]
    return el(
        "dl",
        page.total(
            "Visual tokens", f"{usage.visual_tokens:,}", (usage.coarse_tokens, usage.crop_tokens), _whole(trace)
        ),
        page.total("Crops", f"{usage.served + usage.inserted}", (), page.dots(zooms) or "no zoom asked for"),
        page.total("Text tokens", f"{usage.text_tokens:,}", (), f"{usage.written_tokens:,} written by the model"),
        page.total(
            "Time",
            page.seconds(spent.total),
            (spent.perceive, spent.think, spent.act),
            page.dots([f"look {spent.perceive:.2f}", f"think {spent.think:.2f}", f"act {spent.act:.2f}"]),
        ),
        cls="totals",
    )


def _reasons(usage: Usage) -> str:
    """The refusals by rule, as in " (covered 2, gate 1)"."""
    counts = [f"{cut(code, 40).replace('_', ' ')} {count}" for code, count in sorted(usage.refused_by.items())[:8]]
    return f" ({', '.join(counts)})" if counts else ""


def _whole(trace: Trace) -> str:
    """What the visual tokens are made of, what refusals saved, and what the original would have cost at the same pixels
    per token."""
    usage = trace.usage
    saved = f"{usage.saved_tokens:,} saved by refusals" if usage.saved_tokens else None
    parts = page.dots([f"coarse {usage.coarse_tokens:,}", f"crops {usage.crop_tokens:,}", saved])
    full = page.full_tokens(trace.views)
    return parts if full is None else page.dots([parts, f"{page.share(trace.usage.visual_tokens, full)} of full size"])


def _figure(trace: Trace, original: View, image: page.Pictures, marks: Sequence[page.BoxMark]) -> Html:
    kinds = {mark.kind for mark in marks}
    return page.picture(
        image(original.digest),
        original,
        marks,
        alt=f"with the boxes of {len(_crop_numbers(trace))} crops drawn on it",
        heat=trace.perception.heat if trace.perception else [],
        toggles=[
            page.toggle("boxes", "Boxes", True) if kinds & {"served", "asked", "denied"} else None,
            page.toggle("proposals", "Proposals", False) if "proposed" in kinds else None,
            page.toggle("known", "Known place", True) if "gold" in kinds else None,
        ],
        steps="turns",
    )


def _timeline(trace: Trace, image: page.Pictures) -> Html:
    crops = len(_crop_numbers(trace))
    draw = _Drawing(trace, image, page.CROP_BYTES // max(1, crops + 1))
    items = [_first_look(trace, draw)]
    items += [_turn(draw, turn, position) for position, turn in enumerate(trace.turns, start=1)]
    return el("ol", items, cls="turns")


@dataclass(frozen=True)
class _Drawing:
    """What the parts of the timeline need to show a view."""

    trace: Trace
    image: page.Pictures
    limit: int

    def crop(self, view: View) -> Html:
        original, coarse = _first(self.trace, "original"), _first(self.trace, "coarse")
        wide, high = view.box[2] - view.box[0], view.box[3] - view.box[1]
        closer = None
        if coarse is not None and wide > 0 and coarse.width > 0:
            factor = view.width / wide * (coarse.box[2] - coarse.box[0]) / coarse.width
            closer = f"{factor:.1f}x closer than the coarse view"
        part = None
        if original is not None and original.width * original.height > 0:
            part = f"{page.share(wide * high, original.width * original.height)} of the image"
        blind = "withheld: the model saw a grey image" if self.trace.policy == "blind" else None
        facts = [f"{page.listed(view.box)} in original px", part, closer, f"{view.tokens:,} visual tokens", blind]
        title = f"Crop {_crop_numbers(self.trace)[view.id]}"
        alt = f"{title}, {view.width} x {view.height} pixels as shown to the model"
        return page.thumbnail(self.image(view.digest), title, alt, facts, limit=self.limit)


def _first_look(trace: Trace, draw: _Drawing) -> Html | None:
    asked = {call.result for turn in trace.turns for call in turn.calls}
    coarse = [view for view in trace.views if view.kind == "coarse"]
    inserted = [view for view in trace.views if view.kind == "crop" and view.id not in asked]
    if not coarse and not inserted and trace.perception is None:
        return None
    body: list[str | None] = [findings(trace.perception) if trace.perception else None]
    body += [coarse_view(view, draw.image(view.digest), draw.limit) for view in coarse]
    body += [draw.crop(view) for view in inserted]
    seconds = trace.usage.seconds.perceive
    tokens = sum(view.tokens for view in (*coarse, *inserted))
    return page.item("0", None, "First look", page.cost(tokens, 0, seconds), body)


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
    title = page.dots([title, *notes])
    # A crop is counted where it was asked for; the trace's `visual_tokens` count it a turn later, where it is encoded.
    tokens = sum(view.tokens for view in draw.trace.views if view.id in {call.result for call in turn.calls})
    cost = page.cost(tokens, turn.new_tokens, turn.seconds + turn.act_seconds)
    return page.item(str(position), position, title, cost, body)


def _call(draw: _Drawing, call: CallRecord) -> Html:
    view = draw.trace.view(call.result) if call.result else None
    box = el("code", page.listed(call.box)) if call.box is not None else el("i", "no box")
    frame = {"pixel": "px", "unit": "of 1", "per_mille": "of 1000", "cell": "cells"}[call.frame]
    numbers = [
        f"{cut(key, 60).replace('_', ' ')} {page.number(value)}" for key, value in list(call.numbers.items())[:12]
    ]
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
            el("span", _decision(call), cls=f"decision {call.decision}"),
            cls="ask",
        ),
        _said(call.reason, "reason"),
        page.facts(numbers),
        draw.crop(view) if view is not None and view.kind == "crop" else None,
        cls="call",
    )


def _footer(trace: Trace) -> Html:
    rows = [
        el("tr", [el("td", cell) for cell in (view.id, view.parent or "", page.listed(view.box), _shown(view))])
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
