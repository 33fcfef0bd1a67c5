"""Pages of PDFs with a text layer as paper: every line of print with its box, its text and where each character stands.

Only lines that can be told are kept: horizontal, of characters that nano knows, with ink where the text layer says.
"""

import ctypes
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median
from typing import Any, Final

import numpy as np
from PIL import Image

from nano.paper import ALPHABET, Line, Paper
from qzoom_agent.extras import require

_PLAIN: Final = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"}
    | {"\u2010": "-", "\u00ad": "-", "\x02": "-", "\ufffe": "-", "\u00a0": " "}
)
"""Typographic signs as nano's alphabet has them; the text layer has a sign of its own for a word that is divided."""
_KNOWN: Final = frozenset(ALPHABET)
_TALL: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789bdfhkl")
_LOW: Final = frozenset("acemnorsuvwxz")
_LOW_SHARE: Final = 0.68
"""Height of small letters as a share of that of capitals."""
_BELOW: Final = 0.3
"""Depth of descenders, likewise."""
_WIDE_GAP: Final = 1.6
"""Gap between two characters from which on they are two lines, in heights of capitals."""
_SHIFT: Final = 0.2
"""Distance of two baselines from which on these are two lines, likewise."""
_LEAST_CONTRAST: Final = 60
"""Of the grey values in the box of a line."""
_INKED: Final = 0.8
"""Least share of the characters of a line that have ink, and of its spaces that have none."""
_LEAST_HEIGHT, _LEAST_CHARACTERS = 8.0, 2
"""Of a line, in pixels and in characters."""


@dataclass(frozen=True)
class _Char:
    """A character of the text layer; coordinates in points from the left bottom corner of the page.

    Attributes:
        text: The character.
        left, right, bottom, top: Edges of its ink.
        baseline: Height of the line that it stands on.
    """

    text: str
    left: float
    right: float
    bottom: float
    top: float
    baseline: float


def read_page(page: Any, *, dots: float, name: str = "") -> Paper | None:
    """Return a page as paper without fields, or None where its text and its picture cannot be matched.

    Args:
        page: A `pypdfium2.PdfPage`.
        dots: Dots per inch of the picture.
        name: Name of the page.
    """
    require("pypdfium2", extra="pdf", use="A PDF")
    if page.get_rotation():
        return None
    image: Image.Image = page.render(scale=dots / 72, grayscale=True).to_pil().convert("L")
    pixels = np.asarray(image)
    scale, left, top = _place(page, image.size)
    lines = [_line(chars, left, top, scale) for chars in _runs(list(_characters(page)))]
    found = [line for line in lines if line is not None and _printed(line, pixels)]
    return Paper(image, tuple(found), name=name) if found else None


def _place(page: Any, size: tuple[int, int]) -> tuple[float, float, float]:
    """Return pixels per point of a picture of a page, and the point at its left top corner."""
    import pypdfium2.raw as pdfium

    x, y = ctypes.c_double(), ctypes.c_double()
    corners = []
    for corner in ((0, 0), size):
        pdfium.FPDF_DeviceToPage(page.raw, 0, 0, *size, 0, *corner, x, y)
        corners.append((x.value, y.value))
    (left, top), (right, _) = corners
    return size[0] / (right - left), left, top


def _characters(page: Any) -> Iterator[_Char | None]:
    """Yield the horizontal characters of a page in the order of its text; None where a line ends."""
    import pypdfium2.raw as pdfium

    text = page.get_textpage()
    x, y = ctypes.c_double(), ctypes.c_double()
    for index in range(text.count_chars()):
        char = chr(pdfium.FPDFText_GetUnicode(text.raw, index)).translate(_PLAIN)
        sign = not char.isalpha() and not _KNOWN.issuperset(unicodedata.normalize("NFKC", char))
        if sign or abs(pdfium.FPDFText_GetCharAngle(text.raw, index)) > 0.01:  # bullets and ends of lines
            yield None
            continue
        left, bottom, right, top = text.get_charbox(index)
        pdfium.FPDFText_GetCharOrigin(text.raw, index, x, y)
        yield _Char(char, left, right, bottom, top, y.value)


def _runs(chars: Sequence[_Char | None]) -> Iterator[list[_Char]]:
    """Yield characters that stand side by side on one baseline, without the spaces at their ends."""
    run: list[_Char] = []
    for char in [*chars, None]:
        if char is not None and char.text.isspace():
            run += [char] * bool(run and not run[-1].text.isspace())
            continue
        last = next((one for one in reversed(run) if not one.text.isspace()), None)
        if last is not None and (char is None or not _beside(last, char, _capitals(run))):
            yield run[: run.index(last) + 1] if run[-1].text.isspace() else run
            run = []
        if char is not None:
            run.append(char)


def _beside(one: _Char, other: _Char, capitals: float) -> bool:
    gap = other.left - one.right
    same = (one.left, one.right) == (other.left, other.right)  # two letters that are printed as one
    return (same or -0.5 * capitals < gap < _WIDE_GAP * capitals) and (
        abs(one.baseline - other.baseline) < _SHIFT * capitals
    )


def _capitals(chars: Sequence[_Char]) -> float:
    """Return the height of capitals, or what follows from the small letters."""
    for kind, share in ((_TALL, 1.0), (_LOW, _LOW_SHARE)):
        tall = [char.top - char.baseline for char in chars if char.text in kind]
        if tall:
            return float(median(tall)) / share
    return max(1.0, *(char.top - char.bottom for char in chars if char.text.strip()), 0.0)


def _line(chars: Sequence[_Char], left: float, top: float, scale: float) -> Line | None:
    """Return characters as a line of a picture, or None where one of them is unknown."""
    text, centers = "", []
    spots = [(char.left, char.right) for char in chars]
    for at, char in enumerate(chars):
        if char.text.isspace():
            spots[at] = (chars[at - 1].right, chars[at + 1].left)
    for (start, end), group in groupby(zip(spots, chars, strict=True), key=lambda pair: pair[0]):
        letters = unicodedata.normalize("NFKC", "".join(char.text for _, char in group))
        letters = letters or " "
        text += letters
        centers += [start + (at + 0.5) * (end - start) / len(letters) for at in range(len(letters))]
    capitals, baseline = _capitals(chars), median(char.baseline for char in chars)
    if not _KNOWN.issuperset(text.upper()) or len(text.upper()) != len(text):
        return None
    if len(text) < _LEAST_CHARACTERS or capitals * (1 + _BELOW) * scale < _LEAST_HEIGHT:
        return None
    box = (
        (spots[0][0] - left) * scale,
        (top - baseline - capitals) * scale,
        (spots[-1][1] - left) * scale,
        (top - baseline + _BELOW * capitals) * scale,
    )
    return Line(box, text, tuple((x - left) * scale for x in centers))


def _printed(line: Line, pixels: np.ndarray[Any, Any]) -> bool:
    """Return whether a line lies on the page, its characters from left to right, and has ink."""
    rows, columns = pixels.shape
    left, top, right, bottom = (round(edge) for edge in line.box)
    if left < 0 or top < 0 or right > columns or bottom > rows or right - left < 2:
        return False
    centers = line.centers or ()
    if any(one >= other for one, other in pairwise(centers)):
        return False
    inside = pixels[top:bottom, left:right].astype(int)
    ink = abs(inside - np.median(inside)) >= _LEAST_CONTRAST
    reach = max(1, round(0.1 * line.height))
    above = round(line.height / (1 + _BELOW))  # what underlines a space is no ink of it
    signs, spaces = [], []
    for char, center in zip(line.text, centers, strict=True):
        x = round(center) - left
        if char == " ":
            spaces.append(ink[:above, x : x + 1].any())
        else:
            signs.append(ink[:, max(0, x - 2 * reach) : x + 2 * reach + 1].any())
    return bool(sum(signs) >= _INKED * len(signs) and sum(spaces) <= (1 - _INKED) * len(spaces))
