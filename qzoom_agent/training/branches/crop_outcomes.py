"""Which questions need a zoom, and which crops mend them, where no box says so: told from the model's own answers.

It depends on the view that is looked at. A question that is answered right over it needs no zoom. One that is answered
wrong needs one if more detail makes it right: a higher budget, or with `gate.with_crop` the crop that SD-RPN proposes
by any of the rules that are tried (with `gate.own_calls` the model's own zooms, too). One that nothing mends tells
nothing of the gate: nobody can say whether a better crop would have helped.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from qzoom_agent.agent import Agent
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.training.branches.attending import answers
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, GateStage
from qzoom_agent.training.branches.correctness import is_right
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.inputs import ask
from qzoom_agent.training.branches.localisation import maps_of
from qzoom_agent.training.branches.proposed_crops import with_crop
from qzoom_agent.training.branches.sharded_table import write_parts


class Crop(NamedTuple):
    """What one rule's crop does for one question."""

    right: bool
    """Whether the answer with it is right."""
    area: float
    """The share of the image that is cropped; 0 where nothing is."""


class Outcome(NamedTuple):
    """What becomes of one question that is held out."""

    right: bool
    """Over the view that is looked at."""
    more: bool
    """At a higher budget, or by the model's own calls."""
    crops: list[Crop]
    """Beside the crop of each rule. A question that is right without is not asked again: none is right."""

    def need(self, *, with_crop: bool) -> bool | None:
        """Whether it needs a zoom; None: nobody can say.

        with_crop: a crop that makes the answer right counts as more detail.
        """
        if self.right:
            return False
        return True if self.more or (with_crop and any(crop.right for crop in self.crops)) else None


def higher_budgets(recipe: BranchRecipe, tokens: int) -> list[int]:
    """The recipe's budgets that show more than a view of `tokens`.

    Raises:
        ConfigError: none does, and crops do not count, so that no question can need a zoom.
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


def outcomes(
    backend: HFBackend,
    records: Records,
    recipe: BranchRecipe,
    rules: Sequence[PerceptionConfig],
    folder: Path,
    *,
    source: JsonValue = None,
    note: Callable[[int], None],
) -> list[Outcome]:
    """What becomes of the records. All processes have to call this, and share the work.

    Args:
        rules: of the proposed crop.
        folder: gets the table; one of other settings is refused.
        source: what base, branches and records it is of.
    Raises:
        ConfigError: no question can need a zoom, see `higher_budgets`.
    """
    stage, tokens = recipe.gate, recipe.calibration.tokens
    assert backend.branches is not None
    coarse = tokens or backend.defaults.coarse_max_tokens
    higher = higher_budgets(recipe, coarse)

    def rows(indices: range) -> Iterator[dict[str, Any]]:
        for start in range(indices.start, indices.stop, stage.batch):
            chosen = range(start, min(start + stage.batch, indices.stop))
            some = [records[index] for index in chosen]
            right = _right_at(backend, some, tokens, stage)
            wrong = [record for record, fine in zip(some, right, strict=True) if not fine]
            asked_again = iter(_asked_again(backend, wrong, recipe, rules, higher))
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
    table = write_parts(folder, len(records), rows, settings, note=note)
    return [Outcome(row["right"], row["more"], [Crop(**crop) for crop in row["crops"]]) for row in table]


def _asked_again(
    backend: HFBackend,
    records: Sequence[Record],
    recipe: BranchRecipe,
    rules: Sequence[PerceptionConfig],
    higher: Sequence[int],
) -> list[Outcome]:
    """What becomes of questions that the view alone gets wrong."""
    if not records:
        return []
    stage = recipe.gate
    own = AgentConfig(policy="explicit").replace(**{"budget.coarse_tokens": recipe.calibration.tokens})
    mended = [False] * len(records)
    for budget in higher:
        mended = [before or now for before, now in zip(mended, _right_at(backend, records, budget, stage), strict=True)]
    found = []
    for record, more, crops in zip(records, mended, _crops(backend, records, recipe, rules), strict=True):
        if stage.own_calls and not more and not any(crop.right for crop in crops):
            said = Agent(backend, config=own).run(record["image"], record["question"]).text
            more = is_right(said, record)
        found.append(Outcome(False, more, crops))
    return found


def _right_at(backend: HFBackend, records: Sequence[Record], tokens: int | None, stage: GateStage) -> list[bool]:
    """Which are answered right over a view of at most so many tokens."""
    said = answers(backend, ask(backend, records, [tokens] * len(records)), max_new_tokens=stage.max_new_tokens)
    return [is_right(text, record) for text, record in zip(said, records, strict=True)]


def _crops(
    backend: HFBackend, records: Sequence[Record], recipe: BranchRecipe, rules: Sequence[PerceptionConfig]
) -> list[list[Crop]]:
    """For each record what the crop of each rule does. Rules that propose the same box share its answer."""
    stage, tokens = recipe.gate, recipe.calibration.tokens
    assert backend.branches is not None
    aligned = backend.branches.config.positions == "aligned"
    seen = maps_of(backend, records, tokens=tokens)
    boxes = [[one.proposal(rule) for rule in rules] for one in seen]
    tries = list(dict.fromkeys((at, box) for at, some in enumerate(boxes) for box in some if box is not None))
    made: dict[tuple[int, Box | None], Crop] = {}
    for start in range(0, len(tries), stage.batch):
        part = tries[start : start + stage.batch]
        again = [records[at] for at, _ in part]
        cropped = with_crop(backend, again, [box for _, box in part], tokens=tokens, aligned=aligned)
        said = answers(backend, [one.asked for one in cropped], max_new_tokens=stage.max_new_tokens)
        for (at, box), one, text in zip(part, cropped, said, strict=True):
            area = 0.0 if one.box is None else one.box.area / seen[at].image.area
            made[at, box] = Crop(is_right(text, records[at]), area)
    return [[made.get((at, box), Crop(False, 0.0)) for box in some] for at, some in enumerate(boxes)]
