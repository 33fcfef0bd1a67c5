"""Thresholds for a stated target, on made-up scores and maps."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box
from qzoom_agent.perception.branch_config import BranchConfig
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Calibration
from qzoom_agent.training.branches.calibrate import (
    calibrate,
    calibrated_config,
    candidates,
    evidence_text,
    gate_figures,
)
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.proposals import Crop, LookOutcome
from tests.training.branches.test_localisation import GRID, ONE, coarse

TARGET = Calibration(needed_recall=0.75, box_recall=0.5)


def recipe(*, relative: bool = False, **target: Any) -> BranchRecipe:
    return BranchRecipe(
        data=[DatasetSpec(path="needle")],
        peak_share=0.5 if relative else None,
        calibration=Calibration(**target),
    )


def test_the_highest_threshold_that_lets_enough_through() -> None:
    """Of four that need a zoom three have to pass: just below .4, which lets one of the others through."""
    scores = [0.9, 0.6, 0.4, 0.1, 0.5, 0.2, 0.05]
    needs = [True, True, True, True, False, False, False]
    found = gate_figures(scores, needs, TARGET)
    assert 0.399 < found.threshold < 0.39999
    assert found.missed == 0.25 and found.needless == pytest.approx(1 / 3)
    all_of_them = gate_figures(scores, needs, Calibration(needed_recall=1.0))
    assert 0.0998 < all_of_them.threshold < 0.09999 and all_of_them.missed == 0.0
    assert all_of_them.needless == pytest.approx(2 / 3)


def test_a_share_of_zooms_instead() -> None:
    scores, needs = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [True, False, True, False, False, True]
    found = gate_figures(scores, needs, Calibration(zoom_share=0.5))
    assert sum(score >= found.threshold for score in scores) == 3
    assert found.missed == pytest.approx(1 / 3) and found.needless == pytest.approx(1 / 3)


def test_a_share_is_a_limit_where_scores_are_equal_and_products_are_rounded() -> None:
    """Of ten questions three may zoom; four have one score, which all of them would pass. 0.7 of 90 is 63."""
    needs = [True, False] * 5
    found = gate_figures([0.9, 0.8, *[0.7] * 4, *[0.1] * 4], needs, Calibration(zoom_share=0.3))
    assert 0.79 < found.threshold < 0.8
    easy = gate_figures([at / 90 for at in range(91)], [False] * 90 + [True], Calibration(needless=0.7))
    assert easy.needless == pytest.approx(63 / 90)
    hundred = [at / 100 for at in range(101)]
    needing = gate_figures(hundred, [False] + [True] * 100, Calibration(needed_recall=0.55))
    assert needing.missed == pytest.approx(0.45)


def test_a_share_of_needless_zooms_instead() -> None:
    """One of four may be needless: the threshold lies just above the second, which is .5."""
    scores, needs = [0.9, 0.7, 0.2, 0.8, 0.5, 0.3, 0.1], [True, True, True, False, False, False, False]
    found = gate_figures(scores, needs, Calibration(needless=0.25))
    assert 0.50001 < found.threshold < 0.501
    assert found.needless == 0.25 and found.missed == pytest.approx(1 / 3)
    none = gate_figures(scores, needs, Calibration(needless=0.0))
    assert none.needless == 0.0 and 0.80001 < none.threshold < 0.801
    with pytest.raises(ValidationError, match="give one of them"):
        Calibration(needless=0.1, zoom_share=0.5)


def seen(peak: float, score: float | None, *boxes: Box) -> LookOutcome:
    heat = torch.tensor(ONE) * peak / 0.9
    view = coarse()
    return LookOutcome(score, heat, view, view.size, list(boxes), GRID)


NEEDLE = Box(58, 58, 78, 78)


def test_the_map_takes_the_highest_threshold_that_holds_enough_needles() -> None:
    """Blurred peaks are .204 of these: .184, .123 and .061. For two of three it has to lie below the second."""
    rows = [seen(0.9, 0.9, NEEDLE), seen(0.6, 0.8, NEEDLE), seen(0.3, 0.7, NEEDLE), seen(0.01, 0.1)]
    needs = [True, True, True, False]
    found = calibrate(rows, needs, recipe(box_recall=0.6, needed_recall=1.0))
    assert found.met and found.threshold is not None and 0.11 < found.threshold < 0.123
    assert found.box.recall == pytest.approx(2 / 3) and found.box.n == 3 and found.needing == 3
    assert found.gate is not None and found.gate.missed == 0.0 and found.gate.needless == 0.0
    everything = calibrate(rows, needs, recipe(box_recall=1.0))
    assert everything.threshold is not None and everything.threshold < 0.061 and everything.box.recall == 1.0


def test_a_share_of_the_peak_instead() -> None:
    """It finds the needle beside a hot cell too: one row down, which from .61 of the peak on is foreground."""
    below = Box(58, 58, 78, 100)
    rows = [seen(0.9, 0.9, NEEDLE), seen(0.02, 0.8, below), seen(0.01, 0.1)]
    needs = [True, True, False]
    found = calibrate(rows, needs, recipe(box_recall=0.5, relative=True))
    assert found.relative and found.threshold == 0.95 and found.box.recall == 0.5
    found = calibrate(rows, needs, recipe(box_recall=1.0, relative=True))
    assert found.threshold == 0.6 and found.box.recall == 1.0


def test_of_several_blurs_and_margins_the_smallest_box_wins() -> None:
    """Two hot cells with one between them hold the needle; blurred, all their neighbours are as hot as the cooler."""
    view = coarse()
    heat = torch.tensor(ONE)
    heat[2, 4] = 0.3
    two = LookOutcome(0.9, heat, view, view.size, [Box(58, 58, 136, 78)], GRID)
    rows = [two, seen(0.01, 0.1)]
    target: dict[str, Any] = {"box_recall": 1.0, "relative": True}
    found = calibrate(rows, [True, False], recipe(**target, blurs=["fixed", "none"], margins=[0.2, 0.0]))
    assert (found.blur, found.margin, found.met) == ("none", 0.0, True)
    assert found.box.area == pytest.approx(3 / 36)
    blurred = calibrate(rows, [True, False], recipe(**target)).box.area
    assert blurred is not None and blurred > 9 / 36
    wide = calibrate(rows, [True, False], recipe(**target, blurs=["none"], margins=[0.2]))
    assert wide.box.area is not None and found.box.area is not None and wide.box.area > found.box.area
    # a needle that sticks out of the cell is only held with a margin
    wider = Box(54, 54, 82, 82)
    absolute = recipe(box_recall=1.0, blurs=["none"], margins=[0.0, 0.3])
    held = calibrate([seen(0.9, 0.9, wider), rows[1]], [True, False], absolute)
    assert (held.margin, held.met) == (0.3, True)


def test_a_target_out_of_reach_is_said_to_be_missed() -> None:
    rows = [seen(0.9, 0.9, NEEDLE), seen(0.9, 0.9, Box(130, 130, 150, 150)), seen(0.1, 0.1)]
    found = calibrate(rows, [True, True, False], recipe(box_recall=0.9))
    assert not found.met and found.box.recall == 0.5


def test_the_training_free_gate_is_held_to_the_same_target() -> None:
    """A flat map has a peak of once its mean, a hot cell of 36 times, and of 7.4 blurred as the gate reads it."""
    view = coarse()
    flat = LookOutcome(0.6, torch.full((6, 6), 0.5), view, view.size, [], GRID)
    rows = [seen(0.9, 0.2, NEEDLE), seen(0.8, 0.9, NEEDLE), flat]
    found = calibrate(rows, [True, True, False], recipe(needed_recall=1.0))
    assert found.training_free.missed == 0.0 and found.training_free.needless == 0.0
    assert 7.3 < found.training_free.threshold < 7.4
    sharp = calibrate(rows, [True, True, False], recipe(needed_recall=1.0, blurs=["none"]))
    assert 35 < sharp.training_free.threshold < 36.1
    # the learned gate is worse here: one that needs a zoom has a lower score than the one that needs none
    assert found.gate is not None and found.gate.needless == 1.0


def test_a_question_that_is_computed_again_falls_on_the_same_side() -> None:
    """In another batch its score is a little different; one of the other kind is still not let through."""
    needs = [True, True, False]
    for shift in (-1e-4, 0.0, 1e-4):
        found = gate_figures([0.9, 0.8, 0.5], needs, Calibration(needed_recall=1.0))
        assert 0.8 * (1 + shift) >= found.threshold > 0.5
    close = gate_figures([0.9, 0.8, 0.79999], needs, Calibration(needed_recall=1.0))
    assert 0.79999 < close.threshold < 0.8 and close.needless == 0.0


def test_saturated_scores_leave_the_threshold_where_it_can_be_loaded() -> None:
    """Just above a score of 1, or just below one of 0, is no probability."""
    needs = [True, True, False, False]
    high = gate_figures([1.0, 1.0, 1.0, 0.2], needs, Calibration(needless=0.0), most=1.0)
    assert high.threshold == 1.0
    assert (high.missed, high.needless) == (0.0, 0.5)  # the target cannot be met, and the figures say so
    low = gate_figures([0.0, 0.9, 0.0, 0.2], needs, Calibration(needed_recall=1.0), most=1.0)
    assert low.threshold == 0.0 and (low.missed, low.needless) == (0.0, 1.0)
    # peaks over means are no probabilities
    assert gate_figures([9.0, 8.0, 5.0, 4.0], needs, Calibration(needless=0.0), most=math.inf).threshold > 5.0


def test_saturated_scores_are_calibrated_to_a_legal_config() -> None:
    rows = [seen(0.9, 1.0, NEEDLE), seen(0.9, 1.0)]
    found = calibrate(rows, [True, False], recipe(needless=0.0))
    config = BranchConfig(family="qwen2_5_vl", hidden_size=8, base_layers=4, k=2, peak_share=0.5)
    written = BranchConfig.model_validate_json(calibrated_config(config, found, recipe()).model_dump_json())
    assert written.gate_threshold == 1.0
    assert written.threshold == found.threshold and written.peak_share is None


def unknown(peak: float, score: float | None) -> LookOutcome:
    """A question whose box nobody knows."""
    return seen(peak, score)._replace(boxes=None)


def test_without_boxes_the_threshold_is_the_one_whose_crops_answer_most() -> None:
    """Of the questions that need a zoom; of those that answer as many, the one with the smaller crops."""
    rules = candidates(recipe())
    assert len({rule.threshold for rule in rules}) == len(rules)

    def tried(*right: int, area: float = 0.1) -> list[Crop]:
        """Crops that are right with these rules; each rule's is a little larger than the one before."""
        return [Crop(at in right, area + at / 100) for at in range(len(rules))]

    crops = [tried(1, 2, 3), tried(2, 3), tried(), tried(0, 1), tried(0, 1), tried(0, 1)]
    needs = [True, True, True, False, None, None]
    scores = [0.9, 0.8, 0.7, 0.1, 0.99, 0.0]
    rows = [unknown(0.9, score) for score in scores]
    found = calibrate(rows, needs, recipe(needed_recall=1.0), crops=crops)
    assert found.threshold == rules[2].threshold and found.met is None and found.box.n == 0
    assert found.crops is not None and found.crops.right == pytest.approx(2 / 3)
    assert found.crops.area == pytest.approx(0.12)
    assert (found.questions, found.needing, found.left_out) == (6, 3, 2)
    # those that are left out have no say in the gate's threshold
    assert found.gate is not None and 0.699 < found.gate.threshold < 0.69999 and found.gate.needless == 0.0
    assert "2 left out" in evidence_text(found) and "0.667 of those right" in evidence_text(found)
    assert "warning: 3 questions that need a zoom and 1 that need none are too few" in evidence_text(found)
    # but are zoomed, too
    half = calibrate(rows, needs, recipe(zoom_share=0.5), crops=crops).gate
    assert half is not None and sum(score >= half.threshold for score in scores) == 3


def test_without_boxes_blurs_and_margins_are_tried_as_well() -> None:
    how = recipe(relative=True, blurs=["fixed", "none"], margins=[0.0, 0.2])
    rules = candidates(how)
    last = len(rules) - 1
    crops = [[Crop(at == last, 0.1) for at in range(len(rules))]] * 2
    found = calibrate([unknown(0.9, None)] * 2, [True, False], how, crops=crops)
    assert (found.blur, found.margin, found.threshold) == ("none", 0.2, rules[last].peak_share)
    assert found.gate is None and found.relative


def test_questions_of_one_kind_calibrate_nothing() -> None:
    with pytest.raises(ConfigError, match="3 need a zoom, 0 need none"):
        calibrate([seen(0.9, 0.9, NEEDLE)] * 3, [True] * 3, recipe())
    with pytest.raises(ConfigError, match="0 need a zoom, 1 need none, and 2 are wrong"):
        calibrate([unknown(0.9, 0.9)] * 3, [False, None, None], recipe())


def test_without_a_gate_questions_that_need_a_zoom_are_enough() -> None:
    """The map's threshold is chosen on those alone, with boxes or by answers; without any, nothing can choose it."""
    found = calibrate([seen(0.9, None, NEEDLE)] * 2, [True] * 2, recipe(box_recall=1.0))
    assert found.met and found.gate is None and found.training_free is None
    config = BranchConfig(family="qwen2_5_vl", hidden_size=8, base_layers=4, k=2, gate_threshold=0.7)
    changed = calibrated_config(config, found, recipe())
    assert changed.threshold == found.threshold and changed.gate_threshold == 0.7
    assert "gate" not in evidence_text(found)
    crops = [[Crop(at == 1, 0.1) for at in range(len(candidates(recipe())))]] * 2
    answered = calibrate([unknown(0.9, None)] * 2, [True] * 2, recipe(), crops=crops)
    assert answered.threshold == candidates(recipe())[1].threshold and answered.gate is None
    boxed = calibrate([seen(0.9, None, NEEDLE), unknown(0.9, None)], [False, None], recipe(box_recall=1.0))
    assert boxed.met and (boxed.needing, boxed.box.n, boxed.crops) == (0, 1, None)
    with pytest.raises(ConfigError, match=r"0 need a zoom, 2 need none.*map's threshold needs some that do"):
        calibrate([seen(0.9, None)] * 2, [False] * 2, recipe())
