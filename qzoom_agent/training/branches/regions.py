"""Region-level reinforcement of SD-RPN from questions and answers (as in Vision-RL2, arXiv 2609.19745).

The map is a policy: each cell is foreground with its probability, and regions of cells are the actions. The frozen base
reads the coarse view with the crops of sets of regions inserted, as under the policy `implicit`; the log-odds that it
gives the reference answer are the value of a set. The gain of a region is the value with it minus the value without it.
Two groups of a question's regions are rewarded by their gains:

subtractive     The regions that the map proposes. One that gains less than the noise margin is a distractor and is
                pruned, another is kept. The margin is the gain of control regions, which lie anywhere.
additive        The next peaks of the map, and proposed regions moved a little. One that gains more than the margin (and
                more than the weakest proposed one, if no more regions may be shown) is evidence that was missed.

Only SD-RPN learns. It is held to the map that it started with by the divergence between the two, so that questions
without a reward change little. A round reads all questions with the current map and keeps the rewards as a table, then
trains on it for some epochs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import SDRPN
from qzoom_agent.perception.look import resolve_options
from qzoom_agent.perception.maps import MapRegion, foreground, region_parts, smoothed
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    LowerLayerStates,
    answer_ids,
    ask,
    branches_of,
    lower_states,
    with_answer,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.fitting import Rows, train
from qzoom_agent.training.branches.postsft import answer_batch, answer_logits
from qzoom_agent.training.branches.proposals import LookOutcome, in_pixels, look_at_batch, proposal_zoom, show_crops
from qzoom_agent.training.branches.sdrpn import map_rows
from qzoom_agent.training.branches.sharded_table import say, write_table

_SAME_BUDGET: Final = 16
"""Questions in a row that are read at one budget, so that those about one image share its encoded view."""
_NEXT_SHARE = 0.5
"""Share of a next peak from which its neighbours belong to its region, where the rule of the map is absolute."""
_DRAWS = 8
"""Places that are tried for a control region beside all proposed ones."""


class Region(NamedTuple):
    """A region of a map: what is cropped for it, and whose probabilities decide on it."""

    box: MapRegion
    weights: NDArray[np.float32]
    """(rows, columns), sum 1: weights of cells in the region's log-probability. They are its cells' shares of its heat,
    or of a box of fixed sides, which follows from its centre, those of the cells around the centre."""
    centred: bool = False
    """The box has fixed sides."""


class Advantages(NamedTuple):
    """The advantages of a question's regions, from -1 to 1."""

    kept: list[float]
    """Of each proposed region: positive to keep it, negative to prune it."""
    added: list[float]
    """Of each candidate: positive for the one with most of the missed evidence, else 0."""


class RoundFigures(Figures):
    """Figures of one round, read with the map that it began with."""

    questions: int
    skipped: int
    """Questions without a region that can be cropped."""
    settled: int
    """Questions that the coarse view alone answers, about which regions tell nothing."""
    pruned: int
    """Proposed regions that gained less than the noise margin."""
    recovered: int
    """Questions with a candidate that is evidence missed by the proposed regions."""
    margin: float
    probability: float
    """Mean probability of the answer with the proposed regions."""


class _Question(NamedTuple):
    """A question of a batch with the regions of its map, all of which can be cropped."""

    record: Record
    prompt: CoarsePrompt
    seen: LookOutcome
    proposed: list[Region]
    candidates: list[Region]
    controls: list[Region]


class _Reading(NamedTuple):
    """Log-odds of a question's answer with sets of its regions shown."""

    nothing: float
    proposed: float
    left_out: list[float]
    """With the proposed regions but for one, for each."""
    controls: list[float]

    @classmethod
    def of(cls, one: _Question, values: Sequence[float]) -> "_Reading":
        """Take apart the values of `_first_sets`."""
        nothing, proposed, *rest = values
        return cls(nothing, proposed, rest[: len(one.proposed)], rest[len(one.proposed) :])

    @property
    def gains(self) -> list[float]:
        """What each proposed region adds to the others."""
        return [self.proposed - value for value in self.left_out]


class RegionLoss(nn.Module):
    """Policy loss of SD-RPN's map, and its divergence from the map of `start`."""

    def __init__(self, sdrpn: SDRPN, start: SDRPN, *, anchor: float) -> None:
        super().__init__()
        self.sdrpn, self.start, self.anchor = sdrpn, start, anchor

    def forward(self, states: LowerLayerStates, targets: Tensor) -> Tensor:
        """Return the mean over questions; `targets` are the `cell_targets` of all rows, (2, cells), concatenated."""
        logits, up, down = torch.cat(map_rows(self.sdrpn, states)), targets[0], targets[1]
        with torch.no_grad():
            start = torch.cat(map_rows(self.start, states))
            probable = torch.sigmoid(start)
            # their cross-entropy less this constant is the divergence of independent cells
            entropy = binary_cross_entropy_with_logits(start, probable, reduction="sum")
        drift = binary_cross_entropy_with_logits(logits, probable, reduction="sum") - entropy
        # -log p and -log(1 - p)
        policy: Tensor = (up * softplus(-logits) + down * softplus(logits)).sum()
        return (policy + self.anchor * drift) / len(states.hidden)


class RegionReader:
    """The frozen base as a reader of regions."""

    def __init__(self, backend: HFBackend, recipe: BranchRecipe) -> None:
        self.backend, self.stage, self.seed = backend, recipe.regions, recipe.seed
        config = branches_of(backend).config
        self.options = resolve_options(config, PerceptionConfig(max_regions=config.max_regions))
        self.zoom = proposal_zoom(backend)
        self.certain = log_odds(math.log(self.stage.certain))

    def table(self, records: Records, folder: Path) -> Dataset:
        """Read all records with the regions of their maps.

        Columns: `row` (index of the record), `image_id`, `tokens` (the budget), `grid` (rows and columns), `kind`
        (learned, settled or skipped), `nothing` and `proposed` (log-odds without and with the proposed regions),
        `gains` of the proposed regions, `added` (gains of candidates), `replaced` (see `advantages`), `controls`
        (gains), and of proposed regions and candidates the `cells` and their `shares`. The table is kept in `folder`.
        """
        budgets = self.stage.tokens

        def rows(chosen: range, some: list[Record]) -> Iterator[dict[str, Any]]:
            tokens = [budgets[index // _SAME_BUDGET % len(budgets)] for index in chosen]
            for at, found in zip(tokens, self.read(some, tokens), strict=True):
                yield {"tokens": at, **found}

        return write_table(folder, records, rows, batch=self.stage.batch, progress="read with regions")

    def read(self, records: Sequence[Record], tokens: Sequence[int | None]) -> list[dict[str, Any]]:
        """Read a batch of questions at these budgets; return the columns of the table that tell of them."""
        asked = ask(self.backend, records, tokens)
        seen = look_at_batch(self.backend, records, tokens=None, asked=asked)
        questions = [self._question(*each) for each in zip(records, asked, seen, strict=True)]
        values = self._values(questions, map(_first_sets, questions))
        read = [_Reading.of(*each) for each in zip(questions, values, strict=True)]
        # candidates are read only where the proposed regions leave the answer in doubt
        tried = [
            one.candidates if max(first.nothing, first.proposed) < self.certain else []
            for one, first in zip(questions, read, strict=True)
        ]
        replaced = [self._replaced(one.proposed, first.gains) for one, first in zip(questions, read, strict=True)]
        sets = (
            [[*_left_out(one.proposed, at), each] for each in some]
            for one, at, some in zip(questions, replaced, tried, strict=True)
        )
        found = []
        for one, some, first, at, more in zip(
            questions, tried, read, replaced, self._values(questions, sets), strict=True
        ):
            base = first.proposed if at is None else first.left_out[at]
            kind = "settled" if first.nothing >= self.certain else "learned"
            weights = [region.weights.flatten() for region in (*one.proposed, *some)]
            found.append(
                {
                    "grid": list(one.seen.heat.shape),
                    "kind": kind if one.proposed or one.candidates else "skipped",
                    "nothing": first.nothing,
                    "proposed": first.proposed,
                    "gains": first.gains,
                    "added": [value - base for value in more],
                    "replaced": at,
                    "controls": [value - first.nothing for value in first.controls],
                    "cells": [np.flatnonzero(each).tolist() for each in weights],
                    "shares": [each[each > 0].tolist() for each in weights],
                }
            )
        return found

    def _question(self, record: Record, prompt: CoarsePrompt, seen: LookOutcome) -> _Question:
        """Find the regions of a map, without those that cannot be cropped."""
        stage, rng = self.stage, Random(f"regions/{self.seed}/{record.id}")

        def legal(regions: Sequence[Region]) -> list[Region]:
            return [one for one in regions if self.zoom.plan(prompt.store, self._box(one, seen)).error is None]

        found = proposed_regions(seen.heat, self.options)
        candidates, proposed = next_regions(seen.heat, found, stage.next_peaks, self.options), legal(found)
        candidates = legal(candidates + moved_regions(proposed, stage.moves, reach=stage.reach, rng=rng))
        like = proposed or candidates
        controls = [control_region(like, rng)] if like and rng.random() < stage.controls else []
        return _Question(record, prompt, seen, proposed, candidates, legal(controls))

    def _box(self, region: Region, seen: LookOutcome) -> Box:
        """Return what is cropped for a region, in pixels of the image."""
        return in_pixels(region.box, seen.grid, seen.coarse).padded(self.options.margin or 0.0).clamp(seen.image)

    def _replaced(self, proposed: Sequence[Region], gains: Sequence[float]) -> int | None:
        """Return which proposed region gives way to a candidate, the weakest; None: there is room for one more."""
        full = len(proposed) >= self.options.max_regions
        return min(range(len(proposed)), key=gains.__getitem__) if full else None

    @torch.no_grad()
    def _values(self, questions: Sequence[_Question], sets: Iterable[Sequence[Sequence[Region]]]) -> list[list[float]]:
        """Return the log-odds of each question's answer with each of its sets of regions shown; a set is read once."""
        sets = list(sets)
        keys = [[(at, *map(id, regions)) for regions in some] for at, some in enumerate(sets)]
        given = {
            key: (questions[at], regions)
            for at, some in enumerate(sets)
            for key, regions in zip(keys[at], some, strict=True)
        }
        read: list[float] = []
        for start in range(0, len(given), self.stage.batch):
            part = list(given.values())[start : start + self.stage.batch]
            boxes = [[self._box(region, one.seen) for region in regions] for one, regions in part]
            shown = show_crops(self.backend, [one.prompt for one, _ in part], boxes)
            read += [
                log_odds(value)
                for value in answer_log_probabilities(self.backend, shown, [one.record.answer for one, _ in part])
            ]
        values = dict(zip(given, read, strict=True))
        return [[values[key] for key in some] for some in keys]


def _first_sets(one: _Question) -> list[list[Region]]:
    """Return the sets of regions that are read first, in the order of `_Reading`."""
    without = (_left_out(one.proposed, at) for at in range(len(one.proposed)))
    return [[], one.proposed, *without, *([region] for region in one.controls)]


def _left_out(regions: Sequence[Region], at: int | None) -> list[Region]:
    return [region for index, region in enumerate(regions) if index != at]


def answer_log_probabilities(backend: HFBackend, asked: Sequence[CoarsePrompt], answers: Sequence[str]) -> list[float]:
    """Return the log-probability of each answer, with the end of its turn, after its conversation."""
    ids = [answer_ids(backend, text) for text in answers]
    ready = [with_answer(one.ready, each) for one, each in zip(asked, ids, strict=True)]
    batch = answer_batch(backend, [one.session for one in asked], ready, ids)
    logits, targets, rows = answer_logits(backend.model, **batch)
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return [-float(losses[rows == at].sum()) for at in range(len(asked))]


def reward(table: Dataset, recipe: BranchRecipe) -> tuple[list[NDArray[np.float32]], RoundFigures]:
    """Return the `cell_targets` (2, cells) of each row of read regions, from gains against those of control regions.

    Raises ConfigError if no region decided any answer.
    """
    stage, rows = recipe.regions, list(table)
    controls = [gain for row in rows for gain in row["controls"]]
    margin = noise_margin(controls, quantile=stage.noise, least=stage.least_margin)
    targets, pruned, recovered = [], 0, 0
    for row in rows:
        cells = math.prod(row["grid"])
        target = np.zeros((2, cells), np.float32)
        if row["kind"] == "learned":
            found = advantages(row["gains"], row["added"], margin=margin, replaced=row["replaced"])
            regions = [_weights(*both, cells) for both in zip(row["cells"], row["shares"], strict=True)]
            count = len(found.kept)
            target[:] = cell_targets(regions[:count], regions[count:], found, row["replaced"])
            pruned += sum(value < 0 for value in found.kept)
            recovered += any(value > 0 for value in found.added)
        targets.append(target)
    if not any(target.any() for target in targets):
        raise ConfigError(
            f"No region decided the answer to any of {len(rows)} questions, so there is nothing to learn. Give others, "
            "which the coarse view leaves open and a crop answers, or coarse views of fewer tokens (regions.tokens)."
        )
    kinds = table["kind"]
    figures = RoundFigures(
        questions=len(rows),
        skipped=kinds.count("skipped"),
        settled=kinds.count("settled"),
        pruned=pruned,
        recovered=recovered,
        margin=margin,
        probability=float(torch.tensor(table["proposed"]).sigmoid().mean()),
    )
    return targets, figures


def _weights(cells: Sequence[int], shares: Sequence[float], count: int) -> NDArray[np.float32]:
    weights = np.zeros(count, np.float32)
    weights[list(cells)] = shares
    return weights


def train_regions(
    backend: HFBackend, sdrpn: SDRPN, records: Records, recipe: BranchRecipe, folder: Path
) -> list[RoundFigures]:
    """Train SD-RPN in place; return the figures of each round. ConfigError if no region decided any answer."""
    start, found = deepcopy(sdrpn).requires_grad_(False), []
    reader = RegionReader(backend, recipe)
    for at in range(recipe.regions.rounds):
        table = reader.table(records, folder / f"round-{at}" / "rewards")
        targets, figures = reward(table, recipe)
        say(f"round {at + 1}: {figures.model_dump_json()}")
        module = RegionLoss(sdrpn.requires_grad_(True), start, anchor=recipe.regions.anchor)
        _fit(backend, module, records, table, targets, recipe, folder / f"round-{at}")
        sdrpn.eval()
        found.append(figures)
    return found


def _fit(
    backend: HFBackend,
    module: RegionLoss,
    records: Records,
    table: Dataset,
    targets: Sequence[NDArray[np.float32]],
    recipe: BranchRecipe,
    folder: Path,
) -> None:
    how, k = recipe.regions.optimisation, branches_of(backend).config.k

    def read(index: int) -> dict[str, Any]:
        row = table[index]
        return {"record": records[row["row"]], "tokens": row["tokens"], "targets": targets[index]}

    def prepare(rows: Rows) -> dict[str, Any]:
        asked = ask(backend, [row["record"] for row in rows], [row["tokens"] for row in rows])
        states = lower_states(backend, asked, k)
        wanted = np.concatenate([row["targets"] for row in rows], axis=1)
        return {"states": states, "targets": torch.from_numpy(wanted).to(states.hidden.device)}

    train(module, table["image_id"], read=read, prepare=prepare, how=how, folder=folder, seed=recipe.seed)


# -- regions of a map as actions, and their advantages: without a model -----------------------------------------------


def proposed_regions(heat: Tensor, options: PerceptionConfig) -> list[Region]:
    """Return the regions that inference crops, best first; `options` has to set the rules of the map."""
    found = foreground(heat, options.threshold or 0.0, options)
    parts = region_parts(heat, found, limit=options.max_regions, sides=options.box)
    return [_region(heat, *each, options) for each in parts]


def next_regions(heat: Tensor, taken: Sequence[Region], count: int, options: PerceptionConfig) -> list[Region]:
    """Return the regions around the next peaks of a map, best first: those of what `taken` and one another leave."""
    rules = options.model_copy(update={"peak_share": options.peak_share or _NEXT_SHARE, "peak_to_mean": None})
    left = heat.clone()
    found: list[Region] = []
    for region in taken:
        left[cells_inside(region, left.shape)] = 0.0
    while len(found) < count and float(left.max()) > 0.0:
        # a limit above one asks for connected parts, whatever the rule of the branches
        ((box, part), *_) = region_parts(left, foreground(left, 0.0, rules), limit=2, sides=options.box)
        found.append(_region(left, box, part, options))
        left[cells_inside(found[-1], left.shape)] = 0.0
    return found


def cells_inside(region: Region, shape: Sequence[int]) -> NDArray[np.bool]:
    """Return the cells (rows, columns) that are a region's own, or have their centre in its box."""
    (rows, columns), box = shape, region.box
    down, right = np.arange(rows)[:, None] + 0.5, np.arange(columns)[None] + 0.5
    inside = (box.y1 <= down) & (down < box.y2) & (box.x1 <= right) & (right < box.x2)
    found: NDArray[np.bool] = inside | (region.weights > 0)
    return found


def moved(region: Region, right: float, down: float) -> Region:
    """Return a region so many cells to the right and down, or as far as its box stays inside the map."""
    box, (rows, columns) = region.box, region.weights.shape
    right = min(max(box.x1 + right, 0.0), columns - (box.x2 - box.x1)) - box.x1
    down = min(max(box.y1 + down, 0.0), rows - (box.y2 - box.y1)) - box.y1
    box = MapRegion(box.x1 + right, box.y1 + down, box.x2 + right, box.y2 + down, box.peak)
    if region.centred:
        return Region(box, _around(box, (rows, columns)), centred=True)
    weights: NDArray[np.float32] = _steps(rows, down) @ (region.weights @ _steps(columns, right).T)
    left = float(weights.sum())
    return Region(box, weights / left if left > 0 else region.weights)  # a part at the edge moved out of the map


def moved_regions(regions: Sequence[Region], count: int, *, reach: float, rng: Random) -> list[Region]:
    """Return `count` of the regions in turn, each moved at random by at most `reach` of its box's sides."""
    found = []
    for at in range(count if regions else 0):
        one = regions[at % len(regions)]
        wide, high = one.box.x2 - one.box.x1, one.box.y2 - one.box.y1
        found.append(moved(one, rng.uniform(-reach, reach) * wide, rng.uniform(-reach, reach) * high))
    return found


def control_region(proposed: Sequence[Region], rng: Random) -> Region:
    """Return a region as large as the first proposed one, somewhere else on the map as far as there is room."""
    first, (rows, columns) = proposed[0], proposed[0].weights.shape
    found = first
    for _ in range(_DRAWS):
        found = moved(first, rng.uniform(-columns, columns), rng.uniform(-rows, rows))
        if not any(_overlap(found.box, one.box) for one in proposed):
            break
    return found


def noise_margin(controls: Sequence[float], *, quantile: float, least: float) -> float:
    """Return the gain that a region may have by chance: a quantile of those of control regions, at least `least`."""
    return max(least, float(np.quantile(controls, quantile))) if controls else least


def advantages(
    gains: Sequence[float], added: Sequence[float], *, margin: float, replaced: int | None = None
) -> Advantages:
    """Return the advantages of a question's regions.

    A group is divided by its largest advantage, unless that is less than one unit of log-odds: a question that no
    region decides teaches little.

    Args:
        replaced: Index of the proposed region whose place a candidate takes; None: there is room for one more. A
            candidate has to gain more than that region, and more than nothing, and if one does, the region is not kept.
    """
    least = margin if replaced is None else margin + max(0.0, gains[replaced])
    best = max(added, default=0.0)
    missed = _scaled([max(0.0, gain - least) if gain == best else 0.0 for gain in added])
    kept = _scaled([gain - margin for gain in gains])
    if replaced is not None and any(missed):
        kept[replaced] = min(0.0, kept[replaced])
    return Advantages(kept, missed)


def cell_targets(
    proposed: Sequence[NDArray[np.float32]],
    candidates: Sequence[NDArray[np.float32]],
    found: Advantages,
    replaced: int | None = None,
) -> NDArray[np.float32]:
    """Return how far log-probabilities of cells are raised, (2, ...): to be foreground, and to be background.

    Regions are given by their weights. A candidate that takes the place of a proposed region raises its own cells, and
    lets the other cells of that region go.
    """
    up, down = targets = np.zeros((2, *(*proposed, *candidates)[0].shape), np.float32)
    for weights, value in zip(proposed, found.kept, strict=True):
        (up if value > 0 else down)[:] += abs(value) * weights
    for weights, value in zip(candidates, found.added, strict=True):
        up += value * weights
        if replaced is not None:
            down += value * np.maximum(proposed[replaced] - weights, 0.0)
    return targets


def log_odds(log_probability: float) -> float:
    """Return the log-odds of a text from its log-probability."""
    certain = min(log_probability, -1e-4)  # beyond that float32 tells nothing apart
    return certain - math.log(-math.expm1(certain))


def _region(heat: Tensor, box: MapRegion, part: NDArray[np.bool], options: PerceptionConfig) -> Region:
    if options.box is not None:
        return Region(box, _around(box, part.shape), centred=True)
    inside = heat.numpy() * part
    if not inside.any():  # sinks that the blur alone made foreground, from the cells around them
        inside = heat.numpy() * (smoothed(torch.from_numpy(part.astype(np.float32)), options) > 0).numpy()
    return Region(box, inside / inside.sum())


def _around(box: MapRegion, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the weights of the four cells around the centre of a box, by their distances from it."""
    down, right = _nearest(shape[0], (box.y1 + box.y2) / 2), _nearest(shape[1], (box.x1 + box.x2) / 2)
    weights: NDArray[np.float32] = np.outer(down / down.sum(), right / right.sum()).astype(np.float32)
    return weights


def _scaled(values: list[float]) -> list[float]:
    largest = max([1.0, *map(abs, values)])
    return [value / largest for value in values]


def _overlap(one: MapRegion, other: MapRegion) -> bool:
    return one.x1 < other.x2 and other.x1 < one.x2 and one.y1 < other.y2 and other.y1 < one.y2


def _nearest(size: int, place: float) -> NDArray[np.float64]:
    """Return the weights of the cells of an axis by their distances from a place, of the two next to it alone."""
    weights: NDArray[np.float64] = np.clip(1 - np.abs(np.arange(size) + 0.5 - place), 0, None)
    return weights


def _steps(size: int, by: float) -> NDArray[np.float32]:
    """Return the matrix that moves values along an axis by a number of cells; what leaves the map is dropped."""
    return np.stack([_nearest(size, at + 0.5 + by) for at in range(size)], axis=1).astype(np.float32)
