"""`qzoom train STAGE --config R.yaml`: hands over to the stage, which owns its flags."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Final, NamedTuple


class Stage(NamedTuple):
    module: str
    summary: str


BRANCHES: Final = "qzoom_agent.training.branches.stages"
STAGES: Final = {
    "base": Stage("qzoom_agent.cli.moved", "moved to the script rl/train_nano.py"),
    "branches": Stage(BRANCHES, "gate and SD-RPN: the stages below in order"),
    "select-heads": Stage(BRANCHES, "which attention heads of a base look at what its answer rests on"),
    "label": Stage(BRANCHES, "their attention as labels, without annotation"),
    "sdrpn": Stage(BRANCHES, "the branch that says where to look"),
    "postsft": Stage(BRANCHES, "a base that crops have made wrong, mended"),
    "gate": Stage(BRANCHES, "the branch that says whether to look"),
    "calibrate": Stage(BRANCHES, "thresholds for a stated target"),
    "coldstart": Stage("qzoom_agent.training.sft.fine_tune", "the zoom format, from demonstrations"),
    "grpo": Stage("qzoom_agent.training.grpo.launch", "the zooming policy, by reinforcement on the agent itself"),
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
    module = STAGES[name].module
    # the stages of the branches share a module, which is told which one is meant
    rest = list(argv if module == BRANCHES else argv[1:])
    # A stage that returns nothing has finished.
    return int(importlib.import_module(module).main(rest) or 0)
