"""From attention to training labels for SD-RPN: foreground, background, or left out of the loss.

A model that answers well looks at the right place, so its own attention from answer to image labels that image
(SD-RPN, arXiv 2509.16944; Q-Zoom, arXiv 2604.06912, section 3.1). Only the two ends of a map can be trusted: what is
near the peak is foreground, what is far below it and outside the foreground's box is background, and the middle
teaches nothing. Attention sinks are neither evidence nor foreground.

The rules and defaults are those of the published stage-1 scripts, held to 25 recorded maps; `PAPER` has the papers'
formula. Everything is pure numpy in float64, one image a call. The published code has a second, batched routine that
disagrees with the first (it swaps rows and columns); it is not here. How attention is read off a model, and when its
answer is good enough to learn from, is not decided here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qzoom_agent.geometry import Size
from qzoom_agent.perception.maps import MapRegion

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -100

Heads = Mapping[int, Sequence[int]]
"""Heads of a decoder by layer, both counted from 0."""
Mode = Literal["textual", "natural"]
"""What the answer has to be read off: print, or objects in a scene."""


class LabelRules(BaseModel):
    """Where the lines between foreground, background and neither are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sink: float = Field(default=0.01, gt=0)
    """Value of the sink map from which a cell is a sink: attention of sink heads, or norms where those are given."""
    foreground: float = Field(default=0.25, ge=0, lt=1)
    """Share of the peak above which a cell is foreground."""
    background: float = Field(default=0.05, ge=0, lt=1)
    """Share of the peak below which a cell outside the foreground's box is background."""
    blur_kernel: int = Field(default=3, ge=1)
    """Width of the blur of the foreground before its box is taken: the box grows by half of it, rounded down."""
    area_limit: float = Field(default=0.5, gt=0, le=1)
    """Share of the map from which a box is too large to teach where to look: nothing is labelled."""
    least_peak: float = Field(default=0.005, ge=0)
    """A map with a lower peak is noise: nothing is labelled."""


PUBLISHED = LabelRules()
"""The published stage-1 scripts, for the Qwen families."""
LLAVA = LabelRules(sink=1e-3, blur_kernel=1)
"""What is known to differ for LLaVA-1.5: sinks are found ten times lower, and the box does not grow."""
CROP_BASELINE = LabelRules(foreground=0.2)
"""The published baseline that crops by raw attention, without padding."""
PAPER = LabelRules(foreground=0.2, blur_kernel=1, area_limit=1.0, least_peak=0.0)
"""The papers' formula with the shares that their ablation found best: a tight box, no map left out (unless its box is
all of it). Its sinks are visual tokens of a large norm, so give norms as the sink map and their limit as `sink`."""


class Labels(NamedTuple):
    """The labels of one image."""

    labels: NDArray[np.int64]
    """(rows, columns): 1 foreground, 0 background, -100 neither."""
    excluded: NDArray[np.bool]
    """(rows, columns): sinks and padding, which are never foreground."""
    box: MapRegion
    """Around the foreground, grown; the whole map where nothing is foreground. Its peak is that of the map."""

    @property
    def usable(self) -> bool:
        """Whether anything is labelled."""
        return bool((self.labels != IGNORED).any())


def make_labels(
    attention: NDArray[Any],
    sink: NDArray[Any] | None = None,
    rules: LabelRules = PUBLISHED,
    *,
    shown: Size | None = None,
) -> Labels:
    """The labels of one image.

    Args:
        attention: (rows, columns) attention from the answer to each cell, of grounding heads.
        sink: (rows, columns) by which sinks are found, see `LabelRules.sink`; None: there are none.
        shown: size of the image before it was padded to a square, whose padding then is background; None: not padded.
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
    is_sink = sinks >= rules.sink
    padding = np.zeros(heat.shape, dtype=np.bool)
    if shown is not None:
        if rows != columns:
            raise ValueError(f"an image padded to a square has a square map, not {rows} x {columns}")
        padding[:] = True
        padding[picture_cells(shown, rows)] = False
    excluded = is_sink | padding

    clean = np.where(excluded, 0.0, heat)
    peak = float(clean.max())
    inside = (clean > rules.foreground * peak) & (clean > 0)
    box = _grown_box(inside, rules.blur_kernel // 2, peak)
    area = (box.x2 - box.x1) * (box.y2 - box.y1)
    labels = np.full(heat.shape, IGNORED, dtype=np.int64)
    if area < rules.area_limit * rows * columns and peak >= rules.least_peak:
        outside = np.ones(heat.shape, dtype=np.bool)
        outside[box.y1 : box.y2, box.x1 : box.x2] = False
        # a sink outside the box is background, like anything else that the answer does not need
        quiet = np.where(is_sink, 0.0, heat) < rules.background * peak
        labels[(outside & quiet) | padding] = BACKGROUND
        labels[inside] = FOREGROUND
    return Labels(labels, excluded, box)


def _grown_box(inside: NDArray[np.bool], radius: int, peak: float) -> MapRegion:
    rows, columns = inside.shape
    if not inside.any():
        return MapRegion(0, 0, columns, rows, peak)
    ys, xs = np.nonzero(inside)
    return MapRegion(
        max(0, int(xs.min()) - radius),
        max(0, int(ys.min()) - radius),
        min(columns, int(xs.max()) + 1 + radius),
        min(rows, int(ys.max()) + 1 + radius),
        peak,
    )


def picture_cells(shown: Size, side: int) -> tuple[slice, slice]:
    """Rows and columns of a `side` x `side` map that show an image of this size centred in a square.

    As published: the short side takes whole cells, rounded down but at least one, and one more where it would
    otherwise not be centred.
    """
    cells = max(1, math.floor(min(shown) / max(shown) * side))
    free = side - cells
    short, whole = slice(free // 2, cells + (free + 1) // 2), slice(0, side)
    return (short, whole) if shown.width >= shown.height else (whole, short)


def aggregate(
    steps: Mapping[int, Sequence[Tensor]], heads: Heads, *, start: int, rows: int, columns: int, official: bool = False
) -> NDArray[np.float32]:
    """One map (rows, columns) of the attention of some heads, the mean over generated tokens and heads.

    Args:
        steps: by layer, for each step of generation after the prompt's, the attention (heads, keys) of its one query.
        heads: none give a map of zeros.
        start: index of the image's first visual token among the keys.
        official: round to float16 after reading and after the mean over steps, as the published code does.
    Raises:
        ValueError: a layer has no steps (an answer of a single token is never read).
    """
    total = np.zeros(rows * columns, dtype=np.float32)
    for layer, chosen in heads.items():
        if not steps.get(layer):
            raise ValueError(f"layer {layer} has no steps, so its attention has no mean")
        seen = torch.stack([step[list(chosen), start : start + rows * columns] for step in steps[layer]])
        mean = seen.half().float().mean(dim=0).half().float() if official else seen.float().mean(dim=0)
        total += mean.sum(dim=0).cpu().numpy()
    count = sum(len(chosen) for chosen in heads.values())
    return (total / np.float32(max(1, count))).reshape(rows, columns)


class HeadSet(NamedTuple):
    """The heads whose attention makes the two maps."""

    grounding: Heads
    sink: Heads
    """Empty: no sinks are removed."""


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
"""The heads published for each base, by the name of its preset. They were picked by hand."""

_SHORT_ANSWER = "Answer the question using a single word or phrase."
_ASK_FOR_BOXES = (
    "Output the grounding bounding box of Region of Interest for the question. IMPORTANT: The output MUST be raw text, "
    "one box per line. DO NOT use JSON. Follow this exact format: x_min y_min x_max y_max {detail_label}."
)


def prepared_prompt(question: str, mode: Mode, *, keep_short: bool = True) -> str:
    """The question as it is asked to collect attention (training asks the unchanged one).

    Of a scene the model is asked for boxes, in place of the sentence that asks for a short answer or after the
    question, so that the tokens of its answer look at objects.

    Args:
        keep_short: of print, leave that sentence in (DocVQA was asked without).
    """
    if mode == "natural":
        asked = question if _SHORT_ANSWER in question else f"{question.strip()} {_SHORT_ANSWER}"
        return asked.replace(_SHORT_ANSWER, _ASK_FOR_BOXES).strip()
    if keep_short or _SHORT_ANSWER not in question:
        return question
    return question.replace(_SHORT_ANSWER, "").strip()
