"""Thresholds for a backend's branches: what a recipe holds out is looked at, `calibrate` chooses, the evidence is told.

Where boxes are known the looks alone decide. Where they are not, the model is asked, too (`needs`). All processes of a
run go through this together.
"""

from pathlib import Path
from typing import Any

from pydantic import JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import BranchConfig
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.calibrate import Calibrated, calibrate, candidates
from qzoom_agent.training.branches.crop_outcomes import outcomes
from qzoom_agent.training.branches.dataset import load_records
from qzoom_agent.training.branches.localisation import look_at
from qzoom_agent.training.branches.sharded_table import together


def with_thresholds(backend: HFBackend, recipe: BranchRecipe, folder: Path, *, source: JsonValue) -> BranchConfig:
    """The config of the backend's branches with thresholds chosen on the recipe's held-out questions, which it prints.

    Args:
        folder: gets the answers, where they are needed.
        source: what base, branches and records they are of.
    Raises:
        ConfigError: nothing is held out, or one cannot tell from it which questions need a zoom.
    """
    if not recipe.held_out:
        raise ConfigError("The recipe holds nothing out (`held_out`), so there is nothing to choose thresholds on.")
    assert backend.branches is not None
    held, target = load_records(recipe.held_out, limit=recipe.calibration.records), recipe.calibration
    rules: dict[str, Any] = {
        "relative": recipe.peak_share is not None,
        "blurs": target.blurs or [recipe.blur],
        "margins": target.margins or [recipe.margin],
        "box": recipe.box,
    }
    seen = look_at(backend, held, tokens=target.tokens)
    if all(one.boxes is not None for one in seen):
        found = calibrate(seen, [bool(one.boxes) for one in seen], target, **rules)
    else:
        answered = outcomes(
            backend,
            held,
            recipe,
            candidates(**rules),
            folder / "answers",
            source=source,
            note=lambda done: print(f"answered with and without crops: {done} of {len(held)}", flush=True),
        )
        needs = [one.need(with_crop=recipe.gate.with_crop) for one in answered]
        found = calibrate(seen, needs, target, **rules, crops=[one.crops for one in answered])
    if together().is_main_process:
        print(told(found), flush=True)
    return changed(backend.branches.config, found, recipe)


def changed(config: BranchConfig, found: Calibrated, recipe: BranchRecipe) -> BranchConfig:
    """A branch file's config with what was found, and the evidence for it."""
    changes: dict[str, Any] = {
        "peak_share": found.threshold if found.relative else None,
        "blur": found.blur,
        "margin": found.margin,
        "box": recipe.box,
        "evidence": found.model_dump(mode="json"),
    }
    if not found.relative:
        changes["threshold"] = found.threshold
    if found.gate is not None:
        changes["gate_threshold"] = found.gate.threshold
    return BranchConfig.model_validate({**config.model_dump(), **changes})


def told(found: Calibrated) -> str:
    """The evidence as lines of text."""
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
    return "\n".join(lines)
