"""Going on with a run that was killed: under its own recipe, and with records that end where its checkpoint does."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from yaml import safe_dump

from qzoom_agent.errors import ConfigError
from qzoom_agent.rl.branches.stage import last_checkpoint
from qzoom_agent.rl.grpo.recipe import GRPORecipe, load_grpo_recipe

FREE: Final = frozenset({"steps", "watch", "log_steps", "report_to"})
"""Keys that another part of a run may have otherwise."""


def keep_recipe(recipe: GRPORecipe, output: Path) -> None:
    """Write the recipe into the output folder, unless a run of another one is to be gone on with there.

    Raises:
        ConfigError: there is a checkpoint of a recipe that differs, with the keys.
    """
    path = output / "recipe.yaml"
    now = recipe.model_dump(mode="json")
    if path.exists() and last_checkpoint(output) is not None:
        before = load_grpo_recipe(path).model_dump(mode="json")
        if other := [key for key in now if key not in FREE and now[key] != before[key]]:
            said = "; ".join(f"{key}: {before[key]!r:.80}, now {now[key]!r:.80}" for key in other)
            raise ConfigError(
                f"{output} holds checkpoints of another recipe ({said}), and what one trained is not to be reported as "
                f"another's. Give another --output, or the recipe as it was, or delete {output} to begin anew."
            )
    if int(os.environ.get("RANK", "0")) == 0:
        part = path.with_suffix(".part")
        part.write_text(safe_dump(now, sort_keys=False), encoding="utf-8")
        part.replace(path)  # other processes may be reading it


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
