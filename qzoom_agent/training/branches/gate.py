"""The gate from consistency: a question needs a zoom if more detail, and only that, makes its answer right.

Each question is answered at ascending budgets (Q-Zoom 3.2). It is of use if its answers are a step: wrong below some
budget and right from there on. Right throughout is easy; wrong first is a transition; anything else is luck and is
dropped. With `with_crop` the crop that SD-RPN proposes counts as the highest budget.

Shares and balance of the rows are those of the released code; `consensus`, and `read_tokens` without the two highest
budgets, give its choice of questions and budgets as well. Two things differ: answers are compared with the references,
not with the consensus by any common substring ("12" is no "120"), and a transition that is right at no budget that can
be read is always shown where it was wrong, not nine times in ten.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from qzoom_agent.data.answers import normalise
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Gate
from qzoom_agent.training.branches.base_inference import (
    LowerLayerStates,
    ask,
    branches_of,
    generate_answers,
    is_right,
    lower_states,
)
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, GateStage
from qzoom_agent.training.branches.dataset import Record, Records
from qzoom_agent.training.branches.fitting import Rows, train
from qzoom_agent.training.branches.proposals import answer_by_own_calls, answer_with_crop, propose_boxes
from qzoom_agent.training.branches.sharded_table import say, write_table

_TRANSITION_WRONG = 0.9
"""Probability that a transition is shown where it was wrong."""
FEW: Final = 20
"""Questions of a kind, with and without need of a zoom, below which a gate or its threshold means little."""
_ADVICE: Final = (
    "Give more of the rare kind (gate.data, gate.records), or try other budgets (gate.tokens) or gate.with_crop, which "
    "counts the proposed crop as more detail. Or leave `gate` out of `stages`: branches without a gate propose a crop "
    "for every question."
)
Kind = Literal["easy", "transition", "never", "luck"]


class Draw(NamedTuple):
    """One training row: a record, the index of the budget it is read at, and True if it needs a zoom there."""

    row: int
    image_id: str
    budget: int
    needs: bool


class GateLoss(nn.Module):
    """Binary cross-entropy of the gate's score at the last prompt token; only the gate is trained."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, states: LowerLayerStates, needs: Tensor) -> Tensor:
        """Return the mean over the rows; `needs` is 1 for those that need a zoom, 0 for the others."""
        logits: Tensor = self.gate(states.hidden, rotary=states.rotary, mask=states.mask)
        return binary_cross_entropy_with_logits(logits.float(), needs)


def answer_at_budgets(backend: HFBackend, records: Records, recipe: BranchRecipe, folder: Path) -> Dataset:
    """Return for each record (`row`, `image_id`) its `answers` at the budgets, and which of them are `right`.

    The table is kept in `folder`.
    """
    stage = recipe.gate

    def rows(_: range, some: list[Record]) -> Iterator[dict[str, Any]]:
        said: list[Sequence[str | None]] = [
            generate_answers(backend, ask(backend, some, budget), max_new_tokens=stage.max_new_tokens)
            for budget in stage.tokens
        ]
        if stage.with_crop:
            said.append(_with_crops(backend, some, stage))
        for record, *texts in zip(some, *said, strict=True):
            yield {"answers": texts, "right": [is_right(text, record) for text in texts]}

    return write_table(folder, records, rows, batch=stage.batch, progress="answered at all budgets")


def _with_crops(backend: HFBackend, records: Sequence[Record], stage: GateStage) -> list[str | None]:
    """Answer with the proposed crop, and with `own_calls` by the model's own zooms where that is wrong."""
    lowest = stage.tokens[0]
    boxes = propose_boxes(backend, records, tokens=lowest)
    answers = answer_with_crop(backend, records, boxes, tokens=lowest, max_new_tokens=stage.max_new_tokens)
    return [
        answer_by_own_calls(backend, record, tokens=None) if stage.own_calls and not is_right(text, record) else text
        for (text, _), record in zip(answers, records, strict=True)
    ]


def kind_of(right: Sequence[bool]) -> Kind:
    """Classify right and wrong answers over ascending budgets."""
    if not any(right):
        return "never"
    if not all(right[right.index(True) :]):
        return "luck"
    return "easy" if right[0] else "transition"


def kinds(table: Dataset, stage: GateStage) -> list[Kind]:
    """Classify each row of a table of answers; with `consensus`, as luck where the two highest budgets disagree."""
    found = [kind_of(right) for right in table["right"]]
    if not stage.consensus:
        return found
    agree = [normalise(said[-2]) == normalise(said[-1]) for said in table["answers"]]
    return [kind if same or kind == "never" else "luck" for kind, same in zip(found, agree, strict=True)]


def counted(found: Sequence[Kind]) -> str:
    """Return the number of each kind, as text."""
    return ", ".join(f"{found.count(kind)} {kind}" for kind in get_args(Kind))


def draw_rows(table: Dataset, stage: GateStage, *, seed: int) -> list[Draw]:
    """Draw the training rows of all epochs.

    Of a transition that is mostly one of the last two wrong budgets, seldom a right one; of easy questions, as many as
    there are transitions, any budget.
    """
    readable = stage.budgets_read
    rng = Random(f"gate/{seed}")
    rows = list(zip(table["row"], table["image_id"], table["right"], kinds(table, stage), strict=True))
    transitions = [(row, image, right) for row, image, right, kind in rows if kind == "transition"]
    easy = [(row, image) for row, image, _, kind in rows if kind == "easy"]
    drawn = []
    for _ in range(stage.optimisation.num_train_epochs):
        for row, image, right in transitions:
            wrong = [at for at in readable if not right[at]]
            fine = [at for at in readable if right[at]]
            if wrong and (rng.random() < _TRANSITION_WRONG or not fine):
                drawn.append(Draw(row, image, rng.choice(wrong[-2:]), True))
            elif fine:
                drawn.append(Draw(row, image, rng.choice(fine), False))
        for row, image in rng.sample(easy, min(len(easy), len(transitions))):
            drawn.append(Draw(row, image, rng.choice(readable), False))
    return drawn


def train_gate(
    backend: HFBackend, gate: Gate, records: Records, table: Dataset, recipe: BranchRecipe, folder: Path
) -> None:
    """Train the gate in place; ConfigError if no question needs a zoom at any budget, or all do."""
    stage, found = recipe.gate, kinds(table, recipe.gate)
    drawn = draw_rows(table, stage, seed=recipe.seed)
    need, none = found.count("transition"), found.count("easy")
    told = (
        f"Of {len(found)} questions {need} are answered right only with more detail (these need a zoom), {none} at "
        f"every budget (these need none), and {len(found) - need - none} at none, or not consistently (left out)."
    )
    if len({one.needs for one in drawn}) < 2:
        raise ConfigError(f"The gate has nothing to learn from. {told} It needs both of the first two kinds. {_ADVICE}")
    if min(need, none) < FEW:
        say(f"warning: the gate has very little to learn from. {told} {_ADVICE}")

    def read(index: int) -> dict[str, Any]:
        one = drawn[index]
        return {"record": records[one.row], "budget": one.budget, "needs": one.needs}

    def prepare(rows: Rows) -> dict[str, Any]:
        asked = ask(backend, [row["record"] for row in rows], [stage.tokens[row["budget"]] for row in rows])
        states = lower_states(backend, asked, branches_of(backend).config.k)
        return {"states": states, "needs": torch.tensor([float(row["needs"]) for row in rows]).to(states.hidden.device)}

    module, images, how = GateLoss(gate.requires_grad_(True)), [one.image_id for one in drawn], stage.optimisation
    train(module, images, read=read, prepare=prepare, how=how, folder=folder, seed=recipe.seed, epochs=1)
