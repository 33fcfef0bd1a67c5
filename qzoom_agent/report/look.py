"""What the coarse pass found, for people: the block about it in a report, and a page of its own for one look.

The page is a `PerceptionRecord` over the image it is about, without an answer: left the original under the heat map
with a numbered box for every proposal, right the gate's score against its threshold, and what each box would show.
Everything is drawn from the record alone, so a look that was saved as JSON makes the same page again.

Invariants: the gate is shown as `PerceptionRecord.fired` decides, in words, sign and bar alike, with as many digits as
it takes to tell score and threshold apart. Boxes beyond `MAX_CROPS` are drawn and counted, not cut out.
Deliberately not here: how a page is built (`page.py`), and pictures without a page (`overlay.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from qzoom_agent.report import page
from qzoom_agent.report.markup import Html, bounded, cut, el
from qzoom_agent.report.overlay import fractions
from qzoom_agent.trace import Images, PerceptionRecord, Quad
from qzoom_agent.views import View

MAX_CROPS = 12


def write_look(
    record: PerceptionRecord, views: Sequence[View], image: Images, question: str, model: str, path: Path | str
) -> Path:
    """Write the page for one look to `path` (folders are created) and return it.

    `views` holds the original and the coarse view, `image` maps a digest to its image (`trace.by_digest`).
    TraceError if the file cannot be written.
    """
    return page.write_page(render_look(record, views, image, question, model), path)


def render_look(record: PerceptionRecord, views: Sequence[View], image: Images, question: str, model: str) -> str:
    """The page as a string; see `write_look`."""
    original = next((view for view in views if view.kind == "original"), None)
    coarse = next((view for view in views if view.kind == "coarse"), None)
    pixels = image(original.digest) if original is not None else None
    marks = _marks(record, original.size) if original is not None else []
    limit = page.CROP_BYTES // (1 + min(len(record.boxes), MAX_CROPS))
    found = [findings(record), coarse_view(coarse, image(coarse.digest), limit) if coarse is not None else None]
    items = [page.item("0", None, "First look", page.cost(record.visual_tokens, 0, record.seconds), found)]
    if pixels is not None:
        items += _proposals(record, pixels, limit)
    columns = el(
        "main",
        _figure(record, original, pixels, marks) if original is not None and pixels is not None else None,
        el("ol", items, cls="turns"),
        cls=None if original is not None else "plain",
    )
    return page.document(
        cut(question, 120) + " - qzoom look",
        _header(record, views, question, model),
        columns,
        rules=page.picture_rules(original, marks) if original is not None else "",
    )


# -- parts that a report shows too -----------------------------------------------------------------------------------


def verdict(record: PerceptionRecord) -> str:
    """What the gate said, in words."""
    if record.fired is None:
        return "no gate was asked" if record.score is None else "no threshold was given"
    return "look closer" if record.fired else "the coarse view suffices"


def compared(record: PerceptionRecord) -> str:
    """The gate's score beside its threshold, such as "0.83 >= 0.50"; "none" without a score."""
    if record.score is None:
        return "none"
    if record.threshold is None:
        return f"{record.score:.2f}"
    sign = ">=" if record.fired else "<"
    for digits in (2, 4):
        score, threshold = f"{record.score:.{digits}f}", f"{record.threshold:.{digits}f}"
        if score != threshold or record.score == record.threshold:
            return f"{score} {sign} {threshold}"
    return f"{record.score!r} {sign} {record.threshold!r}"


def work(record: PerceptionRecord) -> str:
    """The token-layers of the coarse pass, as a whole number."""
    return page.number(round(record.token_layers)) if math.isfinite(record.token_layers) else str(record.token_layers)


def findings(record: PerceptionRecord) -> Html:
    """The gate, where the question goes from here, and what finding that out took."""
    peak = max((value for row in record.heat for value in row if math.isfinite(value)), default=None)
    boxes = len(record.boxes)
    return el(
        "div",
        _gate(record),
        el(
            "p",
            el("span", record.route, cls=f"decision {record.route}"),
            el("span", bounded(record.reason), dir="auto") if record.reason else None,
            cls="route",
        ),
        page.facts(
            [
                f"{boxes:,} proposed {'box' if boxes == 1 else 'boxes'}"
                if any(record.heat) or boxes
                else "no map was made",
                f"hottest cell {peak:.3g}" if peak is not None else None,
                f"cut-off {record.cutoff:.3g}" if record.cutoff is not None else None,
                f"{record.visual_tokens:,} visual of {record.prompt_tokens:,} tokens" if record.prompt_tokens else None,
                f"{work(record)} token-layers" if record.token_layers else None,
            ]
        ),
        cls="findings",
    )


def coarse_view(view: View, image: page.Picture, limit: int) -> Html:
    """The image as the coarse pass saw it."""
    items = [f"{view.width} x {view.height} px as shown", f"{view.tokens:,} visual tokens"]
    alt = f"Coarse view, {view.width} x {view.height} pixels as shown to the model"
    return page.thumbnail(image, "Coarse view", alt, items, limit=limit)


def _gate(record: PerceptionRecord) -> Html | None:
    if record.score is None:
        return None
    scale = max(1.0, record.score) if math.isfinite(record.score) else 1.0
    level = 100 * min(max(record.score / scale, 0.0), 1.0) if math.isfinite(record.score) else 0.0
    mark = None
    if record.threshold is not None and math.isfinite(record.threshold):
        x = 100 * min(max(record.threshold / scale, 0.0), 1.0)
        mark = el("rect", x=f"{x - 0.4:.2f}", width="0.8", height="6", cls="mark")
    meter = el(
        "svg",
        el("rect", width="100", height="6", cls="track"),
        el("rect", width=f"{level:.2f}", height="6", cls="level"),
        mark,
        viewBox="0 0 100 6",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    said = el("span", verdict(record)) if record.fired is not None else None
    return el("p", el("span", "Gate"), meter, el("b", compared(record)), said, cls="gate")


# -- the page --------------------------------------------------------------------------------------------------------


def _header(record: PerceptionRecord, views: Sequence[View], question: str, model: str) -> Html:
    full = page.full_tokens(views)
    whole = f"{page.share(record.visual_tokens, full)} of full size" if full else ""
    boxes = len(record.boxes)
    closer = {"zoom": f"Zoom, {boxes:,} {'place' if boxes == 1 else 'places'}", "direct": "Answer from the coarse view"}
    return el(
        "header",
        page.brand("one look, nothing is answered"),
        el("h1", cut(question, 2000), dir="auto"),
        el("dl", el("div", el("dt", "Decision"), el("dd", closer[record.route]), cls="answer"), cls="verdict"),
        el("ul", page.name("model", model), cls="names"),
        el(
            "dl",
            page.total("Gate", compared(record), (), verdict(record)),
            page.total("Visual tokens", f"{record.visual_tokens:,}", (), whole),
            page.total("Prompt tokens", f"{record.prompt_tokens:,}", (), f"{work(record)} token-layers"),
            page.total("Time", page.seconds(record.seconds), (), ""),
            cls="totals",
        ),
    )


def _marks(record: PerceptionRecord, size: tuple[int, int]) -> list[page.BoxMark]:
    places = [(rank, fractions(box, size)) for rank, box in enumerate(record.boxes, start=1)]
    return [
        page.BoxMark("served", rank, str(rank), f"Proposed box {rank}", place)
        for rank, place in places
        if place is not None
    ]


def _figure(record: PerceptionRecord, original: View, pixels: PIL.Image.Image, marks: Sequence[page.BoxMark]) -> Html:
    return page.picture(
        pixels,
        original,
        marks,
        alt=f"with {len(marks)} proposed boxes drawn on it",
        heat=record.heat,
        heat_on=True,
        toggles=[page.toggle("boxes", "Boxes", True) if marks else None],
        steps="boxes" if marks else None,
    )


def _proposals(record: PerceptionRecord, pixels: PIL.Image.Image, limit: int) -> list[Html]:
    """An entry for each box, with what a zoom into it would show."""
    items = []
    for rank, box in enumerate(record.boxes[:MAX_CROPS], start=1):
        place = fractions(box, pixels.size)
        cells = record.cells[rank - 1] if rank <= len(record.cells) else None
        where = [
            f"{page.listed(box)} in original px",
            f"{page.listed(cells)} in cells" if cells is not None else None,
            f"{page.share((place[2] - place[0]) * (place[3] - place[1]), 1)} of the image" if place else "not drawable",
        ]
        body = page.facts(where)
        if place is not None:
            body = page.thumbnail(_cut_out(pixels, place), "What is there", f"Box {rank}, cut out", where, limit=limit)
        items.append(page.item(str(rank), rank, f"Proposed box {rank}", None, [body]))
    if len(record.boxes) > MAX_CROPS:
        items.append(page.item("more", None, f"{len(record.boxes) - MAX_CROPS:,} more boxes", None, []))
    return items


def _cut_out(pixels: PIL.Image.Image, place: Quad) -> PIL.Image.Image:
    width, height = pixels.size
    left, top = min(int(place[0] * width), width - 1), min(int(place[1] * height), height - 1)
    right, bottom = max(left + 1, math.ceil(place[2] * width)), max(top + 1, math.ceil(place[3] * height))
    return pixels.crop((left, top, min(right, width), min(bottom, height)))
