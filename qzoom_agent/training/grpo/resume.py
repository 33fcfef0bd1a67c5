"""Going on with a run that was killed: under its own recipe, and with records that end where its checkpoint does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from qzoom_agent.training import recipe_io as reading
from qzoom_agent.training.branches.fitting import last_checkpoint
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.training.fingerprint import begin, require_same
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe

FREE: Final = {"steps", "watch", "log_steps", "report_to"}
"""Keys that another part of a run may have otherwise."""
_SETTINGS: Final = "settings.json"


def keep_recipe(recipe: GRPORecipe, output: Path) -> None:
    """Write the recipe into the output folder, unless a run of another one is to be gone on with there.

    Raises:
        ConfigError: there is a checkpoint of a recipe that differs, with the keys.
    """
    processes, made = together(), output if last_checkpoint(output) else output / "checkpoint"
    begin(output / _SETTINGS, _settings(recipe), made=made, processes=processes)
    if processes.is_main_process:
        reading.keep_recipe(recipe, output)


def require_same_recipe(recipe: GRPORecipe, output: Path) -> None:
    """Nothing where the run in `output` is one of this recipe.

    Raises:
        ConfigError: it is one of another, with the keys that differ.
    """
    require_same(output / _SETTINGS, _settings(recipe), made=output)


def _settings(recipe: GRPORecipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=FREE)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that are to be kept; the others, and one that was cut off, are dropped from it."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # being written when the run was killed
            continue
        if keep(line):
            found.append(line)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    part.replace(path)
    return found
