"""Receipts, invoices and labels drawn for volume, with the place of every character and the fields as ground truth.

A page comes from one seed: words (`words.py`) are set on a sheet (`sheet.py`, `printer.py`) in one of the `layouts`,
which is then worn and scanned (`scan.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Final, Literal

from nano.layouts.dense import draw_dense
from nano.layouts.invoice import draw_invoice
from nano.layouts.label import draw_label
from nano.layouts.receipt import draw_receipt
from nano.paper import Line, Paper, transcribed
from nano.scan import scanned
from nano.sheet import Sheet

Layout = Literal["receipt", "invoice", "label", "dense"]
SHARES: Final[Mapping[Layout, float]] = {"receipt": 0.6, "invoice": 0.15, "label": 0.1, "dense": 0.15}
"""Share of the pages by layout."""
_DRAW: Final[Mapping[Layout, Callable[[Random], tuple[Sheet, dict[str, str]]]]] = {
    "receipt": draw_receipt,
    "invoice": draw_invoice,
    "label": draw_label,
    "dense": draw_dense,
}


def draw_paper(seed: int, *, layout: Layout | None = None) -> Paper:
    """Draw the page of a seed as a scan, in one of the layouts by their shares or in the one that is given."""
    rng = Random(f"paper/{seed}")
    page = scanned(rng, _print(rng, seed, layout))
    return replace(page, lines=tuple(line for line in page.lines if _whole(line, page.image.size)))


def print_paper(seed: int, *, layout: Layout | None = None) -> Paper:
    """Draw the page of a seed as it comes from the printer, before it is scanned."""
    return _print(Random(f"paper/{seed}"), seed, layout)


def _print(rng: Random, seed: int, layout: Layout | None) -> Paper:
    chosen = layout or Random(f"layout/{seed}").choices(list(SHARES), weights=list(SHARES.values()))[0]
    sheet, fields = _DRAW[chosen](rng)
    bottom = min(sheet.strip.image.height, round(sheet.y))
    image = sheet.strip.image.crop((0, 0, sheet.width, bottom))
    lines = [line for line in sheet.strip.lines if line.text.strip() and line.box[3] < bottom]
    kept = _printed(fields, lines)  # before they are sorted: parts side by side are printed one after the other
    return Paper(image, tuple(in_reading_order(lines)), kept, name=f"drawn/{chosen}/{seed}")


def _whole(line: Line, size: tuple[int, int]) -> bool:
    """Return whether all characters of a line are on the page: a scan that is turned loses its corners."""
    centers = line.centers or ()
    half = 0.3 * line.height
    across = all(half <= x <= size[0] - half for x in centers)
    return across and line.box[1] >= 0 and line.box[3] <= size[1]


def in_reading_order(lines: Sequence[Line]) -> list[Line]:
    """Return lines row by row, each from left to right; a row is what overlaps the middle of its first line."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box[1]):
        if rows and line.box[1] < rows[-1][0].middle:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box[0])]


def _printed(fields: Mapping[str, str], lines: Sequence[Line]) -> dict[str, str]:
    """Return the fields that stand on the page whole: a strip may be too narrow or too short for some."""
    found = transcribed(" ".join(line.text for line in lines)).replace(",", "")
    known = {name: transcribed(value) for name, value in fields.items()}
    return {name: value for name, value in known.items() if value and value.replace(",", "") in found}
