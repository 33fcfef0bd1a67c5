"""Labels without annotation: the attention of the model while it writes its answer (SD-RPN, arXiv 2509.16944).

The base answers each question, over a view that may have more tokens than the branch will read. One pass over prompt
and answer gives the attention of the chosen heads, and that map is stored, with the answer and whether it was right.
Thresholds are applied later, on whatever grid is trained on (`labels_on_grid`), so one table serves all rules.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from qzoom_agent.perception.labels import HEADS, Heads, LabelRules, Labels, Mode, make_labels, prepared_prompt
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    ask,
    attend,
    generate_answers,
    is_right,
    record_batches,
)
from qzoom_agent.training.branches.branch_recipe import Asking, Labelling
from qzoom_agent.training.branches.crops import with_crop
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.localisation import in_pixels
from qzoom_agent.training.branches.sharded_table import write_parts


class HeadPair(NamedTuple):
    """Heads whose attention makes the map, and heads whose attention finds sinks."""

    grounding: Heads
    sink: Heads


def collect(
    backend: HFBackend,
    asked: Sequence[CoarsePrompt],
    said: Sequence[str],
    heads: HeadPair,
    *,
    asking: Asking = "answer",
    norm_layer: int | None = None,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    """Return for each row the attention map of its answer on its view, and its sink map, if sinks are sought.

    Sinks are told by heads, or by the norm of the hidden states at the input of `norm_layer`.
    """
    layers = sorted({*heads.grounding, *heads.sink, *(() if norm_layer is None else (norm_layer,))})
    recorded, valid, queries, images = attend(backend, asked, said, layers, asking)
    found = []
    for row, (response, (start, rows, columns)) in enumerate(zip(queries, images, strict=True)):
        place: dict[str, Any] = {"start": start, "rows": rows, "columns": columns, "row": row}
        heat = response_map(recorded, heads.grounding, response=response, mask=valid, **place)
        sink = response_map(recorded, heads.sink, response=response, mask=valid, **place) if heads.sink else None
        if norm_layer is not None:
            sink = norm_map(recorded, norm_layer, **place)
        found.append((heat, sink))
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


def heads_for(labelling: Labelling, mode: Mode, *, model: str, selected: Heads | None) -> HeadPair:
    """Return the heads that a recipe names, for questions of this mode.

    Raises:
        ConfigError: The recipe asks for selected heads, and there are none.
    """
    base = labelling.published_base(model)
    published = None if base is None else HEADS[base]
    grounding = labelling.grounding
    if grounding == "selected":
        if selected is None:
            raise ConfigError("No heads were selected yet. Run `qzoom train select-heads` with this recipe first.")
        grounding = {layer: list(chosen) for layer, chosen in selected.items()}
    elif grounding == "published":
        assert published is not None
        grounding = {layer: list(chosen) for layer, chosen in published[mode].grounding.items()}
    sink: Heads = {}
    if labelling.sink == "published":
        assert published is not None
        sink = published[mode].sink
    elif isinstance(labelling.sink, dict):
        sink = labelling.sink
    return HeadPair(grounding, sink)


def label(
    backend: HFBackend,
    records: Records,
    labelling: Labelling,
    folder: Path,
    *,
    selected: Heads | None = None,
    k: int,
    source: JsonValue = None,
    positions: Literal["plain", "aligned"] = "plain",
) -> Dataset:
    """Collect the maps of all records in `folder`; a table of another `source` (base and records) is refused.

    Columns: `row` (index of the record), `image_id`, `answer` (or the zoom call), `right` (with `keep: crop` of the
    answer to the crop, at these `positions`), `map` and `sink` (rows of cells), `shown` (see `padded_size`).
    """

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for chosen, some in record_batches(records, indices, labelling.batch):
            yield from _rows(backend, some, chosen, labelling, selected, k, positions)

    settings = map_settings(labelling, k, positions)
    heads: JsonValue = None
    if labelling.grounding == "selected" and selected is not None:
        heads = {str(layer): list(chosen) for layer, chosen in selected.items()}
    return write_parts(
        folder, len(records), rows, {**settings, "source": source, "selected": heads}, progress="labelled"
    )


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
    rows: Sequence[Record],
    chosen: range,
    labelling: Labelling,
    selected: Heads | None,
    k: int,
    positions: Literal["plain", "aligned"],
) -> list[dict[str, Any]]:
    norm_layer = k if labelling.sink == "norm" else None
    by_mode: dict[Mode, list[int]] = {}
    for at, row in enumerate(rows):
        by_mode.setdefault(row["mode"], []).append(at)
    out: dict[int, dict[str, Any]] = {}
    for mode, places in by_mode.items():
        some = [rows[at] for at in places]
        heads = heads_for(labelling, mode, model=backend.name, selected=selected)
        # in scenes the published recipe asks for boxes, so that the answer attends to objects
        asks = labelling.grounding == "published"
        prompts: list[Any] = [
            {**row, "question": prepared_prompt(row["question"], mode, keep_short=row["short_labels"])} if asks else row
            for row in some
        ]
        asked = ask(backend, prompts, labelling.tokens, tools=labelling.response == "call")
        said = [row["answer"] for row in some]
        if labelling.response != "gold":
            said = generate_answers(backend, asked, max_new_tokens=labelling.max_new_tokens)
        maps = collect(backend, asked, said, heads, asking=labelling.asking, norm_layer=norm_layer)
        # boxes that were asked for cannot be compared with the answer
        right = [(asks and mode == "natural") or is_right(*pair) for pair in zip(said, some, strict=True)]
        if labelling.keep == "crop":
            right = _right_with_crop(backend, some, maps, labelling, aligned=positions == "aligned")
        for at, row, one, text, good, (heat, sink) in zip(places, some, asked, said, right, maps, strict=True):
            out[at] = {
                "row": chosen[at],
                "image_id": row["image_id"],
                "answer": text,
                "right": good,
                "map": heat.tolist(),
                "sink": None if sink is None else sink.tolist(),
                "shown": padded_size(one),
            }
    return [out[at] for at in sorted(out)]


def _right_with_crop(
    backend: HFBackend,
    records: Sequence[Record],
    maps: Sequence[tuple[NDArray[np.float32], NDArray[np.float32] | None]],
    labelling: Labelling,
    *,
    aligned: bool,
) -> list[bool]:
    """Return for each record whether it is answered right with the crop of its own map beside the coarse view."""
    ratio = labelling.norm_ratio if labelling.sink == "norm" else None
    boxes = []
    for one, (heat, sink) in zip(ask(backend, records, None), maps, strict=True):
        cells = one.cells
        grid = cells.rows, cells.columns
        found = labels_on_grid(heat, sink, grid, labelling.rules, norm_ratio=ratio, shown=padded_size(one))
        boxes.append(in_pixels(found.box, cells, one.store.view("coarse")) if found.usable else None)
    cropped = with_crop(backend, records, boxes, tokens=None, aligned=aligned)
    said = generate_answers(backend, [one.asked for one in cropped], max_new_tokens=labelling.max_new_tokens)
    return [
        one.box is not None and is_right(text, record) for one, text, record in zip(cropped, said, records, strict=True)
    ]
