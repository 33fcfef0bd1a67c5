"""New thresholds for branches that are there already, on questions of one's own: `qzoom calibrate`.

The weights stay as they are. What the recipe does not say of the map's rule (`peak_share`, `blur`, `margin`, `box`) is
taken from the branches, so that a recipe of nothing but `held_out` and `calibration` does.
"""

import shutil
from pathlib import Path
from typing import Final

from pydantic import Field

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import resolve_model
from qzoom_agent.perception.branches import CONFIG, WEIGHTS, BranchConfig
from qzoom_agent.perception.checkpoints import checkpoint_file
from qzoom_agent.training.branches.branch_recipe import BranchRecipe
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.run_dir import RunDirectory
from qzoom_agent.training.branches.thresholds import with_thresholds
from qzoom_agent.training.recipe_io import read_recipe

_RULE: Final = ("peak_share", "blur", "margin", "box")


class HeldOut(BranchRecipe):
    """A recipe that nothing is trained by: it may be without `data`."""

    data: list[DatasetSpec] = Field(default=[])
    held_out: list[DatasetSpec] = Field(min_length=1)


def recalibrate(recipe: Path, output: Path, *, model: str | None = None, branches: Path | None = None) -> Path:
    """Write `output`/final, the branches with other thresholds and the evidence for them; returns it.

    Args:
        recipe: of the branches, of which `held_out`, `calibration` and where no boxes are known `gate` are read.
        model: another base than the recipe's.
        branches: those to calibrate; None: those that come with the model.
    Raises:
        ConfigError: `output` has such branches already, there are none to calibrate, or the held-out questions do not
            serve.
        BackendError: model or branches cannot be loaded.
    """
    final = output / "final"
    if final.exists():
        raise ConfigError(f"{final} is there already. Delete it, or choose another --output.")
    wanted = read_recipe(recipe, HeldOut, **({} if model is None else {"model": model}))
    stored = _own(wanted.model) if branches is None else branches
    shop = RunDirectory(wanted, output)
    backend = shop.backend(branches=stored)
    assert backend.branches is not None
    shop.recipe = wanted.model_copy(update=_silent(wanted, backend.branches.config))
    config = with_thresholds(backend, shop.recipe, output, source=shop.source(stored, held_out=True))
    if shop.processes.is_main_process:
        writing = output / "final.part"
        writing.mkdir(parents=True, exist_ok=True)
        shutil.copy2(stored / WEIGHTS, writing / WEIGHTS)
        (writing / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        writing.rename(final)
        print(f"written {final}", flush=True)
    shop.processes.wait_for_everyone()
    return final


def _own(model: str) -> Path:
    """The folder of the branches that come with a model."""
    found = [checkpoint_file(resolve_model(model).source, name) for name in (CONFIG, WEIGHTS)]
    if found[0] is None:
        raise ConfigError(
            f"'{model}' comes without branches in our form. Name theirs with --branches, the folder that `qzoom train` "
            "wrote, or `qzoom convert` from a published checkpoint."
        )
    return Path(found[0]).parent


def _silent(recipe: BranchRecipe, config: BranchConfig) -> dict[str, object]:
    """The branches' own rule, as far as the recipe says nothing else."""
    return {key: getattr(config, key) for key in _RULE if key not in recipe.model_fields_set}
