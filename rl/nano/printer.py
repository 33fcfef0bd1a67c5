"""A printer: puts text on a strip of paper in dots, and keeps where every character went.

Heads with few dots print glyphs of hard edges and doubled width or height; printers of text as a picture print smooth
proportional glyphs. Both are drawn here; what a scanner makes of it is in `scan.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image, ImageDraw

from nano.paper import ALPHABET, Line
from nano.typefaces import Style, advance, extent, face, faces

_KNOWN: Final = frozenset(ALPHABET)


@dataclass(frozen=True)
class Type:
    """The typesetting of a line.

    Attributes:
        path: File of the typeface.
        size: Its size in dots.
        pitch: Width of a character in dots; None: each has its own.
        stretch: Times that width and height are printed.
        smooth: Edges in shades of grey; otherwise a dot is black or white.
    """

    path: Path
    size: int
    pitch: float | None
    stretch: tuple[int, int] = (1, 1)
    smooth: bool = False

    def width(self, text: str) -> float:
        loaded = face(self.path, self.size)
        one = sum(advance(loaded, char) if self.pitch is None else self.pitch for char in text)
        return one * self.stretch[0]

    def scaled(self, across: int, down: int) -> "Type":
        return replace(self, stretch=(across, down))

    def sized(self, times: float) -> "Type":
        """Return the same type so many times as large."""
        return replace(self, size=round(self.size * times), pitch=None if self.pitch is None else self.pitch * times)


def pick_type(rng: Random, *, width: int, columns: tuple[float, float] = (26, 56)) -> Type:
    """Return a type of which so many characters fill a line of `width` dots."""
    pitch = width / rng.uniform(*columns)
    kinds: tuple[Style, ...] = ("mono", "bitmap", "sans")
    kind = rng.choices(kinds, weights=(30, 35, 35))[0]
    path = rng.choice(faces(kind))
    probe = face(path, 40)
    average = sum(advance(probe, char) for char in "ABEORSTN0123458 .") / 17 / 40
    size = max(9, round(pitch / average * rng.uniform(0.9, 1.2)))
    even = abs(advance(probe, "i") - advance(probe, "M")) < 0.5
    tracked = rng.uniform(0.94, 1.12) * advance(face(path, size), "0")
    return Type(
        path, size, tracked if even or rng.random() < 0.05 else None, smooth=kind != "bitmap" and rng.random() < 0.8
    )


class Strip:
    """A strip of paper that is printed from top to bottom."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("L", (width, height), 255)
        self.draw = ImageDraw.Draw(self.image)
        self.lines: list[Line] = []

    def put(self, text: str, type_: Type, *, x: float, y: float) -> Line:
        """Print `text` with the top of its capitals at `y`, and keep it as a line."""
        loaded = face(type_.path, type_.size)
        top, bottom = extent(loaded)
        across, down = type_.stretch
        self.draw.fontmode = "L" if type_.smooth else "1"
        room = (round(type_.width(text) / across) + type_.size + 2, bottom - top + 6)
        target, draw = self.image, self.draw
        if type_.stretch != (1, 1):
            target = Image.new("L", room, 255)
            draw = ImageDraw.Draw(target)
            draw.fontmode = self.draw.fontmode
        left, edge = (x, y - top) if target is self.image else (1.0, 3.0 - top)
        at, spots = left, []
        for char in text:
            own = advance(loaded, char)
            slot = own if type_.pitch is None else type_.pitch
            draw.text((round(at + (slot - own) / 2), round(edge)), char, font=loaded, fill=0)
            spots.append(at + slot / 2)
            at += slot
        if target is not self.image:
            big = target.resize((target.width * across, target.height * down), Image.Resampling.NEAREST)
            corner = (round(x - across), round(y - 3 * down))
            self.image.paste(0, corner, mask=big.point(lambda value: 255 - value))
            spots = [x + (spot - 1.0) * across for spot in spots]
        return self._keep(text, spots, (x, y - 1, x + type_.width(text), y + (bottom - top) * down))

    def _keep(self, text: str, spots: Sequence[float], box: tuple[float, float, float, float]) -> Line:
        kept = [(char, spot) for char, spot in zip(text.upper(), spots, strict=True) if char in _KNOWN]
        line = Line(box, "".join(char for char, _ in kept), tuple(spot for _, spot in kept))
        self.lines.append(line)
        return line

    def rule(self, y: float, rng: Random, type_: Type) -> None:
        """Print a line across: solid, double, or of characters that nobody transcribes."""
        width = self.image.width
        left, right = round(width * rng.uniform(0.0, 0.06)), round(width * rng.uniform(0.94, 1.0))
        kind = rng.random()
        if kind < 0.4:
            for x in range(left, right, 6 + type_.size // 2):
                self.draw.line((x, y, x + 3 + type_.size // 3, y), fill=0, width=rng.choice((1, 2)))
        else:
            self.draw.line((left, y, right, y), fill=0, width=rng.choice((1, 2)))
            if kind > 0.8:
                self.draw.line((left, y + 4, right, y + 4), fill=0, width=1)
