"""Sparse crops: a crop is encoded finer, and only its tokens on the foreground of the map are shown.

Text and objects often fill a small part of a box. A whole crop spends its tokens on the rest as well; a sparse one
spends them on the foreground, in more detail.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qzoom_agent.geometry import Box, Size, fit_tokens
from qzoom_agent.views import Kept
from qzoom_agent.zoom.zoom import ZoomPlan

_STEP: Final = 0.95
"""Ratio of a scale to the next larger one that is tried."""
_NOISE: Final = 1e-6


def sparse_plan(plan: ZoomPlan, foreground: Sequence[Box], *, scale: float, factor: int) -> ZoomPlan:
    """Return a plan that shows some tokens of the same crop, at the largest scale that costs no more than `plan`.

    Args:
        plan: A crop as it is shown whole.
        foreground: Boxes in original pixels. A token is kept if it or one of its eight neighbours touches one of them.
        scale: Most times that each side is encoded larger.
        factor: Side in pixels of one token.

    Returns:
        The plan with its new size, tokens and `kept`; the plan itself if nothing would be left out.
    """
    if plan.box is None:
        return plan
    side, whole = scale, (int(plan.box.width), int(plan.box.height))
    while side > 1:
        count = int(plan.tokens * side**2)
        size = fit_tokens(whole, factor=factor, min_tokens=count, max_tokens=count)
        kept = _near(plan.box, size, foreground, factor)
        if 0 < int(kept.sum()) <= plan.tokens:
            return _thinned(plan, size, kept)
        side *= _STEP
    kept = _near(plan.box, plan.size, foreground, factor)
    return _thinned(plan, plan.size, kept) if kept.any() else plan


def _near(box: Box, size: Size, foreground: Sequence[Box], factor: int) -> NDArray[np.bool]:
    """Return which tokens (rows, columns) of a crop shown at this size touch the foreground, or have a neighbour that
    does.
    """
    columns, rows = size.width // factor, size.height // factor
    kept = np.zeros((rows, columns), dtype=np.bool)
    across, down = columns / box.width, rows / box.height
    for part in foreground:
        left, right = _touched((part.x1 - box.x1) * across, (part.x2 - box.x1) * across, columns)
        top, bottom = _touched((part.y1 - box.y1) * down, (part.y2 - box.y1) * down, rows)
        if left < right and top < bottom:
            kept[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    return kept


def _touched(low: float, high: float, count: int) -> tuple[int, int]:
    """Return the first cell of 0..count that an interval touches, and the one behind the last."""
    return max(0, floor(low + _NOISE)), min(count, ceil(high - _NOISE))


def _thinned(plan: ZoomPlan, size: Size, kept: NDArray[np.bool]) -> ZoomPlan:
    if kept.all():
        return plan
    rows: Kept = tuple("".join("01"[mark] for mark in row) for row in kept.astype(int).tolist())
    return replace(plan, size=size, tokens=int(kept.sum()), kept=rows)
