"""`qzoom train STAGE --config RECIPE.yaml` and `qzoom calibrate`: training, which has its own flags in each stage.

qzoom calibrate --model qwen2.5-vl-7b --branches ./branches --config mine.yaml --output runs/mine
qzoom ask photo.jpg "What does the sign say?" --model qwen2.5-vl-7b --branches runs/mine/final
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from qzoom_agent.cli.main import OK
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


def main(argv: Sequence[str]) -> int:
    """Run one training stage; everything after its name goes to the stage's own `main(argv)`."""
    width = max(map(len, STAGES))
    parser = argparse.ArgumentParser(
        prog="qzoom train",
        usage="qzoom train STAGE --config RECIPE.yaml ...",
        description="Train a model from a recipe.",
        epilog="stages:\n"
        + "\n".join(f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items())
        + "\n\n'qzoom train STAGE --help' explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).stage
    if name == "base":
        return _moved("qzoom train base", "rl/train_nano.py", argv[1:])
    module = STAGES[name].module
    # The stages of the branches share a module, which is told the stage.
    rest = list(argv if module == BRANCHES else argv[1:])
    # A stage that returns nothing has finished.
    return int(importlib.import_module(module).main(rest) or 0)


def calibrate_parser() -> argparse.ArgumentParser:
    """Return the flags of `qzoom calibrate`."""
    flags = argparse.ArgumentParser(
        prog="qzoom calibrate",
        description="Fit the thresholds of trained branches to your own questions. The recipe says which questions are "
        "held out and which target is meant (`held_out`, `calibration`, and `gate` where no boxes are known). The "
        "evidence is printed and written beside the thresholds; the weights stay as they are.",
    )
    flags.add_argument("--model", metavar="M", help="preset name, folder or hub id (default: the recipe's)")
    flags.add_argument("--branches", metavar="B", help="gate and SD-RPN: folder or hub id (default: the model's)")
    flags.add_argument("--config", type=Path, required=True, metavar="FILE", help="recipe (YAML)")
    flags.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; `final` in it is for --branches"
    )
    return flags


def calibrate_main(argv: Sequence[str]) -> int:
    """Run `qzoom calibrate`. Raises ConfigError or BackendError where nothing can be calibrated."""
    args = calibrate_parser().parse_args(argv)

    from qzoom_agent.training.branches.calibrate import recalibrate

    recalibrate(args.config, args.output, model=args.model, branches=args.branches)
    return OK


def reproduce_main(argv: Sequence[str]) -> int:
    """Name the script that `qzoom reproduce` has become."""
    return _moved("qzoom reproduce", "rl/reproduce.py", argv)


def _moved(command: str, script: str, argv: Sequence[str]) -> int:
    text = f"This command is a script of the source checkout now. Run there: python {script}"
    argparse.ArgumentParser(prog=command, description=text).parse_known_args(argv)  # for --help
    raise ConfigError(f"{text} {' '.join(argv)}".rstrip())
