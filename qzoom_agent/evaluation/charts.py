"""Places of the points and labels of the scatter chart of a run's page; templates/charts.html.jinja draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from qzoom_agent.evaluation.stats import Figure

_LINE = 15.0
"""Least distance of two labels."""
_NEAR = 130.0
"""Labels that are further apart than this stand beside each other."""


class ChartPoint(NamedTuple):
    """A run, a task or a kind."""

    label: str
    x: float
    figure: Figure
    main: bool
    """The run that the page is about."""


class Scatter:
    """Accuracy from 0 to 100 % over visual tokens from 0, in units of the picture."""

    width, height = 640, 320
    left, right, top, bottom = 62.0, 490.0, 12.0, 280.0

    def __init__(self, points: Sequence[ChartPoint]) -> None:
        self.points = points
        most = max((point.x for point in points), default=0.0) or 1.0
        step = _step(most)
        self.end = step * math.ceil(1.02 * most / step)
        self.ticks = [count * step for count in range(round(self.end / step) + 1)]
        self.heights = _spread([(self.x(point.x), self.y(point.figure.mean)) for point in points])
        self.alt = "; ".join(f"{each.label} {100 * each.figure.mean:.0f}% at {each.x:,.0f}" for each in points)

    def x(self, tokens: float) -> float:
        """Return the place of a number of visual tokens."""
        return self.left + (self.right - self.left) * tokens / self.end

    def y(self, share: float) -> float:
        """Return the height of an accuracy."""
        return self.bottom - (self.bottom - self.top) * share


def _step(most: float) -> float:
    """Return a round distance of ticks that makes three to six of them."""
    unit = 10.0 ** math.floor(math.log10(most))
    return next(size * unit for size in (0.2, 0.5, 1.0, 2.0) if most / (size * unit) <= 6)


def _spread(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return heights of labels at these places, moved apart from the lowest upwards so that none covers another."""
    heights = [height for _, height in places]
    done: list[int] = []
    for at in sorted(range(len(places)), key=lambda at: -heights[at]):
        for below in done:
            if abs(places[at][0] - places[below][0]) < _NEAR and heights[below] - heights[at] < _LINE:
                heights[at] = heights[below] - _LINE
        done.append(at)
    return heights
