"""`qzoom calibrate --config RECIPE.yaml --output DIR`: thresholds of trained branches for questions of one's own.

    qzoom calibrate --model qwen2.5-vl-7b --branches ./branches --config mine.yaml --output runs/mine
    qzoom ask photo.jpg "What does the sign say?" --model qwen2.5-vl-7b --branches runs/mine/final

The recipe says what is held out and which target is meant (`held_out`, `calibration`, and `gate` where no boxes are
known). The evidence is printed and written beside the thresholds; the weights stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.cli.main import OK


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(
        prog="qzoom calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", metavar="M", help="preset name, folder or hub id (default: the recipe's)")
    flags.add_argument("--branches", type=Path, metavar="DIR", help="gate and SD-RPN (default: those of the model)")
    flags.add_argument("--config", type=Path, required=True, metavar="FILE", help="recipe (YAML)")
    flags.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets `final`, and what led to it")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb. Raises ConfigError or BackendError where nothing can be calibrated."""
    args = parser().parse_args(argv)

    from qzoom_agent.training.branches.calibrate import recalibrate

    recalibrate(args.config, args.output, model=args.model, branches=args.branches)
    return OK
