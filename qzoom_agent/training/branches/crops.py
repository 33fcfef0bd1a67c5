"""Records asked again with a crop beside their coarse view, and what the crop does to the answers.

Where no box is known, the model's own answers tell which questions need a zoom. A question that is answered right over
the coarse view needs none. One that is answered wrong needs one if more detail makes it right: a higher budget, or with
`gate.with_crop` a crop that SD-RPN proposes (with `gate.own_calls` the model's own zooms, too). One that nothing makes
right says nothing about the gate: a better crop might have helped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.localisation import look_at_batch
from qzoom_agent.training.branches.sharded_table import write_parts
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig


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
) -> list[CoarsePrompt]:
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
            out.append(one)
            continue
        if aligned:
            coarse = one.store.view("coarse")
            cells = coarse.from_original(cut.region).to_frame("cell", coarse.size, coarse.cell)
            one.session.place(cut.id, source="coarse", cells=(cells.x1, cells.y1, cells.x2, cells.y2))
        asked = open_prompt(backend, one.session, one.store, [*one.shown, cut], record["question"])
        out.append(asked._replace(crop=cut.region))
    return out


def answer_with_crop(
    backend: HFBackend,
    records: Sequence[Record],
    boxes: Sequence[Box | None],
    *,
    tokens: int | None,
    aligned: bool,
    max_new_tokens: int,
) -> list[tuple[str, Box | None]]:
    """Return the answer to each record, asked as `with_crop` says, and its crop in pixels of the image, if any."""
    cropped = with_crop(backend, records, boxes, tokens=tokens, aligned=aligned)
    said = generate_answers(backend, cropped, max_new_tokens=max_new_tokens)
    return [(text, one.crop) for text, one in zip(said, cropped, strict=True)]


def answer_by_own_calls(backend: HFBackend, record: Record, *, tokens: int | None) -> str | None:
    """Return the model's answer when it may zoom by itself; `tokens` limits the coarse view (None: the preset's)."""
    config = AgentConfig(policy="explicit").replace(**{"budget.coarse_tokens": tokens})
    return Agent(backend, config=config).run(record["image"], record["question"]).text


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
            f"{tokens} in calibration.higher_tokens, set gate.with_crop to true, or hold out questions with `boxes`."
        )
    return higher


def crop_outcomes(
    backend: HFBackend, records: Records, recipe: BranchRecipe, rules: Sequence[PerceptionConfig], folder: Path
) -> list[Outcome]:
    """Ask all records over the coarse view, and those that are wrong with more detail. All processes share the work.

    `rules` make a crop of SD-RPN's map; `folder` gets the table of outcomes.

    Raises:
        ConfigError: No question can need a zoom, see `higher_budgets`.
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

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for chosen, some in record_batches(records, indices, stage.batch):
            right = right_at(some, tokens)
            wrong = [record for record, fine in zip(some, right, strict=True) if not fine]
            asked_again = again(wrong) if wrong else iter(())
            for index, fine in zip(chosen, right, strict=True):
                found = Outcome(True, False, [Crop(False, 0.0)] * len(rules)) if fine else next(asked_again)
                yield {**found._asdict(), "row": index, "crops": [crop._asdict() for crop in found.crops]}

    table = write_parts(folder, len(records), rows, progress="answered with and without crops")
    return [Outcome(row["right"], row["more"], [Crop(**crop) for crop in row["crops"]]) for row in table]


def _crops(
    backend: HFBackend, records: Sequence[Record], recipe: BranchRecipe, rules: Sequence[PerceptionConfig]
) -> list[list[Crop]]:
    """Ask each record with the crop of each rule. Rules that propose the same box share its answer."""
    stage, tokens = recipe.gate, recipe.calibration.tokens
    assert backend.branches is not None
    how: dict[str, Any] = {"aligned": backend.branches.config.positions == "aligned", "tokens": tokens}
    seen = look_at_batch(backend, records, tokens=tokens)
    boxes = [[one.proposal(rule) for rule in rules] for one in seen]
    tries = list(dict.fromkeys((at, box) for at, some in enumerate(boxes) for box in some if box is not None))
    made: dict[tuple[int, Box | None], Crop] = {}
    for start in range(0, len(tries), stage.batch):
        part = tries[start : start + stage.batch]
        again, proposed = [records[at] for at, _ in part], [box for _, box in part]
        answers = answer_with_crop(backend, again, proposed, max_new_tokens=stage.max_new_tokens, **how)
        for (at, box), (text, cut) in zip(part, answers, strict=True):
            made[at, box] = Crop(is_right(text, records[at]), 0.0 if cut is None else cut.area / seen[at].image.area)
    return [[made.get((at, box), Crop(False, 0.0)) for box in some] for at, some in enumerate(boxes)]
