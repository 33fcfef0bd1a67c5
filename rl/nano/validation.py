"""Validation of a stage: answers on boards that are never trained on, by kind of batch and of question.

Teacher-forced: earlier zooms in a conversation are the right ones, so an answer's score is that of its own turn. A zoom
call that is not served counts as right when none of its four edges is more than two location steps off.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nano.batches import PAPER_TOKENS, VALIDATION_SEED, Kind, trees_of
from nano.examples import DENSE_CLASSES
from nano.heads import losses
from nano.paper_batches import PAPER_KINDS, paper_trees
from nano.receipts import Receipts
from nano.tokenizer import LOCATIONS
from nano.trees import Packer, Tree
from qzoom_agent.protocols.nano import LOCATION_STEP

_UNSERVED = ("call ", "lost ", "follow ", "slip ", "steps ")
"""Roles that end with a call: judged by where it lies."""
_NEAR = 2 * LOCATION_STEP
_DENSE_NAMES = ("char", "char", "shape", "color", "pips", "middle")
Scores = dict[str, tuple[float, int]]
"""Mean and count by name."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with every tensor in it, nested ones too, on `device`."""
    moved: dict[str, Any] = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)
    return moved


def _count_dense(logits: Tensor, labels: Tensor, kind: str, scores: dict[str, list[float]]) -> None:
    """Count the classes that the linear reader gets right: "char" counts both halves of a token."""
    for slot, part in enumerate(torch.split(logits, list(DENSE_CLASSES), dim=1)):
        there = labels[:, slot] > 0
        right = part[there].argmax(1) == labels[there, slot]
        scores.setdefault(f"{kind} sees {_DENSE_NAMES[slot]}", []).extend(right.float().tolist())


def _trees(kind: Kind, number: int, receipts: Receipts | None) -> list[Tree]:
    if kind not in PAPER_KINDS:
        return trees_of(kind, number)
    return paper_trees(Random(f"batch/{kind}/{number}"), kind, number, receipts, tokens=PAPER_TOKENS)


@torch.no_grad()
def validate(
    model: Any, packer: Packer, *, kinds: Sequence[Kind], batches: int, receipts: Receipts | None = None
) -> Scores:
    """Scores of a nano with its training heads: right answers per kind of batch and question, losses, and the mean
    error of the edges of zoom calls in pixels of the coarse view, and what the linear reader gets right."""
    ids = cast(list[int], packer.tokenizer.convert_tokens_to_ids(list(LOCATIONS)))
    steps = {token: LOCATION_STEP * index for index, token in enumerate(ids)}
    scores: dict[str, list[float]] = {}
    model.eval()
    for kind in kinds:
        for index in range(batches):
            trees = _trees(kind, VALIDATION_SEED + index, receipts)
            batch = to_device(packer.batch(trees), model.device)
            terms = losses(model, model.training_heads, batch)
            for name, value in terms.items():
                if value.ndim == 0:
                    scores.setdefault(f"{kind} {name} loss", []).append(float(value))
            if "dense" in terms:
                _count_dense(terms["dense"], batch["dense"], kind, scores)
            if "predicts" not in terms:
                continue
            names = [name for tree in trees for name in tree.names]
            right = [True] * len(names)
            owners = batch["branch"][terms["predicts"]].tolist()
            wanted, said = batch["labels"][terms["predicts"]].tolist(), terms["logits"].argmax(-1).tolist()
            for who, want, got in zip(owners, wanted, said, strict=True):
                if want in steps:
                    error = abs(steps.get(got, 10**3) - steps[want])
                    scores.setdefault(f"{kind} call px", []).append(float(min(error, 500)))
                    right[who] &= error <= _NEAR or not names[who].startswith(_UNSERVED)
                else:
                    right[who] &= want == got
            for who in sorted(set(owners)):  # conversations in which something is said
                scores.setdefault(f"{kind} {names[who]}", []).append(float(right[who]))
    model.train()
    return {
        name: (round(sum(values) / len(values), 3), len(values)) for name, values in sorted(scores.items()) if values
    }
