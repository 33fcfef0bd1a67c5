"""Records asked again with a crop beside their coarse view, and what the crop does to the answers.

Where no box is known, the model's own answers tell which questions need a zoom. A question that is answered right over
the coarse view needs none. One that is answered wrong needs one if more detail makes it right: a higher budget, or with
`gate.with_crop` the crop that SD-RPN proposes by any of the rules that are tried (with `gate.own_calls` the model's own
zooms, too). One that nothing makes right says nothing about the gate: a better crop might have helped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.look import resolve_options
from qzoom_agent.training.branches.base_inference import (
    CoarsePrompt,
    ask,
    generate_answers,
    is_right,
    open_prompt,
    record_batches,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, GateStage
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.localisation import look_at_batch
from qzoom_agent.training.branches.sharded_table import write_parts
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig


class Cropped(NamedTuple):
    """One record, asked with a crop beside its coarse view."""

    asked: CoarsePrompt
    box: Box | None
    """The crop in pixels of the image; None: nothing was cropped."""


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
    assert backend.branches is not None
    options = resolve_options(backend.branches.config, PerceptionConfig())
    return [one.proposal(options) for one in look_at_batch(backend, records, tokens=tokens)]


def with_crop(
    backend: HFBackend, records: Sequence[Record], boxes: Sequence[Box | None], *, tokens: int | None, aligned: bool
) -> list[Cropped]:
    """Ask each record with the crop of its box beside its coarse view, as a policy does that looks first.

    `tokens` limits the coarse view (None: the preset's); an `aligned` crop gets the positions of the cells it shows.
    """
    views = backend.defaults
    config = AgentConfig().resolved(model=backend.name, protocol=backend.protocol, defaults=views)
    tool = ZoomConfig(
        factor=views.factor,
        min_tokens=views.crop_min_tokens,
        max_tokens=views.crop_max_tokens,
        min_side=views.crop_min_side,
    )
    zoom = Zoom(tool.for_proposals(config.perception))
    out = []
    for record, box, one in zip(records, boxes, ask(backend, records, tokens), strict=True):
        cut = None if box is None else zoom(one.store, box).view
        if cut is None:
            out.append(Cropped(one, None))
            continue
        if aligned:
            coarse = one.store.view("coarse")
            cells = coarse.from_original(cut.region).to_frame("cell", coarse.size, coarse.cell)
            x1, y1, x2, y2 = cells.as_list()
            one.session.place(cut.id, source="coarse", cells=(x1, y1, x2, y2))
        asked = open_prompt(backend, one.session, one.store, [*one.shown, cut], record["question"])
        out.append(Cropped(asked, cut.region))
    return out


def higher_budgets(recipe: BranchRecipe, tokens: int) -> list[int]:
    """Return the recipe's budgets that show more than a view of `tokens`.

    Raises:
        ConfigError: There is none and crops do not count, so that no question can need a zoom.
    """
    budgets = recipe.calibration.higher_tokens or recipe.gate.tokens
    higher = [budget for budget in budgets if budget > tokens]
    if not higher and not recipe.gate.with_crop:
        raise ConfigError(
            f"No held-out question can be told to need a zoom: the view that is looked at has {tokens} visual tokens, "
            f"no question is asked again at more than {max(budgets)}, and crops do not count. Name a budget above "
            f"{tokens} in calibration.higher_tokens, set gate.with_crop to true, or hold out questions whose `boxes` "
            "are known."
        )
    return higher


def crop_outcomes(
    backend: HFBackend,
    records: Records,
    recipe: BranchRecipe,
    rules: Sequence[PerceptionConfig],
    folder: Path,
    *,
    source: JsonValue = None,
) -> list[Outcome]:
    """Ask all records over the coarse view, and those that are wrong with more detail. All processes share the work.

    Args:
        rules: Rules by which SD-RPN's map becomes a crop.
        folder: Folder for the table; one of other settings is refused.
        source: The base, branches and records that the table is of.

    Raises:
        ConfigError: No question can need a zoom, see `higher_budgets`.
    """
    stage, tokens = recipe.gate, recipe.calibration.tokens
    assert backend.branches is not None
    coarse = tokens or backend.defaults.coarse_max_tokens
    higher = higher_budgets(recipe, coarse)

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for chosen, some in record_batches(records, indices, stage.batch):
            right = _right_at(backend, some, tokens, stage)
            wrong = [record for record, fine in zip(some, right, strict=True) if not fine]
            asked_again = iter(_ask_again(backend, wrong, recipe, rules, higher))
            for index, fine in zip(chosen, right, strict=True):
                found = Outcome(True, False, [Crop(False, 0.0)] * len(rules)) if fine else next(asked_again)
                yield {**found._asdict(), "row": index, "crops": [crop._asdict() for crop in found.crops]}

    settings: dict[str, JsonValue] = {
        "tokens": coarse,
        "higher": [*higher],
        "own_calls": stage.own_calls,
        "max_new_tokens": stage.max_new_tokens,
        "rules": [rule.model_dump(mode="json", exclude_none=True) for rule in rules],
        "positions": backend.branches.config.positions,
        "source": source,
    }
    table = write_parts(folder, len(records), rows, settings, progress="answered with and without crops")
    return [Outcome(row["right"], row["more"], [Crop(**crop) for crop in row["crops"]]) for row in table]


def _ask_again(
    backend: HFBackend,
    records: Sequence[Record],
    recipe: BranchRecipe,
    rules: Sequence[PerceptionConfig],
    higher: Sequence[int],
) -> list[Outcome]:
    """Ask questions with more detail that the coarse view alone gets wrong."""
    if not records:
        return []
    stage = recipe.gate
    own = AgentConfig(policy="explicit").replace(**{"budget.coarse_tokens": recipe.calibration.tokens})
    at_budgets = [_right_at(backend, records, budget, stage) for budget in higher]
    found = []
    for at, (record, crops) in enumerate(zip(records, _crops(backend, records, recipe, rules), strict=True)):
        more = any(right[at] for right in at_budgets)
        if stage.own_calls and not more and not any(crop.right for crop in crops):
            more = is_right(Agent(backend, config=own).run(record["image"], record["question"]).text, record)
        found.append(Outcome(False, more, crops))
    return found


def _right_at(backend: HFBackend, records: Sequence[Record], tokens: int | None, stage: GateStage) -> list[bool]:
    """Return for each record whether it is answered right over a view of at most so many tokens."""
    said = generate_answers(backend, ask(backend, records, tokens), max_new_tokens=stage.max_new_tokens)
    return [is_right(text, record) for text, record in zip(said, records, strict=True)]


def _crops(
    backend: HFBackend, records: Sequence[Record], recipe: BranchRecipe, rules: Sequence[PerceptionConfig]
) -> list[list[Crop]]:
    """Ask each record with the crop of each rule. Rules that propose the same box share its answer."""
    stage, tokens = recipe.gate, recipe.calibration.tokens
    assert backend.branches is not None
    aligned = backend.branches.config.positions == "aligned"
    seen = look_at_batch(backend, records, tokens=tokens)
    boxes = [[one.proposal(rule) for rule in rules] for one in seen]
    tries = list(dict.fromkeys((at, box) for at, some in enumerate(boxes) for box in some if box is not None))
    made: dict[tuple[int, Box | None], Crop] = {}
    for start in range(0, len(tries), stage.batch):
        part = tries[start : start + stage.batch]
        again = [records[at] for at, _ in part]
        cropped = with_crop(backend, again, [box for _, box in part], tokens=tokens, aligned=aligned)
        said = generate_answers(backend, [one.asked for one in cropped], max_new_tokens=stage.max_new_tokens)
        for (at, box), one, text in zip(part, cropped, said, strict=True):
            area = 0.0 if one.box is None else one.box.area / seen[at].image.area
            made[at, box] = Crop(is_right(text, records[at]), area)
    return [[made.get((at, box), Crop(False, 0.0)) for box in some] for at, some in enumerate(boxes)]
