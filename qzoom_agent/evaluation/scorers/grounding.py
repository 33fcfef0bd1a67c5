"""Measures of how well boxes find the targets, for tasks with boxes of the answer.

TreeBench's mIoU is the mean over the targets of the best IoU that a box has with it. Its boxes are the ones a reply
writes as `<box>[x1,y1,x2,y2]</box>` in pixels of the image; the crops that an episode was shown can stand in for them.
Source: TreeVGR, inference_treebench.py, compute_box_iou. That code reads whole numbers without spaces only and drops a
box whose corners are in another order, so a model that writes other boxes has more IoU here; a question without targets
is 0 there and none here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from qzoom_agent.geometry import Box

_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX: Final = re.compile(rf"<box>\s*\[{','.join([_NUMBER] * 4)}\]\s*</box>", re.IGNORECASE)


def written_boxes(text: str | None) -> tuple[Box, ...]:
    """Return the boxes that a reply writes, corners put in order; what cannot be read as a box is left out."""
    return tuple(
        Box(float(x1), float(y1), float(x2), float(y2)).ordered() for x1, y1, x2, y2 in _BOX.findall(text or "")
    )


def mean_iou(targets: Sequence[Box], boxes: Sequence[Box]) -> float | None:
    """Return the mean over the targets of the best IoU, 0 to 1; None without targets, 0 without boxes."""
    return fmean(max((box.iou(target) for box in boxes), default=0.0) for target in targets) if targets else None


def recall(targets: Sequence[Box], boxes: Sequence[Box], *, threshold: float = 0.5) -> float | None:
    """Return the share of targets that some box has an IoU of at least `threshold` with; None without targets."""
    if not targets:
        return None
    return fmean(any(box.iou(target) >= threshold for box in boxes) for target in targets)
