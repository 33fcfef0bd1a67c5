"""Validation: a model that says what it should scores 1.0, and each slip costs what the table says it does."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from nano import validation
from nano.batches import VALIDATION_SEED
from nano.examples import coarse_tree
from nano.pages import object_page
from nano.tokenizer import LOCATIONS, build_tokenizer
from nano.trees import Packer, Tree, image_blocks
from nano.validation import Scores, to_device, validate
from qzoom_agent.evaluation.tasks.needle.boards import draw_board
from qzoom_agent.protocols.nano import LOCATION_STEP

PACKER = Packer(build_tokenizer())
(FIRST,) = PACKER.tokenizer.encode(LOCATIONS[0])
PLACES = range(FIRST, FIRST + len(LOCATIONS))
END = PACKER.tokenizer.eos_token_id
TREES = {"coarse": [coarse_tree(Random(1), draw_board("scene", 3))], "pages": [object_page(Random(0))]}
NAMES, PAGES = ([name for tree in TREES[kind] for name in tree.names] for kind in ("coarse", "pages"))
SAYING = [name for name in NAMES if not name.startswith("look ")]
"""Conversations in which something is said, not only looked up."""


class Model:
    """As much of a model as validation touches."""

    device = torch.device("cpu")
    training_heads = None

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def eval(self) -> None:
        self.modes.append(False)

    def train(self) -> None:
        self.modes.append(True)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scores]:
    """Scores of a model that says `slip(branch name, right token)`."""

    def scored(slip: Callable[[str, int], int], kinds: tuple[Any, ...] = ("coarse",), batches: int = 1) -> Scores:
        def losses(model: Model, heads: None, batch: dict[str, Any]) -> dict[str, Tensor]:
            assert not torch.is_grad_enabled()
            assert model.modes[-1] is False
            predicts = torch.nonzero(batch["labels"] != -100)[:, 0]
            names = NAMES if len(batch["labels"]) == size("coarse") else PAGES
            said = [slip(names[batch["branch"][at]], int(batch["labels"][at])) for at in predicts]
            logits = torch.nn.functional.one_hot(torch.tensor(said), len(PACKER.tokenizer)).float()
            return {"predicts": predicts, "logits": logits, "answer": torch.tensor(0.25), "focus": torch.tensor(2.0)}

        monkeypatch.setattr(validation, "losses", losses)
        monkeypatch.setattr(validation, "trees_of", lambda kind, seed: TREES[kind])
        model = Model()
        scores = validate(model, PACKER, kinds=kinds, batches=batches)
        assert model.modes == [False, True]
        return scores

    return scored


def size(kind: str) -> int:
    return len(PACKER.batch(TREES[kind])["labels"])


def answers(scores: Scores) -> dict[str, float]:
    return {name: value for name, (value, _) in scores.items() if not name.endswith((" loss", " px"))}


def test_a_model_that_says_what_it_should(score: Callable[..., Scores]) -> None:
    scores = score(lambda name, token: token, kinds=("coarse", "pages"), batches=2)
    assert set(answers(scores).values()) == {1.0}
    assert set(answers(scores)) == {
        f"{kind} {name}" for kind, named in (("coarse", SAYING), ("pages", PAGES)) for name in named
    }
    for name in set(SAYING):
        assert scores[f"coarse {name}"] == (1.0, 2 * NAMES.count(name))
    assert scores["coarse call px"][0] == 0.0
    assert scores["coarse call px"][1] == 2 * 4 * sum(name.startswith("call ") for name in NAMES) + 2 * 4 * served()
    assert scores["coarse answer loss"] == scores["pages answer loss"] == (0.25, 2)
    assert scores["coarse focus loss"] == (2.0, 2)
    assert "pages call px" not in scores
    assert list(scores) == sorted(scores)


def served() -> int:
    """Calls in branches that go on after them."""
    labels = PACKER.batch(TREES["coarse"])
    owners = labels["branch"][torch.isin(labels["labels"], torch.tensor(PLACES))]
    return sum(not NAMES[owner].startswith("call ") for owner in owners.tolist()) // 4


def test_a_model_that_says_nothing_right(score: Callable[..., Scores]) -> None:
    scores = score(lambda name, token: 0)
    assert set(answers(scores).values()) == {0.0}
    assert scores["coarse call px"][0] == 500.0, "a word where an edge belongs"


def test_one_wrong_word_loses_its_answer_alone(score: Callable[..., Scores]) -> None:
    scores = answers(score(lambda name, token: 0 if name == "direct count" and token == END else token))
    assert scores.pop("coarse direct count") == 0.0
    assert set(scores.values()) == {1.0}


@pytest.mark.parametrize(("steps", "right"), [(1, 1.0), (2, 1.0), (-2, 1.0), (3, 0.0), (-3, 0.0)])
def test_an_unserved_call_may_be_two_steps_off(score: Callable[..., Scores], steps: int, right: float) -> None:
    def slip(name: str, token: int) -> int:
        moved = token + steps
        return moved if token in PLACES and moved in PLACES else token - steps if token in PLACES else token

    scores = score(slip)
    calls = {name: value for name, value in answers(scores).items() if name.startswith("coarse call ")}
    assert calls
    assert set(calls.values()) == {right}
    assert scores["coarse call px"][0] == abs(steps) * LOCATION_STEP
    # A served call was followed by the right crop, so its answer is judged alone.
    assert {value for name, value in answers(scores).items() if name not in calls} == {1.0}


def test_validation_boards_are_those_that_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []

    def trees_of(kind: str, seed: int) -> list[Tree]:
        drawn.append((kind, seed))
        return TREES["pages"]

    monkeypatch.setattr(validation, "trees_of", trees_of)
    monkeypatch.setattr(validation, "losses", lambda model, heads, batch: {"read": torch.tensor(0.5)})
    assert validate(Model(), PACKER, kinds=["crops", "pages"], batches=2) == {
        "crops read loss": (0.5, 2),
        "pages read loss": (0.5, 2),
    }
    assert drawn == [(kind, VALIDATION_SEED + index) for kind in ("crops", "pages") for index in (0, 1)]


def test_a_batch_moves_with_all_that_is_in_it() -> None:
    batch = {"ids": torch.zeros(3), "whole": image_blocks([(2, 2)], window=None), "pages": True}
    moved = to_device(batch, torch.device("meta"))
    assert moved["ids"].is_meta
    assert moved["whole"][0].query.is_meta
    assert moved["whole"][0].bias is None
    assert moved["pages"] is True
