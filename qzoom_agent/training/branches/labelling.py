"""Labels without annotation: the attention of the model while it writes its answer (SD-RPN, arXiv 2509.16944).

One pass over question and answer gives the attention of the chosen heads, over a view that may have more tokens than
the branch will read. That map is stored with the answer and whether it was right. Thresholds are applied later, on
whatever grid is trained on (`labels_on_grid`), so one table serves all rules.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import JsonValue
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.attention import norm_map, response_map
from qzoom_agent.perception.labels import HEADS, Heads, HeadSet, LabelRules, Labels, Mode, make_labels, prepared_prompt
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    ask,
    attend,
    attended_answers,
    is_right,
    record_batches,
)
from qzoom_agent.training.branches.branch_recipe import Asking, Labelling
from qzoom_agent.training.branches.crops import answer_with_crop
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.localisation import in_pixels
from qzoom_agent.training.branches.sharded_table import write_parts


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
    *,
    asking: Asking = "answer",
    norm_layer: int | None = None,
) -> list[Maps]:
    """Return the maps of each answer on its view; sinks are told by heads, or by norms at the input of `norm_layer`."""
    layers = sorted({*heads.grounding, *heads.sink, *(() if norm_layer is None else (norm_layer,))})
    recorded, valid, queries, images = attend(backend, asked, said, layers, asking)
    found = []
    for row, (response, (start, rows, columns)) in enumerate(zip(queries, images, strict=True)):
        place: dict[str, Any] = {"start": start, "rows": rows, "columns": columns, "row": row}
        heat = response_map(recorded, heads.grounding, response=response, mask=valid, **place)
        sink = response_map(recorded, heads.sink, response=response, mask=valid, **place) if heads.sink else None
        found.append(Maps(heat, sink if norm_layer is None else norm_map(recorded, norm_layer, **place)))
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
        heat: Attention map.
        sink: Map that tells sinks; None: there are none.
        grid: Rows and columns.
        rules: Thresholds.
        norm_ratio: Sinks are tokens whose norm is this many times the median; None: `rules.sink` decides.
        shown: See `padded_size`.
    """
    if sink is None:
        return make_labels(resized(heat, grid), None, rules, shown=shown)
    limit = rules.sink if norm_ratio is None else norm_ratio * float(np.median(sink))
    sinks = np.asarray(sink) >= limit
    clean, share = np.where(sinks, 0.0, heat), resized(sinks.astype(np.float32), grid, mass=False)
    return make_labels(resized(clean, grid), share, rules.model_copy(update={"sink": 0.5}), shown=shown)


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
    """Return the heads that a recipe names, for questions of this mode.

    Raises:
        ConfigError: The recipe asks for selected heads, and there are none.
    """
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

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for chosen, some in record_batches(records, indices, labelling.batch):
            by_mode: dict[Mode, dict[int, Record]] = {}
            for index, record in zip(chosen, some, strict=True):
                by_mode.setdefault(record["mode"], {})[index] = record
            made = (_rows(backend, same, labelling, selected, k=k, aligned=aligned) for same in by_mode.values())
            yield from sorted(chain.from_iterable(made), key=itemgetter("row"))

    return write_parts(folder, len(records), rows, progress="labelled")


def map_settings(labelling: Labelling, k: int | None, positions: str) -> dict[str, JsonValue]:
    """Return the keys of a recipe's labelling that decide the maps."""
    # which of the maps are learned from, and by which rules, is decided when they are read
    read_later = {"batch", "keep", *(() if labelling.keep == "crop" else ("rules", "norm_ratio"))}
    settings = {**labelling.model_dump(mode="json", exclude=read_later), "with_crop": labelling.keep == "crop"}
    if labelling.keep == "crop":
        settings["positions"] = positions
    return {**settings, "norm_layer": k} if labelling.sink == "norm" else settings


def _rows(
    backend: HFBackend,
    records: Mapping[int, Record],
    labelling: Labelling,
    selected: Heads | None,
    *,
    k: int,
    aligned: bool,
) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of records of one mode."""
    rows = list(records.values())
    mode = rows[0]["mode"]
    heads = heads_for(labelling, mode, model=backend.name, selected=selected)
    # in scenes the published recipe asks for boxes, so that the answer attends to objects
    published = labelling.grounding == "published"
    prompts: list[Any] = [
        {**row, "question": prepared_prompt(row["question"], mode, keep_short=row["short_labels"])} for row in rows
    ]
    asked, said = attended_answers(backend, prompts if published else rows, labelling)
    norm_layer = k if labelling.sink == "norm" else None
    maps = collect(backend, asked, said, heads, asking=labelling.asking, norm_layer=norm_layer)
    if labelling.keep == "crop":
        right = _right_with_crop(backend, rows, maps, labelling, aligned=aligned)
    else:  # boxes that were asked for cannot be compared with the answer
        right = [(published and mode == "natural") or is_right(*pair) for pair in zip(said, rows, strict=True)]
    for index, one, text, good, (heat, sink) in zip(records, asked, said, right, maps, strict=True):
        yield {
            "row": index,
            "image_id": records[index]["image_id"],
            "answer": text,
            "right": good,
            "map": heat.tolist(),
            "sink": None if sink is None else sink.tolist(),
            "shown": padded_size(one),
        }


def _right_with_crop(
    backend: HFBackend, records: Sequence[Record], maps: Sequence[Maps], labelling: Labelling, *, aligned: bool
) -> list[bool]:
    """Return for each record whether it is answered right with the crop of its own map beside the coarse view."""
    boxes = []
    for one, (heat, sink) in zip(ask(backend, records, None), maps, strict=True):
        grid, ratio = (one.cells.rows, one.cells.columns), labelling.used_norm_ratio
        found = labels_on_grid(heat, sink, grid, labelling.rules, norm_ratio=ratio, shown=padded_size(one))
        boxes.append(in_pixels(found.box, one.cells, one.store.view("coarse")) if found.usable else None)
    answers = answer_with_crop(
        backend, records, boxes, tokens=None, aligned=aligned, max_new_tokens=labelling.max_new_tokens
    )
    return [box is not None and is_right(text, record) for (text, box), record in zip(answers, records, strict=True)]
