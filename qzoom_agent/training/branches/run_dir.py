"""The output folder of the branches' stages: results by name, and what each of them was made from.

    heads.json           the chosen heads, with the scores of all
    labels/              attention maps
    sdrpn/final          branches with SD-RPN, and metrics.json
    postsft/base         the fine-tuned base; postsft/final the branches fitted to it again
    gate/final           branches with SD-RPN and gate
    calibrate/final      the same with thresholds and their evidence: the folder to publish
    settings/STAGE.json  the keys of the recipe, and the results of earlier stages, that a stage depends on

A result gets its name when it is complete. A stage whose settings differ from those that are stored is neither resumed
nor skipped, and a folder with results of one recipe takes no other.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import torch
from pydantic import BaseModel, JsonValue

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.branches import CONFIG, WEIGHTS, Branches
from qzoom_agent.perception.labels import Heads
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, StageName
from qzoom_agent.training.branches.dataset import Records, load_records
from qzoom_agent.training.branches.fitting import NOT_DECISIVE
from qzoom_agent.training.branches.head_selection import Selection
from qzoom_agent.training.branches.labelling import heads_for, map_settings
from qzoom_agent.training.branches.sharded_table import FINISHED, together
from qzoom_agent.training.fingerprint import begin, require_same

_RESULTS: Final[dict[StageName, str]] = {"select-heads": "heads.json", "label": f"labels/{FINISHED}"}
"""Results of stages, where it is not the folder `final`."""
_BEFORE: Final[dict[StageName, tuple[StageName, ...]]] = {
    "postsft": ("sdrpn",),
    "gate": ("sdrpn", "postsft"),
    "calibrate": ("sdrpn", "postsft", "gate"),
}
"""Stages whose branches another one starts from: the last of them that is done."""
_BASE_KEYS: Final = {"model", "dtype"}
_READING_KEYS: Final = {"peak_share", "blur", "margin", "box"}
"""Keys that say how a map becomes a box."""
_ANSWER_KEYS: Final = {"tokens", "response", "asking", "max_new_tokens"}
"""Keys of `labelling` that decide the answers whose attention is read."""
_BUDGET_KEYS: Final = {"tokens", "with_crop", "own_calls", "max_new_tokens"}
"""Keys of `gate` that decide the answers at each budget."""
_READ: Final[dict[StageName, set[str]]] = {
    "select-heads": {"data", "heads"},
    "label": {"data"},
    "sdrpn": {"data", "seed", "k", "depth", "positions", "labelling", "sdrpn", *_READING_KEYS},
    "postsft": {"data", "seed", "labelling", "postsft"},
    "gate": {"data", "seed", "k", "positions", "gate_depth", "gate"},
    "calibrate": {"held_out", "positions", "calibration", *_READING_KEYS},
}
"""Keys of the recipe that the result of a stage depends on ..."""
_UNREAD: Final[dict[str, Any]] = {
    "labelling": {"batch"},
    "sdrpn": {"report": True, "optimisation": NOT_DECISIVE},
    "gate": {"batch": True, "optimisation": NOT_DECISIVE},
    "postsft": {"batch": True, "optimisation": NOT_DECISIVE, "refit": NOT_DECISIVE},
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
        many = self.processes.num_processes > 1
        preset = resolve_model(self.recipe.model)
        backend = HFBackend.load(
            self.recipe.model if base is None else str(base),
            device=str(self.processes.device) if many else "auto",
            dtype=self.recipe.dtype,
            branches=branches,
            protocol=preset.protocol,
        )
        if backend.name != self.recipe.model:  # tuned weights keep the name, heads and budgets of their base
            backend = rebuilt(backend, backend.branches, name=self.recipe.model, defaults=preset.budget)
        backend.model.requires_grad_(False)
        return backend

    def fresh(self, backend: HFBackend, *, sdrpn: bool, gate: bool) -> Branches:
        """Return untrained branches of this recipe. The seed decides the gate's head."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        return Branches.from_base(
            backend.model,
            k=recipe.k,
            depth=recipe.depth,
            gate_depth=recipe.gate_depth,
            with_sdrpn=sdrpn,
            with_gate=gate,
            positions=recipe.positions,
            peak_share=recipe.peak_share,
            blur=recipe.blur,
            margin=recipe.margin,
            box=recipe.box,
        )

    def records(self, stage: StageName, *, limit: int | None = None) -> Records:
        """Load the questions of a stage, at most `limit`."""
        return load_records(self.recipe.asked(stage), limit=limit)

    def held_out(self, *, limit: int | None = None) -> Records | None:
        """Load the held-out questions, if the recipe has some."""
        return load_records(self.recipe.held_out, limit=limit) if self.recipe.held_out else None

    def final(self, stage: StageName) -> Path:
        """Return the folder of the branches of a stage."""
        return self.output / stage / "final"

    def result(self, stage: StageName) -> Path:
        """Return the file or folder that is there once the stage is done."""
        return self.output / _RESULTS[stage] if stage in _RESULTS else self.final(stage)

    def finish(self, stage: StageName, write: Callable[[Path], object]) -> None:
        """Let the main process write a stage's result into a folder, which then gets its name; all wait for it."""
        if self.processes.is_main_process:
            writing = self.final(stage).with_name("final.part")
            writing.mkdir(parents=True, exist_ok=True)
            write(writing)
            writing.rename(self.final(stage))
            print(f"written {self.final(stage)}")
        self.processes.wait_for_everyone()

    def latest(self, *stages: StageName) -> Path:
        """Return the branches of the last of these stages that is done.

        Raises:
            ConfigError: None of them is.
        """
        done = [self.final(stage) for stage in stages if self.final(stage).exists()]
        if not done:
            raise ConfigError(f"{self.output} has no branches of {' or '.join(stages)} yet. Run that stage first.")
        return done[-1]

    def heads(self) -> Heads | None:
        """Return the heads that `select-heads` chose, if that stage is done."""
        file = self.output / "heads.json"
        return Selection.model_validate_json(file.read_text(encoding="utf-8")).heads if file.exists() else None

    def source(
        self,
        branches: Path | None = None,
        *,
        stage: StageName = "label",
        held_out: bool = False,
        base: Path | None = None,
    ) -> dict[str, JsonValue]:
        """Return the base (None: the recipe's), branches and records that a table is of, to store beside it."""
        asked = self.recipe.held_out if held_out else self.recipe.asked(stage)
        found: dict[str, JsonValue] = {
            "model": self.recipe.model if base is None else str(base.relative_to(self.output)),
            "margin": self.recipe.margin,
            "blur": self.recipe.blur,
            "box": None if self.recipe.box is None else list(self.recipe.box),
            "data": [one.identity() for one in asked],
        }
        if branches is not None:
            found["branches"] = hashlib.sha256((branches / WEIGHTS).read_bytes()).hexdigest()[:16]
        return found

    def require_recipe(self) -> None:
        """Check that all results in the output folder were made with this recipe.

        Raises:
            ConfigError: A stage was begun with other keys.
        """
        for stage in get_args(StageName):
            made = self._made(stage)
            if made.exists():
                settings: dict[str, JsonValue] = {"recipe": keys_read_by(self.recipe, stage)}
                require_same(self._settings(stage), settings, made=made, kind=StageSettings)

    def begin_stage(self, stage: StageName) -> None:
        """Store what a stage depends on, or check that it was begun with that.

        Raises:
            ConfigError: It was begun, or is done, with other keys or from something else; or it lacks what it needs.
        """
        if self.result(stage).exists() and not self._settings(stage).exists():
            return  # done before settings were stored
        settings: dict[str, JsonValue] = {
            "recipe": keys_read_by(self.recipe, stage),
            "made_from": self.made_from(stage),
        }
        begin(self._settings(stage), settings, made=self._made(stage), processes=self.processes, kind=StageSettings)

    def base_of(self, stage: StageName) -> Path | None:
        """Return the tuned base that a stage's branches were made for; None: the recipe's, whatever came later."""
        if not self._settings(stage).exists():
            return self.base  # done before settings were stored
        stored = json.loads(self._settings(stage).read_text(encoding="utf-8"))
        return None if stored["made_from"]["base"] == "as given" else self.tuned

    def made_from(self, stage: StageName) -> dict[str, JsonValue]:
        """Return what a stage takes from those before it; ConfigError if there is nothing of one that it needs."""
        found: dict[str, JsonValue] = {}
        if stage in ("label", "sdrpn", "postsft"):
            heads = heads_for(self.recipe.labelling, "textual", model=self.recipe.model, selected=self.heads())
            found["heads"] = {str(layer): list(chosen) for layer, chosen in heads.grounding.items()}
        if stage in _BEFORE:
            branches = self.latest(*_BEFORE[stage])
            content = b"".join((branches / name).read_bytes() for name in (CONFIG, WEIGHTS))
            found["branches"] = hashlib.sha256(content).hexdigest()[:16]
        if stage in ("gate", "calibrate"):
            found["base"] = "as given" if self.base is None else "of postsft"
        return found

    def _settings(self, stage: StageName) -> Path:
        return self.output / "settings" / f"{stage}.json"

    def _made(self, stage: StageName) -> Path:
        """Return the file or folder with all that a stage writes."""
        return self.result(stage) if stage == "select-heads" else self.result(stage).parent


def rebuilt(
    backend: HFBackend, branches: Branches | None, *, name: str | None = None, defaults: ViewBudget | None = None
) -> HFBackend:
    """Return the same base, its weights not loaded again, with other branches, and another name and its budgets."""
    return HFBackend(
        backend.model,
        backend.processor,
        name=name or backend.name,
        protocol=backend.protocol,
        defaults=defaults if name else backend.defaults,
        placement=backend.placement,
        branches=branches,
    )


def keys_read_by(recipe: BranchRecipe, stage: StageName) -> dict[str, JsonValue]:
    """Return the keys of a recipe that a stage's result depends on."""
    found = recipe.model_dump(mode="json", include=_BASE_KEYS | _READ[stage], exclude=_UNREAD)
    labelling, gate, sdrpn = recipe.labelling, recipe.gate, recipe.sdrpn
    if stage == "select-heads":
        found["labelling"] = labelling.model_dump(mode="json", include=_ANSWER_KEYS)
    elif stage == "label":
        found["labelling"] = map_settings(labelling, recipe.k, recipe.positions)
    elif stage == "postsft":  # SD-RPN is fitted again
        found["sdrpn"] = sdrpn.model_dump(mode="json", include={"tokens", "share"})
    elif stage == "calibrate":  # where boxes are unknown
        found["gate"] = gate.model_dump(mode="json", include=_BUDGET_KEYS)
    return found
