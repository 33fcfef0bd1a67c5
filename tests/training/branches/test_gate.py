"""What needs more detail: a step in the answers over ascending budgets, and which rows are drawn from it."""

from collections import Counter
from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.training.branches.branch_recipe import GateStage, Optimisation
from qzoom_agent.training.branches.gate import counted, draw_rows, kind_of, kinds
from tests.cases import each_case


@each_case(
    ("right", "kind"),
    [
        ("1111", "easy"),
        ("0111", "transition"),
        ("0001", "transition"),
        ("0000", "never"),
        ("1110", "luck"),
        ("0110", "luck"),
        ("1011", "luck"),
        ("0101", "luck"),
    ],
)
def test_only_a_step_is_consistent(right: str, kind: str) -> None:
    assert kind_of([mark == "1" for mark in right]) == kind


@given(st.lists(st.booleans(), min_size=2, max_size=6))
def test_a_step_once_right_stays_right(right: list[bool]) -> None:
    rises = all(later or not before for before, later in pairwise(right))
    expected = ("easy" if right[0] else "transition" if right[-1] else "never") if rises else "luck"
    assert kind_of(right) == expected


def table(*patterns: str) -> Dataset:
    return Dataset.from_dict(
        {
            "row": list(range(len(patterns))),
            "image_id": [f"p{row}" for row in range(len(patterns))],
            "right": [[mark == "1" for mark in pattern] for pattern in patterns],
        }
    )


def stage(*, epochs: int, read: list[int] | None = None) -> GateStage:
    return GateStage(tokens=[64, 128, 256, 512], read_tokens=read, optimisation=Optimisation(num_train_epochs=epochs))


def test_rows_are_labelled_by_the_budget_they_are_read_at() -> None:
    """Wrong at 64 and 128: read there it needs more; at 256 it does not, and 512 is never read."""
    drawn = draw_rows(table("0011"), stage(epochs=400), seed=0)
    assert {(one.budget, one.needs) for one in drawn} == {(0, True), (1, True), (2, False)}
    share = sum(one.needs for one in drawn) / len(drawn)
    assert 0.85 < share < 0.95
    fine = draw_rows(table("0011"), stage(epochs=40, read=[256]), seed=0)
    assert [(one.budget, one.needs) for one in fine] == [(2, False)] * 40


def test_only_the_last_two_wrong_budgets_are_shown() -> None:
    drawn = draw_rows(table("0001"), stage(epochs=200), seed=0)
    assert {(one.budget, one.needs) for one in drawn} == {(1, True), (2, True)}


def test_the_last_wrong_budgets_do_not_depend_on_the_order_they_are_named_in() -> None:
    ascending, descending = (stage(epochs=200, read=read) for read in ([64, 128, 256], [256, 128, 64]))
    assert draw_rows(table("0001"), descending, seed=0) == draw_rows(table("0001"), ascending, seed=0)


def test_easy_ones_are_at_most_as_many_as_transitions_and_luck_is_dropped() -> None:
    drawn = draw_rows(table("0011", "1111", "1111", "1111", "0000", "1010"), stage(epochs=50), seed=0)
    by_row = Counter(one.row for one in drawn)
    assert by_row[0] == 50 and sum(by_row[row] for row in (1, 2, 3)) == 50 and by_row[4] == by_row[5] == 0
    assert all(by_row[row] for row in (1, 2, 3))
    assert not any(one.needs for one in drawn if one.row != 0)


def test_with_a_crop_as_the_highest_budget_every_real_one_can_be_read() -> None:
    """Four budgets and a crop: a question that only the crop answers needs one at each of them."""
    how = stage(epochs=300, read=[64, 128, 256, 512])
    drawn = draw_rows(table("00001"), how, seed=0)
    assert {(one.budget, one.needs) for one in drawn} == {(2, True), (3, True)}


def test_draws_depend_on_the_seed_alone() -> None:
    patterns = ("0011", "1111", "0111", "0001")
    assert draw_rows(table(*patterns), stage(epochs=5), seed=3) == draw_rows(table(*patterns), stage(epochs=5), seed=3)
    assert draw_rows(table(*patterns), stage(epochs=5), seed=3) != draw_rows(table(*patterns), stage(epochs=5), seed=4)


def test_with_a_consensus_the_two_highest_budgets_have_to_give_one_right_answer() -> None:
    patterns = ("0011", "0001", "1111", "0111", "0000")
    answers = [["7", "7", "4", "4."], ["7", "7", "7", "4"], ["4"] * 4, ["7", "4", "4", "it is 4"], ["7", "7", "8", "9"]]
    answered = table(*patterns).add_column("answers", answers)
    how = stage(epochs=1, read=[64, 128])
    assert kinds(answered, how) == ["transition", "transition", "easy", "transition", "never"]
    agreeing = how.model_copy(update={"consensus": True})
    assert kinds(answered, agreeing) == ["transition", "luck", "easy", "luck", "never"]
    assert {one.row for one in draw_rows(answered, agreeing, seed=0)} == {0, 2}
    three = table("011", "011").add_column("answers", [["7", "4", "4"], ["7", "4", "5"]])
    assert kinds(three, agreeing) == ["transition", "luck"]
    assert counted(kinds(answered, agreeing)) == "1 easy, 1 transition, 1 never, 2 luck"
    with pytest.raises(ValueError, match="with_crop"):
        GateStage(consensus=True, with_crop=True)


def test_budgets_have_to_ascend_and_be_answered_at() -> None:
    with pytest.raises(ValueError, match="ascend"):
        GateStage(tokens=[128, 64])
    with pytest.raises(ValueError, match="not in tokens"):
        GateStage(tokens=[64, 128], read_tokens=[256])
