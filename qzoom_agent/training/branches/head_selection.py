"""Choice of the attention heads of a base that look at the place its answer comes from.

Heads are published only for a few bases. Here every head above the lowest layers is scored on some hundred questions:

- where boxes are known: by the share of its attention on the image that falls inside them (`inside`);
- where they are not: by how peaked its map is (`peak`, its highest cell over the mean), times how far it agrees with
  the other peaked heads (`agreement`): a single head may attend to a sink, but seldom several to the same place of
  different images.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.training.branches.base_inference import attend, attended_answers, record_batches
from qzoom_agent.training.branches.branch_recipe import HeadSearch, Labelling
from qzoom_agent.training.branches.dataset import Records
from qzoom_agent.training.branches.localisation import known_boxes, needle_cells

_POOL = 16
"""Number of heads, the most peaked ones, among which agreement is measured."""


class HeadScore(Figures):
    """Scores of one head."""

    layer: int
    head: int
    inside: float | None
    """Share of its attention on the image that falls into the boxes; None without boxes."""
    lift: float | None
    """That share over the boxes' share of the image."""
    peak: float
    """Highest cell over the mean, mean over questions."""
    agreement: float
    """Mean correlation of its map with those of the other peaked heads."""

    @property
    def score(self) -> float:
        """The figure that heads are ranked by."""
        return self.peak * max(0.0, self.agreement) if self.inside is None else self.inside


class Selection(Figures):
    """Result of `select-heads`."""

    criterion: str
    questions: int
    heads: dict[int, list[int]]
    """Chosen heads by layer."""
    ranked: list[HeadScore]
    """All heads, best first."""

    def table(self, rows: int = 12) -> str:
        """Return the best heads as text."""
        lines = [f"{'layer':>5} {'head':>4} {'inside':>7} {'lift':>6} {'peak':>6} {'agreement':>9}"]
        for one in self.ranked[:rows]:
            inside = "-" if one.inside is None else f"{one.inside:.3f}"
            lift = "-" if one.lift is None else f"{one.lift:.1f}"
            mark = "  *" if one.head in self.heads.get(one.layer, []) else ""
            lines.append(
                f"{one.layer:>5} {one.head:>4} {inside:>7} {lift:>6} {one.peak:>6.1f} {one.agreement:>9.2f}{mark}"
            )
        return "\n".join(lines)


def select_heads(backend: HFBackend, records: Records, search: HeadSearch, labelling: Labelling) -> Selection:
    """Score all heads on the first records and choose the best.

    Raises:
        ConfigError: No question is about a part of the image.
    """
    depth, heads = Decoder(backend.model).depth, backend.model.config.get_text_config().num_attention_heads
    layers = list(range(int(search.from_layer * depth), depth))
    maps: list[NDArray[np.float32]] = []
    insides: list[NDArray[np.bool] | None] = []
    count = min(search.records, len(records))
    for _, rows in record_batches(records, range(count), labelling.batch):
        asked, said = attended_answers(backend, rows, labelling)
        recorded, valid, queries, images = attend(backend, asked, said, layers, labelling.asking)
        for at, (row, one, response, (start, high, wide)) in enumerate(zip(rows, asked, queries, images, strict=True)):
            boxes = known_boxes(row) or []
            if row["boxes"] is not None and not boxes:
                continue  # no part of the image in particular
            place: dict[str, Any] = {"queries": response, "keys": slice(start, start + high * wide), "mask": valid}
            found = [recorded.attention(layer, range(heads), **place)[at].mean(dim=1) for layer in layers]
            maps.append(torch.cat(found).cpu().numpy())
            cells = needle_cells(one.cells, one.store.view("coarse"), boxes)
            insides.append(cells.flatten().numpy() if boxes else None)
    if not maps:
        raise ConfigError(
            "No question is about a part of the image: all have an empty list of boxes. Give others, or leave the "
            "column out."
        )
    names = [(layer, head) for layer in layers for head in range(heads)]
    return rank(names, maps, insides, count=search.count)


def rank(
    names: Sequence[tuple[int, int]],
    maps: Sequence[NDArray[np.float32]],
    insides: Sequence[NDArray[np.bool] | None],
    *,
    count: int,
) -> Selection:
    """Choose heads from their maps.

    Args:
        names: Layer and index of each head.
        maps: For each question the maps of all heads, (heads, cells).
        insides: For each question the cells inside its boxes, (cells,) bool; None: unknown.
        count: Number of heads to choose.
    """
    known = [(each, inside) for each, inside in zip(maps, insides, strict=True) if inside is not None]
    shares = [each[:, inside].sum(1) / np.maximum(each.sum(1), 1e-9) for each, inside in known]
    even = fmean(float(inside.mean()) for _, inside in known) if known else 0.0
    peaks = np.mean([each.max(1) / np.maximum(each.mean(1), 1e-12) for each in maps], axis=0)
    pool = np.argsort(-peaks)[:_POOL]
    agreement = np.mean([_agreement(each, pool) for each in maps], axis=0)
    inside = np.mean(shares, axis=0) if known else None
    scores = [
        HeadScore(
            layer=layer,
            head=head,
            inside=None if inside is None else float(inside[at]),
            lift=None if inside is None else float(inside[at] / max(even, 1e-9)),
            peak=float(peaks[at]),
            agreement=float(agreement[at]),
        )
        for at, (layer, head) in enumerate(names)
    ]
    ranked = sorted(scores, key=lambda one: -one.score)
    chosen: dict[int, list[int]] = {}
    for one in sorted(ranked[:count], key=lambda one: (one.layer, one.head)):
        chosen.setdefault(one.layer, []).append(one.head)
    criterion = "attention inside boxes" if known else "peak over mean, times agreement"
    return Selection(criterion=criterion, questions=len(maps), heads=chosen, ranked=ranked)


def _agreement(maps: NDArray[np.float32], pool: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean correlation of each map with those of the pool, itself left out."""
    centred = maps - maps.mean(1, keepdims=True)
    centred = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    with_pool = centred @ centred[pool].T
    own = np.arange(len(maps))[:, None] == pool
    mean: NDArray[np.float64] = np.where(own, 0.0, with_pool).sum(1) / np.maximum((~own).sum(1), 1)
    return mean
