"""Which questions need a zoom where no box says so, by the answers of the shipped nano and by made-up ones."""

from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.training.branches import proposals
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Calibration, GateStage
from qzoom_agent.training.branches.dataset import DatasetSpec, Records, load_records
from qzoom_agent.training.branches.proposals import Crop, Outcome, crop_outcomes, higher_budgets


def recipe(gate: GateStage, **calibration: Any) -> BranchRecipe:
    return BranchRecipe(data=[DatasetSpec(path="needle")], gate=gate, calibration=Calibration(**calibration))


def test_what_is_right_needs_none_and_what_nothing_mends_nobody_can_say() -> None:
    good, bad = Crop(True, 0.1), Crop(False, 0.1)
    assert Outcome(True, False, [bad]).need(with_crop=True) is False
    assert Outcome(False, True, [bad]).need(with_crop=False) is True
    assert Outcome(False, False, [bad, good]).need(with_crop=True) is True
    assert Outcome(False, False, [bad, good]).need(with_crop=False) is None
    assert Outcome(False, False, [bad, bad]).need(with_crop=True) is None


def test_budgets_below_the_view_that_is_looked_at_say_nothing() -> None:
    gate = GateStage(tokens=[64, 128, 256, 512])
    assert higher_budgets(recipe(gate), 128) == [256, 512]
    with pytest.raises(ConfigError, match=r"576 visual tokens.*more than 512.*above 576.*higher_tokens.*with_crop"):
        higher_budgets(recipe(gate), 576)
    assert higher_budgets(recipe(gate, higher_tokens=[512, 1024]), 576) == [1024]
    assert higher_budgets(recipe(gate.model_copy(update={"with_crop": True})), 576) == []


@pytest.fixture(scope="module")
def nano() -> HFBackend:
    return HFBackend.load("nano", device="cpu", dtype="float32")


@pytest.fixture
def held(boxless: Path) -> Records:
    return load_records([DatasetSpec(path=str(boxless))])


RULES = [PerceptionConfig(blur="none", margin=0.0, box=(0.3, 0.225), peak_share=share) for share in (0.8, 0.4)]


def test_need_is_that_of_the_view_that_is_looked_at(
    nano: HFBackend, held: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Print that nano cannot read at 64 tokens it reads in its crop. Over the whole board in full it needs none."""
    gate = GateStage(tokens=[48, 64], with_crop=True, max_new_tokens=8)
    found = crop_outcomes(nano, held, recipe(gate), RULES, tmp_path / "coarse")
    monkeypatch.setattr(proposals, "generate_answers", lambda *_, **__: pytest.fail("answers are not made again"))
    kinds = [one.need(with_crop=True) for one in found]
    assert kinds.count(True) >= 2 and kinds.count(False) >= 2
    # of boards of which the box is known it is that which has one
    boards = load_records([DatasetSpec(path="needle", limit=8, a_board=4, seed=1)])
    agree = sum(bool(boards[at].boxes) == kind for at, kind in enumerate(kinds) if kind is not None)
    assert agree >= 6
    assert all(len(one.crops) == len(RULES) for one in found)
    assert all(0 < crop.area < 0.2 for one in found if not one.right for crop in one.crops)
    again = crop_outcomes(nano, held, recipe(gate), RULES, tmp_path / "coarse")
    assert again == found


def test_a_question_right_at_a_higher_budget_is_none_for_a_look_that_shows_as_much(
    nano: HFBackend, boxless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up: four patterns of right and wrong at 16, 25 and 49 tokens, looked at over 25 and over 16."""
    right = {0: (16, 25, 49), 1: (25, 49), 2: (49,), 3: ()}
    four = load_records([DatasetSpec(path=str(boxless))], limit=4)
    questions = {four[row].question: row for row in right}

    def made_up(backend, asked, *, max_new_tokens):  # type: ignore[no-untyped-def]
        said = []
        for one in asked:
            (row,) = [row for text, row in questions.items() if text in str(one.messages)]
            shown = one.shown[0].tokens
            budget = min((budget for budget in (16, 25, 49) if shown <= budget), default=49)
            fine = len(one.shown) == 1 and budget in right[row]
            said.append(four[row].answer if fine else "no")
        return said

    monkeypatch.setattr(proposals, "generate_answers", made_up)
    gate = GateStage(tokens=[16, 25, 49])
    kinds = {}
    for tokens in (16, 25):
        found = crop_outcomes(nano, four, recipe(gate, tokens=tokens), RULES, tmp_path / str(tokens))
        kinds[tokens] = [one.need(with_crop=False) for one in found]
    assert kinds == {16: [False, True, True, None], 25: [False, False, True, None]}


def test_what_only_its_own_calls_answer_needs_a_zoom(nano: HFBackend, tmp_path: Path) -> None:
    hops = load_records([DatasetSpec(path="needle", limit=3, a_board=3, seed=3, tasks=("needle-hop",))])
    gate = GateStage(tokens=[48, 64], with_crop=True, own_calls=True, max_new_tokens=8)
    found = crop_outcomes(nano, hops, recipe(gate), RULES[:1], tmp_path)
    assert not any(one.right or any(crop.right for crop in one.crops) for one in found)
    assert [one.need(with_crop=True) for one in found].count(True) >= 2
