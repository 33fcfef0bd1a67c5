"""Thresholds for a stated target, chosen on held-out questions and written down with their evidence.

The published code has thresholds tuned by hand for each benchmark. Here one target is stated for all: how many of the
zooms that are needed the gate must let through (or how many questions may zoom), and how many needles the proposed box
must hold. Of all thresholds that meet a target the highest is taken: it zooms least, and its boxes are smallest.
(Where the target is how many zooms may be needless, the gate's lowest.) That of the map is absolute, as published, or a
share of each map's peak; where several blurs and margins may be tried, each gets its own, and the pair with the
smallest boxes wins. A training-free gate, the map's peak over its mean, is calibrated for the same target and reported
beside the learned one.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from qzoom_agent.config import Blur, PerceptionConfig, Sides
from qzoom_agent.errors import ConfigError
from qzoom_agent.rl.branches.metrics import Localisation, Seen, localisation
from qzoom_agent.rl.branches.recipe import Calibration


class GateFigures(BaseModel):
    """A gate at one threshold."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    threshold: float
    missed: float
    """Share of the questions that need a zoom which it skips."""
    needless: float
    """Share of the questions that need none which it zooms."""


class Calibrated(BaseModel):
    """What was chosen, and why."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    target: Calibration
    questions: int
    needing: int
    """How many of them need a zoom."""
    threshold: float | None
    """Of the map; None where no question has a box, so that recall cannot be measured."""
    relative: bool
    """Whether that is a share of each map's peak."""
    blur: Blur
    margin: float
    met: bool
    """Whether the target of the box is met at that threshold."""
    box: Localisation
    gate: GateFigures | None
    """None where there is no learned gate."""
    training_free: GateFigures
    """Peak over mean of the map instead."""


def calibrate(
    seen: Sequence[Seen],
    needs: Sequence[bool],
    target: Calibration,
    *,
    relative: bool = False,
    blurs: Sequence[Blur] = ("fixed",),
    margins: Sequence[float] = (0.0,),
    box: Sides | None = None,
) -> Calibrated:
    """Choose thresholds, and the rule of the map they belong to.

    Args:
        needs: for each question whether it needs a zoom.
        relative: choose a share of the map's peak instead of an absolute threshold.
        blurs, margins: what may be tried.
        box: sides of the proposed box, where they are fixed.
    Raises:
        ConfigError: none of the questions needs a zoom, or all do.
    """
    if len(set(needs)) < 2:
        raise ConfigError(
            f"All {len(needs)} held-out questions are alike: {sum(needs)} need a zoom. Thresholds need both kinds."
        )
    rules = [PerceptionConfig(blur=blur, margin=margin, box=box) for blur in blurs for margin in margins]
    tried = [(rule, _map_threshold(seen, target, rule, relative=relative)) for rule in rules]
    rule, (threshold, met, found) = min(tried, key=lambda pair: _cost(*pair[1]))
    scores = [one.score for one in seen]
    gate = None
    if all(score is not None for score in scores):
        gate = gate_figures([float(score or 0.0) for score in scores], needs, target, most=1.0)
    peaks = [float(one.heat.max()) / max(float(one.heat.mean()), 1e-9) for one in seen]
    return Calibrated(
        target=target,
        questions=len(seen),
        needing=sum(needs),
        threshold=threshold,
        relative=relative,
        blur=rule.blur or "fixed",
        margin=rule.margin or 0.0,
        met=met,
        box=found,
        gate=gate,
        training_free=gate_figures(peaks, needs, target),
    )


def _cost(threshold: float | None, met: bool, box: Localisation) -> tuple[bool, float]:
    """Of two rules the better one has less: the target missed by less, or reached with less of the image."""
    return (False, box.area or 0.0) if met else (True, -(box.recall or 0.0))


def _map_threshold(
    seen: Sequence[Seen], target: Calibration, options: PerceptionConfig, *, relative: bool
) -> tuple[float | None, bool, Localisation]:
    key = "peak_share" if relative else "threshold"
    values = np.linspace(0.95, 0.05, 91) if relative else np.geomspace(0.9, 0.005, 60)
    candidates = [round(float(value), 4) for value in values]
    found = [(value, localisation(seen, options.model_copy(update={key: value}))) for value in candidates]
    if found[0][1].n == 0:
        return None, False, found[0][1]
    for value, box in found:  # from the highest down
        if (box.recall or 0.0) >= target.box_recall:
            return value, True, box
    value, box = max(found, key=lambda pair: pair[1].recall or 0.0)
    return value, False, box


def gate_figures(
    scores: Sequence[float], needs: Sequence[bool], target: Calibration, *, most: float = math.inf
) -> GateFigures:
    """The threshold that the target asks for, and what it does.

    Args:
        most: no score is higher, nor may the threshold be. Where scores reach it, it may miss the target.
    """
    needing = sorted((score for score, need in zip(scores, needs, strict=True) if need), reverse=True)
    easy = sorted((score for score, need in zip(scores, needs, strict=True) if not need), reverse=True)
    if target.needless is not None:
        # just above the first that must not zoom
        threshold = float(np.nextafter(easy[int(target.needless * len(easy))], np.inf))
    else:
        if target.zoom_share is None:
            lowest = needing[int(np.ceil(target.needed_recall * len(needing))) - 1]
        else:
            lowest = sorted(scores, reverse=True)[max(0, int(target.zoom_share * len(scores)) - 1)]
        # not the very score of a question that was looked at: the next one may lie a hair below
        threshold = float(np.nextafter(lowest, -np.inf))
    threshold = min(max(threshold, 0.0), most)
    return GateFigures(
        threshold=threshold,
        missed=fmean(score < threshold for score in needing),
        needless=fmean(score >= threshold for score in easy),
    )


def evidence(found: Calibrated) -> dict[str, Any]:
    """What a branch file says about its thresholds."""
    return found.model_dump(mode="json")
