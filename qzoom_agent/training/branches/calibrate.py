"""Thresholds for a stated target, chosen on held-out questions and written down with their evidence.

The published code has thresholds tuned by hand for each benchmark. Here one target is stated for all: how many of the
zooms that are needed the gate must let through (or how many questions may zoom), and how many needles the proposed box
must hold. Of all thresholds that meet a target the highest is taken: it zooms least, and its boxes are smallest.
(Where the target is how many zooms may be needless, the gate's lowest.) That of the map is absolute, as published, or a
share of each map's peak; where several blurs and margins may be tried, each gets its own, and the pair with the
smallest boxes wins. Where no box is known, answers choose: of some `candidates` the one whose crops make most of the
questions right that need a zoom. A training-free gate, the map's peak over its mean, is calibrated for the same target
and reported beside the learned one.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from qzoom_agent.config import Blur, PerceptionConfig, Sides
from qzoom_agent.errors import ConfigError
from qzoom_agent.gate import gate_fires
from qzoom_agent.perception.maps import smoothed
from qzoom_agent.training.branches.branch_recipe import Calibration
from qzoom_agent.training.branches.crop_outcomes import Crop
from qzoom_agent.training.branches.localisation import Localisation, LookOutcome, localisation

_THRESHOLDS: Final = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)
"""Those that answers choose from: what the published code has, and a little around it."""
_SHARES: Final = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1)
_ROUNDING: Final = 1e-3
"""Share of a score by which it may differ when it is computed again."""


class GateFigures(BaseModel):
    """A gate at one threshold."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    threshold: float
    missed: float
    """Share of the questions that need a zoom which it skips."""
    needless: float
    """Share of the questions that need none which it zooms."""


class CropFigures(BaseModel):
    """Crops of one rule, on the questions that need a zoom."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    right: float
    """Share of them that are answered right with it."""
    area: float
    """Mean share of the image that is cropped."""


class Calibrated(BaseModel):
    """What was chosen, and why."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    target: Calibration
    questions: int
    needing: int
    """How many of them need a zoom."""
    left_out: int
    """How many may or may not: nothing makes their answers right."""
    threshold: float
    """Of the map."""
    relative: bool
    """Whether that is a share of each map's peak."""
    blur: Blur
    margin: float
    met: bool | None
    """Whether the target of the box is met at that threshold; None where no question has a box."""
    box: Localisation
    crops: CropFigures | None
    """What chose the threshold where no question has a box, else None."""
    gate: GateFigures | None
    """None where there is no learned gate."""
    training_free: GateFigures
    """Peak over mean of the map instead."""


def candidates(
    *, relative: bool, blurs: Sequence[Blur] = ("fixed",), margins: Sequence[float] = (0.0,), box: Sides | None = None
) -> list[PerceptionConfig]:
    """Rules of a map's foreground for answers to choose from, few enough that each question is asked with them all."""
    key, values = ("peak_share", _SHARES) if relative else ("threshold", _THRESHOLDS)
    return [rule.model_copy(update={key: value}) for rule in _rules(blurs, margins, box) for value in values]


def calibrate(
    seen: Sequence[LookOutcome],
    needs: Sequence[bool | None],
    target: Calibration,
    *,
    relative: bool = False,
    blurs: Sequence[Blur] = ("fixed",),
    margins: Sequence[float] = (0.0,),
    box: Sides | None = None,
    crops: Sequence[Sequence[Crop]] = (),
) -> Calibrated:
    """Choose thresholds, and the rule of the map they belong to.

    Args:
        needs: for each question whether it needs a zoom; None: nobody can say.
        relative: choose a share of the map's peak instead of an absolute threshold.
        blurs, margins: what may be tried.
        box: sides of the proposed box, where they are fixed.
        crops: for each question its crop by each of the `candidates`; of use where no question has a box.
    Raises:
        ConfigError: none of the questions needs a zoom, or all do.
    """
    needing, easy = sum(need is True for need in needs), sum(need is False for need in needs)
    left_out = len(needs) - needing - easy
    if not needing or not easy:
        raise ConfigError(
            f"Of {len(needs)} held-out questions {needing} need a zoom, {easy} need none, and {left_out} are wrong "
            "whatever is shown. Thresholds need some that do and some that do not: hold out other questions."
        )
    figures, met = None, None
    if any(one.boxes for one in seen):
        tried = [_by_boxes(seen, target, rule, relative=relative) for rule in _rules(blurs, margins, box)]
        rule, met, _ = min(tried, key=_cost)
    else:
        rules = candidates(relative=relative, blurs=blurs, margins=margins, box=box)
        rule, figures = _by_answers(needs, crops, rules)
    threshold = rule.peak_share if relative else rule.threshold
    assert threshold is not None
    scores = [one.score for one in seen]
    gate = None
    if all(score is not None for score in scores):
        gate = gate_figures([float(score or 0.0) for score in scores], needs, target, most=1.0)
    maps = [smoothed(one.heat, rule) for one in seen]  # as the gate of that name reads them
    peaks = [float(heat.max()) / max(float(heat.mean()), 1e-9) for heat in maps]
    return Calibrated(
        target=target,
        questions=len(seen),
        needing=needing,
        left_out=left_out,
        threshold=threshold,
        relative=relative,
        blur=rule.blur or "fixed",
        margin=rule.margin or 0.0,
        met=met,
        box=localisation(seen, rule),
        crops=figures,
        gate=gate,
        training_free=gate_figures(peaks, needs, target),
    )


def _rules(blurs: Sequence[Blur], margins: Sequence[float], box: Sides | None) -> list[PerceptionConfig]:
    return [PerceptionConfig(blur=blur, margin=margin, box=box) for blur in blurs for margin in margins]


def _by_boxes(
    seen: Sequence[LookOutcome], target: Calibration, options: PerceptionConfig, *, relative: bool
) -> tuple[PerceptionConfig, bool, Localisation]:
    """The rule with the highest threshold that meets the target (whether one does), or comes closest."""
    key = "peak_share" if relative else "threshold"
    values = np.linspace(0.95, 0.05, 91) if relative else np.geomspace(0.9, 0.005, 60)
    rules = [options.model_copy(update={key: round(float(value), 4)}) for value in values]
    found = [(rule, localisation(seen, rule)) for rule in rules]
    for rule, box in found:  # from the highest down
        if (box.recall or 0.0) >= target.box_recall:
            return rule, True, box
    rule, box = max(found, key=lambda pair: pair[1].recall or 0.0)
    return rule, False, box


def _cost(found: tuple[PerceptionConfig, bool, Localisation]) -> tuple[bool, float]:
    """Of two rules the better one has less: the target missed by less, or reached with less of the image."""
    _, met, box = found
    return (False, box.area or 0.0) if met else (True, -(box.recall or 0.0))


def _by_answers(
    needs: Sequence[bool | None], crops: Sequence[Sequence[Crop]], rules: Sequence[PerceptionConfig]
) -> tuple[PerceptionConfig, CropFigures]:
    """The rule whose crops answer most of the questions that need a zoom; of equals, that with the smallest crops."""
    needing = [some for some, need in zip(crops, needs, strict=True) if need]
    figures = [
        CropFigures(right=fmean(crop.right for crop in one), area=fmean(crop.area for crop in one))
        for one in zip(*needing, strict=True)
    ]
    pairs = zip(rules, figures, strict=True)
    return max(pairs, key=lambda pair: (pair[1].right, -pair[1].area))


def gate_figures(
    scores: Sequence[float], needs: Sequence[bool | None], target: Calibration, *, most: float = math.inf
) -> GateFigures:
    """The threshold that the target asks for, and what it does.

    Args:
        needs: questions of which nobody can say count for `zoom_share` alone.
        most: no score is higher, nor may the threshold be. Where scores reach it, it may miss the target.
    """
    needing = sorted((score for score, need in zip(scores, needs, strict=True) if need), reverse=True)
    easy = sorted((score for score, need in zip(scores, needs, strict=True) if need is False), reverse=True)
    if target.needless is not None:
        first = easy[int(target.needless * len(easy))]
        threshold = _beside(first, min((score for score in scores if score > first), default=math.inf))
    else:
        if target.zoom_share is None:
            lowest = needing[int(np.ceil(target.needed_recall * len(needing))) - 1]
        else:
            lowest = sorted(scores, reverse=True)[max(0, int(target.zoom_share * len(scores)) - 1)]
        threshold = _beside(lowest, max((score for score in scores if score < lowest), default=-math.inf))
    threshold = min(max(threshold, 0.0), most)
    return GateFigures(
        threshold=threshold,
        missed=fmean(not gate_fires(score, threshold) for score in needing),
        needless=fmean(bool(gate_fires(score, threshold)) for score in easy),
    )


def _beside(score: float, next_one: float) -> float:
    """A threshold between two scores, no further from the first than rounding moves it.

    A question has another score by itself than in a batch, or in another number format: not by much, but a threshold
    that is a hair from a score would then fall on its other side.
    """
    step = max(abs(score) * _ROUNDING, 1e-12)
    return max((score + next_one) / 2, score - step) if next_one < score else min((score + next_one) / 2, score + step)
