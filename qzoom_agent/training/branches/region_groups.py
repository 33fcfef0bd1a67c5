"""Regions of a map as actions, and their advantages: the arithmetic of `qzoom train regions`, without a model.

A reader is shown sets of regions, and the log-odds that it gives the right answer are the value of a set. The gain of a
region is the value with it minus the value without it. Two groups of a question's regions are rewarded by their gains:

subtractive     The regions that the map proposes. One that gains less than the noise margin is a distractor and is
                pruned, another is kept. The margin is the gain of control regions, which lie anywhere.
additive        The next peaks of the map, and proposed regions moved a little. One that gains more than the margin (and
                more than the weakest proposed one, if no more regions may be shown) is evidence that was missed.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.perception.maps import MapRegion, foreground, region_parts, smoothed

_NEXT_SHARE = 0.5
"""Share of a next peak from which its neighbours belong to its region, where the rule of the map is absolute."""
_DRAWS = 8
"""Places that are tried for a control region beside all proposed ones."""


class Region(NamedTuple):
    """A region of a map: what is cropped for it, and whose probabilities decide on it."""

    box: MapRegion
    weights: NDArray[np.float32]
    """(rows, columns), sum 1: weights of cells in the region's log-probability. They are its cells' shares of its heat,
    or of a box of fixed sides, which follows from its centre, those of the cells around the centre."""
    centred: bool = False
    """The box has fixed sides."""


class Advantages(NamedTuple):
    """The advantages of a question's regions, from -1 to 1."""

    kept: list[float]
    """Of each proposed region: positive to keep it, negative to prune it."""
    added: list[float]
    """Of each candidate: positive for the one with most of the missed evidence, else 0."""


def proposed_regions(heat: Tensor, options: PerceptionConfig) -> list[Region]:
    """Return the regions that inference crops, best first; `options` has to set the rules of the map."""
    found = foreground(heat, options.threshold or 0.0, options)
    parts = region_parts(heat, found, limit=options.max_regions, sides=options.box)
    return [_region(heat, *each, options) for each in parts]


def next_regions(heat: Tensor, taken: Sequence[Region], count: int, options: PerceptionConfig) -> list[Region]:
    """Return the regions around the next peaks of a map, best first: those of what `taken` and one another leave."""
    rules = options.model_copy(update={"peak_share": options.peak_share or _NEXT_SHARE, "peak_to_mean": None})
    left = heat.clone()
    found: list[Region] = []
    for region in taken:
        left[cells_inside(region, left.shape)] = 0.0
    while len(found) < count and float(left.max()) > 0.0:
        # a limit above one asks for connected parts, whatever the rule of the branches
        ((box, part), *_) = region_parts(left, foreground(left, 0.0, rules), limit=2, sides=options.box)
        found.append(_region(left, box, part, options))
        left[cells_inside(found[-1], left.shape)] = 0.0
    return found


def cells_inside(region: Region, shape: Sequence[int]) -> NDArray[np.bool]:
    """Return the cells (rows, columns) that are a region's own, or have their centre in its box."""
    (rows, columns), box = shape, region.box
    down, right = np.arange(rows)[:, None] + 0.5, np.arange(columns)[None] + 0.5
    inside = (box.y1 <= down) & (down < box.y2) & (box.x1 <= right) & (right < box.x2)
    found: NDArray[np.bool] = inside | (region.weights > 0)
    return found


def moved(region: Region, right: float, down: float) -> Region:
    """Return a region so many cells to the right and down, or as far as its box stays inside the map."""
    box, (rows, columns) = region.box, region.weights.shape
    right = min(max(box.x1 + right, 0.0), columns - (box.x2 - box.x1)) - box.x1
    down = min(max(box.y1 + down, 0.0), rows - (box.y2 - box.y1)) - box.y1
    box = MapRegion(box.x1 + right, box.y1 + down, box.x2 + right, box.y2 + down, box.peak)
    if region.centred:
        return Region(box, _around(box, (rows, columns)), centred=True)
    weights: NDArray[np.float32] = _steps(rows, down) @ (region.weights @ _steps(columns, right).T)
    left = float(weights.sum())
    return Region(box, weights / left if left > 0 else region.weights)  # a part at the edge moved out of the map


def moved_regions(regions: Sequence[Region], count: int, *, reach: float, rng: Random) -> list[Region]:
    """Return `count` of the regions in turn, each moved at random by at most `reach` of its box's sides."""
    found = []
    for at in range(count if regions else 0):
        one = regions[at % len(regions)]
        wide, high = one.box.x2 - one.box.x1, one.box.y2 - one.box.y1
        found.append(moved(one, rng.uniform(-reach, reach) * wide, rng.uniform(-reach, reach) * high))
    return found


def control_region(proposed: Sequence[Region], rng: Random) -> Region:
    """Return a region as large as the first proposed one, somewhere else on the map as far as there is room."""
    first, (rows, columns) = proposed[0], proposed[0].weights.shape
    found = first
    for _ in range(_DRAWS):
        found = moved(first, rng.uniform(-columns, columns), rng.uniform(-rows, rows))
        if not any(_overlap(found.box, one.box) for one in proposed):
            break
    return found


def noise_margin(controls: Sequence[float], *, quantile: float, least: float) -> float:
    """Return the gain that a region may have by chance: a quantile of those of control regions, at least `least`."""
    return max(least, float(np.quantile(controls, quantile))) if controls else least


def advantages(
    gains: Sequence[float], added: Sequence[float], *, margin: float, replaced: int | None = None
) -> Advantages:
    """Return the advantages of a question's regions.

    A group is divided by its largest advantage, unless that is less than one unit of log-odds: a question that no
    region decides teaches little.

    Args:
        replaced: Index of the proposed region whose place a candidate takes; None: there is room for one more. A
            candidate has to gain more than that region, and more than nothing, and if one does, the region is not kept.
    """
    least = margin if replaced is None else margin + max(0.0, gains[replaced])
    best = max(added, default=0.0)
    missed = _scaled([max(0.0, gain - least) if gain == best else 0.0 for gain in added])
    kept = _scaled([gain - margin for gain in gains])
    if replaced is not None and any(missed):
        kept[replaced] = min(0.0, kept[replaced])
    return Advantages(kept, missed)


def cell_targets(
    proposed: Sequence[NDArray[np.float32]],
    candidates: Sequence[NDArray[np.float32]],
    found: Advantages,
    replaced: int | None = None,
) -> NDArray[np.float32]:
    """Return how far log-probabilities of cells are raised, (2, ...): to be foreground, and to be background.

    Regions are given by their weights. A candidate that takes the place of a proposed region raises its own cells, and
    lets the other cells of that region go.
    """
    up, down = targets = np.zeros((2, *(*proposed, *candidates)[0].shape), np.float32)
    for weights, value in zip(proposed, found.kept, strict=True):
        (up if value > 0 else down)[:] += abs(value) * weights
    for weights, value in zip(candidates, found.added, strict=True):
        up += value * weights
        if replaced is not None:
            down += value * np.maximum(proposed[replaced] - weights, 0.0)
    return targets


def log_odds(log_probability: float) -> float:
    """Return the log-odds of a text from its log-probability."""
    certain = min(log_probability, -1e-4)  # beyond that float32 tells nothing apart
    return certain - math.log(-math.expm1(certain))


def _region(heat: Tensor, box: MapRegion, part: NDArray[np.bool], options: PerceptionConfig) -> Region:
    if options.box is not None:
        return Region(box, _around(box, part.shape), centred=True)
    inside = heat.numpy() * part
    if not inside.any():  # sinks that the blur alone made foreground, from the cells around them
        inside = heat.numpy() * (smoothed(torch.from_numpy(part.astype(np.float32)), options) > 0).numpy()
    return Region(box, inside / inside.sum())


def _around(box: MapRegion, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the weights of the four cells around the centre of a box, by their distances from it."""
    down, right = _nearest(shape[0], (box.y1 + box.y2) / 2), _nearest(shape[1], (box.x1 + box.x2) / 2)
    weights: NDArray[np.float32] = np.outer(down / down.sum(), right / right.sum()).astype(np.float32)
    return weights


def _scaled(values: list[float]) -> list[float]:
    largest = max([1.0, *map(abs, values)])
    return [value / largest for value in values]


def _overlap(one: MapRegion, other: MapRegion) -> bool:
    return one.x1 < other.x2 and other.x1 < one.x2 and one.y1 < other.y2 and other.y1 < one.y2


def _nearest(size: int, place: float) -> NDArray[np.float64]:
    """Return the weights of the cells of an axis by their distances from a place, of the two next to it alone."""
    weights: NDArray[np.float64] = np.clip(1 - np.abs(np.arange(size) + 0.5 - place), 0, None)
    return weights


def _steps(size: int, by: float) -> NDArray[np.float32]:
    """Return the matrix that moves values along an axis by a number of cells; what leaves the map is dropped."""
    return np.stack([_nearest(size, at + 0.5 + by) for at in range(size)], axis=1).astype(np.float32)
