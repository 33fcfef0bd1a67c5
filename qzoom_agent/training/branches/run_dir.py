"""A recipe, its output folder, and what the stages so far put there.

    heads.json           the chosen heads, with the figures of all
    labels/              attention maps
    sdrpn/final          branches with SD-RPN, and metrics.json
    postsft/base         the fine-tuned base; postsft/final the branches fitted to it again
    gate/final           branches with SD-RPN and gate
    calibrate/final      the same with thresholds and their evidence: the folder to ship

A result appears under its name when it is whole, so what is there is done.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from pydantic import JsonValue

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.branches import WEIGHTS, Branches
from qzoom_agent.perception.labels import Heads
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, StageName
from qzoom_agent.training.branches.dataset import Records, load_records
from qzoom_agent.training.branches.head_selection import Selection
from qzoom_agent.training.branches.sharded_table import FINISHED, together

_RESULT: Final[dict[StageName, str]] = {"select-heads": "heads.json", "label": f"labels/{FINISHED}"}
"""What a stage leaves behind, if not `final`."""


class RunDirectory:
    """See the module's note."""

    def __init__(self, recipe: BranchRecipe, output: Path) -> None:
        self.recipe, self.output = recipe, output
        self.processes = together()

    @property
    def tuned(self) -> Path:
        """Where `postsft` puts the base that it tunes, there before any branches are fitted to it."""
        return self.output / "postsft" / "base"

    @property
    def base(self) -> Path | None:
        """The base that `postsft` tuned, if that stage is done: branches that fit it are there, too."""
        return self.tuned if self.final("postsft").exists() else None

    def backend(self, *, branches: Path | None = None, base: Path | None = None) -> HFBackend:
        """The recipe's base or a tuned one, with branches of a stage. None of its weights is to be trained."""
        many = self.processes.num_processes > 1
        preset = resolve_model(self.recipe.model)
        backend = HFBackend.load(
            self.recipe.model if base is None else str(base),
            device=str(self.processes.device) if many else "auto",
            dtype=self.recipe.dtype,
            branches=branches,
            protocol=preset.protocol,
        )
        if backend.name != self.recipe.model:  # fine-tuned weights go by the name, heads and budgets of their base
            backend = HFBackend(
                backend.model,
                backend.processor,
                name=self.recipe.model,
                protocol=backend.protocol,
                defaults=preset.budget,
                placement=backend.placement,
                branches=backend.branches,
            )
        backend.model.requires_grad_(False)
        return backend

    def fresh(self, backend: HFBackend, *, sdrpn: bool, gate: bool) -> Branches:
        """Untrained branches of this recipe. The seed decides the gate's head."""
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
        """What a stage asks, at most `limit`."""
        return load_records(self.recipe.asked(stage), limit=limit)

    def held_out(self, *, limit: int | None = None) -> Records | None:
        return load_records(self.recipe.held_out, limit=limit) if self.recipe.held_out else None

    def final(self, stage: StageName) -> Path:
        return self.output / stage / "final"

    def result(self, stage: StageName) -> Path:
        """What is there once the stage is done."""
        return self.output / _RESULT[stage] if stage in _RESULT else self.final(stage)

    def finish(self, stage: StageName, write: Callable[[Path], object]) -> None:
        """Have a stage's result written into a folder, which then gets its name."""
        writing = self.final(stage).with_name("final.part")
        writing.mkdir(parents=True, exist_ok=True)
        write(writing)
        writing.rename(self.final(stage))
        print(f"written {self.final(stage)}")

    def latest(self, *stages: StageName) -> Path:
        """The branches of the last of these stages that is done.

        Raises:
            ConfigError: none is.
        """
        done = [self.final(stage) for stage in stages if self.final(stage).exists()]
        if not done:
            raise ConfigError(f"{self.output} has no branches of {' or '.join(stages)} yet. Run that stage first.")
        return done[-1]

    def heads(self) -> Heads | None:
        file = self.output / "heads.json"
        if not file.exists():
            return None
        return Selection.model_validate_json(file.read_text(encoding="utf-8")).heads

    def source(
        self,
        branches: Path | None = None,
        *,
        stage: StageName = "label",
        held_out: bool = False,
        base: Path | None = None,
    ) -> dict[str, JsonValue]:
        """What base, branches and records a table of a stage is of."""
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
