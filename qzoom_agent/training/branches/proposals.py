"""Boxes that SD-RPN proposes: how well they hold known boxes, and what their crops do to answers.

`look_at_records` runs the branches once over held-out questions; all figures of localisation are computed from the maps
and scores that it keeps, so thresholds are swept without the model.

Where no box is known, the model's own answers tell which questions need a zoom. A question that is answered right over
the coarse view needs none. One that is answered wrong needs one if more detail makes it right: a higher budget, or with
`gate.with_crop` a crop that SD-RPN proposes (with `gate.own_calls` the model's own zooms, too). One that nothing makes
right says nothing about the gate: a better crop might have helped.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.redundancy import INSIDE
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.geometry import Box, Size
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.adapters import Grid
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.decoder import Decoder
from qzoom_agent.perception.look import BranchOutput, look, resolve_options
from qzoom_agent.perception.maps import MapRegion, foreground, regions
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    ask,
    branches_of,
    generate_answers,
    is_right,
    lower_states,
    open_prompt,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.dataset import Record, Records, record_batches
from qzoom_agent.training.branches.sharded_table import write_table
from qzoom_agent.views import View
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig


class LookOutcome(NamedTuple):
    """Gate score and map of one question."""

    score: float | None
    """The gate's probability; None without one."""
    heat: Tensor
    """(rows, columns) probabilities, 0 on sinks."""
    coarse: View
    image: Size
    boxes: Sequence[Box] | None
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


def look_at_batch(
    backend: HFBackend,
    records: Sequence[Record],
    *,
    tokens: int | None,
    asked: Sequence[CoarsePrompt] | None = None,
) -> list[LookOutcome]:
    """Return gate scores and maps of one batch; `asked` are its prompts, if they were made before."""
    branches = branches_of(backend)
    asked = ask(backend, records, tokens) if asked is None else asked
    options = PerceptionConfig(threshold=0.0, gate="learned" if branches.gate is not None else "off")
    found = run_branches(backend, branches, asked, options, map_always=True)
    out = []
    for row, one, seen in zip(records, asked, found, strict=True):
        coarse, size = one.store.view("coarse"), one.store.view("original").size
        out.append(LookOutcome(seen.score, seen.maps[0].heat, coarse, size, row.known_boxes, one.cells))
    return out


def run_branches(
    backend: HFBackend, branches: Branches, asked: Sequence[CoarsePrompt], options: PerceptionConfig, **how: Any
) -> list[BranchOutput]:
    """Look at conversations with these branches; `how` is as in `perception.look.look`."""
    states = lower_states(backend, asked, branches.config.k, inside_crops=branches.config.inside_crops)
    given = {**states._asdict(), "options": options, **how}
    return look(branches, Decoder(backend.model).adapter, given.pop("hidden"), **given)


def localisation(seen: Sequence[LookOutcome], options: PerceptionConfig) -> Localisation:
    """Return the figures under one rule of the foreground; questions without a box do not count."""
    rows: dict[str, list[float]] = {name: [] for name in ("recall", "iou", "area", "auc", "proposed")}
    for one in seen:
        if not one.boxes:
            continue
        box, curve = one.proposal(options), auc(one)
        rows["recall"].append(box is not None and all(box.coverage(needle) >= INSIDE for needle in one.boxes))
        rows["iou"].append(0.0 if box is None else box.iou(bounding_box(one.boxes)))
        rows["area"].append(0.0 if box is None else box.area / one.image.area)
        rows["auc"] += [] if curve is None else [curve]
        rows["proposed"].append(box is not None)
    means: dict[str, float | None] = {name: fmean(values) if values else None for name, values in rows.items()}
    return Localisation.model_validate({"n": len(rows["recall"]), **means})


def in_pixels(region: MapRegion, grid: Grid, view: View) -> Box:
    """Return a region of a view's map as a box in pixels of the image, without padding."""
    box = grid.to_view(region.x1, region.y1, region.x2, region.y2, view=view.id)
    return view.to_original(box.clamp(view.size))


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


class Crop(NamedTuple):
    """One rule's crop for one question."""

    right: bool
    """The answer with it is right."""
    area: float
    """Share of the image that is cropped; 0 where nothing is."""


class Outcome(NamedTuple):
    """Answers to one held-out question."""

    right: bool
    """Over the coarse view."""
    more: bool
    """At a higher budget, or by the model's own calls."""
    crops: list[Crop]
    """With the crop of each rule. A question that is right without is not asked again: none is right."""

    def need(self, *, with_crop: bool) -> bool | None:
        """Return whether the question needs a zoom; None: that cannot be told.

        `with_crop`: a crop that makes the answer right counts as more detail.
        """
        if self.right:
            return False
        return True if self.more or (with_crop and any(crop.right for crop in self.crops)) else None


def propose_boxes(backend: HFBackend, records: Sequence[Record], *, tokens: int | None) -> list[Box | None]:
    """Return the box that SD-RPN proposes for each record by the branches' own rules, whatever the gate says."""
    options = resolve_options(branches_of(backend).config, PerceptionConfig())
    return [one.proposal(options) for one in look_at_batch(backend, records, tokens=tokens)]


def with_crop(
    backend: HFBackend,
    records: Sequence[Record],
    boxes: Sequence[Box | None],
    *,
    tokens: int | None,
    aligned: bool | None = None,
) -> list[CoarsePrompt]:
    """Ask each record with the crop of its box beside its coarse view, as a policy does that looks first.

    `tokens` limits the coarse view (None: the preset's). See `show_crops`.
    """
    some = [[] if box is None else [box] for box in boxes]
    return show_crops(backend, ask(backend, records, tokens), some, aligned=aligned)


def show_crops(
    backend: HFBackend, asked: Sequence[CoarsePrompt], boxes: Sequence[Sequence[Box]], *, aligned: bool | None = None
) -> list[CoarsePrompt]:
    """Show the crops of some boxes behind the views of each conversation, but for those that cannot be cut.

    An `aligned` crop gets the positions of the cells that it shows. None: as the branches want it.
    """
    aligned = branches_of(backend).config.positions == "aligned" if aligned is None else aligned
    zoom, shown = proposal_zoom(backend), []
    for one, some in zip(asked, boxes, strict=True):
        for box in some:
            cut = zoom(one.store, box).view
            if cut is None:
                continue
            if aligned:
                coarse = one.store.view("coarse")
                cells = coarse.from_original(cut.region).to_frame("cell", coarse.size, coarse.cell)
                one.session.place(cut.id, source="coarse", cells=(cells.x1, cells.y1, cells.x2, cells.y2))
            one = open_prompt(backend, one.session, one.store, [*one.shown, cut], one.question)
            one = one._replace(crop=cut.region)
        shown.append(one)
    return shown


def proposal_zoom(backend: HFBackend) -> Zoom:
    """Return the tool that cuts proposed crops, at the budget of the model's preset."""
    views = backend.defaults
    config = AgentConfig().resolved(model=backend.name, protocol=backend.protocol, defaults=views)
    return Zoom(ZoomConfig.of(views, min_side=views.crop_min_side).for_proposals(config.perception))


def answer_with_crop(
    backend: HFBackend, records: Sequence[Record], boxes: Sequence[Box | None], *, max_new_tokens: int, **how: Any
) -> list[tuple[str, Box | None]]:
    """Return the answer to each record, asked as `with_crop` says, and its crop in pixels of the image, if any."""
    cropped = with_crop(backend, records, boxes, **how)
    said = generate_answers(backend, cropped, max_new_tokens=max_new_tokens)
    return [(text, one.crop) for text, one in zip(said, cropped, strict=True)]


def answer_by_own_calls(backend: HFBackend, record: Record, *, tokens: int | None) -> str | None:
    """Return the model's answer when it may zoom by itself; `tokens` limits the coarse view (None: the preset's)."""
    config = AgentConfig(policy="explicit").replace(**{"budget.coarse_tokens": tokens})
    return Agent(backend, config=config).run(record.image, record.question).text


def higher_budgets(recipe: BranchRecipe, tokens: int) -> list[int]:
    """Return the recipe's budgets that show more than a view of `tokens`.

    Raises ConfigError if there is none and crops do not count, so that no question can need a zoom.
    """
    budgets = recipe.calibration.higher_tokens or recipe.gate.tokens
    higher = [budget for budget in budgets if budget > tokens]
    if not higher and not recipe.gate.with_crop:
        raise ConfigError(
            f"No held-out question can be told to need a zoom: the view that is looked at has {tokens} visual tokens, "
            f"no question is asked again at more than {max(budgets)}, and crops do not count. Name a budget above "
            f"{tokens} in calibration.higher_tokens, set gate.with_crop to true, or hold out questions with `boxes`."
        )
    return higher


def crop_outcomes(
    backend: HFBackend, records: Records, recipe: BranchRecipe, rules: Sequence[PerceptionConfig], folder: Path
) -> list[Outcome]:
    """Ask all records over the coarse view, and those that are wrong with more detail. All processes share the work.

    `rules` make a crop of SD-RPN's map; `folder` gets the table of outcomes. ConfigError as `higher_budgets`.
    """
    stage, tokens = recipe.gate, recipe.calibration.tokens
    higher = higher_budgets(recipe, tokens or backend.defaults.coarse_max_tokens)

    def right_at(some: Sequence[Record], budget: int | None) -> list[bool]:
        said = generate_answers(backend, ask(backend, some, budget), max_new_tokens=stage.max_new_tokens)
        return [is_right(*pair) for pair in zip(said, some, strict=True)]

    def again(wrong: Sequence[Record]) -> Iterator[Outcome]:
        at_budgets = [right_at(wrong, budget) for budget in higher]
        for at, (record, crops) in enumerate(zip(wrong, _crops(backend, wrong, recipe, rules), strict=True)):
            more = any(right[at] for right in at_budgets)
            if stage.own_calls and not more and not any(crop.right for crop in crops):
                more = is_right(answer_by_own_calls(backend, record, tokens=tokens), record)
            yield Outcome(False, more, crops)

    def rows(_: range, some: list[Record]) -> Iterator[dict[str, Any]]:
        right = right_at(some, tokens)
        wrong = [record for record, fine in zip(some, right, strict=True) if not fine]
        asked_again = again(wrong) if wrong else iter(())
        for fine in right:
            found = Outcome(True, False, [Crop(False, 0.0)] * len(rules)) if fine else next(asked_again)
            yield {**found._asdict(), "crops": [crop._asdict() for crop in found.crops]}

    table = write_table(folder, records, rows, batch=stage.batch, progress="answered with and without crops")
    return [Outcome(row["right"], row["more"], [Crop(**crop) for crop in row["crops"]]) for row in table]


def _crops(
    backend: HFBackend, records: Sequence[Record], recipe: BranchRecipe, rules: Sequence[PerceptionConfig]
) -> list[list[Crop]]:
    """Ask each record with the crop of each rule. Rules that propose the same box share its answer."""
    stage, tokens = recipe.gate, recipe.calibration.tokens
    seen = look_at_batch(backend, records, tokens=tokens)
    boxes = [[one.proposal(rule) for rule in rules] for one in seen]
    tries = list(dict.fromkeys((at, box) for at, some in enumerate(boxes) for box in some if box is not None))
    made: dict[tuple[int, Box | None], Crop] = {}
    for start in range(0, len(tries), stage.batch):
        part = tries[start : start + stage.batch]
        again, proposed = [records[at] for at, _ in part], [box for _, box in part]
        answers = answer_with_crop(backend, again, proposed, tokens=tokens, max_new_tokens=stage.max_new_tokens)
        for (at, box), (text, cut) in zip(part, answers, strict=True):
            made[at, box] = Crop(is_right(text, records[at]), 0.0 if cut is None else cut.area / seen[at].image.area)
    return [[made.get((at, box), Crop(False, 0.0)) for box in some] for at, some in enumerate(boxes)]
