"""Other layouts of real receipts: rows taken out, gaps widened, another shape, the head of one above another's foot.

There are few real receipts, and a coarse view shows little but their layout, which is soon known by heart. A row that a
field stands in, or that names a total or a date, stays, so that every answer stays right.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nano.paper import Line, Paper
from qzoom_agent.evaluation.tasks.receipts import place_of

_NAMED: Final = re.compile(r"TOTAL|DATE|AMOUNT|CASH|CHANGE|ROUND|GST|TAX|TUNAI|JUMLAH|DUE|PAID")
"""Rows that say what is asked for, or look alike."""
_TOTAL: Final = "TOTAL"
_HEAD: Final = ("company", "address")
_FEW: Final = 3
"""Fewest rows of a head or a foot."""
_WIDER: Final = 1.6
"""Most that the scan of one may be wider than that of the other."""


class _Band(NamedTuple):
    """Rows of pixels between two gaps in the print, and the lines on them."""

    top: int
    bottom: int
    lines: list[Line]


def relaid(rng: Random, page: Paper, other: Paper | None = None) -> Paper:
    """Return a page in another layout; with `other`, its lower half may be that of another receipt."""
    if other is not None:
        page = _joined(rng, page, other)
    fields = _places(page)
    bands, share = _bands(page), rng.uniform(0.0, 0.7)
    kept = [band for band in bands if _stays(band, fields) or rng.random() >= share]
    height = float(np.median([line.height for line in page.lines])) if page.lines else 1.0
    gaps = [round(rng.uniform(0.3, 3.0) * height) if rng.random() < 0.15 else 0 for _ in kept]
    return _stretched(rng, _stacked(page, kept, gaps))


def _joined(rng: Random, head: Paper, foot: Paper) -> Paper:
    """Return the head of one receipt above the foot of another; the head itself where no place to cut them fits.

    The head keeps company and address, the foot the total; the date is that of the head, if it has one.
    """
    above, below = _bands(head), _bands(foot)
    tops, bottoms = _places(head), _places(foot)
    first = max((tops[name][3] for name in _HEAD if name in tops), default=0.0)
    last = min((line.box[1] for line in head.lines if _TOTAL in line.text), default=float(head.image.height))
    ends = [at for at, band in enumerate(above, 1) if at >= _FEW and first <= band.bottom <= last]
    latest = bottoms["total"][1] if "total" in bottoms else 0.0
    starts = [at for at, band in enumerate(below) if band.top <= latest and len(below) - at >= _FEW]
    wider = head.image.width / foot.image.width
    if not ends or not starts or not 1 / _WIDER < wider < _WIDER:
        return head
    one, two = above[: rng.choice(ends)], below[rng.choice(starts) :]
    upper = _stacked(head, one, [0] * len(one))
    lower = _scaled(_stacked(foot, two, [0] * len(two)), wider, wider)
    wide = [np.asarray(part.image.convert("RGB")) for part in (upper, lower)]
    columns = min(part.shape[1] for part in wide)
    image = Image.fromarray(np.concatenate([part[:, :columns] for part in wide]))
    lines = (*upper.lines, *(_shifted(line, upper.image.height) for line in lower.lines))
    # an item in the head may cost what its total was
    own = {name: value for name, value in head.fields.items() if name != "total"}
    fields = {name: value for name, value in own.items() if name in _HEAD or _stands(upper, name, value)}
    fields |= {
        name: value
        for name, value in foot.fields.items()
        if name not in (*_HEAD, *fields) and _stands(lower, name, value)
    }
    return Paper(image, lines, fields, name=head.name)


def _stands(page: Paper, name: str, value: str) -> bool:
    return place_of(page.lines, name, value) is not None


def _places(page: Paper) -> Mapping[str, tuple[float, float, float, float]]:
    found = {name: place_of(page.lines, name, value) for name, value in page.fields.items() if value}
    return {name: box for name, box in found.items() if box is not None}


def _stays(band: _Band, fields: Mapping[str, tuple[float, float, float, float]]) -> bool:
    held = any(box[1] < band.bottom and box[3] > band.top for box in fields.values())
    return held or any(_NAMED.search(line.text) for line in band.lines)


def _bands(page: Paper) -> list[_Band]:
    """Return the rows of a page, cut in the middle of each gap in its print."""
    cuts, reached = [0], 0.0
    for line in sorted(page.lines, key=lambda line: line.box[1]):
        if reached and line.box[1] > reached:
            cuts.append(round((reached + line.box[1]) / 2))
        reached = max(reached, line.box[3])
    cuts.append(page.image.height)
    return [
        _Band(top, bottom, [line for line in page.lines if top <= line.middle < bottom])
        for top, bottom in pairwise(cuts)
        if bottom > top
    ]


def _stacked(page: Paper, bands: Sequence[_Band], gaps: Sequence[int]) -> Paper:
    """Return the bands of a page below one another, each above so many empty rows."""
    pixels = np.asarray(page.image)
    sheet = np.median(pixels, axis=(0, 1))
    parts: list[NDArray[np.uint8]] = []
    lines: list[Line] = []
    at = 0
    for band, gap in zip(bands, gaps, strict=True):
        empty = np.broadcast_to(sheet, (gap, *pixels.shape[1:])).astype(np.uint8)
        parts += [pixels[band.top : band.bottom], empty]
        lines += [_shifted(line, at - band.top) for line in band.lines]
        at += band.bottom - band.top + gap
    return replace(page, image=Image.fromarray(np.concatenate(parts)), lines=tuple(lines)) if parts else page


def _stretched(rng: Random, page: Paper) -> Paper:
    """Return a page in another shape, with other margins."""
    page = _scaled(page, *(math.exp(rng.uniform(-0.15, 0.15)) for _ in range(2)))
    if rng.random() < 0.5:
        return page
    (width, height), tone = page.image.size, page.image.resize((1, 1)).getpixel((0, 0))
    left, top, right, bottom = (round(rng.uniform(0.0, 0.1) * width) for _ in range(4))
    sheet = Image.new(page.image.mode, (width + left + right, height + top + bottom), tone)
    sheet.paste(page.image, (left, top))
    return replace(page, image=sheet, lines=tuple(_shifted(line, top, left) for line in page.lines))


def _scaled(page: Paper, wide: float, high: float) -> Paper:
    size = (max(1, round(page.image.width * wide)), max(1, round(page.image.height * high)))
    lines = []
    for line in page.lines:
        left, top, right, bottom = line.box
        centers = None if line.centers is None else tuple(x * wide for x in line.centers)
        lines.append(Line((left * wide, top * high, right * wide, bottom * high), line.text, centers))
    return replace(page, image=page.image.resize(size, Image.Resampling.BILINEAR), lines=tuple(lines))


def _shifted(line: Line, down: float, right: float = 0.0) -> Line:
    x1, y1, x2, y2 = line.box
    centers = None if line.centers is None else tuple(x + right for x in line.centers)
    return Line((x1 + right, y1 + down, x2 + right, y2 + down), line.text, centers)
