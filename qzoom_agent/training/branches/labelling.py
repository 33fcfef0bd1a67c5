"""Labels without annotation: the attention of the model while it writes its answer (SD-RPN, arXiv 2509.16944).

`select_heads` finds the heads that look at the place the answer comes from, on some hundred questions. Where boxes are
known, heads are ranked by the share of their attention on the image that falls inside (`inside`); else by how peaked
their maps are (`peak`, the highest cell over the mean), times how far they agree with those of the other peaked heads
(`agreement`): a single head may attend to a sink, but seldom several to the same place of different images.

`label` stores the attention map of these heads for each question, with the answer and whether it was right. Thresholds
are applied later, on whatever grid is trained on (`labels_on_grid`), so one table serves all rules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import JsonValue
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import full_layers
from qzoom_agent.perception.attention import norm_map, response_map
from qzoom_agent.perception.labels import HEADS, Heads, HeadSet, LabelRules, Labels, Mode, make_labels, prepared_prompt
from qzoom_agent.training.branches.base_inference import CoarsePrompt, ask, attend, attended_answers, is_right
from qzoom_agent.training.branches.branch_recipe import HeadSearch, Labelling
from qzoom_agent.training.branches.dataset import Record, Records, record_batches
from qzoom_agent.training.branches.proposals import answer_with_crop, in_pixels, needle_cells
from qzoom_agent.training.branches.sharded_table import write_table

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

    Raises ConfigError if no question is about a part of the image.
    """
    text = backend.model.config.get_text_config()
    heads = text.num_attention_heads
    layers = [layer for layer in full_layers(text) if layer >= int(search.from_layer * text.num_hidden_layers)]
    maps: list[NDArray[np.float32]] = []
    insides: list[NDArray[np.bool] | None] = []
    count = min(search.records, len(records))
    for _, rows in record_batches(records, range(count), labelling.batch):
        asked, said = attended_answers(backend, rows, labelling)
        kept, valid, queries, images = attend(backend, asked, said, layers, labelling.asking)
        for at, (row, one, response, (start, high, wide)) in enumerate(zip(rows, asked, queries, images, strict=True)):
            if row.known_boxes == ():
                continue  # no part of the image in particular
            place: dict[str, Any] = {"queries": response, "keys": slice(start, start + high * wide), "mask": valid}
            found = [kept.attention(layer, range(heads), **place)[at].mean(dim=1) for layer in layers]
            maps.append(torch.cat(found).cpu().numpy())
            cells = needle_cells(one.cells, one.store.view("coarse"), row.boxes)
            insides.append(cells.flatten().numpy() if row.boxes else None)
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


class Maps(NamedTuple):
    """The maps of one answer."""

    heat: NDArray[np.float32]
    """(rows, columns) attention."""
    sink: NDArray[np.float32] | None
    """Map that tells sinks; None: none are sought."""


def collect(
    backend: HFBackend,
    asked: Sequence[CoarsePrompt],
    said: Sequence[str],
    heads: HeadSet,
    how: Labelling,
    *,
    k: int | None = None,
    views: int | None = 1,
) -> list[list[Maps]]:
    """Return the maps of each answer on the first `views` views of its conversation (None: on all).

    Sinks are told by heads, or with `sink: norm` by norms at the input of layer `k`.
    """
    norm_layer = k if how.sink == "norm" else None
    layers = sorted({*heads.grounding, *heads.sink, *(() if norm_layer is None else (norm_layer,))})
    kept, valid, queries, images = attend(backend, asked, said, layers, how.asking)
    found = []
    for row, (one, response, (first, _, _)) in enumerate(zip(asked, queries, images, strict=True)):
        grids, maps = one.session.grids(one.ready.prompt), []
        for at, rows, columns in grids[:views]:
            place: dict[str, Any] = {"start": first - grids[0][0] + at, "rows": rows, "columns": columns, "row": row}
            heat = response_map(kept, heads.grounding, response=response, mask=valid, **place)
            sink = response_map(kept, heads.sink, response=response, mask=valid, **place) if heads.sink else None
            maps.append(Maps(heat, sink if norm_layer is None else norm_map(kept, norm_layer, **place)))
        found.append(maps)
    return found


def labels_on_grid(
    heat: NDArray[Any],
    sink: NDArray[Any] | None,
    grid: tuple[int, int],
    rules: LabelRules,
    *,
    norm_ratio: float | None,
    shown: Size | None = None,
) -> Labels:
    """Return the labels on the grid that is trained on, from maps that may have another.

    Sinks are found, and their attention is dropped, on the map as it was read: on a coarser one a sink of a single
    token would be averaged away, and its attention would stay. A cell is a sink if half of what it covers is.

    Args:
        sink: Map that tells sinks; None: there are none.
        norm_ratio: Sinks are tokens whose norm is this many times the median; None: `rules.sink` decides.
        shown: See `padded_size`.
    """
    if sink is None:
        return make_labels(resized(heat, grid), None, rules, shown=shown)
    sinks = sink_cells(sink, rules, norm_ratio)
    clean, share = np.where(sinks, 0.0, heat), resized(sinks.astype(np.float32), grid, mass=False)
    return make_labels(resized(clean, grid), share, rules.model_copy(update={"sink": 0.5}), shown=shown)


def sink_cells(sink: NDArray[Any], rules: LabelRules, norm_ratio: float | None) -> NDArray[np.bool]:
    """Return the cells of a map that are sinks. Arguments as of `labels_on_grid`."""
    limit = rules.sink if norm_ratio is None else norm_ratio * float(np.median(sink))
    return np.asarray(sink) >= limit


def padded_size(one: CoarsePrompt) -> Size | None:
    """Return the size of a view that was padded to a square, so that its padding is background; None: it was not."""
    return one.store.view("coarse").size if any(one.cells.corner) else None


def resized(values: NDArray[Any], grid: tuple[int, int], *, mass: bool = True) -> NDArray[np.float32]:
    """Resize a map to another grid; with `mass` each cell gets the sum of what it covers, else the mean."""
    if values.shape == grid:
        return np.asarray(values, dtype=np.float32)
    tensor = torch.as_tensor(np.asarray(values, dtype=np.float32))[None, None]
    smaller = grid[0] <= values.shape[0] and grid[1] <= values.shape[1]
    out = adaptive_avg_pool2d(tensor, grid) if smaller else interpolate(tensor, grid, mode="bilinear")
    scale = values.size / (grid[0] * grid[1]) if mass else 1.0
    scaled: NDArray[np.float32] = (out[0, 0] * scale).numpy()
    return scaled


def heads_for(labelling: Labelling, mode: Mode, *, model: str, selected: Heads | None) -> HeadSet:
    """Return the heads that a recipe names for questions of this mode; ConfigError if they were not selected yet."""
    base = labelling.published_base(model)
    published = HeadSet({}, {}) if base is None else HEADS[base][mode]
    if labelling.grounding == "selected" and selected is None:
        raise ConfigError("No heads were selected yet. Run `qzoom train select-heads` with this recipe first.")
    named = {"selected": selected or {}, "published": published.grounding}
    grounding = labelling.grounding if isinstance(labelling.grounding, dict) else named[labelling.grounding]
    sink: Heads = labelling.sink if isinstance(labelling.sink, dict) else {}
    return HeadSet(
        {layer: list(chosen) for layer, chosen in grounding.items()},
        published.sink if labelling.sink == "published" else sink,
    )


def label(
    backend: HFBackend,
    records: Records,
    labelling: Labelling,
    folder: Path,
    *,
    selected: Heads | None = None,
    k: int,
    aligned: bool = False,
) -> Dataset:
    """Collect the maps of all records in `folder`, with heads that `select-heads` `selected` if the recipe says so.

    Columns: `row` (index of the record), `image_id`, `answer` (or the zoom call), `right` (with `keep: crop` of the
    answer to the crop, at `aligned` positions or not), `map` and `sink` (rows of cells), `shown` (see `padded_size`).
    """

    def rows(_: range, some: Sequence[Record]) -> list[dict[str, Any]]:
        made: dict[int, dict[str, Any]] = {}
        for mode in dict.fromkeys(record.mode for record in some):  # which have the same heads
            places = [at for at, record in enumerate(some) if record.mode == mode]
            heads = heads_for(labelling, mode, model=backend.name, selected=selected)
            found = _labelled(backend, [some[at] for at in places], labelling, heads, mode, k=k, aligned=aligned)
            made |= zip(places, found, strict=True)
        return [made[at] for at in range(len(some))]

    return write_table(folder, records, rows, batch=labelling.batch, progress="labelled")


def map_settings(labelling: Labelling, k: int | None, positions: str) -> dict[str, JsonValue]:
    """Return the keys of a recipe's labelling that decide the maps."""
    # which of the maps are learned from, and by which rules, is decided when they are read
    read_later = {"batch", "keep", *(() if labelling.keep == "crop" else ("rules", "norm_ratio"))}
    settings = {**labelling.model_dump(mode="json", exclude=read_later), "with_crop": labelling.keep == "crop"}
    if labelling.keep == "crop":
        settings["positions"] = positions
    return {**settings, "norm_layer": k} if labelling.sink == "norm" else settings


def _labelled(
    backend: HFBackend,
    records: Sequence[Record],
    recipe: Labelling,
    heads: HeadSet,
    mode: Mode,
    *,
    k: int,
    aligned: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each record of one mode."""
    # in scenes the published recipe asks for boxes, so that the answer attends to objects
    published = recipe.grounding == "published"
    prompts = [
        replace(row, question=prepared_prompt(row.question, mode, keep_short=row.short_labels)) for row in records
    ]
    asked, said = attended_answers(backend, prompts if published else records, recipe)
    maps = collect(backend, asked, said, heads, recipe, k=k)
    if recipe.keep == "crop":
        right = _right_with_crop(backend, records, recipe, maps, aligned=aligned)
    else:  # boxes that were asked for cannot be compared with the answer
        right = [(published and mode == "natural") or is_right(*pair) for pair in zip(said, records, strict=True)]
    for one, text, good, ((heat, sink),) in zip(asked, said, right, maps, strict=True):
        yield {
            "answer": text,
            "right": good,
            "map": heat.tolist(),
            "sink": None if sink is None else sink.tolist(),
            "shown": padded_size(one),
        }


def _right_with_crop(
    backend: HFBackend, records: Sequence[Record], recipe: Labelling, maps: Sequence[Sequence[Maps]], *, aligned: bool
) -> list[bool]:
    """Return for each record whether it is answered right with the crop of its own map beside the coarse view."""
    boxes = []
    for one, ((heat, sink),) in zip(ask(backend, records, None), maps, strict=True):
        grid, ratio = (one.cells.rows, one.cells.columns), recipe.used_norm_ratio
        found = labels_on_grid(heat, sink, grid, recipe.rules, norm_ratio=ratio, shown=padded_size(one))
        boxes.append(in_pixels(found.box, one.cells, one.store.view("coarse")) if found.usable else None)
    how: dict[str, Any] = {"tokens": None, "aligned": aligned, "max_new_tokens": recipe.max_new_tokens}
    answers = answer_with_crop(backend, records, boxes, **how)
    return [box is not None and is_right(text, row) for (text, box), row in zip(answers, records, strict=True)]
