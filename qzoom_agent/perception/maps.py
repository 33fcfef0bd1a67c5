"""From map logits to boxes: remove sinks, blur, threshold, tight box (Q-Zoom 3.1, rules of the released code).

All functions are pure and work in cells of one image's grid, (rows, columns). The defaults are the published rules;
each departure is an option of `PerceptionConfig` with its own name. Where the published code fails or is off by one, it
is corrected here; `evals/parity_run.py` has the original.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.perception.adapters import Cells, Sink

SINK_PROBABILITY = 0.75
"""Probability from which a cell that the first token of the sequence attends to is a sink (Qwen3-VL)."""
_CORNER_FROM = 256
"""Grids of more cells than this have a sink in the corner (Qwen2.5-VL)."""
_CERTAIN = 0.02
"""Smallest 1 - p in the odds that weigh cells: surer cells weigh no more."""


class MapRegion(NamedTuple):
    """A part of a map that is foreground: its box in cells, right and bottom exclusive, and its highest value."""

    x1: float
    y1: float
    x2: float
    y2: float
    peak: float


def keep_mask(rule: Sink, rows: int, columns: int, first_token: Tensor | None = None) -> Tensor:
    """Return the cells that are no attention sinks, (rows, columns) bool.

    Args:
        rule: "corner": in grids of more than 256 cells, the first quarter of the first row and column are sinks;
            "first_token": cells that the first token of the sequence attends to are; "none": no cell is.
        first_token: map logits (rows * columns,) of the first token, for that rule.
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
    """Return the sigmoid of logits (rows, columns) on the CPU, 0 on sinks."""
    return torch.sigmoid(logits.float().cpu()) * keep


def blur(heat: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Blur (rows, columns) with a Gaussian: three taps at sigma 1, more at a larger one; edges are mirrored.

    An axis of one cell has nothing to mirror and is left as it is (the published code raises there).
    """
    radius = max(1, round(sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / sigma) ** 2)
    taps = taps / taps.sum()
    out = heat[None, None]
    for axis, size in ((2, heat.shape[0]), (3, heat.shape[1])):
        reach = min(radius, size - 1)  # no more cells than there are to mirror
        if reach < 1:
            continue
        some = taps[radius - reach : radius + reach + 1]
        kernel = (some / some.sum()).view(1, 1, -1, 1) if axis == 2 else (some / some.sum()).view(1, 1, 1, -1)
        margins = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        out = conv2d(pad(out, margins, mode="reflect"), kernel)
    return out[0, 0]


def blur_sigma(cells: int, options: PerceptionConfig) -> float:
    """Return 1, or with `blur: grid` 1 at 512 cells growing to 2 at 2,048 (as in the successor of the method)."""
    if options.blur != "grid":
        return 1.0
    return min(2.0, max(1.0, math.sqrt(cells / 512)))


def smoothed(heat: Tensor, options: PerceptionConfig) -> Tensor:
    """Return the map that is thresholded: blurred, unless the options say `blur: none`.

    A blur of three cells joins the parts of an object on a grid of hundreds of cells; on one of 64 it only widens
    boxes.
    """
    if options.blur == "none":
        return heat
    return blur(heat, sigma=blur_sigma(heat.numel(), options))


def cutoff(heat: Tensor, threshold: float, options: PerceptionConfig) -> float:
    """Return the value above which a cell of the blurred map is foreground; infinite if the map is too flat."""
    peak, mean = float(heat.max()), float(heat.mean())
    if options.peak_to_mean is not None and peak < options.peak_to_mean * mean:
        return math.inf
    return threshold if options.peak_share is None else options.peak_share * peak


def foreground(heat: Tensor, threshold: float, options: PerceptionConfig) -> NDArray[np.bool]:
    """Return the cells that are foreground after blurring, (rows, columns); `heat` is 0 on sinks."""
    blurred = smoothed(heat, options)
    found: NDArray[np.bool] = (blurred > cutoff(blurred, threshold, options)).numpy()
    return found


def regions(
    heat: Tensor, found: NDArray[np.bool], *, limit: int = 1, sides: tuple[float, float] | None = None
) -> list[MapRegion]:
    """Return boxes of the foreground, best first: one around everything, or with `limit` > 1 one for each connected
    part.

    With `sides`, shares of the map's width and height, a box has those sides around the centre of its part's heat.
    """
    return [box for box, _ in region_parts(heat, found, limit=limit, sides=sides)]


def region_parts(
    heat: Tensor, found: NDArray[np.bool], *, limit: int = 1, sides: tuple[float, float] | None = None
) -> list[tuple[MapRegion, NDArray[np.bool]]]:
    """Return `regions`, each with its part of the foreground, (rows, columns)."""
    if not found.any():
        return []
    values = heat.numpy()
    boxes = []
    for part in [found] if limit == 1 and sides is None else _connected(found):
        ys, xs = np.nonzero(part)
        tight = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        box: Cells = tight if sides is None else _around_centre(values, part, sides)
        boxes.append((MapRegion(*box, float(values[part].max())), part))
    return sorted(boxes, key=lambda pair: -pair[0].peak)[:limit]


def runs(found: NDArray[np.bool]) -> list[Cells]:
    """Return the cells of a mask as boxes of one row each, in reading order."""
    boxes: list[Cells] = []
    for row, marks in enumerate(found.astype(int)):
        edges = np.flatnonzero(np.diff(marks, prepend=0, append=0))
        boxes += [(int(x1), row, int(x2), row + 1) for x1, x2 in edges.reshape(-1, 2)]
    return boxes


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


def _around_centre(heat: NDArray[np.float32], part: NDArray[np.bool], sides: tuple[float, float]) -> Cells:
    """Return a box around the centre of gravity of a part's hottest cell and its neighbours, moved inside the map.

    Cells weigh by their odds, not their probabilities: one at 0.98 says more than one at 0.9. Neighbours weigh whether
    foreground or not: they tell where in its cell the object lies.
    """
    rows, columns = heat.shape
    top, left = np.unravel_index(int(np.where(part, heat, -1.0).argmax()), heat.shape)
    window = (slice(max(0, int(top) - 1), int(top) + 2), slice(max(0, int(left) - 1), int(left) + 2))
    weights = np.zeros_like(heat)
    weights[window] = heat[window] / np.maximum(1.0 - heat[window], _CERTAIN)
    if not weights.any():  # sinks that the blur alone made foreground
        weights[part] = 1.0
    width, height = sides[0] * columns, sides[1] * rows
    weight = float(weights.sum())
    x = float((weights.sum(0) * (np.arange(columns) + 0.5)).sum()) / weight - width / 2
    y = float((weights.sum(1) * (np.arange(rows) + 0.5)).sum()) / weight - height / 2
    x, y = min(max(0.0, x), columns - width), min(max(0.0, y), rows - height)
    return x, y, x + width, y + height
