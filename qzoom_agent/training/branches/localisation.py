"""Where a map points, against boxes that are known: what the published code never measures.

`look_at` runs the branches once over held-out questions and keeps logits and scores; everything else (recall at a
threshold, IoU, the area under the ROC curve) is arithmetic on those, so thresholds are swept without the model.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.geometry import Box, Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import Grid
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.look import look
from qzoom_agent.perception.maps import MapRegion, foreground, regions, widened
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.inputs import ask, lower_states
from qzoom_agent.views import View

COVERED = 0.95
"""Share of a needle that has to lie in the crop."""


class LookOutcome(NamedTuple):
    """What the branches made of one question."""

    id: str
    score: float | None
    """The gate's probability; None without one."""
    heat: Tensor
    """(rows, columns) probabilities, 0 on sinks."""
    coarse: View
    image: Size
    boxes: list[Box] | None
    """Where the answer is, in pixels of the image; None where nobody knows."""
    grid: Grid
    """The cells of `heat`, and where they lie in the coarse view."""

    def proposal(self, options: PerceptionConfig) -> Box | None:
        """The box around the foreground, with its margin, in pixels of the image; None: nothing stands out.

        `options` has to say what is foreground (see `perception.look.resolve_options`).
        """
        found = regions(self.heat, foreground(self.heat, options.threshold or 0.0, options), sides=options.box)
        if not found:
            return None
        return widened(in_pixels(found[0], self.grid, self.coarse), options.margin or 0.0, self.image)


class Localisation(BaseModel):
    """How well the map finds what is known to be there. Shares are None where no question has a box."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    n: int
    """Questions with a box."""
    recall: float | None
    """Share of them whose needle lies in the proposed box, 95 % of it at least."""
    iou: float | None
    """Mean intersection over union of proposed and smallest box (0 where nothing is proposed)."""
    area: float | None
    """Mean share of the image that is proposed: recall is cheap with large boxes."""
    auc: float | None
    """Area under the ROC curve: a cell that shows the needle against one that does not, mean over questions."""
    proposed: float | None
    """Share for which anything is proposed."""


def look_at(
    backend: HFBackend, records: Records, *, tokens: int | None, batch: int = 16, limit: int | None = None
) -> list[LookOutcome]:
    """Gate scores and maps of all records at a budget."""
    count = len(records) if limit is None else min(limit, len(records))
    out = []
    for start in range(0, count, batch):
        rows = [records[index] for index in range(start, min(start + batch, count))]
        out += maps_of(backend, rows, tokens=tokens)
    return out


def maps_of(backend: HFBackend, records: Sequence[Record], *, tokens: int | None) -> list[LookOutcome]:
    """Gate scores and maps of one batch."""
    branches = backend.branches
    assert branches is not None
    asked = ask(backend, records, [tokens] * len(records))
    states = lower_states(backend, asked, branches.config.k)
    found = look(
        branches,
        Decoder(backend.model).adapter,
        states.hidden,
        rotary=states.rotary,
        mask=states.mask,
        images=states.images,
        starts=states.starts,
        options=PerceptionConfig(threshold=0.0, gate="learned" if branches.gate is not None else "off"),
        map_always=True,
    )
    out = []
    for row, one, seen in zip(records, asked, found, strict=True):
        coarse, size = one.store.view("coarse"), one.store.view("original").size
        out.append(LookOutcome(row["id"], seen.score, seen.maps[0].heat, coarse, size, known_boxes(row), one.cells))
    return out


def known_boxes(record: Record) -> list[Box] | None:
    """Where the answer is, in pixels of the image; None where nobody knows."""
    return None if record["boxes"] is None else [Box(x1, y1, x2, y2) for x1, y1, x2, y2 in record["boxes"]]


def localisation(seen: Sequence[LookOutcome], options: PerceptionConfig) -> Localisation:
    """The figures under one rule of what is foreground; questions without a box do not count."""
    hits, overlaps, areas, curves, proposed = [], [], [], [], 0
    for one in seen:
        if not one.boxes:
            continue
        target = around(one.boxes)
        box = one.proposal(options)
        proposed += box is not None
        hits.append(box is not None and all(box.coverage(needle) >= COVERED for needle in one.boxes))
        overlaps.append(0.0 if box is None else box.iou(target))
        areas.append(0.0 if box is None else box.area / one.image.area)
        curve = auc(one)
        if curve is not None:
            curves.append(curve)
    n = len(hits)
    if n == 0:
        return Localisation(n=0, recall=None, iou=None, area=None, auc=None, proposed=None)
    return Localisation(
        n=n,
        recall=fmean(hits),
        iou=fmean(overlaps),
        area=fmean(areas),
        auc=fmean(curves) if curves else None,
        proposed=proposed / n,
    )


def in_pixels(region: MapRegion, grid: Grid, coarse: View) -> Box:
    """A region of the coarse view's map, in pixels of the image and as far as it shows the image."""
    box = grid.to_view(region.x1, region.y1, region.x2, region.y2, view="coarse")
    return coarse.to_original(box.clamp(coarse.size))


def around(boxes: Sequence[Box]) -> Box:
    """The box around several."""
    return Box(
        min(box.x1 for box in boxes),
        min(box.y1 for box in boxes),
        max(box.x2 for box in boxes),
        max(box.y2 for box in boxes),
    )


def auc(one: LookOutcome) -> float | None:
    """Probability that a cell with part of a needle is hotter than one without; None where all or none has."""
    inside = needle_cells(one.grid, one.coarse, one.boxes or ())
    hot, cold = one.heat[inside], one.heat[~inside]
    if len(hot) == 0 or len(cold) == 0:
        return None
    wins = (hot[:, None] > cold[None]).double().mean() + 0.5 * (hot[:, None] == cold[None]).double().mean()
    return float(wins)


def needle_cells(grid: Grid, coarse: View, boxes: Sequence[Box]) -> Tensor:
    """(rows, columns) bool: cells of the coarse view's map that show part of a box."""
    rows, columns, (wide, high), (left, top) = grid.rows, grid.columns, grid.cell, grid.corner
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for box in boxes:
        shown = coarse.from_original(box)
        x1, y1 = max(0, math.floor((shown.x1 - left) / wide)), max(0, math.floor((shown.y1 - top) / high))
        x2, y2 = min(columns, math.ceil((shown.x2 - left) / wide)), min(rows, math.ceil((shown.y2 - top) / high))
        inside[y1:y2, x1:x2] = True
    return inside
