"""Localisation: how well the map points at known boxes.

`look_at_records` runs the branches once over held-out questions; all figures are computed from the maps and scores that
it keeps, so thresholds are swept without the model.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.geometry import Box, Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import Grid
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.look import look
from qzoom_agent.perception.maps import MapRegion, foreground, regions
from qzoom_agent.training.branches.base_inference import ask, lower_states, record_batches
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.views import View

COVERED = 0.95
"""Share of a needle that has to lie in the crop."""


class LookOutcome(NamedTuple):
    """Gate score and map of one question."""

    id: str
    score: float | None
    """The gate's probability; None without one."""
    heat: Tensor
    """(rows, columns) probabilities, 0 on sinks."""
    coarse: View
    image: Size
    boxes: list[Box] | None
    """Boxes of the answer, in pixels of the image; None: unknown."""
    grid: Grid
    """The cells of `heat`, and where they lie in the coarse view."""

    def proposal(self, options: PerceptionConfig) -> Box | None:
        """Return the box around the foreground, with its margin, in pixels of the image; None: there is no foreground.

        `options` has to set the rule (see `perception.look.resolve_options`).
        """
        found = regions(self.heat, foreground(self.heat, options.threshold or 0.0, options), sides=options.box)
        if not found:
            return None
        return in_pixels(found[0], self.grid, self.coarse).padded(options.margin or 0.0).clamp(self.image)


class Localisation(Figures):
    """Figures of localisation. Shares are None where no question has a box."""

    n: int
    """Number of questions with a box."""
    recall: float | None
    """Share of them of whose needle at least 95 % lies in the proposed box."""
    iou: float | None
    """Mean intersection over union of the proposed box and the smallest one (0 where nothing is proposed)."""
    area: float | None
    """Mean share of the image that is proposed: large boxes make recall easy."""
    auc: float | None
    """Area under the ROC curve of cells that show the needle against others, mean over questions."""
    proposed: float | None
    """Share of the questions for which anything is proposed."""


def look_at_records(backend: HFBackend, records: Records, *, tokens: int | None, batch: int = 16) -> list[LookOutcome]:
    """Return gate scores and maps of all records over views of at most `tokens`."""
    batches = record_batches(records, range(len(records)), batch)
    return [seen for _, rows in batches for seen in look_at_batch(backend, rows, tokens=tokens)]


def look_at_batch(backend: HFBackend, records: Sequence[Record], *, tokens: int | None) -> list[LookOutcome]:
    """Return gate scores and maps of one batch."""
    branches = backend.branches
    assert branches is not None
    asked = ask(backend, records, tokens)
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
    """Return the boxes of the answer, in pixels of the image; None: unknown."""
    return None if record["boxes"] is None else [Box(x1, y1, x2, y2) for x1, y1, x2, y2 in record["boxes"]]


def localisation(seen: Sequence[LookOutcome], options: PerceptionConfig) -> Localisation:
    """Return the figures under one rule of the foreground; questions without a box do not count."""
    rows: dict[str, list[float]] = {name: [] for name in ("recall", "iou", "area", "auc", "proposed")}
    for one in seen:
        if not one.boxes:
            continue
        box, curve = one.proposal(options), auc(one)
        rows["recall"].append(box is not None and all(box.coverage(needle) >= COVERED for needle in one.boxes))
        rows["iou"].append(0.0 if box is None else box.iou(bounding_box(one.boxes)))
        rows["area"].append(0.0 if box is None else box.area / one.image.area)
        rows["auc"] += [] if curve is None else [curve]
        rows["proposed"].append(box is not None)
    means: dict[str, float | None] = {name: fmean(values) if values else None for name, values in rows.items()}
    return Localisation.model_validate({"n": len(rows["recall"]), **means})


def in_pixels(region: MapRegion, grid: Grid, coarse: View) -> Box:
    """Return a region of the coarse view's map as a box in pixels of the image, without padding."""
    box = grid.to_view(region.x1, region.y1, region.x2, region.y2, view="coarse")
    return coarse.to_original(box.clamp(coarse.size))


def bounding_box(boxes: Sequence[Box]) -> Box:
    """Return the smallest box around several."""
    left, top, right, bottom = zip(*(box.as_list() for box in boxes), strict=True)
    return Box(min(left), min(top), max(right), max(bottom))


def auc(one: LookOutcome) -> float | None:
    """Return the probability that a cell of the needle is hotter than another; None if all cells are of one kind."""
    inside = needle_cells(one.grid, one.coarse, one.boxes or ())
    hot, cold = one.heat[inside], one.heat[~inside]
    if len(hot) == 0 or len(cold) == 0:
        return None
    wins = (hot[:, None] > cold[None]).double().mean() + 0.5 * (hot[:, None] == cold[None]).double().mean()
    return float(wins)


def needle_cells(grid: Grid, coarse: View, boxes: Sequence[Box]) -> Tensor:
    """Return (rows, columns) bool: the cells of the coarse view's map that show part of a box."""
    rows, columns, (wide, high), (left, top) = grid.rows, grid.columns, grid.cell, grid.corner
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for box in boxes:
        shown = coarse.from_original(box)
        x1, y1 = max(0, math.floor((shown.x1 - left) / wide)), max(0, math.floor((shown.y1 - top) / high))
        x2, y2 = min(columns, math.ceil((shown.x2 - left) / wide)), min(rows, math.ceil((shown.y2 - top) / high))
        inside[y1:y2, x1:x2] = True
    return inside
