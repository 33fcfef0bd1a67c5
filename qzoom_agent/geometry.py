"""Boxes that know their coordinate frame, and the resize rule of the model families.

    pixel      pixels of the view as shown to the model (for "original": of the image itself)
    unit       0..1 of the view's width and height
    per_mille  0..1000 of the view's width and height
    cell       columns and rows of the view's token grid; a token covers `cell` x `cell` shown pixels

Combining boxes of different frames or views is an error, and every conversion is written once, here. Coordinates are
continuous: x2 and y2 are exclusive, and all of a 640 x 480 view is [0, 0, 640, 480].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from qzoom_agent.errors import BoxError, ConfigError, ImageError

Frame = Literal["pixel", "unit", "per_mille", "cell"]
FRAMES: tuple[Frame, ...] = get_args(Frame)
Affine = tuple[float, float, float, float, float, float]
"""An affine map (a, b, c, d, e, f) of a point: x, y becomes a x + b y + c, d x + e y + f. As in Pillow's
`Image.transform`, that of an image made from another gives the place in that one of each of its pixels."""
MAX_ASPECT = 200
"""Longest side over shortest side of an image: no model is shown more, and thin images cost memory by the row."""

_FLAT = 1e-9
# Rounding errors of a conversion must not move `rounded` by a whole pixel.
_NOISE = 1e-6


class Size(NamedTuple):
    """Width and height in pixels, in that order (as in Pillow)."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle (x1, y1, x2, y2) in `frame` of the view named `view`.

    It holds any four numbers that a model may write, swapped, outside or NaN: see `finite`, `ordered` and `clamp`.
    `clamp`, `grow_to`, `limit_aspect` and `scale` return a box that is neither empty nor outside.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    frame: Frame = "pixel"
    view: str = "original"

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise BoxError(f"Unknown frame {self.frame!r}; use one of {', '.join(FRAMES)}.")
        for name in ("x1", "y1", "x2", "y2"):
            object.__setattr__(self, name, _as_float(getattr(self, name)))

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def area(self) -> float:
        """Width times height; 0 for a box whose corners are swapped."""
        return max(0.0, self.width) * max(0.0, self.height)

    @property
    def center(self) -> tuple[float, float]:
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def finite(self) -> bool:
        """True if no number is NaN or infinite."""
        return all(map(math.isfinite, self.corners))

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2."""
        return self.x1, self.y1, self.x2, self.y2

    def as_list(self) -> list[float]:
        return list(self.corners)

    def ordered(self) -> "Box":
        """Return the same rectangle with x1 <= x2 and y1 <= y2."""
        x1, x2 = sorted((self.x1, self.x2))
        y1, y2 = sorted((self.y1, self.y2))
        return replace(self, x1=x1, y1=y1, x2=x2, y2=y2)

    def to_pixel(self, size: tuple[int, int], cell: int = 28) -> "Box":
        """Return this box in pixels of its view of `size` pixels, with tokens of `cell` x `cell` pixels."""
        return self.to_frame("pixel", size, cell)

    def to_frame(self, frame: Frame, size: tuple[int, int], cell: int = 28) -> "Box":
        """Return this box in another frame of the same view. Nothing is rounded or clamped."""
        if frame == self.frame:
            return self
        from_x, from_y = extent(self.frame, size, cell)
        to_x, to_y = extent(frame, size, cell)
        sx, sy = to_x / from_x, to_y / from_y
        return replace(self, x1=self.x1 * sx, y1=self.y1 * sy, x2=self.x2 * sx, y2=self.y2 * sy, frame=frame)

    def clamp(self, size: tuple[int, int]) -> "Box":
        """Return the part of a pixel box inside `size`, at least one pixel; the nearest pixel if all is outside.

        Raises:
            BoxError: The box holds NaN or is not in pixels.
        """
        return self._each_axis(lambda low, high, _: (low, high), size)

    def grow_to(self, min_side: float, size: tuple[int, int]) -> "Box":
        """Clamp, then grow each side to `min_side` pixels about the centre, sliding the box inside `size`.

        A side never becomes longer than the image's.
        """
        return self._each_axis(lambda low, high, limit: _resize_axis(low, high, max(min_side, high - low), limit), size)

    def limit_aspect(self, max_aspect: float, size: tuple[int, int]) -> "Box":
        """Clamp, then grow the short side until long / short <= `max_aspect`, as far as the image allows."""
        box = self.clamp(size)
        short = math.ceil(max(box.width, box.height) / max_aspect - _NOISE)
        return box.grow_to(short, size)

    def scale(self, factor: float, size: tuple[int, int]) -> "Box":
        """Clamp, then multiply both sides by `factor` about the centre, sliding the box inside `size`."""
        return self._each_axis(lambda low, high, limit: _resize_axis(low, high, (high - low) * factor, limit), size)

    def padded(self, share: float) -> "Box":
        """Move each edge outwards by `share` of the longer side, also beyond the image."""
        pad = share * max(self.width, self.height)
        return replace(self, x1=self.x1 - pad, y1=self.y1 - pad, x2=self.x2 + pad, y2=self.y2 + pad)

    def rounded(self) -> "Box":
        """Return a pixel box with whole numbers, rounded outward and at least one pixel wide and high."""
        self._need_pixel("rounded")
        if not self.finite:
            raise BoxError(f"A box that is rounded has finite numbers; got {self}.")
        x1, y1 = math.floor(self.x1 + _NOISE), math.floor(self.y1 + _NOISE)
        x2, y2 = math.ceil(self.x2 - _NOISE), math.ceil(self.y2 - _NOISE)
        return replace(self, x1=x1, y1=y1, x2=max(x2, x1 + 1), y2=max(y2, y1 + 1))

    def iou(self, other: "Box") -> float:
        """Return intersection over union, 0..1; 0 if both are empty. Both boxes must share frame and view."""
        shared = self._shared(other)
        union = self.area + other.area - shared
        return shared / union if union > 0 else 0.0

    def coverage(self, other: "Box") -> float:
        """Return the share of `other` that lies inside this box, 0..1; 0 if `other` is empty."""
        shared = self._shared(other)
        return shared / other.area if other.area > 0 else 0.0

    def _shared(self, other: "Box") -> float:
        if (self.frame, self.view) != (other.frame, other.view):
            raise BoxError(
                f"Boxes of different frames cannot be compared: {self.frame} of {self.view!r} and "
                f"{other.frame} of {other.view!r}. Convert both to original pixels first."
            )
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(0.0, width) * max(0.0, height)

    def _each_axis(self, change: Callable[[float, float, int], tuple[float, float]], size: tuple[int, int]) -> "Box":
        """Clamp, then change (low, high, limit) along each axis into a new (low, high)."""
        self._need_pixel("clamp, grow_to, limit_aspect and scale")
        if any(map(math.isnan, self.corners)):
            raise BoxError(f"Box {self.as_list()} holds NaN. Check `box.finite` before using a box a model wrote.")
        width, height = _positive(size)
        x1, x2 = change(*_clamp_axis(self.x1, self.x2, width), width)
        y1, y2 = change(*_clamp_axis(self.y1, self.y2, height), height)
        return replace(self, x1=x1, y1=y1, x2=x2, y2=y2)

    def _need_pixel(self, what: str) -> None:
        if self.frame != "pixel":
            raise BoxError(f"{what} need a pixel box, got frame {self.frame!r}. Call to_pixel(size) first.")


def mapped(box: Box, matrix: Affine) -> Box:
    """Return the box around the corners of a pixel box that an affine map has moved, as a box of the original."""
    a, b, c, d, e, f = matrix
    corners = [(x, y) for x in (box.x1, box.x2) for y in (box.y1, box.y2)]
    across, down = [a * x + b * y + c for x, y in corners], [d * x + e * y + f for x, y in corners]
    return Box(min(across), min(down), max(across), max(down))


def inverse(matrix: Affine) -> Affine:
    """Return the affine map that undoes another. Raises BoxError if it keeps no area."""
    a, b, c, d, e, f = matrix
    area = a * e - b * d
    if not math.isfinite(area) or abs(area) < _FLAT:
        raise BoxError(f"The affine map {matrix} keeps no area, so it cannot be undone.")
    return e / area, -b / area, (b * f - c * e) / area, -d / area, a / area, (c * d - a * f) / area


def composed(first: Affine, then: Affine) -> Affine:
    """Return the affine map that applies `first`, and then `then` to its result."""
    a, b, c, d, e, f = first
    g, h, i, j, k, m = then
    return g * a + h * d, g * b + h * e, g * c + h * f + i, j * a + k * d, j * b + k * e, j * c + k * f + m


def extent(frame: Frame, size: tuple[int, int], cell: int = 28) -> tuple[float, float]:
    """Return the largest legal x and y of a frame for a view of `size` pixels."""
    width, height = _positive(size)
    if frame in ("pixel", "cell"):
        side = 1 if frame == "pixel" else cell
        return width / side, height / side
    return (1.0, 1.0) if frame == "unit" else (1000.0, 1000.0)


def fit_tokens(size: tuple[int, int], *, factor: int, min_tokens: int, max_tokens: int) -> Size:
    """Return the size at which a view of `size` pixels is shown under a budget of visual tokens.

    It equals the families' own `smart_resize`, so their processors leave the result as it is. As there, a very long
    shape, or one whose sides round up across the budget, may cost more than `max_tokens`.

    Args:
        size: Pixels before.
        factor: Side in pixels of one token: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        min_tokens: A smaller view is enlarged to this many.
        max_tokens: A larger view is shrunk to this many.

    Raises:
        ImageError: The shape is longer than `MAX_ASPECT` allows.
        ConfigError: The budget cannot be met.
    """
    if factor < 1 or not 1 <= min_tokens <= max_tokens:
        raise ConfigError(
            f"A token budget needs 1 <= min_tokens <= max_tokens and factor >= 1, "
            f"got min_tokens={min_tokens}, max_tokens={max_tokens}, factor={factor}."
        )
    width, height = _positive(size)
    if max(width, height) / min(width, height) > MAX_ASPECT:
        raise ImageError(
            f"An image of {width}x{height} px is longer than {MAX_ASPECT}:1 and cannot be shown to the model. "
            "Cut it into shorter pieces."
        )
    min_pixels, max_pixels = min_tokens * factor**2, max_tokens * factor**2
    shown_w, shown_h = round(width / factor) * factor, round(height / factor) * factor
    if shown_w * shown_h > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        shown_h = max(factor, math.floor(height / shrink / factor) * factor)
        shown_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif shown_w * shown_h < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        shown_h = math.ceil(height * stretch / factor) * factor
        shown_w = math.ceil(width * stretch / factor) * factor
    return Size(shown_w, shown_h)


def tokens(size: tuple[int, int], factor: int) -> int:
    """Return the visual tokens of a view whose sides are multiples of `factor`."""
    return (size[0] // factor) * (size[1] // factor)


def _clamp_axis(low: float, high: float, limit: int) -> tuple[float, float]:
    low, high = sorted((min(max(low, 0.0), float(limit)), min(max(high, 0.0), float(limit))))
    return _resize_axis(low, high, max(high - low, 1.0), limit)


def _resize_axis(low: float, high: float, side: float, limit: int) -> tuple[float, float]:
    """Return an interval of length `side`, at least 1, about the centre of low..high, slid inside 0..limit."""
    if side == high - low:
        return low, high
    side = min(max(side, 1.0), float(limit))
    low = min(max((low + high) / 2 - side / 2, 0.0), limit - side)
    return low, min(low + side, float(limit))


def _positive(size: tuple[int, int]) -> tuple[int, int]:
    if size[0] < 1 or size[1] < 1:
        raise ImageError(f"An image needs at least one pixel each way, got {size[0]}x{size[1]}.")
    return size


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise BoxError(f"A side of a box is a number; got {value!r:.80}.") from None
