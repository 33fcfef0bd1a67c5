"""From map logits to boxes: sinks out, blur, threshold, tight box (Q-Zoom 3.1; the released code's rules).

Everything is in cells of one image's grid, and pure. The defaults are the published rules; each departure is an option
of `PerceptionConfig` with its own name. Where the published code fails or is off by one the default is mended and
`official=True` gives the original: boxes are rounded in float32 there and truncated, and a grid of one row or column
cannot be blurred.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.geometry import Box, Size
from qzoom_agent.perception.adapters import Sink

SINK_PROBABILITY = 0.75
"""Cells to which the first token of the sequence gives at least this are sinks (Qwen3-VL)."""
_CORNER_FROM = 256
"""Cells of a grid from which Qwen2.5-VL's corner counts as a sink."""
_CERTAIN = 0.02
"""Cells that are less uncertain than this all weigh as much."""
MIN_SIDE = 28
"""Shortest side in original pixels of a box, whatever the family."""


class MapRegion(NamedTuple):
    """A part of a map that is foreground: its box in cells, right and bottom exclusive, and its highest value."""

    x1: float
    y1: float
    x2: float
    y2: float
    peak: float


def keep_mask(rule: Sink, rows: int, columns: int, first_token: Tensor | None = None) -> Tensor:
    """Which cells count, (rows, columns) bool.

    Args:
        rule: "corner": in grids of more than 256 cells, the left of the first row and the top of the first column do
            not; "first_token": those that the first token of the sequence looks at do not; "none": all count.
        first_token: logits (rows * columns,) of that token, for that rule.
    """
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if rule == "corner" and rows * columns > _CORNER_FROM:
        keep[: max(1, rows // 4), 0] = False
        keep[0, : max(1, columns // 4)] = False
    if rule == "first_token":
        assert first_token is not None
        keep = (torch.sigmoid(first_token.float().cpu()) < SINK_PROBABILITY).view(rows, columns)
    return keep


def probabilities(logits: Tensor, keep: Tensor) -> Tensor:
    """Sigmoid of logits (rows, columns) on the CPU, 0 on sinks."""
    return torch.sigmoid(logits.float().cpu()) * keep


def blur(heat: Tensor, *, sigma: float = 1.0, official: bool = False) -> Tensor:
    """Gaussian blur of (rows, columns): three taps at sigma 1, wider with it; edges mirrored without repetition.

    An axis of a single cell has nothing to mirror and is left as it is; the published code raises there, and so does
    this with `official` (RuntimeError).
    """
    radius = max(1, round(sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma) ** 2)
    taps = taps / taps.sum()
    out = heat[None, None]
    if official:
        kernel = taps[:, None] * taps[None, :]
        return conv2d(pad(out, (radius,) * 4, mode="reflect"), kernel[None, None])[0, 0]
    for axis, size in ((2, heat.shape[0]), (3, heat.shape[1])):
        reach = min(radius, size - 1)
        if reach < 1:
            continue
        some = taps[radius - reach : radius + reach + 1]
        kernel = (some / some.sum()).view(1, 1, -1, 1) if axis == 2 else (some / some.sum()).view(1, 1, 1, -1)
        margins = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        out = conv2d(pad(out, margins, mode="reflect"), kernel)
    return out[0, 0]


def blur_sigma(cells: int, options: PerceptionConfig) -> float:
    """1, or with `blur: grid` growing from 1 at 512 cells to 2 at 2,048 and beyond (as the successor method does)."""
    if options.blur != "grid":
        return 1.0
    return min(2.0, max(1.0, math.sqrt(cells / 512)))


def smoothed(heat: Tensor, options: PerceptionConfig, *, official: bool = False) -> Tensor:
    """The map as it is thresholded: blurred, unless the options say `blur: none`.

    A blur of three cells joins what belongs together on a grid of hundreds; on one of 64 it only makes boxes wider.
    """
    if options.blur == "none":
        return heat
    return blur(heat, sigma=blur_sigma(heat.numel(), options), official=official)


def cutoff(heat: Tensor, threshold: float, options: PerceptionConfig) -> float:
    """The value above which a cell of the blurred map is foreground; infinite where the map is too flat to trust."""
    peak, mean = float(heat.max()), float(heat.mean())
    if options.peak_to_mean is not None and peak < options.peak_to_mean * mean:
        return math.inf
    return threshold if options.peak_share is None else options.peak_share * peak


def foreground(
    heat: Tensor, threshold: float, options: PerceptionConfig, *, official: bool = False
) -> NDArray[np.bool]:
    """Cells of the (sink-free) probabilities that are foreground after blurring, (rows, columns)."""
    blurred = smoothed(heat, options, official=official)
    found: NDArray[np.bool] = (blurred > cutoff(blurred, threshold, options)).numpy()
    return found


def regions(
    heat: Tensor, found: NDArray[np.bool], *, limit: int = 1, sides: tuple[float, float] | None = None
) -> list[MapRegion]:
    """The foreground as boxes, best first: one around everything, or with `limit` > 1 one for each connected part.

    With `sides` (shares of the map's width and height) a box of those sides around the centre of each part's heat.
    """
    if not found.any():
        return []
    values = heat.numpy()
    parts = [found] if limit == 1 and sides is None else _connected(found)
    boxes = []
    for part in parts:
        ys, xs = np.nonzero(part)
        box: tuple[float, float, float, float] = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        if sides is not None:
            box = _around_centre(values, part, sides)
        x1, y1, x2, y2 = box
        boxes.append(MapRegion(x1, y1, x2, y2, peak=float(values[part].max())))
    return sorted(boxes, key=lambda box: -box.peak)[:limit]


def _connected(found: NDArray[np.bool]) -> list[NDArray[np.bool]]:
    """Return the parts of a mask whose cells touch, corners included, in reading order of their first cells."""
    cells: list[tuple[int, int]] = [(int(row), int(column)) for row, column in np.argwhere(found)]
    left, parts = set(cells), []
    for first in cells:
        if first not in left:
            continue
        left.remove(first)
        part = [first]
        for row, column in part:  # which grows while it is walked through
            near = left & {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
            left -= near
            part.extend(near)
        mask = np.zeros_like(found)
        mask[tuple(zip(*part, strict=True))] = True
        parts.append(mask)
    return parts


def _around_centre(
    heat: NDArray[np.float32], part: NDArray[np.bool], sides: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A box around the centre of gravity of a part's hottest cell and those next to it, in cells, moved inside the map.

    Cells weigh by their odds, not their probabilities: a cell at 0.98 knows more than one at 0.9.
    Those next to it weigh, whether foreground or not: they tell where in its cell the thing lies (20).
    """
    rows, columns = heat.shape
    top, left = np.unravel_index(int((heat * part).argmax()), heat.shape)
    window = (slice(max(0, int(top) - 1), int(top) + 2), slice(max(0, int(left) - 1), int(left) + 2))
    weights = np.zeros_like(heat)
    weights[window] = heat[window] / np.maximum(1.0 - heat[window], _CERTAIN)
    width, height = sides[0] * columns, sides[1] * rows
    weight = float(weights.sum())
    x = float((weights.sum(0) * (np.arange(columns) + 0.5)).sum()) / weight - width / 2
    y = float((weights.sum(1) * (np.arange(rows) + 0.5)).sum()) / weight - height / 2
    x, y = min(max(0.0, x), columns - width), min(max(0.0, y), rows - height)
    return x, y, x + width, y + height


def official_pixels(region: MapRegion, *, rows: int, columns: int, unit: int, size: Size) -> tuple[int, int, int, int]:
    """The box in pixels of the original exactly as the published code finds it, float32 rounding and all.

    Args:
        unit: side of a visual token in pixels of the coarse image (28 or 32).
    """

    def axis(low: float, high: float, cells: int, length: int) -> tuple[float, float]:
        ratio = np.float32(length / (cells * unit))
        start, stop = np.float32(low * unit) * ratio, np.float32(high * unit) * ratio
        if stop - start < MIN_SIDE:
            middle = (start + stop) / np.float32(2)
            start, stop = middle - np.float32(MIN_SIDE / 2), middle + np.float32(MIN_SIDE / 2)
        if start < 0:
            start, stop = np.float32(0), stop - start
        if stop > length:
            start, stop = start - (stop - np.float32(length)), np.float32(length)
        return max(0.0, float(start)), min(float(length), float(stop))

    x1, x2 = axis(region.x1, region.x2, columns, size.width)
    y1, y2 = axis(region.y1, region.y2, rows, size.height)
    return int(x1), int(y1), int(x2), int(y2)


def widened(box: Box, margin: float, size: Size) -> Box:
    """A box in original pixels with `margin` of its longer side added on every side, inside the image."""
    if margin == 0:
        return box.clamp(size)
    pad_by = margin * max(box.width, box.height)
    return Box(box.x1 - pad_by, box.y1 - pad_by, box.x2 + pad_by, box.y2 + pad_by, view=box.view).clamp(size)
