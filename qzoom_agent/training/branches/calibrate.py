"""Thresholds for a stated target, chosen on held-out questions and stored with their evidence.

The target is the share of the needed zooms that the gate must let through (or of the questions that may zoom), and the
share of the needles that the proposed box must hold. Of all thresholds that meet it the highest is taken: it zooms
least, and its boxes are smallest. (Where the target is a share of needless zooms, the gate's lowest.) The map's
threshold is absolute, as published, or a share of each map's peak; of several blurs and margins the pair with the
smallest boxes wins. Where no box is known, answers choose the rule (see `proposals`). A training-free gate, the peak of
the map over its mean, is calibrated for the same target and reported beside the learned one.
"""

import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
from pydantic import Field, JsonValue

from qzoom_agent.config import Blur, PerceptionConfig
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.stats import Figures
from qzoom_agent.gate import gate_fires
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.branch_config import CONFIG, BranchConfig
from qzoom_agent.perception.checkpoints import own_branches
from qzoom_agent.perception.hub import local_branches
from qzoom_agent.perception.maps import smoothed
from qzoom_agent.training.branches.base_inference import branches_of
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Calibration
from qzoom_agent.training.branches.dataset import DatasetSpec, load_records
from qzoom_agent.training.branches.gate import FEW
from qzoom_agent.training.branches.proposals import (
    Crop,
    Localisation,
    LookOutcome,
    crop_outcomes,
    localisation,
    look_at_records,
)
from qzoom_agent.training.branches.run_dir import RULE_KEYS, RunDirectory, copy_branches, digest, keys_read_by
from qzoom_agent.training.branches.sharded_table import say
from qzoom_agent.training.contents import contents
from qzoom_agent.training.recipe_io import begin, read_recipe, writing

_THRESHOLDS: Final = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)
"""Thresholds that answers choose from: those of the published code, and a few around them."""
_PEAK_SHARES: Final = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1)
_ROUNDING: Final = 1e-3
"""Share of a score by which it may differ when it is computed again."""


class GateFigures(Figures):
    """Errors of a gate at one threshold."""

    threshold: float
    missed: float
    """Share of the questions that need a zoom which it skips."""
    needless: float
    """Share of the questions that need none which it zooms."""


class CropFigures(Figures):
    """Crops of one rule, on the questions that need a zoom."""

    right: float
    """Share of them that are answered right with it."""
    area: float
    """Mean share of the image that is cropped."""


class Calibrated(Figures):
    """Chosen thresholds and the evidence for them; stored in `branches.json`."""

    target: Calibration
    questions: int
    needing: int
    """Number of questions that need a zoom."""
    left_out: int
    """Number of questions of which that cannot be told: nothing makes their answers right."""
    threshold: float
    """Threshold of the map."""
    relative: bool
    """The threshold is a share of each map's peak."""
    blur: Blur
    margin: float
    met: bool | None
    """The target of the box is met at that threshold; None where no question has a box."""
    box: Localisation
    crops: CropFigures | None
    """Figures that chose the threshold where no question has a box, else None."""
    gate: GateFigures | None
    """None where there is no learned gate."""
    training_free: GateFigures | None
    """The map's peak over its mean, used as a gate; None where all questions are of one kind."""


def map_rules(recipe: BranchRecipe) -> list[PerceptionConfig]:
    """Return the rules of the map that calibration tries, without their threshold."""
    blurs, margins = recipe.calibration.blurs or [recipe.blur], recipe.calibration.margins or [recipe.margin]
    return [PerceptionConfig(blur=blur, margin=margin, box=recipe.box) for blur in blurs for margin in margins]


def candidates(recipe: BranchRecipe) -> list[PerceptionConfig]:
    """Return the rules that answers choose from, few enough that each question is asked with all of them."""
    key, values = ("threshold", _THRESHOLDS) if recipe.peak_share is None else ("peak_share", _PEAK_SHARES)
    return [rule.model_copy(update={key: value}) for rule in map_rules(recipe) for value in values]


def calibrate(
    seen: Sequence[LookOutcome],
    needs: Sequence[bool | None],
    recipe: BranchRecipe,
    *,
    crops: Sequence[Sequence[Crop]] = (),
) -> Calibrated:
    """Choose thresholds, and the rule of the map they belong to.

    A learned gate takes questions that need a zoom and questions that need none. Without one, the map's threshold takes
    questions with a box, or else questions that need a zoom.

    Args:
        seen: Gate score and map of each question.
        needs: For each question True if it needs a zoom; None: that cannot be told.
        recipe: States the target and the rules to try. With `peak_share`, shares of the map's peak are chosen from.
        crops: For each question its crop by each of the `candidates`, which choose where no question has a box.

    Raises:
        ConfigError: There are too few kinds of questions for what is chosen.
    """
    target, relative = recipe.calibration, recipe.peak_share is not None
    needing, easy = sum(need is True for need in needs), sum(need is False for need in needs)
    left_out = len(needs) - needing - easy
    scores = [one.score for one in seen if one.score is not None]
    learned, boxed, both = len(scores) == len(seen), any(one.boxes for one in seen), bool(needing and easy)
    counts = (
        f"Of {len(needs)} held-out questions {needing} need a zoom, {easy} need none, and {left_out} are wrong "
        "whatever is shown."
    )
    if learned and not both:
        raise ConfigError(
            f"{counts} The gate's threshold needs some that do and some that do not: hold out other questions, or "
            "leave `calibrate` out of `stages` and set perception.gate_threshold yourself."
        )
    if not boxed and not needing:
        raise ConfigError(
            f"{counts} The map's threshold needs some that do: hold out other questions, such as ones with `boxes`, or "
            "leave `calibrate` out of `stages` and set perception.threshold yourself."
        )
    figures, met = None, None
    if boxed:
        rule, met = _by_boxes(seen, recipe)
    else:
        rule, figures = _by_answers(needs, crops, candidates(recipe))
    threshold = rule.peak_share if relative else rule.threshold
    assert threshold is not None
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
        gate=gate_figures(scores, needs, target, most=1.0) if learned else None,
        training_free=gate_figures(peaks, needs, target) if both else None,
    )


def _by_boxes(seen: Sequence[LookOutcome], recipe: BranchRecipe) -> tuple[PerceptionConfig, bool]:
    """Return the rule with the smallest boxes that meets the target, or else the one that comes closest, and whether it
    meets it. Each rule is tried at the highest threshold that does.
    """
    relative, wanted = recipe.peak_share is not None, recipe.calibration.box_recall
    key, values = (
        ("peak_share", np.linspace(0.95, 0.05, 91)) if relative else ("threshold", np.geomspace(0.9, 0.005, 60))
    )
    tried: list[tuple[bool, float, PerceptionConfig]] = []
    for options in map_rules(recipe):
        rules = [options.model_copy(update={key: round(float(value), 4)}) for value in values]
        found = [(rule, localisation(seen, rule)) for rule in rules]
        meeting = [one for one in found if (one[1].recall or 0.0) >= wanted]
        rule, box = meeting[0] if meeting else max(found, key=lambda one: one[1].recall or 0.0)
        tried.append((not meeting, (box.area if meeting else -(box.recall or 0.0)) or 0.0, rule))
    missed, _, rule = min(tried, key=itemgetter(0, 1))
    return rule, not missed


def _by_answers(
    needs: Sequence[bool | None], crops: Sequence[Sequence[Crop]], rules: Sequence[PerceptionConfig]
) -> tuple[PerceptionConfig, CropFigures]:
    """Return the rule whose crops answer most of the questions that need a zoom; among equals, the smallest crops."""
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
    """Choose the threshold that the target asks for, and measure its errors.

    Args:
        needs: For each question True if it needs a zoom. Those of which that cannot be told (None) count for
            `zoom_share` alone.
        most: Upper limit of scores and threshold. Where scores reach it, the threshold may miss the target.
    """
    needing = sorted((score for score, need in zip(scores, needs, strict=True) if need), reverse=True)
    easy = sorted((score for score, need in zip(scores, needs, strict=True) if need is False), reverse=True)
    if target.needless is not None:
        first = easy[_whole(target.needless * len(easy))]
        threshold = _beside(first, min((score for score in scores if score > first), default=math.inf))
    else:
        if target.zoom_share is None:
            lowest = needing[-_whole(-target.needed_recall * len(needing)) - 1]
        else:
            ranked, count = sorted(scores, reverse=True), _whole(target.zoom_share * len(scores))
            while 0 < count < len(ranked) and ranked[count] == ranked[count - 1]:
                count -= 1  # questions of one score zoom together
            lowest = ranked[max(0, count - 1)]
        threshold = _beside(lowest, max((score for score in scores if score < lowest), default=-math.inf))
    threshold = min(max(threshold, 0.0), most)
    return GateFigures(
        threshold=threshold,
        missed=fmean(not gate_fires(score, threshold) for score in needing),
        needless=fmean(bool(gate_fires(score, threshold)) for score in easy),
    )


def _whole(count: float) -> int:
    """Return a count without its fraction, whatever the rounding of a share has taken from it: 0.7 * 90 is below 63."""
    return math.floor(count + 1e-9)


def _beside(score: float, next_one: float) -> float:
    """Return a threshold between two scores, no further from the first than rounding moves it.

    Scores differ a little between batch sizes and number formats; one right beside the threshold might pass it.
    """
    step = max(abs(score) * _ROUNDING, 1e-12)
    return max((score + next_one) / 2, score - step) if next_one < score else min((score + next_one) / 2, score + step)


def with_thresholds(backend: HFBackend, recipe: BranchRecipe, folder: Path) -> BranchConfig:
    """Return the config of the branches with thresholds chosen on held-out questions, and print the evidence.

    All processes of a run have to call this. `folder` gets the answers, where no boxes are known. Raises ConfigError if
    nothing is held out, or it cannot be told which of the questions need a zoom.
    """
    if not recipe.held_out:
        raise ConfigError(
            "Thresholds are chosen on held-out questions, and the recipe has none. Name some in `held_out`."
        )
    held = load_records(recipe.held_out, limit=recipe.calibration.records)
    seen = look_at_records(backend, held, tokens=recipe.calibration.tokens)
    if all(one.boxes is not None for one in seen):
        found = calibrate(seen, [bool(one.boxes) for one in seen], recipe)
    else:
        answered = crop_outcomes(backend, held, recipe, candidates(recipe), folder / "answers")
        needs = [one.need(with_crop=recipe.gate.with_crop) for one in answered]
        found = calibrate(seen, needs, recipe, crops=[one.crops for one in answered])
    say(evidence_text(found))
    return calibrated_config(branches_of(backend).config, found, recipe)


def calibrated_config(config: BranchConfig, found: Calibrated, recipe: BranchRecipe) -> BranchConfig:
    """Return the config of branches with the thresholds that were found and their evidence."""
    changes: dict[str, Any] = {"peak_share": None, "box": recipe.box, "evidence": found.model_dump(mode="json")}
    changes["peak_share" if found.relative else "threshold"] = found.threshold
    changes |= {"blur": found.blur, "margin": found.margin, "max_regions": recipe.max_regions}
    if found.gate is not None:
        changes["gate_threshold"] = found.gate.threshold
    return BranchConfig.model_validate({**config.model_dump(), **changes})


def evidence_text(found: Calibrated) -> str:
    """Return the evidence as lines of text."""
    left_out = f"; {found.left_out} left out, which nothing makes right" if found.left_out else ""
    lines = [f"{found.questions} questions, {found.needing} of which need a zoom{left_out}"]
    rule = f"{found.threshold:g}{' of its peak' if found.relative else ''}, blur {found.blur}, margin {found.margin:g}"
    if found.crops is not None:
        lines.append("no held-out question has a box: answers choose the map's threshold, and box_recall says nothing")
        lines.append(f"map at {rule}: {found.crops.right:.3f} of those right with it, area {found.crops.area:.3f}")
    else:
        missed = "" if found.met else f" (the target of {found.target.box_recall:g} is not reached)"
        lines.append(f"map at {rule}: recall {found.box.recall:.3f}{missed}, area {found.box.area:.3f}")
    for name, gate in (("learned gate", found.gate), ("training-free gate", found.training_free)):
        if gate is not None:
            lines.append(
                f"{name} at {gate.threshold:.4g}: skips {gate.missed:.3f} of the needed zooms, "
                f"makes {gate.needless:.3f} of the needless ones"
            )
    easy = found.questions - found.needing - found.left_out
    if found.gate is not None and min(found.needing, easy) < FEW:
        lines.append(
            f"warning: {found.needing} questions that need a zoom and {easy} that need none are too few for a gate's "
            "threshold to hold on others: name more in held_out"
        )
    return "\n".join(lines)


class HeldOut(BranchRecipe):
    """A recipe for calibration alone, which may lack `data`."""

    data: list[DatasetSpec] = Field(default=[])
    held_out: list[DatasetSpec] = Field(min_length=1)


def recalibrate(recipe: Path, output: Path, *, model: str | None = None, branches: Path | str | None = None) -> Path:
    """Calibrate existing branches on other questions (`qzoom calibrate`); return `output`/final, where they are.

    The weights stay as they are, and so does the map's rule (`peak_share`, `blur`, `margin`, `box`, `max_regions`)
    unless the recipe sets it.

    Args:
        recipe: A recipe of the branches; only `held_out`, `calibration` and, where no boxes are known, `gate` are read.
        output: Folder of the results.
        model: Base to use instead of the recipe's.
        branches: Branches to calibrate; None: those that come with the model.

    Raises:
        ConfigError: `output` has calibrated branches already, there are none to calibrate, or the held-out questions
            cannot choose.
        BackendError: The model or the branches cannot be loaded.
    """
    final = output / "final"
    if final.exists():
        raise ConfigError(f"{final} is there already. Delete it, or choose another --output.")
    wanted = read_recipe(recipe, HeldOut, **({} if model is None else {"model": model}))
    stored = _branches_of(wanted.model) if branches is None else local_branches(branches)
    run = RunDirectory(wanted, output)
    with writing(output, run.processes):
        backend = run.backend(branches=stored)
        config = branches_of(backend).config
        kept = {*RULE_KEYS, "max_regions"} - wanted.model_fields_set
        run.recipe = wanted.model_copy(update={key: getattr(config, key) for key in kept})
        settings: dict[str, JsonValue] = {
            "recipe": keys_read_by(run.recipe, "calibrate"),
            "branches": digest(stored),
            "contents": contents(wanted.model, wanted.held_out),
        }
        begin(output / "settings.json", settings, made=output / "answers", processes=run.processes)
        config = with_thresholds(backend, run.recipe, output)

        def write(folder: Path) -> None:
            copy_branches(stored, folder)
            (folder / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")

        run.finish(final, write)
    return final


def _branches_of(model: str) -> Path:
    """Return the folder of the branches that come with a model."""
    found = own_branches(resolve_model(model).source)
    if found is None:
        raise ConfigError(
            f"'{model}' comes without branches in our form. Name theirs with --branches, the folder that `qzoom train` "
            "wrote, or `qzoom convert` from a published checkpoint."
        )
    return found
