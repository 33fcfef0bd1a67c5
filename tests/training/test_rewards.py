"""Rewards against tables worked out by hand, those of published projects among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any, get_args

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import open_answer
from qzoom_agent.evaluation.scorers.judge import judged
from qzoom_agent.evaluation.tasks.catalog import TASKS
from qzoom_agent.evaluation.tasks.needle.tasks import NEEDLE
from qzoom_agent.geometry import Box
from qzoom_agent.trace import CallRecord, PerceptionRecord, Trace, Turn
from qzoom_agent.training.grpo.grpo_recipe import load_grpo_recipe
from qzoom_agent.training.reward_list import PUBLISHED, accuracy_of, build, read_reward
from qzoom_agent.training.rewards import (
    RULES,
    Accuracy,
    Agreement,
    ChainOfFocus,
    Coverage,
    CropArea,
    CropPrice,
    CropsAmongRight,
    Curiosity,
    FirstCrop,
    Format,
    Redundant,
    Reward,
    Rollout,
    Rule,
    ToolBonus,
    VisionThinkPrice,
    asked_share,
    heat_gain,
)
from qzoom_agent.views import View
from tests.cases import each_case

Quad = tuple[float, float, float, float]
SIZE = 800, 400
QUESTION = Sample(id="", task="", kind="", image=PIL.Image.new("RGB", (1, 1)), question="", answer="")


def view(id: str, box: Quad, size: tuple[int, int], tokens: int) -> View:
    kind = "crop" if id.startswith("crop") else "coarse"
    return View(
        id=id,
        parent="original",
        kind=kind,  # type: ignore[arg-type]
        box=box,
        width=size[0],
        height=size[1],
        digest="0",
        tokens=tokens,
    )


def rollout(
    answer: str | None = "407",
    *,
    crops: Sequence[Quad] = (),
    failed: int = 0,
    gold: str = "407",
    boxes: Sequence[Quad] = (),
    group: str = "",
    status: str = "answered",
    look: PerceptionRecord | None = None,
    format_ok: bool = True,
    **question: Any,
) -> Rollout:
    """An episode whose calls were served these crops, in pixels of an 800 x 400 original, `failed` calls after them."""
    original = View(
        id="original", parent=None, kind="original", box=(0, 0, *SIZE), width=800, height=400, digest="0", tokens=0
    )
    views = [original, view("coarse", (0, 0, *SIZE), (224, 112), 32)]
    calls = []
    for at, box in enumerate(crops, 1):
        views.append(view(f"crop{at}", box, (112, 112), 16))
        asked = tuple(value * 224 / 800 for value in box)
        calls.append(
            CallRecord(name="zoom", box=asked, view="coarse", decision="served", served=box, result=f"crop{at}")  # type: ignore[arg-type]
        )
    calls += [CallRecord(name="zoom", view="coarse", decision="failed") for _ in range(failed)]
    turns = [Turn(index=at, text="", calls=[call]) for at, call in enumerate(calls)]
    turns.append(Turn(index=len(calls), text="", answer=answer, repairs=[] if format_ok else ["a tag was closed"]))
    trace = Trace(
        question="What is the code?",
        status=status,  # type: ignore[arg-type]
        answer=answer,
        views=views,
        turns=turns,
        perception=look,
    )
    known = {"id": group, "answer": gold, "boxes": tuple(Box(*box) for box in boxes)} | question
    return Rollout(trace, replace(QUESTION, **known))


def about(one: Rollout, **changes: Any) -> Rollout:
    """The same episode, of another question."""
    return replace(one, sample=replace(one.sample, **changes))


def cut(one: Rollout) -> Rollout:
    """The same episode, its last turn cut off by the limit of tokens."""
    trace = one.trace.model_copy(deep=True)
    trace.turns[-1].finish = "length"
    return replace(one, trace=trace)


CROP: Quad = (0, 0, 100, 100)
DIRECT_RIGHT, DIRECT_WRONG = rollout(), rollout("9")
ZOOM_RIGHT, ZOOM_WRONG = rollout(crops=[CROP]), rollout("9", crops=[CROP])
FOUR = [DIRECT_RIGHT, ZOOM_RIGHT, ZOOM_WRONG, DIRECT_WRONG]


def read(entries: Sequence[Mapping[str, object]]) -> list[Reward]:
    return [read_reward(entry) for entry in entries]


def total(specs: Sequence[Reward], batch: Sequence[Rollout]) -> list[float]:
    """What the rewards of a recipe add up to for each rollout."""
    columns = [(one.weight, one.reward(batch)) for one in build(specs)]
    return [round(sum(weight * (column[at] or 0.0) for weight, column in columns), 6) for at in range(len(batch))]


# --- right and wrong -------------------------------------------------------------------------------------------------


def test_accuracy_is_the_scorer_of_the_evaluation() -> None:
    assert set(get_args(Rule)) == set(RULES)
    for task in NEEDLE:
        (scorer,) = task.scorers.values()
        for text in ("407", "407.", "408", "it is 407", None):
            (score,) = Accuracy()([rollout(text)])
            assert score == scorer(text, replace(QUESTION, answer="407")).value
    documents = {scorer for task in TASKS.values() for scorer in task.scorers.values()}
    assert {RULES[name] for name in ("open", "choice", "anls", "chartqa", "vqa", "ocr")} <= documents | {
        open_answer.rule
    }


def test_shares_of_an_answer_are_rewarded_and_count_as_right_from_a_half() -> None:
    # two of eight letters are wrong: 3/4; five of eight: below the measure's own threshold
    near, far = rollout("terminus", gold="terminal"), rollout("abcdenal", gold="terminal")
    anls = Accuracy(rule="anls")
    assert anls([near, far]) == pytest.approx([0.75, 0.0])
    assert anls.right([near, far]) == [True, False]


def test_choices_are_scored_by_their_letter() -> None:
    asked = about(rollout("B", gold="B"), options=("red", "blue"))
    named = about(rollout("blue", gold="B"), options=("red", "blue"))
    assert Accuracy(rule="choice")([asked, named]) == [1.0, 1.0]
    assert Accuracy()([named]) == [0.0]


def test_accuracy_takes_any_accepted_answer_and_no_other() -> None:
    batch = [
        rollout("407."),
        about(rollout("four"), answers=("407", "Four")),
        rollout("408"),
        rollout(None),
        rollout("407", status="error"),
    ]
    assert Accuracy()(batch) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_long_answers_are_wrong_unread() -> None:
    nine, ten = rollout("1" * 9, gold="1" * 9), rollout("1" * 10, gold="1" * 10)
    assert Accuracy(max_chars=10)([nine, ten]) == [1.0, 0.0]


def test_an_answer_after_a_failed_call_can_be_wrong() -> None:
    batch = [DIRECT_RIGHT, ZOOM_RIGHT, rollout(crops=[CROP], failed=1)]
    assert Accuracy(failed_is_wrong=True)(batch) == [1.0, 1.0, 0.0]
    assert Accuracy()(batch) == [1.0, 1.0, 1.0]


def test_a_judge_is_asked_at_once_and_only_where_rules_do_not_reach() -> None:
    asked: list[tuple[str, str, str]] = []
    together = Barrier(2, timeout=30)

    def judge(question: str, answer: str, gold: str) -> bool:
        asked.append((question, answer, gold))
        together.wait()
        return answer == "four hundred seven"

    accuracy = Accuracy().asking(judge)
    batch = [rollout("407"), rollout("four hundred seven"), rollout("9"), rollout(None)]
    assert accuracy(batch) == [1.0, 1.0, 0.0, 0.0]
    assert sorted(asked) == [("What is the code?", "9", "407"), ("What is the code?", "four hundred seven", "407")]
    half = rollout("40", gold="4071")
    assert Accuracy(rule="anls").asking(lambda *_: False)([half]) == [0.5]


def test_the_judge_of_a_reward_is_the_judge_of_the_evaluation() -> None:
    """Asked about the final answer, beside every accepted one until one fits, and never about a multiple choice."""
    asked: list[tuple[str, str]] = []

    def judge(question: str, answer: str, gold: str) -> bool:
        asked.append((answer, gold))
        return gold == "soda"

    cases = [
        about(rollout("The answer is fizzy drink.", gold="pop"), answers=("pop", "soda", "cola")),
        about(rollout("fizzy drink", gold="pop"), answers=("pop", "cola")),
        about(rollout("I think it is B", gold="A"), answers=("A",), options=("soda", "pop")),
        about(rollout("soda", gold="A"), answers=("A",), options=("pop", "soda")),
    ]
    for one, worth in zip(cases, (1.0, 0.0, 0.0, 0.0), strict=True):
        text, sample = (
            one.trace.answer,
            replace(QUESTION, answer=one.answer, answers=one.answers, options=one.options),
        )
        asked.clear()
        assert judged(judge)(text, sample).value == worth  # type: ignore[arg-type]
        evaluation = list(asked)
        asked.clear()
        assert Accuracy(rule="open").asking(judge)([one]) == [worth]
        assert asked == evaluation
    assert not asked, "a multiple choice goes by its letter"


def test_format_as_bonus_and_as_penalty() -> None:
    batch = [rollout(), rollout(format_ok=False), rollout("1" * 1000)]
    assert Format()(batch) == [1.0, 0.0, 1.0]
    assert Format(style="penalty")(batch) == [0.0, -1.0, 0.0]
    assert Format(style="penalty", max_chars=1000)(batch) == [0.0, -1.0, -1.0]


# --- published sums --------------------------------------------------------------------------------------------------


def test_deepeyes() -> None:
    malformed = rollout(crops=[CROP], format_ok=False)
    refused = rollout(failed=1)
    batch = [*FOUR, malformed, refused, rollout("1" * 1000, gold="1" * 1000)]
    assert total(PUBLISHED["deepeyes"], batch) == [0.8, 2.0, 0.0, 0.0, 1.8, 0.8, -0.2]
    assert ToolBonus()(batch)[:4] == [0.0, 1.0, 0.0, 0.0]


def test_mini_o3_is_accuracy_alone_and_leaves_out_what_ran_out_of_turns() -> None:
    batch = [*FOUR, cut(ZOOM_WRONG)]
    (accuracy,) = build(PUBLISHED["mini-o3"])
    assert accuracy.reward(batch) == [1.0, 1.0, 0.0, 0.0, None]


def test_chain_of_focus_ranks() -> None:
    easy = [about(one, id="easy") for one in FOUR]
    hard = [about(one, id="hard") for one in FOUR[1:]]
    mixed = [easy[0], hard[0], easy[1], hard[1], easy[2], hard[2], easy[3]]
    assert ChainOfFocus()(mixed) == [1.0, 1.0, 0.8, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("direct", "zoomed", "expected"),
    [
        (1, 4, (-0.1, -0.1)),  # 1 / 5.0001 is below 0.2
        (1, 3, (0.0, -0.1)),
        (1, 9, (-0.1, -0.1)),
        (3, 12, (-0.1, -0.1)),
        (4, 12, (0.0, -0.1)),
        (4, 0, (0.0, None)),
        (0, 4, (None, -0.1)),
    ],
)
def test_visionthink_turns_the_price_over(
    direct: int, zoomed: int, expected: tuple[float | None, float | None]
) -> None:
    batch = [DIRECT_RIGHT] * direct + [ZOOM_RIGHT] * zoomed + [DIRECT_WRONG, ZOOM_WRONG]
    values = VisionThinkPrice()(batch)
    assert values == [expected[0]] * direct + [expected[1]] * zoomed + [0.0, 0.0]


def test_visionthink_sum() -> None:
    assert total(PUBLISHED["visionthink"], FOUR) == [1.5, 1.4, 0.5, 0.5]
    one_in_six = [DIRECT_RIGHT, *[ZOOM_RIGHT] * 5, rollout("9", format_ok=False)]
    assert total(PUBLISHED["visionthink"], one_in_six) == [1.4] * 6 + [0.0]


def test_adaptvision_sum() -> None:
    quarter: Quad = (0, 0, 400, 200)
    hit = rollout(crops=[quarter], boxes=[(10, 10, 30, 30)])
    miss = rollout("9", crops=[quarter], boxes=[(500, 10, 530, 30)])
    direct = rollout(boxes=[(10, 10, 30, 30)])
    # 0.9 + 0.5 + 0.1 - 0.2 / 4, then 0 + 0.5 - 0.2 / 4, then 1 + 0.5
    assert total(PUBLISHED["adaptvision"], [hit, miss, direct]) == [1.45, 0.45, 1.5]


def test_pixel_reasoner_pays_for_calls_while_they_are_rare() -> None:
    caller, twice = rollout(crops=[CROP]), rollout(crops=[CROP] * 3)
    rare = [caller, *[DIRECT_RIGHT] * 9]
    assert Curiosity()(rare)[:2] == pytest.approx([0.5 * 0.2, 0.0])
    assert Curiosity()([twice, DIRECT_RIGHT]) == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("name", ["mini-o3", "visionthink", "adaptvision", "pixel-reasoner"])
def test_published_lists_find_the_answer_in_a_sentence(name: str) -> None:
    asked = accuracy_of(PUBLISHED[name])
    assert asked.right([rollout("The answer is Nokia.", gold="nokia"), rollout("Samsung", gold="nokia")]) == [
        True,
        False,
    ]


def test_every_published_list_can_be_built() -> None:
    for specs in PUBLISHED.values():
        assert [one.name for one in build(specs)] == [spec.name for spec in specs]


# --- prices ----------------------------------------------------------------------------------------------------------


def test_a_constant_price_by_crop_call_and_token() -> None:
    batch = [DIRECT_RIGHT, rollout("9", crops=[CROP, CROP], failed=1)]
    assert CropPrice(cost=0.1)(batch) == pytest.approx([0.0, -0.2])
    assert CropPrice(cost=0.1, per="call")(batch) == pytest.approx([0.0, -0.3])
    assert CropPrice(cost=0.1, per="token")(batch) == pytest.approx([0.0, -0.1])  # 2 x 16 tokens, one coarse view
    assert CropPrice(cost=0.1, free=1)(batch) == pytest.approx([0.0, -0.1])
    assert CropPrice(cost=0.1, only_right=True)(batch) == [0.0, 0.0]


def test_a_refused_call_costs_unless_a_budget_refused_it() -> None:
    asked = rollout(crops=[CROP, CROP, CROP])
    for call, code in zip(asked.calls, ("gate", "budget", ""), strict=True):
        call.decision, call.code = ("refused", code) if code else ("served", "")  # type: ignore[assignment]
    assert CropPrice(cost=0.4, per="refused")([DIRECT_RIGHT, asked]) == pytest.approx([0.0, -0.4])
    asked.calls[0].decision = "snapped"  # served, at another place
    assert CropPrice(cost=0.4, per="refused")([asked]) == [0.0]


def test_crops_are_compared_among_right_answers_only() -> None:
    batch = [rollout(crops=[CROP] * 3), ZOOM_RIGHT, DIRECT_RIGHT, DIRECT_WRONG, rollout("9", crops=[CROP] * 4)]
    assert CropsAmongRight(cost=0.1)(batch) == pytest.approx([0.1 * (4 / 3 - 3), 0.1 / 3, 0.1 * 4 / 3, 0.0, 0.0])
    alone = about(ZOOM_RIGHT, id="alone")
    assert CropsAmongRight(cost=0.1)([alone, about(DIRECT_WRONG, id="alone")]) == [0.0, 0.0]
    assert CropsAmongRight(cost=1.0, most=0.5)(batch)[0] == -0.5
    assert CropsAmongRight(cost=0.1)([DIRECT_WRONG, ZOOM_WRONG]) == [0.0, 0.0]


def test_the_area_asked_for_is_of_the_first_box_as_written() -> None:
    assert asked_share(DIRECT_RIGHT) == asked_share(rollout(failed=1)) == 0.0
    assert asked_share(rollout(crops=[(0, 0, 400, 200), (0, 0, 800, 400)])) == pytest.approx(0.25)
    assert CropArea(free_share=0.2)([rollout(crops=[(0, 0, 400, 200)])]) == pytest.approx([-0.05])
    call = CallRecord(name="zoom", box=(200, 100, 100, 50), view="coarse", decision="grown", result="crop1")
    swapped = rollout(crops=[CROP])
    swapped.trace.turns[0].calls[0] = call
    assert asked_share(swapped) == 0.0
    call.box = (-1e9, -1e9, 1e9, 1e9)
    swapped.trace.turns[0].calls[0] = call
    assert asked_share(swapped) == 1.0
    call.box = (float("nan"), 0, 1, 1)
    assert asked_share(swapped) == 0.0
    call.box, call.frame = (0, 0, 500, 500), "per_mille"
    assert asked_share(swapped) == pytest.approx(0.25)
    call.view = "crop1"
    assert asked_share(swapped) == pytest.approx(0.25 * 100 * 100 / (800 * 400))


def test_the_first_crop_has_to_show_every_box() -> None:
    both, one = [(0, 0, 50, 50), (60, 60, 90, 90)], [(0, 0, 50, 50), (200, 0, 250, 50)]
    batch = [
        rollout(crops=[CROP], boxes=both),  # type: ignore[arg-type]
        rollout(crops=[CROP], boxes=one),  # type: ignore[arg-type]
        rollout(boxes=both),  # type: ignore[arg-type]
        ZOOM_RIGHT,
    ]
    assert FirstCrop()(batch) == [1.0, 0.0, 0.0, None]


# --- where -----------------------------------------------------------------------------------------------------------


def test_coverage_of_the_worst_covered_box() -> None:
    needles: list[Quad] = [(0, 0, 50, 50), (90, 0, 110, 20)]
    batch = [
        rollout(crops=[CROP], boxes=needles),
        rollout(crops=[(0, 0, 800, 400)], boxes=needles),  # the whole image is no evidence of having looked
        rollout(boxes=needles),
        ZOOM_RIGHT,
    ]
    assert Coverage()(batch) == [0.5, 0.0, 0.0, None]


LOOK = PerceptionRecord(score=0.9, threshold=0.5, heat=[[0.0, 1.0], [0.0, 0.0]], boxes=[(400, 0, 800, 200)])


def test_agreement_with_the_look() -> None:
    there: Quad = (400, 0, 800, 200)
    batch = [
        rollout(crops=[there], look=LOOK),
        rollout(crops=[(0, 0, 800, 400)], look=LOOK),
        rollout(crops=[(0, 0, 400, 200)], look=LOOK),
        rollout(look=LOOK),
        rollout(crops=[there]),
    ]
    assert Agreement(measure="heat")(batch) == pytest.approx([0.75, 0.0, 0.0, 0.0, None])
    assert Agreement(measure="iou")(batch) == pytest.approx([1.0, 0.25, 0.0, 0.0, None])


def test_agreement_with_a_gate_that_needs_no_crop() -> None:
    calm = LOOK.model_copy(update={"score": 0.1, "boxes": []})
    assert Agreement()([rollout(look=calm), rollout(crops=[CROP], look=calm)]) == [1.0, 0.0]


def test_agreement_where_the_map_decides_in_place_of_a_gate() -> None:
    """Without a gate a map without a region says that the coarse view suffices, if the configuration has it decide."""
    flat = PerceptionRecord(heat=[[1.0, 1.0], [1.0, 1.0]])
    batch = [rollout(look=flat), rollout(crops=[CROP], look=flat)]
    assert Agreement()(batch) == [0.0, 0.0], "and else it decides nothing"
    for one in batch:
        one.trace.config = {"perception": {"gate": "statistics", "peak_to_mean": 3.0}}
    assert Agreement()(batch) == [1.0, 0.0]


def test_agreement_with_crops_that_the_policy_showed() -> None:
    """Nothing is left to call for where the gate fired and its region stands there already."""
    shown = rollout(look=LOOK)
    shown.trace.views.append(view("crop1", (400, 0, 800, 200), (112, 112), 16))
    assert Agreement(measure="heat")([shown]) == pytest.approx([0.75])
    assert Agreement(measure="iou")([shown]) == pytest.approx([1.0])


def test_agreement_with_the_map_of_an_image_that_was_shown_padded() -> None:
    """The square around the image of 800 x 400 reaches from -200 to 600, and its second row begins at 0."""
    heat = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    shown = rollout(look=LOOK.model_copy(update={"heat": heat, "extent": (0, -200, 800, 600)}))
    shown.trace.views.append(view("crop1", (600, 0, 800, 200), (112, 112), 16))
    assert Agreement(measure="heat")([shown]) == pytest.approx([1 - 1 / 8])


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=2), st.integers(0, 700))
def test_heat_gain_is_a_share(heat: list[list[float]], left: int) -> None:
    gain = heat_gain(heat, [Box(left, 0, left + 100, 400)], Box(0, 0, *SIZE), Box(0, -200, 800, 600))
    assert gain is None or 0 <= gain <= 1
    assert (gain is None) == (sum(map(sum, heat)) == 0)


def test_redundant_crops_are_those_that_add_nothing() -> None:
    needle: Quad = (10, 10, 30, 30)
    known = {"coarse_suffices": False}
    batch = [
        rollout(crops=[CROP], boxes=[needle], **known),
        rollout(crops=[CROP, CROP], boxes=[needle], **known),
        rollout(crops=[(400, 0, 500, 100)], boxes=[needle], **known),
        rollout(crops=[CROP], coarse_suffices=True),
        rollout(crops=[CROP, (400, 0, 500, 100)]),
        rollout(crops=[CROP] * 7, coarse_suffices=True),
        rollout(),
    ]
    assert Redundant()(batch) == [0.0, -1.0, -1.0, -1.0, 0.0, -4.0, 0.0]


def test_calls_that_the_review_refuses_are_redundant() -> None:
    one = rollout(crops=[CROP], failed=2)
    first, second = (turn.calls[0] for turn in one.trace.turns[1:-1])
    first.decision, first.code = "refused", "covered"
    for code in ("budget", "last_turn"):  # no judgement of the crop
        second.decision, second.code = "refused", code
        assert Redundant()([one]) == [-1.0]


def test_crops_that_the_branches_speak_against_are_redundant_where_a_recipe_says_so() -> None:
    hot, cold, other = (400, 0, 800, 200), (0, 200, 100, 300), (300, 200, 400, 300)
    calm = LOOK.model_copy(update={"score": 0.1, "boxes": []})
    batch = [
        rollout(crops=[cold], look=LOOK),
        rollout(crops=[hot, cold], look=LOOK),  # the first crop may have said where to look next
        rollout(crops=[hot], look=LOOK),
        rollout(crops=[cold, other], look=calm),
        rollout(crops=[cold, cold], look=calm),  # repeated and unwanted: one crop, one reason
        rollout(crops=[cold]),
    ]
    assert Redundant()(batch) == [0.0, 0.0, 0.0, 0.0, -1.0, 0.0]
    assert Redundant(opinions=True)(batch) == [-1.0, 0.0, 0.0, -2.0, -2.0, 0.0]
    reviewed = rollout(crops=[cold], failed=1, look=calm)
    first, second = (turn.calls[0] for turn in reviewed.trace.turns[:-1])
    reviewed.trace.turns[0].calls[0], reviewed.trace.turns[1].calls[0] = second, first
    second.decision, second.code = "refused", "gate"
    assert Redundant(opinions=True)([reviewed]) == [-1.0], "what the model insisted on counts once"


def test_rewards_that_need_a_look_say_so() -> None:
    entries = [{"name": "agreement"}, {"name": "redundant"}, {"name": "redundant", "opinions": True}]
    assert [one.needs_look for one in read(entries)] == [True, False, True]


def test_crops_that_the_policy_showed_are_not_the_models_fault() -> None:
    one = rollout(coarse_suffices=True)
    one.trace.views.append(view("crop1", CROP, (112, 112), 16))
    assert Redundant()([one]) == [0.0]


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_a_rollout_is_cut_off_by_tokens_or_by_turns_without_an_answer() -> None:
    assert cut(DIRECT_RIGHT).truncated and rollout(None, status="budget").truncated
    assert not any(one.truncated for one in (DIRECT_RIGHT, rollout(status="budget"), rollout(None)))


def test_rewards_do_not_see_masked_rollouts() -> None:
    batch = [cut(DIRECT_RIGHT), ZOOM_RIGHT]
    (ranks,) = build(read([{"name": "chain-of-focus"}]))
    assert ranks.reward(batch) == [None, 1.0], "a masked direct answer makes no question easy"
    (ranks,) = build(read([{"name": "chain-of-focus"}]), mask_truncated=False)
    assert ranks.reward(batch) == [1.0, 0.8]


def test_every_reward_uses_the_accuracy_of_the_recipe() -> None:
    specs = read([{"name": "tool-bonus"}, {"name": "accuracy", "weight": 0, "max_chars": 3}])
    bonus, accuracy = build(specs)
    assert bonus.reward([ZOOM_RIGHT]) == accuracy.reward([ZOOM_RIGHT]) == [0.0]
    assert (accuracy.name, accuracy.weight) == ("accuracy", 0.0)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "accuraccy"}, "There is no reward 'accuraccy'. Known: accuracy, agreement"),
        ({"name": "format", "stile": "bonus"}, "Unknown key 'format.stile'. Did you mean 'format.style'?"),
        ({"name": "crop-price", "cost": -1}, "'crop-price.cost': Input should be greater than or equal to 0; got -1"),
        (
            {"name": "accuracy", "weight": float("nan")},
            "Bad value for 'accuracy.weight': Input should be a finite number",
        ),
        ({"weight": 1}, "A reward is written {name: ..., weight: ..., SETTING: ...}; got {'weight': 1}"),
    ],
)
def test_a_wrong_entry_is_named(entry: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_reward(entry)


@pytest.mark.parametrize("entries", [[], [{"name": "format"}, {"name": "format"}]])
def test_rewards_have_names_of_their_own(entries: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match="list of different names; got"):
        build(read(entries))


def test_a_judged_recipe_needs_a_judge() -> None:
    specs = read([{"name": "accuracy", "judged": True}])
    with pytest.raises(ConfigError, match="no judge is given"):
        build(specs)
    assert build(specs, judge=lambda *_: True)[0].reward([DIRECT_WRONG]) == [1.0]


@given(st.lists(st.sampled_from(FOUR), max_size=8), st.sampled_from(sorted(PUBLISHED)), st.randoms())
def test_order_does_not_matter(batch: list[Rollout], project: str, random: object) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for one in build(PUBLISHED[project]):
        straight = one.reward(batch)
        assert one.reward([batch[at] for at in order]) == [straight[at] for at in order]
        assert len(straight) == len(batch)


GRPO = Path(__file__).resolve().parents[2] / "rl" / "recipes"


@each_case("path", sorted(GRPO.glob("*/grpo*.yaml")))
def test_in_every_recipe_to_be_right_is_worth_more_than_a_crop_saved(path: Path) -> None:
    recipe = load_grpo_recipe(path)
    assert recipe.loss.multi_objective_aggregation == "sum_then_normalize", "else advantages are no function of the sum"
    group = [rollout(crops=[CROP], look=LOOK), rollout("no", look=LOOK), rollout(look=LOOK), rollout(look=LOOK)]
    sums = [0.0] * len(group)
    for reward in build(recipe.rewards, judge=lambda *_: False):
        for at, value in enumerate(reward.reward(group)):
            sums[at] += reward.weight * (value or 0.0)
    assert sums[0] > sums[1] + 0.1, "right after a needless crop against wrong without one"
