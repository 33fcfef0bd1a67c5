"""From attention to training labels for SD-RPN: foreground, background, or left out of the loss.

A model that answers well attends to the right place, so its own attention from answer to image labels that image
(SD-RPN, arXiv 2509.16944; Q-Zoom, arXiv 2604.06912, section 3.1). Only the two ends of a map are used: cells near the
peak are foreground, cells far below it and outside the foreground's box are background, the rest is ignored. Attention
sinks are never foreground.

The defaults are the rules of the published stage-1 scripts, tested on 25 recorded maps. All functions are pure numpy in
float64, one image a call. The published batched routine is not here: it swaps rows and columns.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from qzoom_agent.geometry import Size
from qzoom_agent.perception.maps import MapRegion

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -100

Heads = Mapping[int, Sequence[int]]
"""Heads of a decoder by layer, both counted from 0."""
Mode = Literal["textual", "natural"]
"""Kind of image: print, or objects in a scene."""


class LabelRules(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Thresholds between foreground, background and ignored cells."""

    sink: float = Field(default=0.01, gt=0)
    """Value of the sink map from which a cell is a sink: attention of sink heads, or norms where those are given."""
    foreground: float = Field(default=0.25, ge=0, lt=1)
    """Share of the peak above which a cell is foreground."""
    background: float = Field(default=0.05, ge=0, lt=1)
    """Share of the peak below which a cell outside the foreground's box is background."""
    blur_kernel: int = Field(default=3, ge=1)
    """Width of the blur of the foreground before its box is taken: the box grows by half of it, rounded down."""
    area_limit: float = Field(default=0.5, gt=0, le=1)
    """Share of the map from which a box is too large: nothing is labelled."""
    least_peak: float = Field(default=0.005, ge=0)
    """Lowest peak of a map; below it the map is noise and nothing is labelled."""


PUBLISHED = LabelRules()
"""The published stage-1 scripts, for the Qwen families."""
CROP_BASELINE = LabelRules(foreground=0.2)
"""The published baseline that crops by raw attention, without padding."""


class Labels(NamedTuple):
    """The labels of one image."""

    labels: NDArray[np.int64]
    """(rows, columns): 1 foreground, 0 background, -100 neither."""
    excluded: NDArray[np.bool]
    """(rows, columns): sinks and padding, which are never foreground."""
    box: MapRegion
    """Grown box around the foreground; the whole map if nothing is foreground. Its peak is that of the map."""

    @property
    def usable(self) -> bool:
        """True if any cell is labelled."""
        return bool((self.labels != IGNORED).any())


def make_labels(
    attention: NDArray[Any],
    sink: NDArray[Any] | None = None,
    rules: LabelRules = PUBLISHED,
    *,
    shown: Size | None = None,
) -> Labels:
    """Make the labels of one image.

    Args:
        attention: (rows, columns) attention from the answer to each cell, of grounding heads.
        sink: (rows, columns) map in which sinks are high, see `LabelRules.sink`; None: there are no sinks.
        shown: size of the image before it was padded to a square; the padding is background. None: not padded.

    Raises:
        ValueError: the maps are not two equal (rows, columns) of finite numbers, or a padded one is not square.
    """
    heat = np.asarray(attention, dtype=np.float64)
    sinks = np.zeros_like(heat) if sink is None else np.asarray(sink, dtype=np.float64)
    if heat.ndim != 2 or heat.size == 0 or heat.shape != sinks.shape:
        raise ValueError(f"maps of {heat.shape} and {sinks.shape}; both must be the same (rows, columns)")
    if not (np.isfinite(heat).all() and np.isfinite(sinks).all()):
        raise ValueError("a map holds numbers that are not finite")
    rows, columns = heat.shape
    if shown is not None and rows != columns:
        raise ValueError(f"an image padded to a square has a square map, not {rows} x {columns}")
    is_sink = sinks >= rules.sink
    padding = np.full(heat.shape, shown is not None)
    if shown is not None:
        padding[picture_cells(shown, rows)] = False
    excluded = is_sink | padding

    clean = np.where(excluded, 0.0, heat)
    peak = float(clean.max())
    inside = (clean > rules.foreground * peak) & (clean > 0)
    box = MapRegion(0, 0, columns, rows, peak)
    if inside.any():
        (ys, xs), radius = np.nonzero(inside), rules.blur_kernel // 2
        x1, y1 = max(0, int(xs.min()) - radius), max(0, int(ys.min()) - radius)
        x2, y2 = min(columns, int(xs.max()) + 1 + radius), min(rows, int(ys.max()) + 1 + radius)
        box = MapRegion(x1, y1, x2, y2, peak)
    area = (box.x2 - box.x1) * (box.y2 - box.y1)
    labels = np.full(heat.shape, IGNORED, dtype=np.int64)
    if area < rules.area_limit * rows * columns and peak >= rules.least_peak:
        outside = np.ones(heat.shape, dtype=np.bool)
        outside[box.y1 : box.y2, box.x1 : box.x2] = False
        # a sink outside the box is background, like any cell that the answer does not need
        quiet = np.where(is_sink, 0.0, heat) < rules.background * peak
        labels[(outside & quiet) | padding] = BACKGROUND
        labels[inside] = FOREGROUND
    return Labels(labels, excluded, box)


def picture_cells(shown: Size, side: int) -> tuple[slice, slice]:
    """Return the rows and columns of a `side` x `side` map that show an image of this size centred in a square.

    As published, the short side takes whole cells: rounded down, at least one, and one more if it is not centred then.
    """
    cells = max(1, math.floor(min(shown) / max(shown) * side))
    free = side - cells
    short, whole = slice(free // 2, cells + (free + 1) // 2), slice(0, side)
    return (short, whole) if shown.width >= shown.height else (whole, short)


class HeadSet(NamedTuple):
    """Heads that make the two maps."""

    grounding: Heads
    sink: Heads
    """If empty, no sinks are removed."""


HEADS: dict[str, dict[Mode, HeadSet]] = {
    "qwen2.5-vl-3b": {
        "textual": HeadSet({20: (1, 4), 22: (14,)}, {}),
        "natural": HeadSet({21: (9, 11), 22: (0, 7)}, {8: (1, 13)}),
    },
    "qwen2.5-vl-7b": {
        "textual": HeadSet({22: (1, 4), 23: (6, 11)}, {}),
        "natural": HeadSet({16: (1, 7, 17), 19: (17, 20)}, {9: (4, 22)}),
    },
    "qwen3-vl-4b": {
        "textual": HeadSet({19: (24, 27), 24: (21, 23)}, {24: (6, 10)}),
        "natural": HeadSet({20: (15, 21, 23), 21: (8, 10, 11)}, {20: (1, 24)}),
    },
    "qwen3-vl-8b": {
        "textual": HeadSet({19: (24, 26, 27), 24: (21, 22, 23)}, {24: (1, 2)}),
        "natural": HeadSet({20: (15, 21, 23), 21: (8, 10, 11)}, {21: (7,)}),
    },
    # the same heads for both, and of the smaller one all heads of a low layer find the sinks
    "llava-1.5-7b": dict.fromkeys(("textual", "natural"), HeadSet({14: (13, 24, 26)}, {2: range(32)})),
    "llava-1.5-13b": dict.fromkeys(
        ("textual", "natural"), HeadSet({13: (21, 23, 26), 15: (2,), 16: (2, 21, 30)}, {16: (17, 22)})
    ),
}
"""Published heads of each base, chosen by hand, by the name of its preset."""

_SHORT_ANSWER = "Answer the question using a single word or phrase."
_ASK_FOR_BOXES = (
    "Output the grounding bounding box of Region of Interest for the question. IMPORTANT: The output MUST be raw text, "
    "one box per line. DO NOT use JSON. Follow this exact format: x_min y_min x_max y_max {detail_label}."
)


def prepared_prompt(question: str, mode: Mode, *, keep_short: bool = True) -> str:
    """Return the question in the form that attention is collected with (training uses the unchanged question).

    In a scene the model is asked for boxes, so that the tokens of its answer attend to objects. That sentence replaces
    the one that asks for a short answer, or follows the question.

    Args:
        keep_short: keep the sentence that asks for a short answer in print (DocVQA was asked without).
    """
    if mode == "natural":
        asked = question if _SHORT_ANSWER in question else f"{question.strip()} {_SHORT_ANSWER}"
        return asked.replace(_SHORT_ANSWER, _ASK_FOR_BOXES).strip()
    if keep_short or _SHORT_ANSWER not in question:
        return question
    return question.replace(_SHORT_ANSWER, "").strip()
