"""Boxes as models write them: a value of any shape becomes four numbers in the frame that they can only be meant in.

Read are lists (nested, of points, of boxes), strings, named corners, and a corner or centre with width and height;
`box_2d` is known for y before x. Percentages, and numbers up to 1 where larger ones are expected, are shares of the
image. A box that cannot be meant in its frame is an error that names the frame and its range.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Frame, Size

Quad = tuple[float, float, float, float]
BOX_KEYS = (
    *("bbox_2d", "bbox", "box_2d", "bbox2d", "box", "bounding_box", "boundingBox", "bbox_xyxy", "xyxy", "bbox_xywh"),
    *("xywh", "coordinates", "coords", "region", "rect", "roi", "crop"),
)
"""Names under which models give a box, the usual one first."""
_LARGEST = 1e9
_DEPTH = 8
_RANGES: dict[Frame, float] = {"unit": 1.0, "per_mille": 1000.0}
_FRAMES: dict[Frame, str] = {
    "unit": "shares of the image",
    "per_mille": "thousandths of the image",
    "pixel": "pixels of the image as shown",
    "cell": "cells of the image's token grid",
}
_CORNERS = (
    *(("x0", "y0", "x1", "y1"), ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")),
    *(("minx", "miny", "maxx", "maxy"), ("left", "top", "right", "bottom"), ("xstart", "ystart", "xend", "yend")),
)
_POINTS = (("topleft", "bottomright"), ("lefttop", "rightbottom"), ("min", "max"), ("start", "end"), ("p1", "p2"))
_SIZES = (("width", "height"), ("w", "h"))
_ORIGINS = (("x", "y"), ("left", "top"), ("xmin", "ymin"), ("x1", "y1"), ("x0", "y0"))
_CENTRES = (("cx", "cy"), ("centerx", "centery"), ("xcenter", "ycenter"))
_JOINTS = ("size", "center", "origin")
_SIDES = frozenset(name for names in (*_CORNERS, *_POINTS, *_SIZES, *_ORIGINS, *_CENTRES, _JOINTS) for name in names)
_SIGNS = str.maketrans("\uff05\u066a\uff0e\u066b\u2212\uff0d\uff0b\uff1a\uff1d", "%%..--+:=")
"""Plain signs for those of other scripts that decide what a number is and means."""
_PLAIN = r"(?>\d+(?:\.\d*)?|\.\d+)(?>(?:[eE][-+]?\d{1,4})?)(?:\s?%)?(?!\w)"
_NUMBER = re.compile(rf"(?:(?<![\w.%)\]])[-+])?(?<![\w.]){_PLAIN}")
"""A number that belongs to no word; a sign counts where it cannot be the hyphen between two numbers."""
_WHOLE = re.compile(rf"[-+]?{_PLAIN}")
_NAMED = re.compile(rf"([A-Za-z]{{1,10}}_?[A-Za-z]{{0,10}}\d?)[\"']?\s{{0,4}}[:=]\s{{0,4}}([-+]?{_PLAIN})")
_SPOKEN = re.compile(
    rf"\b(x[012]?|y[012]?|w|h|[xy]_?m(?:in|ax)|left|top|right|bottom|width|height|c[xy])\b[\s:=]{{1,6}}([-+]?{_PLAIN})",
    re.IGNORECASE,
)
"""A name of a coordinate before its number, without a mark between them."""
_Y_FIRST = re.compile(r"\bbox_2d\b")
_SPAN = re.compile(
    rf"\b([xy])\b(?:\W{{0,4}}(?:from|in|between)?\W{{0,3}}({_PLAIN})\s?(?:-|\u2013|to|and|\.\.)\s?({_PLAIN})"
    rf"|\W{{0,4}}(?:in\s?)?[\[(]\s?({_PLAIN})\s?,\s?({_PLAIN})\s?[\])])",
    re.IGNORECASE,
)
"""From where to where it goes along an axis."""
_SIZED = re.compile(r"\b(?:cent(?:er|re)|width|height|size)\b", re.IGNORECASE)


class BoxReading(NamedTuple):
    """Four finite numbers, possibly swapped or outside, and their frame."""

    box: Quad
    frame: Frame


def numbers_in(text: str) -> list[str]:
    """Return the decimal numbers in a text, in order, with a percent sign where one follows."""
    return _NUMBER.findall(text.translate(_SIGNS))


def box_key(arguments: Mapping[Any, object]) -> str | None:
    """Return the name under which the arguments of a call give a box; None if there is none."""
    return next((key for key in BOX_KEYS if key in arguments), None)


def names_side(name: str) -> bool:
    """Return whether a name is one of those under which parts of a box are given, in any spelling."""
    return _bare(name) in _SIDES


def box_argument(
    arguments: Mapping[str, object], frame: Frame, notes: list[str], *, size: Size | None, farthest: float = 1.5
) -> BoxReading:
    """Return the box among the arguments of a call; see `read_box`."""
    key = box_key(arguments)
    if key not in (None, "bbox_2d"):
        notes.append(f"box read from {key}")
    value = arguments if key is None else arguments[key]
    if isinstance(value, str):
        notes.append("box read from a string")
    return read_box(value, frame, notes, size=size, key=key or "", farthest=farthest)


def read_box(
    value: object, frame: Frame, notes: list[str], *, size: Size | None, key: str = "", farthest: float = 1.5
) -> BoxReading:
    """Return the box that a value stands for.

    Args:
        frame: The frame that the model was told to use.
        notes: Takes what was corrected.
        size: Shown size of the view, to name the range of pixels; None if it is not known.
        key: The name that the value was given under.
        farthest: Numbers from this many times the frame's range outside cannot be meant.

    Raises:
        BoxError: It is no box, or cannot be meant in `frame`; the text is for the model.
    """
    numbers = _Reader(notes)
    corners = numbers.corners(value, key=key)
    if len(corners) != 4:
        raise _unreadable()
    x1, y1, x2, y2 = corners
    if numbers.percents:
        if max(map(abs, corners)) > 100:
            raise _out_of(corners, frame, size, "percentages go from 0% to 100%")
        if numbers.percents < 4 and any(0 < abs(number) < 1 for number in corners):
            raise _out_of(corners, frame, size, "some numbers are percentages and some are not")
        notes.append("percentages read as shares of the image")
        x1, y1, x2, y2 = (number / 100 for number in corners)
        frame = "unit"
    elif frame in _RANGES and not -(farthest - 1) * _RANGES[frame] <= min(corners) <= max(corners) <= (
        farthest * _RANGES[frame]
    ):
        raise _out_of(corners, frame, size)
    elif frame != "unit" and max(corners) <= 2 and _tiny(corners):
        if max(corners) > 1.1 or min(corners) < -0.1:
            raise _out_of(corners, frame, size)
        notes.append("numbers up to 1 read as shares of the image")
        frame = "unit"
    if x2 < x1 or y2 < y1:
        notes.append("box corners were swapped")
    return BoxReading((x1, y1, x2, y2), frame)


def read_index(arguments: Mapping[str, object], names: Sequence[str], notes: list[str], *, default: int) -> int | None:
    """Return the number under one of `names`, `default` if none is given, None if it is not a whole number."""
    given = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if given is None:
        notes.append(f"{names[0]} missing, {default} taken")
        return default
    try:
        number = _Reader(notes).number(given)
    except BoxError:
        return None
    return int(number) if number.is_integer() else None


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name[:40].lower())


def _unreadable() -> BoxError:
    return BoxError("The box could not be read: it must be four finite numbers x1, y1, x2, y2.")


def _out_of(corners: Sequence[float], frame: Frame, size: Size | None, reason: str = "") -> BoxError:
    if frame in _RANGES:
        legal = f"x and y from 0 to {_RANGES[frame]:g}"
    else:
        legal = f"x from 0 to {size.width}, y from 0 to {size.height}" if size and frame == "pixel" else "from 0 on"
    written = ", ".join(f"{number:.6g}" for number in corners)
    return BoxError(
        f"The box [{written}] cannot be meant{f': {reason}' if reason else ''}. Boxes are in {_FRAMES[frame]}: {legal}."
    )


def _tiny(corners: Sequence[float]) -> bool:
    """Return whether a box of numbers up to 2 is written in shares: with fractions, or as one that fills the image."""
    x1, y1, x2, y2 = corners
    return any(number % 1 for number in corners) or (max(corners) == 1 and x1 != x2 and y1 != y2)


class _Reader:
    """Reads numbers and boxes from JSON values; every method raises BoxError on a value that is none."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.percents = 0
        """Numbers with a percent sign."""

    def number(self, value: object) -> float:
        if isinstance(value, str):
            written = value.strip().translate(_SIGNS)
            if not _WHOLE.fullmatch(written):
                raise _unreadable()
            self.notes.append("number read from a string")
            value = self._decimal(written)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise _unreadable()
        try:
            number = float(value)
        except OverflowError:
            raise _unreadable() from None
        if not abs(number) <= _LARGEST:  # nor is NaN
            raise _unreadable()
        return number

    def corners(self, value: object, *, key: str = "", depth: int = 0) -> list[float]:
        """Return x1, y1, x2, y2 from a value given under the name `key`."""
        if depth > _DEPTH:
            raise _unreadable()
        if isinstance(value, str):
            return self._from_text(value, key, depth)
        if isinstance(value, dict):
            return self._from_names(value, depth)
        if not isinstance(value, list | tuple):
            raise _unreadable()
        if any(isinstance(item, list | tuple | dict) for item in value) or (
            len(value) == 1 and isinstance(value[0], str)
        ):
            return self._from_list(value, key, depth)
        return self._ordered([self.number(item) for item in value], key)

    def _ordered(self, numbers: list[float], key: str) -> list[float]:
        if len(numbers) != 4:
            raise _unreadable()
        first, second, third, fourth = numbers
        if key.lower() == "box_2d":
            self.notes.append("box_2d read as y1, x1, y2, x2")
            return [second, first, fourth, third]
        if key.lower().endswith("xywh"):
            self.notes.append("box read from a corner and its size")
            return [first, second, first + third, second + fourth]
        return numbers

    def _from_text(self, text: str, key: str, depth: int) -> list[float]:
        text = text.translate(_SIGNS)
        named = _NAMED.findall(text)
        named = named if len(named) >= 4 else _SPOKEN.findall(text)
        if len(named) >= 4:
            return self._from_names({name: self._decimal(number) for name, number in named}, depth)
        spans = {one[1].lower(): (one[2] or one[4], one[3] or one[5]) for one in _SPAN.finditer(text)}
        if len(spans) == 2:
            (x1, x2), (y1, y2) = spans["x"], spans["y"]
            return [self.number(self._decimal(one)) for one in (x1, y1, x2, y2)]
        if _SIZED.search(text):
            raise _unreadable()
        numbers = [self.number(self._decimal(one)) for one in numbers_in(text)[:5]]
        told = "box_2d" if _Y_FIRST.search(text) else "xywh" if "xywh" in text.lower() else key
        return self._ordered(numbers, told)

    def _decimal(self, written: str) -> float:
        self.percents += written.endswith("%")
        return float(written.rstrip("% \t"))

    def _from_names(self, given: Mapping[object, object], depth: int) -> list[float]:
        self.notes.append("box read from an object")
        if (inner := box_key(given)) is not None:
            return self.corners(given[inner], key=inner, depth=depth + 1)
        held = {_bare(str(name)): item for name, item in given.items()}
        for corners in _CORNERS:
            if all(name in held for name in corners):
                return [self.number(held[name]) for name in corners]
        for first, second in _POINTS:
            if first in held and second in held:
                return [*self._point(held[first]), *self._point(held[second])]
        width, height = self._pair(held, _SIZES, "size")
        if any(name in held for name in ("cx", "centerx", "xcenter", "center")):
            x, y = self._pair(held, _CENTRES, "center")
            return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        x, y = self._pair(held, _ORIGINS, "origin")
        return [x, y, x + width, y + height]

    def _pair(self, held: Mapping[str, object], names: Sequence[tuple[str, str]], joint: str) -> tuple[float, float]:
        """Return two numbers under the first of these pairs of names, or a point under `joint`."""
        for first, second in names:
            if first in held and second in held:
                return self.number(held[first]), self.number(held[second])
        return self._point(held.get(joint))

    def _point(self, value: object) -> tuple[float, float]:
        if isinstance(value, dict):
            value = [value.get("x"), value.get("y")]
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise _unreadable()
        return self.number(value[0]), self.number(value[1])

    def _from_list(self, items: Sequence[object], key: str, depth: int) -> list[float]:
        """Return the box of a list of points, or the first of a list of boxes."""
        points = len(items) > 1 and all(
            (isinstance(item, list | tuple) and len(item) == 2) or (isinstance(item, dict) and set(item) == {"x", "y"})
            for item in items
        )
        if not points:
            self.notes.append(f"box taken from a list of {len(items)}")
            return self.corners(items[0], key=key, depth=depth + 1)
        self.notes.append("box read from points" if len(items) == 2 else f"box drawn around {len(items)} points")
        across, down = zip(*(self._point(item) for item in items), strict=True)
        if len(items) == 2:
            return self._ordered([across[0], down[0], across[1], down[1]], key)
        return [min(across), min(down), max(across), max(down)]
