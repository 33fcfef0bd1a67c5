"""Findings of the coarse pass for people: the block about them in a report, and a page of its own for one look.

The page shows a `PerceptionRecord` over the image it is about, without an answer: left the original under the heat map
with a numbered box for every proposal, right the gate's score against its threshold, and what each box would show.
Everything is drawn from the record alone, so a look that was saved as JSON makes the same page again.

The gate is shown as `PerceptionRecord.fired` decides, in words, sign and bar alike, with as many digits as it takes to
tell score and threshold apart. Boxes beyond `MAX_CROPS` are drawn and counted, not cut out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from qzoom_agent.geometry import Box
from qzoom_agent.images import cut
from qzoom_agent.report import page
from qzoom_agent.report.overlay import fractions
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.views import View, ViewStore

MAX_CROPS = 12


def write_look(record: PerceptionRecord, store: ViewStore, question: str, model: str, path: Path | str) -> Path:
    """Write the page for one look at the original and the coarse view in `store`; see `write_report`."""
    return page.write_page(render_look(record, store, question, model), path)


def render_look(record: PerceptionRecord, store: ViewStore, question: str, model: str) -> str:
    """Return the page as a string; see `write_look`."""
    original, pixels, coarse = store.view("original"), store.image("original"), next(iter(store.coarse), None)
    limit = page.CROP_BYTES // (1 + min(len(record.boxes), MAX_CROPS))
    stage = page.stage(original, pixels, _marks(record, original.size), record)
    return page.document(
        "look.html.jinja",
        rules=stage.rules,
        question=question,
        model=model,
        found=findings(record),
        full=page.full_tokens(store.views),
        coarse=coarse_view(coarse, store.image(coarse.id), limit) if coarse is not None else None,
        stage=stage,
        proposals=[_proposal(record, rank, pixels, limit) for rank in range(1, len(record.boxes[:MAX_CROPS]) + 1)],
    )


# -- parts that a report shows too -----------------------------------------------------------------------------------


def verdict(record: PerceptionRecord, *, further: bool = False) -> str:
    """Return the decision of the gate in words; `further`: of a further look."""
    if record.fired is None:
        return "no gate was asked" if record.score is None else "no threshold was given"
    if further:
        return "look again" if record.fired else "the views so far suffice"
    return "look closer" if record.fired else "the coarse view suffices"


def compared(record: PerceptionRecord) -> str:
    """Return the gate's score beside its threshold, such as "0.83 >= 0.50"; "none" without a score."""
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
    """Return the token-layers of the coarse pass, of all images, as a whole number."""
    spent = sum(one.token_layers for one in record.every)
    return page.number(round(spent)) if math.isfinite(spent) else str(spent)


def findings(record: PerceptionRecord, *, further: bool = False) -> dict[str, Any]:
    """Return the result of a look in words and numbers, as the macro `findings` shows it; `further`: of a further look.

    Of several images, boxes and costs are those of all, and the highest cell and cut-off are shown. The score (`level`)
    and the threshold (`mark`) are in percent of the gate's bar.
    """
    every = record.every
    heat = [value for one in every for row in one.heat for value in row]
    peak = max(filter(math.isfinite, heat), default=None)
    cutoff = max((one.cutoff for one in every if one.cutoff is not None), default=None)
    boxes = sum(len(one.boxes) for one in every)
    visual, prompt = sum(one.visual_tokens for one in every), sum(one.prompt_tokens for one in every)
    scale = max(1.0, record.score or 0.0) if math.isfinite(record.score or 0.0) else 1.0
    return {
        "record": record,
        "compared": compared(record),
        "verdict": verdict(record, further=further),
        "work": work(record),
        "level": _percent(record.score, scale) or 0.0,
        "mark": _percent(record.threshold, scale),
        "facts": [
            *(f"gate of image {one.image + 1} {compared(one)}" for one in record.others if one.score is not None),
            f"perceived by {page.cut(record.perceiver, 80)}" if record.perceiver else None,
            f"{boxes:,} proposed {'box' if boxes == 1 else 'boxes'}" if heat or boxes else "no map was made",
            f"hottest cell {peak:.3g}" if peak is not None else None,
            f"cut-off {cutoff:.3g}" if cutoff is not None else None,
            f"{visual:,} visual of {prompt:,} tokens" if prompt else None,
            f"{work(record)} token-layers" if any(one.token_layers for one in every) else None,
        ],
    }


def coarse_view(view: View, image: page.Picture, limit: int, *, several: bool = False) -> page.Thumbnail:
    """Return the image as the coarse pass saw it."""
    facts = [f"{view.width} x {view.height} px as shown", f"{view.tokens:,} visual tokens"]
    title = f"Coarse view of image {view.image + 1}" if several else "Coarse view"
    alt = f"{title}, {view.width} x {view.height} pixels as shown to the model"
    return page.thumbnail(image, title, alt, facts, limit=limit)


def _percent(value: float | None, scale: float) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return 100 * min(max(value / scale, 0.0), 1.0)


# -- the page --------------------------------------------------------------------------------------------------------


def _marks(record: PerceptionRecord, size: tuple[int, int]) -> list[page.BoxMark]:
    places = [(rank, fractions(box, size)) for rank, box in enumerate(record.boxes, start=1)]
    return [
        page.BoxMark("served", rank, str(rank), f"Proposed box {rank}", place)
        for rank, place in places
        if place is not None
    ]


def _proposal(
    record: PerceptionRecord, rank: int, pixels: PIL.Image.Image, limit: int
) -> tuple[Sequence[str | None], page.Thumbnail | None]:
    """Return facts about a box, and what a zoom into it would show."""
    box = record.boxes[rank - 1]
    place = fractions(box, pixels.size)
    where = [
        f"{page.listed(box)} in original px",
        f"{page.listed(record.cells[rank - 1])} in cells" if rank <= len(record.cells) else None,
        f"{page.share((place[2] - place[0]) * (place[3] - place[1]), 1)} of the image" if place else "not drawable",
    ]
    if place is None:
        return where, None
    shown = cut(pixels, Box(*box).ordered().clamp(pixels.size).rounded())
    return where, page.thumbnail(shown, "What is there", f"Box {rank}, cut out", where, limit=limit)
