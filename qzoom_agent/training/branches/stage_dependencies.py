"""What the result of each stage depends on: keys of the recipe, and what the stages before it left.

Kept for each stage in `settings/STAGE.json` of the output folder. A stage that was begun, or is done, with others is
neither gone on with nor skipped, and a folder that holds results of one recipe takes no other: its `recipe.yaml` is
what it was made with.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import JsonValue

from qzoom_agent.perception.branches import CONFIG, WEIGHTS
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, StageName
from qzoom_agent.training.branches.fitting import ONLY_TOLD
from qzoom_agent.training.branches.labelling import heads_for, map_settings
from qzoom_agent.training.branches.run_dir import RunDirectory
from qzoom_agent.training.fingerprint import begin, require_same

_BASE: Final = {"model", "dtype"}
_READING: Final = {"peak_share", "blur", "margin", "box"}
"""How a map becomes a box."""
_SPOKEN: Final = {"tokens", "response", "asking", "max_new_tokens"}
"""What of `labelling` decides on the answers whose attention is looked at."""
_ANSWERED: Final = {"tokens", "with_crop", "own_calls", "max_new_tokens"}
"""What of `gate` decides on the answers at each budget."""
_READ: Final[dict[StageName, set[str]]] = {
    "select-heads": {"data", "heads"},
    "label": {"data"},
    "sdrpn": {"data", "seed", "k", "depth", "positions", "labelling", "sdrpn", *_READING},
    "postsft": {"data", "seed", "labelling", "postsft"},
    "gate": {"data", "seed", "k", "positions", "gate_depth", "gate"},
    "calibrate": {"held_out", "positions", "calibration", *_READING},
}
_UNREAD: Final[dict[str, Any]] = {
    "labelling": {"batch"},
    "sdrpn": {"report": True, "optimisation": ONLY_TOLD},
    "gate": {"batch": True, "optimisation": ONLY_TOLD},
    "postsft": {"batch": True, "optimisation": ONLY_TOLD, "refit": ONLY_TOLD},
}
"""Keys of those sections that do not change what comes out."""


def read_by(recipe: BranchRecipe, stage: StageName) -> dict[str, JsonValue]:
    """The keys of a recipe that a stage's result depends on."""
    found = recipe.model_dump(mode="json", include=_BASE | _READ[stage], exclude=_UNREAD)
    labelling, gate, sdrpn = recipe.labelling, recipe.gate, recipe.sdrpn
    if stage == "select-heads":
        found["labelling"] = labelling.model_dump(mode="json", include=_SPOKEN)
    elif stage == "label":
        found["labelling"] = map_settings(labelling, recipe.k, recipe.positions)
    elif stage == "postsft":  # SD-RPN is fitted again
        found["sdrpn"] = sdrpn.model_dump(mode="json", include={"tokens", "share"})
    elif stage == "calibrate":  # where boxes are unknown
        found["gate"] = gate.model_dump(mode="json", include=_ANSWERED)
    return found


def made_from(shop: RunDirectory, stage: StageName) -> dict[str, JsonValue]:
    """What a stage takes from those before it.

    Raises:
        ConfigError: there is nothing of a stage that this one needs.
    """
    found: dict[str, JsonValue] = {}
    if stage in ("label", "sdrpn", "postsft"):
        heads = heads_for(shop.recipe.labelling, "textual", model=shop.recipe.model, selected=shop.heads())
        found["heads"] = {str(layer): list(chosen) for layer, chosen in heads.grounding.items()}
    before: dict[StageName, tuple[StageName, ...]] = {
        "postsft": ("sdrpn",),
        "gate": ("sdrpn", "postsft"),
        "calibrate": ("sdrpn", "postsft", "gate"),
    }
    if stage in before:
        branches = shop.latest(*before[stage])
        content = b"".join((branches / name).read_bytes() for name in (CONFIG, WEIGHTS))
        found["branches"] = hashlib.sha256(content).hexdigest()[:16]
    if stage in ("gate", "calibrate"):
        found["base"] = "as given" if shop.base is None else "of postsft"
    return found


def base_of(shop: RunDirectory, stage: StageName) -> Path | None:
    """The tuned base that a stage's branches were made for; None: the recipe's, whatever `postsft` made since."""
    stated = _stated(shop, stage)
    if not stated.exists():
        return shop.base  # done before settings were kept
    given = json.loads(stated.read_text(encoding="utf-8"))["made_from"]["base"] == "as given"
    return None if given else shop.tuned


def require_recipe(shop: RunDirectory) -> None:
    """Nothing where all that the output folder holds was made with this recipe.

    Raises:
        ConfigError: a stage was begun with other keys.
    """
    for stage in get_args(StageName):
        made = _made(shop, stage)
        if made.exists():
            require_same(_stated(shop, stage), {"recipe": read_by(shop.recipe, stage)}, made=made)


def begin_stage(shop: RunDirectory, stage: StageName) -> None:
    """Keep what a stage is about to be made from, or see that it was made from that.

    Raises:
        ConfigError: it was begun, or is done, with other keys or from something else; or it lacks what it needs.
    """
    stated = _stated(shop, stage)
    if shop.result(stage).exists() and not stated.exists():
        return  # done before settings were kept
    settings: dict[str, JsonValue] = {"recipe": read_by(shop.recipe, stage), "made_from": made_from(shop, stage)}
    begin(stated, settings, made=_made(shop, stage), processes=shop.processes)


def _stated(shop: RunDirectory, stage: StageName) -> Path:
    return shop.output / "settings" / f"{stage}.json"


def _made(shop: RunDirectory, stage: StageName) -> Path:
    """All that a stage leaves behind."""
    result = shop.result(stage)
    return result if stage == "select-heads" else result.parent
