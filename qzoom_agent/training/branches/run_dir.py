"""The output folder of the branches' stages: results by name, and what each of them was made from.

    heads.json           the chosen heads, with the scores of all
    labels/              attention maps
    sdrpn/final          branches with SD-RPN, and metrics.json
    postsft/base         the fine-tuned base; postsft/final the branches fitted to it again
    regions/final        branches with the SD-RPN that answers reinforced
    gate/final           branches with SD-RPN and gate
    calibrate/final      the same with thresholds and their evidence: the folder to publish, unless there is
    further/final        the same with branches of further looks
    settings/STAGE.json  the keys of the recipe, and the results of earlier stages, that a stage depends on

A result gets its name when it is complete. A stage whose settings differ from those that are stored is neither resumed
nor skipped, and a folder with results of one recipe takes no other.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import torch
from pydantic import BaseModel, JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import read_json
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, WEIGHTS, branch_folder
from qzoom_agent.perception.branches import Branches
from qzoom_agent.perception.checkpoints import own_branches
from qzoom_agent.perception.labels import Heads
from qzoom_agent.training.branches.base_inference import branches_of, load_frozen
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, StageName
from qzoom_agent.training.branches.dataset import ConcatenatedRecords, load_records
from qzoom_agent.training.branches.fitting import NOT_DECISIVE
from qzoom_agent.training.branches.labelling import Selection, heads_for, map_settings
from qzoom_agent.training.branches.sharded_table import FINISHED, together
from qzoom_agent.training.contents import contents
from qzoom_agent.training.recipe_io import begin, require_same

_RESULTS: Final[dict[StageName, str]] = {"select-heads": "heads.json", "label": f"labels/{FINISHED}"}
"""Results of stages, where it is not the folder `final`."""
_BEFORE: Final[dict[StageName, tuple[StageName, ...]]] = {
    "postsft": ("sdrpn",),
    "regions": ("sdrpn", "postsft"),
    "gate": ("sdrpn", "postsft", "regions"),
    "calibrate": ("sdrpn", "postsft", "regions", "gate"),
    "further": ("calibrate",),
}
"""Stages whose branches another one starts from: the last of them that is done."""
RULE_KEYS: Final = ("peak_share", "blur", "margin", "box")
"""Keys of a recipe that say how a map becomes a box."""


def _keys(*whole: str, **parts: set[str]) -> dict[str, Any]:
    return {**dict.fromkeys(("model", "dtype", *whole), True), **parts}


_READ: Final[dict[StageName, dict[str, Any]]] = {
    "select-heads": _keys("data", "heads", labelling={"tokens", "response", "asking", "max_new_tokens"}),
    "label": _keys("data"),
    "sdrpn": _keys("data", "seed", "k", "depth", "positions", "labelling", "sdrpn", *RULE_KEYS),
    "postsft": _keys(
        "data", "seed", "labelling", "postsft", sdrpn={"tokens", "share", "absent"}
    ),  # SD-RPN is fitted again
    "regions": _keys("data", "seed", "positions", "regions"),
    "gate": _keys("data", "seed", "k", "positions", "gate_depth", "gate"),
    "calibrate": _keys(
        "held_out",
        "positions",
        "calibration",
        *RULE_KEYS,
        gate={"tokens", "with_crop", "own_calls", "max_new_tokens"},  # where boxes are unknown
    ),
    "further": _keys("data", "seed", "positions", "labelling", "further", calibration={"tokens"}),
}
"""Keys of the recipe that the result of a stage depends on ..."""
_UNREAD: Final[dict[str, Any]] = {
    "labelling": {"batch"},
    "sdrpn": {"report": True, "optimisation": NOT_DECISIVE},
    "regions": {"batch": True, "optimisation": NOT_DECISIVE},
    "gate": {"batch": True, "optimisation": NOT_DECISIVE},
    "postsft": {"batch": True, "optimisation": NOT_DECISIVE, "refit": NOT_DECISIVE},
    "further": {"batch": True, "optimisation": NOT_DECISIVE},
}
"""... but for these keys of those sections."""


class StageSettings(BaseModel):
    """Content of `settings/STAGE.json`, to find keys that have new names."""

    recipe: BranchRecipe
    made_from: dict[str, JsonValue]


class RunDirectory:
    """A recipe and its output folder."""

    def __init__(self, recipe: BranchRecipe, output: Path) -> None:
        self.recipe, self.output = recipe, output
        self.processes = together()

    @property
    def tuned(self) -> Path:
        """The folder of the base that `postsft` tunes, there before any branches are fitted to it."""
        return self.output / "postsft" / "base"

    @property
    def base(self) -> Path | None:
        """The base that `postsft` tuned, if that stage is done and branches are fitted to it."""
        return self.tuned if self.final("postsft").exists() else None

    def backend(self, *, branches: Path | None = None, base: Path | None = None) -> HFBackend:
        """Load the recipe's base, or a tuned one, with the branches of a stage; all weights are frozen."""
        preset = resolve_model(self.recipe.model)
        source = self.recipe.model if base is None else str(base)
        backend = load_frozen(source, dtype=self.recipe.dtype, protocol=preset.protocol, branches=branches)
        backend.name = self.recipe.model  # tuned weights keep the name, heads and budgets of their base
        if preset.budget is not None:
            backend.defaults = preset.budget.model_copy(update={"factor": backend.defaults.factor})
        return backend

    def fresh(self, backend: HFBackend, *, sdrpn: bool, gate: bool) -> Branches:
        """Return untrained branches of this recipe. The seed decides the gate's head."""
        torch.manual_seed(self.recipe.seed)
        keys = {"k", "depth", "gate_depth", "positions", "max_regions", *RULE_KEYS}
        settings = self.recipe.model_dump(include=keys)
        if gate:  # it reads the layer that the SD-RPN beside it reads, which may come from the base
            settings["k"] = branches_of(backend).config.k
        return Branches.from_base(backend.model, with_sdrpn=sdrpn, with_gate=gate, **settings)

    def records(self, stage: StageName, *, limit: int | None = None) -> ConcatenatedRecords:
        """Load the questions of a stage, at most `limit`."""
        return load_records(self.recipe.asked(stage), limit=limit)

    def final(self, stage: StageName) -> Path:
        """Return the folder of the branches of a stage."""
        return self.output / stage / "final"

    def result(self, stage: StageName) -> Path:
        """Return the file or folder that is there once the stage is done."""
        return self.output / _RESULTS[stage] if stage in _RESULTS else self.final(stage)

    def finish(self, folder: Path, write: Callable[[Path], object]) -> None:
        """Let the main process write into a folder, which then gets its name; all wait for it."""
        if self.processes.is_main_process:
            writing = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            write(writing)
            writing.rename(folder)
            print(f"written {folder}", flush=True)
        self.processes.wait_for_everyone()

    def latest(self, *stages: StageName) -> Path:
        """Return the branches of the last of these stages that is done; ConfigError if none of them is."""
        done = [self.final(stage) for stage in stages if self.final(stage).exists()]
        if not done:
            raise ConfigError(f"{self.output} has no branches of {' or '.join(stages)} yet. Run that stage first.")
        return done[-1]

    def before(self, stage: StageName) -> Path:
        """Return the branches that a stage starts from; ConfigError if there are none.

        For `regions` and `further` they may be those of the base, if no stage here has trained others.
        """
        given = resolve_model(self.recipe.model).source if stage in ("regions", "further") else None
        training = _BEFORE["calibrate"] if stage == "further" else ()
        made = any(self.final(earlier).exists() for earlier in (*training, *_BEFORE[stage]))
        if given and not made and (own := own_branches(given)) is not None:
            return own
        return self.latest(*_BEFORE[stage])

    def heads(self) -> Heads | None:
        """Return the heads that `select-heads` chose, if that stage is done."""
        file = self.output / "heads.json"
        return read_json(file, Selection, "Delete it, and run select-heads again.").heads if file.exists() else None

    def require_recipe(self) -> None:
        """Raise ConfigError if a result in the output folder was made with another recipe."""
        for stage in get_args(StageName):
            made = self._made(stage)
            if made.exists():
                settings: dict[str, JsonValue] = {"recipe": keys_read_by(self.recipe, stage)}
                require_same(self._settings(stage), settings, made=made, kind=StageSettings)
        for final in (self.final("sdrpn"), self.final("postsft")):
            if (final / CONFIG).exists():  # changes no weights, so no settings hold it
                config = read_json(final / CONFIG, dict[str, Any], "Delete the stage, and run it again.")
                if (was := config.get("max_regions", 1)) != self.recipe.max_regions:
                    raise ConfigError(
                        f"{final} was made with max_regions {was}, and the recipe has {self.recipe.max_regions}. Set "
                        f"max_regions: {was}, delete {final.parent} and later stages, or choose another --output."
                    )

    def begin_stage(self, stage: StageName) -> None:
        """Store what a stage depends on, or check that it was begun with that.

        Raises ConfigError if it was not, from other keys or other results, or lacks what it needs.
        """
        if self.result(stage).exists() and not self._settings(stage).exists():
            return  # done before settings were stored
        asked = [*self.recipe.asked(stage), *self.recipe.data]  # postsft reads both
        sources = self.recipe.held_out if "held_out" in _READ[stage] else asked
        settings: dict[str, JsonValue] = {
            "recipe": keys_read_by(self.recipe, stage),
            "made_from": self.made_from(stage),
            "contents": contents(self.recipe.model, sources),
        }
        begin(self._settings(stage), settings, made=self._made(stage), processes=self.processes, kind=StageSettings)

    def base_of(self, stage: StageName) -> Path | None:
        """Return the tuned base that a stage's branches were made for; None: the recipe's, whatever came later."""
        if not self._settings(stage).exists():
            return self.base  # done before settings were stored
        stored = read_json(self._settings(stage), dict[str, Any], "Run the stages again, with another --output.")
        return None if stored["made_from"]["base"] == "as given" else self.tuned

    def made_from(self, stage: StageName) -> dict[str, JsonValue]:
        """Return what a stage takes from those before it; ConfigError if there is nothing of one that it needs."""
        found: dict[str, JsonValue] = {}
        if stage in ("label", "sdrpn", "postsft", "further"):
            heads = heads_for(self.recipe.labelling, "textual", model=self.recipe.model, selected=self.heads())
            found["heads"] = {str(layer): list(chosen) for layer, chosen in heads.grounding.items()}
        if stage in _BEFORE:
            found["branches"] = digest(self.before(stage))
        if stage in ("regions", "gate", "calibrate", "further"):
            found["base"] = "as given" if self.base is None else "of postsft"
        return found

    def _settings(self, stage: StageName) -> Path:
        return self.output / "settings" / f"{stage}.json"

    def _made(self, stage: StageName) -> Path:
        """Return the file or folder with all that a stage writes."""
        return self.result(stage) if stage == "select-heads" else self.result(stage).parent


def copy_branches(source: Path, target: Path) -> None:
    """Copy the branches of a folder into another, with those of further looks if it has them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy2(branch_folder(source) / name, target / name)
    if (further := branch_folder(source) / FURTHER).is_dir():
        copy_branches(further, target / FURTHER)


def digest(branches: Path) -> str:
    """Return a hash of the branches in a folder."""
    content = b"".join((branch_folder(branches) / name).read_bytes() for name in (CONFIG, WEIGHTS))
    return hashlib.sha256(content).hexdigest()[:16]


def keys_read_by(recipe: BranchRecipe, stage: StageName) -> dict[str, JsonValue]:
    """Return the keys of a recipe that a stage's result depends on."""
    found = recipe.model_dump(mode="json", include=_READ[stage], exclude=_UNREAD)
    if stage not in ("sdrpn", "postsft"):
        for source in found.get("data", ()):
            source.pop("topic", None)
    if stage == "label":
        found["labelling"] = map_settings(recipe.labelling, recipe.k, recipe.positions)
    return found
