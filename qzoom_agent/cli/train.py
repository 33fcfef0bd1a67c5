"""`qzoom train STAGE --config RECIPE.yaml` and `qzoom calibrate`: training, which has its own flags in each stage.

qzoom calibrate --model qwen2.5-vl-7b --branches ./branches --config mine.yaml --output runs/mine
qzoom ask photo.jpg "What does the sign say?" --model qwen2.5-vl-7b --branches runs/mine/final
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Final, NamedTuple

from qzoom_agent.cli.main import OK, choose
from qzoom_agent.errors import ConfigError


class Stage(NamedTuple):
    """A training stage and the module whose `main(argv)` runs it."""

    module: str
    summary: str


BRANCHES: Final = "qzoom_agent.training.branches.stages"
STAGES: Final = {
    "branches": Stage(BRANCHES, "gate and SD-RPN: the stages below in order"),
    "select-heads": Stage(BRANCHES, "find the attention heads that look at the evidence for the answer"),
    "label": Stage(BRANCHES, "collect their attention as labels, without annotation"),
    "sdrpn": Stage(BRANCHES, "train the branch that says where to look"),
    "postsft": Stage(BRANCHES, "fine-tune the base on questions that a crop made it answer wrongly"),
    "regions": Stage(BRANCHES, "reinforce that branch by the answers that its crops lead to"),
    "gate": Stage(BRANCHES, "train the branch that says whether to look"),
    "calibrate": Stage(BRANCHES, "choose thresholds for a stated target"),
    "further": Stage(BRANCHES, "train both to look again, with the crops so far in context"),
    "coldstart": Stage("qzoom_agent.training.sft.fine_tune", "teach the zoom format from demonstrations"),
    "grpo": Stage("qzoom_agent.training.grpo.launch", "train the zooming policy by reinforcement learning"),
    "base": Stage("", "moved to the script rl/train_nano.py"),
}


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the choice of a stage; the stage reads everything after its name."""
    flags.usage = "qzoom train STAGE --config RECIPE.yaml ..."
    flags.description = "Train a model from a recipe."
    choose(flags, "stage", {name: stage.summary for name, stage in STAGES.items()})
    flags.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run one training stage; everything after its name goes to the stage's own `main(argv)`."""
    module = STAGES[args.stage].module
    if not module:
        raise ConfigError(_moved("rl/train_nano.py", *args.rest))
    # The stages of the branches share a module, which is told the stage.
    rest = [args.stage, *args.rest] if module == BRANCHES else args.rest
    # A stage that returns nothing has finished.
    return int(importlib.import_module(module).main(rest) or 0)


def add_calibrate_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Fit the thresholds of trained branches to your own questions. The recipe says which questions are "
        "held out and which target is meant (`held_out`, `calibration`, and `gate` where no boxes are known). The "
        "evidence is printed and written beside the thresholds; the weights stay as they are."
    )
    flags.add_argument("--model", metavar="M", help="preset name, folder or hub id (default: the recipe's)")
    flags.add_argument("--branches", metavar="B", help="gate and SD-RPN: folder or hub id (default: the model's)")
    flags.add_argument("--config", type=Path, required=True, metavar="FILE", help="recipe (YAML)")
    flags.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; `final` in it is for --branches"
    )


def run_calibrate(args: argparse.Namespace) -> int:
    """Run `qzoom calibrate`. Raises ConfigError or BackendError where nothing can be calibrated."""
    from qzoom_agent.training.branches.calibrate import recalibrate

    recalibrate(args.config, args.output, model=args.model, branches=args.branches)
    return OK


def add_reproduce_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = _moved("rl/reproduce.py")
    flags.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run_reproduce(args: argparse.Namespace) -> int:
    """Name the script that `qzoom reproduce` has become."""
    raise ConfigError(_moved("rl/reproduce.py", *args.rest))


def _moved(*command: str) -> str:
    return f"This command is a script of the source checkout now. Run there: python {' '.join(command)}"
