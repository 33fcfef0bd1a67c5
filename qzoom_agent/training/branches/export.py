"""Put a base and its trained branches into one model folder, which `Agent.from_pretrained` loads.

    python -m qzoom_agent.training.branches.export runs/branches models/mine

The branches are those of `further`, else of `calibrate`. The base is the one they were made for: the recipe's, or that
of `postsft`. The base's confidence (`qzoom eval calibrate`) stays behind: it was fitted to other branches.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.confidence import FILE as CONFIDENCE
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.models.presets import keep_origin, resolve_model
from qzoom_agent.models.prompts import save_processor
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, SUBFOLDER, WEIGHTS
from qzoom_agent.protocols.wording import write_prompt
from qzoom_agent.training.branches.branch_recipe import load_branch_recipe
from qzoom_agent.training.branches.run_dir import RunDirectory, copy_branches


def export_model(run: Path, target: Path) -> Path:
    """Write the base and its branches into `target`, which is complete or not there, and return it.

    Raises ConfigError if `run` has no calibrated branches, or `target` is there already.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already. Delete it, or choose another folder.")
    folder = RunDirectory(load_branch_recipe(run / "recipe.yaml"), run)
    branches = folder.latest("calibrate", "further")
    source = folder.base_of("calibrate") or Path(resolve_model(folder.recipe.model).source)

    def write(writing: Path) -> None:
        if source.is_dir():
            others = shutil.ignore_patterns(CONFIG, WEIGHTS, FURTHER, CONFIDENCE)
            shutil.copytree(source, writing, dirs_exist_ok=True, ignore=others)
        else:
            backend = folder.backend()
            backend.model.save_pretrained(writing)
            save_processor(backend.processor, writing)
            write_prompt(backend.prompt, writing)
        keep_origin(writing, folder.recipe.model)
        copy_branches(branches, writing / SUBFOLDER)

    folder.finish(target, write)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put a base and its trained branches into one folder.")
    parser.add_argument("run", type=Path, help="output folder of the branches' stages")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    export_model(options.run, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(finished("qzoom_agent.training.branches.export", main))
