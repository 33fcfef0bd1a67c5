"""One self-contained HTML page per episode: where the model looked, what it wrote, and what that cost.

The page shows a `Trace` and nothing else: left the original with a numbered box for every crop and a colour for every
turn, right the turns in order. Long texts are cut with a note of what is missing; the trace keeps all of it. Nothing is
scored: `expected` is shown beside the answer, and ticked only if the two are the same text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qzoom_agent.geometry import Box
from qzoom_agent.report import page
from qzoom_agent.report.look import coarse_view, findings
from qzoom_agent.report.overlay import fractions
from qzoom_agent.trace import CallRecord, Quad, QuestionRecord, Trace, Turn, Usage
from qzoom_agent.views import View


def write_report(trace: Trace, image: page.Pictures, path: Path | str, *, expected: str | None = None) -> Path:
    """Write the page for a trace and return its path.

    Args:
        trace: The episode.
        image: Maps a digest to its image (`trace.by_digest`, `trace.saved_images`).
        path: File to write; folders are created.
        expected: The right answer, shown beside the model's.

    Raises:
        TraceError: The file cannot be written.
    """
    return page.write_page(render_html(trace, image, expected=expected), path)


def render_html(trace: Trace, image: page.Pictures, *, expected: str | None = None, linked: bool = False) -> str:
    """Return the page as a string; see `write_report`. With `linked`, `image` gives `page.ImageLink`s."""
    originals = [view for view in trace.all_views if view.kind == "original"]
    views = {view.id: view for view in trace.all_views if view.kind in ("crop", "tool")}
    limit = page.CROP_BYTES // max(1, len(views) + 1)
    numbers = {id: number for number, id in enumerate((id for id in views if views[id].kind == "crop"), start=1)}
    crops = {
        id: _crop(trace, view, numbers[id], image, limit) if id in numbers else _made(trace, view, image, limit)
        for id, view in views.items()
    }
    stages, marked = list[page.Stage](), 0
    for original in originals:
        look = trace.perception.of(original.image) if trace.perception else None
        marks = _marks(trace, original)
        stages.append(page.stage(original, image(original.digest), marks, look, first_mark=marked))
        marked += len(marks)
    return page.document(
        "episode.html.jinja",
        rules="".join(stage.rules for stage in stages),
        linked=linked,
        trace=trace,
        expected=expected,
        tokens=_tokens(trace),
        zooms=_zooms(trace.total),
        stages=stages,
        crops=crops,
        questions=[_part(one, image, crops, limit, several=len(originals) > 1) for one in trace.questions],
        decision=_decision,
        numbers=lambda call: [
            f"{page.cut(key, 60).replace('_', ' ')} {page.number(value)}"
            for key, value in list(call.numbers.items())[:12]
        ],
        details=[
            ("Configuration", _json(trace.config)),
            ("Environment", _json(trace.environment)),
            ("Usage", _json(trace.total.model_dump())),
        ],
    )


def _part(
    record: QuestionRecord, image: page.Pictures, crops: Mapping[str, page.Thumbnail], limit: int, *, several: bool
) -> dict[str, Any]:
    """Return one question of a trace, as the template shows it."""
    results = {call.result for turn in record.turns for call in turn.calls}
    shown = {view.id: view for view in record.views if view.tokens}
    first = [view for id, view in shown.items() if id not in results]
    return {
        "record": record,
        "found": [findings(look, further=at > 0) for at, look in enumerate(record.looks)],
        "first": [
            crops.get(view.id) or coarse_view(view, image(view.digest), limit, several=several) for view in first
        ],
        "first_tokens": sum(view.tokens for view in first),
        # A crop is counted where it was asked for; `visual_tokens` count it a turn later, where it is encoded.
        "turns": [
            (
                turn,
                _title(turn, record),
                sum(shown[id].tokens for id in {call.result for call in turn.calls} if id in shown),
            )
            for turn in record.turns
        ],
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


# -- boxes on the original -------------------------------------------------------------------------------------------


def _marks(trace: Trace, original: View) -> list[page.BoxMark]:
    every = [view for view in trace.all_views if view.kind == "crop"]
    turns, image = trace.all_turns, original.image
    numbers = {view.id: number for number, view in enumerate(every, start=1) if view.image == image}
    marks = []

    def add(kind: str, turn: int | str | None, label: str, title: str, box: Sequence[float] | None) -> None:
        clipped = fractions(box, original.size)
        if clipped is not None:
            marks.append(page.BoxMark(kind, turn, label, title, clipped))

    for one in trace.questions:
        for box, number in zip(one.gold, one.gold_images or [0] * len(one.gold), strict=False):
            if number == image:
                add("gold", None, "", "Known place of the answer", box)
    results = {call.result for turn in turns for call in turn.calls}
    for at, one in enumerate(trace.questions, start=1):
        part = f"look-{at}" if at > 1 else 0  # its id on the page
        for look in (found for look in one.looks if (found := look.of(image))):
            for rank, box in enumerate(look.boxes, start=1):
                add("proposed", part, "", f"Proposed box {rank}", box)
        for view in one.views:
            if view.id in numbers and view.id not in results:
                label = str(numbers[view.id])
                add("served", part, label, f"Crop {label}, shown by the policy", view.box)
    for position, turn in enumerate(turns, start=1):
        for call in turn.calls:
            crop = trace.view(call.result) if call.result else None
            if crop is not None and crop.id in numbers:
                label = str(numbers[crop.id])
                add("served", position, label, f"Crop {label}, turn {position}", crop.box)
            asked = trace.view(call.view)
            if call.decision != "served" and (asked.image if asked else 0) == image:
                given = call.decision in ("grown", "snapped")
                cross = "" if given else "\u00d7"
                kind = "asked" if given else "denied"
                add(kind, position, cross, f"Asked in turn {position}, {_decision(call)}", _asked(trace, call))
    # Of crops of one place the last is on top, so it has the numbers of all.
    same: dict[Quad, list[str]] = {}
    for at, mark in enumerate(marks):
        if mark.kind == "served":
            same.setdefault(mark.box, []).append(mark.label)
            marks[at] = mark._replace(label=", ".join(sorted(same[mark.box], key=int)))
    return marks


def _decision(call: CallRecord) -> str:
    """Return the outcome of a call, and the rule or the person that decided it."""
    person = (
        {"approve": "approved", "move": "moved", "refuse": "refused"}[call.approval.action] if call.approval else ""
    )
    if call.approval and call.code in ("", "person"):
        return f"{person} by a person"
    said = f"{call.decision}: {page.cut(call.code, 40).replace('_', ' ')}" if call.code else call.decision
    return f"{said}, {person} by a person" if person else said


def _asked(trace: Trace, call: CallRecord) -> list[float] | None:
    """Return the box of a call in original pixels; None if it has none that can be drawn."""
    view = trace.view(call.view)
    if view is None or not view.placed or call.box is None or not all(abs(value) < 1e7 for value in call.box):
        return None
    if call.frame == "cell" and not 0 < view.tokens <= view.width * view.height:
        return None
    return view.to_original(Box(*call.box, frame=call.frame, view=call.view).ordered()).as_list()


def _crop(trace: Trace, view: View, number: int, image: page.Pictures, limit: int) -> page.Thumbnail:
    own = [one for one in trace.all_views if one.image == view.image]
    original = next((one for one in own if one.kind == "original"), None)
    coarse = next((one for one in own if one.kind == "coarse"), None)
    wide, high = view.box[2] - view.box[0], view.box[3] - view.box[1]
    closer = part = None
    a, _, _, d, *_ = view.matrix or (1, 0, 0, 0)
    row = view.extent.width * math.hypot(a, d)  # its length in pixels of the original, also where a tool turned it
    if coarse is not None and row > 0:
        factor = view.width / row * (coarse.box[2] - coarse.box[0]) / coarse.width
        closer = f"{factor:.1f}x closer than the coarse view"
    if original is not None and original.width * original.height > 0:
        part = f"{page.share(wide * high, original.width * original.height)} of the image"
    blind = "withheld: the model saw a grey image" if trace.policy in ("blind", "masked") else None
    of = "" if view.kept is None else f" of {sum(map(len, view.kept)):,}, those on the foreground of the map"
    name = f"image {view.image + 1}" if view.image else "original"
    facts = [f"{page.listed(view.box)} in {name} px", part, closer, f"{view.tokens:,} visual tokens{of}", blind]
    alt = f"Crop {number}, {view.width} x {view.height} pixels {'withheld from' if blind else 'as shown to'} the model"
    # A row of print is legible only as wide as the page allows.
    return page.thumbnail(image(view.digest), f"Crop {number}", alt, facts, limit=limit, across=wide > 3 * high)


def _made(trace: Trace, view: View, image: page.Pictures, limit: int) -> page.Thumbnail:
    """Return the picture of an image that a tool made."""
    tools = [call.name for turn in trace.all_turns for call in turn.calls if call.result == view.id]
    title = f"Image {page.cut(view.id, 40)} of {page.cut(tools[0], 80)}" if tools else f"Image {page.cut(view.id, 40)}"
    place = None if view.placed else "no part of the original"
    alt = f"{title}, {view.width} x {view.height} pixels as shown to the model"
    return page.thumbnail(image(view.digest), title, alt, [place, f"{view.tokens:,} visual tokens"], limit=limit)


# -- totals and titles -----------------------------------------------------------------------------------------------


def _zooms(usage: Usage) -> str:
    rules = [f"{page.cut(code, 40).replace('_', ' ')} {count}" for code, count in sorted(usage.refused_by.items())[:8]]
    why = f" ({', '.join(rules)})" if rules else ""
    counts = [
        f"{usage.requested} asked" if usage.requested else None,
        f"{usage.snapped} moved" if usage.snapped else None,
        f"{usage.refused} refused{why}" if usage.refused else None,
        f"{usage.failed} failed" if usage.failed else None,
        f"{usage.inserted} shown unasked" if usage.inserted else None,
        f"{usage.tool_calls} calls of other tools" if usage.tool_calls else None,
    ]
    return page.dots(counts) or "no zoom asked for"


def _tokens(trace: Trace) -> str:
    """Return the parts of the visual tokens, the tokens refusals saved, and the share of the original's cost."""
    usage, full = trace.total, page.full_tokens(trace.all_views)
    saved = f"{usage.saved_tokens:,} saved by refusals" if usage.saved_tokens else None
    whole = f"{page.share(usage.visual_tokens, full)} of full size" if full is not None else None
    made = f"tools {usage.tool_tokens:,}" if usage.tool_tokens else None
    return page.dots([f"coarse {usage.coarse_tokens:,}", f"crops {usage.crop_tokens:,}", made, saved, whole])


def _title(turn: Turn, record: QuestionRecord) -> str:
    if turn.calls:
        named = list(
            dict.fromkeys("Zoom" if call.arguments is None else page.cut(call.name, 40) for call in turn.calls)
        )
        served = any(call.serves for call in turn.calls)
        title = ", ".join([*named, *([] if served else ["not served"])])
    else:
        title = "Answer" if turn.answer is not None else "Unreadable" if turn.problems else "Text"
    answered = [one for one in record.turns if one.answer is not None]
    sure = None if turn.confidence is None else f"least likely token {turn.confidence:.2f}"
    if answered and turn is answered[-1] and record.confidence is not None:  # the calibrated one, as answer.confidence
        sure = f"confidence {record.confidence:.2f}"
    forced = "last turn, without tools" if turn.forced else None
    return page.dots([title, sure, forced, "cut off" if turn.finish == "length" else None])
