"""Picture of one look: the original, the heat map over it, and the proposed boxes with their numbers.

A heat map has few cells (the coarse view's tokens). Each keeps its edges, here and on the pages, because a smoothed map
would look more precise than it is. Colours are relative: clear at the coldest cell of the map, crimson at its hottest.

Any numbers can be drawn, NaN and infinities included: an infinite cell is cold, a box with one is left out. Nothing is
drawn outside the image, and the image that was given is not changed.
"""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from qzoom_agent.errors import ConfigError
from qzoom_agent.trace import PerceptionRecord, Quad

OPACITY = 0.55
"""Default opacity of the hottest cell's colour over the image."""
MAX_SIDE = 1600
"""Pixels of the longer side of an original as it is drawn, here and on a page."""
_STOPS = ((255, 214, 102, 0), (255, 196, 70, 60), (255, 160, 50, 150), (240, 90, 40, 210), (200, 20, 60, 255))
"""Red, green, blue and opacity at equal steps from the coldest cell to the hottest."""
_INK, _HALO = "#2f6fde", "#ffffff"


def overlay(image: PIL.Image.Image, record: PerceptionRecord, *, opacity: float = OPACITY) -> PIL.Image.Image:
    """Draw the heat map and the proposed boxes of a look over the original.

    Args:
        image: The original.
        record: What the look found.
        opacity: Opacity of the hottest cell, 0 to 1.

    Returns:
        A new RGB image, at most `MAX_SIDE` pixels a side.

    Raises:
        ConfigError: The opacity is outside 0 to 1.
    """
    if not 0 <= opacity <= 1:
        raise ConfigError(f"The opacity of a heat map is a share of 1, got {opacity!r}. Give a number from 0 to 1.")
    picture = image.convert("RGB").copy()
    picture.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    if any(record.heat):
        heat = heat_image(record.heat)
        x1, y1, x2, y2 = heat_place(record, image.size)
        across, down = heat.width / (x2 - x1), heat.height / (y2 - y1)
        shown = (-x1 * across, -y1 * down, (1 - x1) * across, (1 - y1) * down)  # the image, in cells of the map
        heat = heat.transform(picture.size, PIL.Image.Transform.EXTENT, shown, PIL.Image.Resampling.NEAREST)
        strength = heat.getchannel("A").point(lambda value: round(value * opacity))
        picture.paste(heat.convert("RGB"), (0, 0), strength)
    numbered = [(number, fractions(box, image.size)) for number, box in enumerate(record.boxes, start=1)]
    # The best box is number 1 and comes last, so that no other covers it.
    for number, place in reversed(numbered):
        if place is not None:
            _draw(picture, place, str(number))
    return picture


def heat_image(heat: Sequence[Sequence[float]]) -> PIL.Image.Image:
    """Return a heat map (one cell or more) as RGBA, one pixel a cell: clear where cold, amber to crimson where hot."""
    grid = np.nan_to_num(np.asarray(heat, dtype=np.float64), posinf=0.0, neginf=0.0).clip(-1e30, 1e30)
    grid -= grid.min()
    grid /= max(float(grid.max()), 1e-12)
    steps = np.linspace(0, 1, len(_STOPS))
    channels = [np.interp(grid, steps, values) for values in zip(*_STOPS, strict=True)]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def heat_place(record: PerceptionRecord, size: tuple[int, int]) -> Quad:
    """Return the place of a heat map as fractions of the image, whose size is given.

    It reaches outside 0 to 1 where the model was shown the image padded.
    """
    x1, y1, x2, y2 = record.extent or (0.0, 0.0, *size)
    if not (all(map(math.isfinite, (x1, y1, x2, y2))) and x1 < x2 and y1 < y2):
        return 0.0, 0.0, 1.0, 1.0
    return x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]


def fractions(box: Sequence[float] | None, size: tuple[int, int]) -> Quad | None:
    """Return a pixel box as fractions of an image of that size, clipped to it; None if it cannot be drawn."""
    width, height = size
    if box is None or not all(math.isfinite(value) for value in box) or width < 1 or height < 1:
        return None
    x1, x2 = sorted(min(max(0.0, value / width), 1.0) for value in (box[0], box[2]))
    y1, y2 = sorted(min(max(0.0, value / height), 1.0) for value in (box[1], box[3]))
    return x1, y1, x2, y2


def _draw(picture: PIL.Image.Image, place: Quad, label: str) -> None:
    draw = PIL.ImageDraw.Draw(picture)
    width, height = picture.size
    line = max(2, round(max(width, height) / 400))
    left, top = min(round(place[0] * width), width - 1), min(round(place[1] * height), height - 1)
    right, bottom = max(left, round(place[2] * width) - 1), max(top, round(place[3] * height) - 1)
    # Light around the ink, or the outline is lost on a dark image.
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_HALO, width=line + 2)
    draw.rectangle((left, top, right, bottom), outline=_INK, width=line)

    font = PIL.ImageFont.load_default(max(11, round(max(width, height) / 55)))
    x1, y1, x2, y2 = draw.textbbox((0, 0), label, font=font)
    pad = line + 1
    wide, high = round(x2 - x1) + 2 * pad, round(y2 - y1) + 2 * pad
    # On top of the box like a tab of a folder; inside it where the image ends.
    x, y = max(0, min(left, width - wide)), top - high if top >= high else top
    draw.rectangle((x - 1, y - 1, x + wide, y + high), fill=_HALO)
    draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=_INK)
    draw.text((x + pad - x1, y + pad - y1), label, font=font, fill=_HALO)
