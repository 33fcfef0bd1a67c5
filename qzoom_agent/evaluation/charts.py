"""Two charts as SVG: bars with intervals, and accuracy against cost. Positions are attributes, never styles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from qzoom_agent.evaluation.stats import Figure
from qzoom_agent.report.markup import Html, cut, el

_WIDTH, _HEIGHT = 640.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 150.0, 12.0, 40.0
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


def bars(lines: Sequence[tuple[str, Figure, bool]]) -> Html:
    """(label, share, whether it is a whole task) one below the other, from 0 to 100 %."""
    rows = []
    for label, share, whole in lines:
        marks = [el("rect", x="0", y="2", width=f"{100 * share.mean:.2f}", height="8", cls="fill")]
        if share.interval is not None:
            low, high = (f"{100 * end:.2f}" for end in share.interval)
            marks.append(el("line", x1=low, x2=high, y1="6", y2="6", cls="whisker"))
        picture = el(
            "svg",
            el("rect", x="0", y="2", width="100", height="8", cls="ground"),
            marks,
            viewBox="0 0 100 12",
            preserveAspectRatio="none",
            aria_hidden="true",
        )
        ends = f" [{100 * share.interval.low:.0f}, {100 * share.interval.high:.0f}]" if share.interval else ""
        rows.append(
            el(
                "li",
                el("span", cut(label, 60), cls="what"),
                picture,
                el("span", f"{100 * share.mean:.1f}%", el("i", f"{ends} n {share.n}"), cls="value"),
                cls="whole" if whole else None,
            )
        )
    return el("ol", rows, cls="bars")


def scatter(points: Sequence[ChartPoint]) -> Html:
    """Accuracy from 0 to 100 % over visual tokens from 0, with vertical intervals and a label beside each point."""
    most = max((point.x for point in points), default=0.0) or 1.0
    step = _step(most)
    end = step * math.ceil(1.02 * most / step)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / end

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(_LEFT, y(share), _WIDTH - _RIGHT, y(share), "grid"))
        parts.append(_text(f"{100 * share:.0f}%", _LEFT - 8, y(share) + 4, "end"))
    for count in range(round(end / step) + 1):
        parts.append(_text(f"{count * step:,.0f}", x(count * step), _HEIGHT - _BOTTOM + 18, "middle"))
    parts.append(_text("visual tokens a question", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "middle"))
    for point in points:
        if point.figure.interval is not None:
            low, high = point.figure.interval
            parts.append(_line(x(point.x), y(low), x(point.x), y(high), "whisker"))
    for point, height in zip(points, _spread([(x(point.x), y(point.figure.mean)) for point in points]), strict=True):
        cx, cy = x(point.x), y(point.figure.mean)
        name = f"{point.label}: {100 * point.figure.mean:.1f}% at {point.x:,.0f} tokens"
        size = "6" if point.main else "4.5"
        parts.append(
            el("circle", el("title", name), cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=size, cls="main" if point.main else None)
        )
        parts.append(_text(cut(point.label, 24), cx + 11, height + 4, "start"))
    alt = "; ".join(f"{point.label} {100 * point.figure.mean:.0f}% at {point.x:,.0f}" for point in points)
    return el("svg", parts, viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}", role="img", aria_label=alt, cls="scatter")


def _step(most: float) -> float:
    """A round distance of ticks that makes three to six of them."""
    unit = 10.0 ** math.floor(math.log10(most))
    return next(size * unit for size in (0.2, 0.5, 1.0, 2.0) if most / (size * unit) <= 6)


def _spread(places: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of labels at these places, moved apart from the lowest upwards so that no two cover each other."""
    heights = [height for _, height in places]
    done: list[int] = []
    for at in sorted(range(len(places)), key=lambda at: -heights[at]):
        for below in done:
            if abs(places[at][0] - places[below][0]) < _NEAR and heights[below] - heights[at] < _LINE:
                heights[at] = heights[below] - _LINE
        done.append(at)
    return heights


def _line(x1: float, y1: float, x2: float, y2: float, cls: str) -> Html:
    return el("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", cls=cls)


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return el("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
