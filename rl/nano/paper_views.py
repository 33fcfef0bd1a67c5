"""Views of paper as the model gets them, with what there is to read along each line of print.

A view is a part of a page at some size in whole visual tokens: one line, a few rows, or the whole page. What is read is
asked for along lines (`frames.py`).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Final

from PIL import Image

from nano.frames import ACROSS, CELL, DOWN, FRAME_HEIGHT, FRAME_WIDTH, Reading
from nano.paper import Line, Paper, Rect, classes_of
from nano.scan import aged
from nano.trees import Look

LEAST_HEIGHT: Final = 13.0
"""Height of a line in a view, in pixels, below which nothing is asked of it."""
LEAST_ADVANCE: Final = 6.0
"""The same for the average width of a character."""
_MARGIN: Final = 0.15
"""Part of a line's height that is read beyond its ends."""


def view_of(paper: Paper, box: Rect, columns: int, rows: int, *, rng: Random | None = None) -> Look:
    """Show a part of a page in `columns` x `rows` visual tokens.

    Args:
        paper: The page.
        box: The part of it, in its pixels; beyond its edges it is continued in its own paper's tone.
        columns: Width in visual tokens.
        rows: Height in visual tokens.
        rng: Ages the view (`scan.aged`); None leaves it as it is.
    """
    size = (columns * CELL, rows * CELL)
    image = _cut(paper.image, box).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if rng is not None:
        image = aged(rng, image)
    return Look(image.convert("RGB"), readings=readings_of(paper, box, columns, rows))


def readings_of(paper: Paper, box: Rect, columns: int, rows: int) -> tuple[Reading, ...]:
    """Return what can be read in a part of a page that is shown in `columns` x `rows` visual tokens."""
    scale = (columns * CELL / (box[2] - box[0]), rows * CELL / (box[3] - box[1]))
    found = [_reading(line, box, scale, (columns * ACROSS, rows * DOWN)) for line in paper.lines]
    return tuple(one for one in found if one is not None)


def _cut(image: Image.Image, box: Rect) -> Image.Image:
    left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop((left, top, right, bottom))
    at = (min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1))
    canvas = Image.new(image.mode, (right - left, bottom - top), image.getpixel(at))
    canvas.paste(image, (-left, -top))
    return canvas


def _reading(line: Line, box: Rect, scale: tuple[float, float], frames: tuple[int, int]) -> Reading | None:
    """Return what is read of a line in a view, or None where it is too small, too close or not wholly in it."""
    left, right = (line.box[0] - box[0]) * scale[0], (line.box[2] - box[0]) * scale[0]
    top, bottom = (line.box[1] - box[1]) * scale[1], (line.box[3] - box[1]) * scale[1]
    height = bottom - top
    if height < LEAST_HEIGHT or right <= 0 or left >= frames[0] * FRAME_WIDTH:
        return None
    middle = (top + bottom) / 2
    if middle - 0.35 * height < 0 or middle + 0.35 * height > frames[1] * FRAME_HEIGHT:
        return None
    if (right - left) / max(1, len(line.text)) < LEAST_ADVANCE:
        return None
    slack = _MARGIN * height
    first = max(0, int((left - slack) // FRAME_WIDTH))
    last = min(frames[0] - 1, int((right + slack) // FRAME_WIDTH))
    y = min(max(middle / FRAME_HEIGHT - 0.5, 0.0), frames[1] - 1.0)
    classes, places = classes_of(line.text), None
    if line.centers is not None:
        spots = [int(((x - box[0]) * scale[0]) // FRAME_WIDTH) for x in line.centers]
        inside = [at for at, spot in enumerate(spots) if 0 <= spot < frames[0]]
        classes, spots = [classes[at] for at in inside], [spots[at] - first for at in inside]
        if not spots or len(set(spots)) < len(spots):
            return None
        places = tuple(spots)
    elif left < -0.2 * height or right > frames[0] * FRAME_WIDTH + 0.2 * height:
        return None
    count = last - first + 1
    twice = sum(one == other for one, other in pairwise(classes))
    if not classes or count < len(classes) + twice:
        return None
    return Reading(y, first, count, tuple(classes), places)


def line_view(paper: Paper, line: Line, *, height: float = 40.0, rng: Random | None = None) -> Look:
    """Show one line of a page alone, `height` pixels high; with `rng`, loosely cut and aged."""
    margin = (0.25, 0.25, 0.6, 0.6) if rng is None else tuple(rng.uniform(0.02, 0.9) for _ in range(4))
    left, top, right, bottom = line.box
    tall = bottom - top
    top, bottom = top - margin[0] * tall, bottom + margin[1] * tall
    left, right = left - margin[2] * tall, right + margin[3] * tall
    scale = height / tall
    columns = max(2, math.ceil((right - left) * scale / CELL))
    rows = max(2, round((bottom - top) * scale / CELL))
    spare = columns * CELL / scale - (right - left)
    alone = Paper(paper.image, (line,), name=paper.name)
    return view_of(alone, (left - spare / 2, top, right + spare / 2, bottom), columns, rows, rng=rng)


def crop_view(
    rng: Random, paper: Paper, *, tokens: tuple[int, int], heights: tuple[float, float], places: int = 3
) -> Look:
    """Show a part of a page around one of its lines, aged.

    Args:
        rng: Where, how large and how aged.
        paper: The page; it has lines.
        tokens: Fewest and most visual tokens.
        heights: Least and greatest height of that line in the view, in pixels.
        places: Places to choose from: the one with most to read is shown.
    """
    line = rng.choice(paper.lines)
    shown = math.exp(rng.uniform(math.log(heights[0]), math.log(heights[1])))
    scale = shown / max(line.height, 4.0)
    most = rng.randint(*tokens)
    widest = paper.image.width * scale / CELL
    columns = max(3, min(round(widest), rng.choice((rng.randint(5, 34), 34)), most // 2))
    rows = max(2, min(most // columns, round(paper.image.height * scale / CELL)))
    squeeze = math.exp(rng.gauss(0, 0.05))
    width, height = columns * CELL / scale * squeeze, rows * CELL / scale
    boxes = []
    for about in (line, *(rng.choice(paper.lines) for _ in range(places - 1))):
        x = _place(rng, (about.box[0] + about.box[2]) / 2, width, float(paper.image.width))
        y = _place(rng, (about.box[1] + about.box[3]) / 2, height, float(paper.image.height))
        boxes.append((x, y, x + width, y + height))
    best = max(boxes, key=lambda box: _characters(readings_of(paper, box, columns, rows)))
    return view_of(paper, best, columns, rows, rng=rng)


def _place(rng: Random, about: float, length: float, room: float) -> float:
    """Return where a stretch begins that holds a place and, if it can, stays on the page."""
    start = about - length * rng.uniform(0.15, 0.85)
    return min(max(start, 0.0), room - length) if length <= room else (room - length) * rng.random()


def _characters(readings: Sequence[Reading]) -> int:
    return sum(len(one.classes) for one in readings)


def page_view(paper: Paper, *, tokens: int, rng: Random | None = None) -> Look:
    """Show a whole page in at most so many visual tokens, at most at twice its size."""
    width, height = paper.image.size
    scale = min(2.0, CELL * math.sqrt(tokens / (width * height)))
    columns, rows = max(1, int(width * scale / CELL)), max(1, int(height * scale / CELL))
    return view_of(paper, (0.0, 0.0, float(width), float(height)), columns, rows, rng=rng)


def characters(views: Sequence[Look]) -> int:
    """Return how many characters are read in these views."""
    return sum(_characters(view.readings or ()) for view in views)
