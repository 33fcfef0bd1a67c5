"""`qzoom train STAGE --config R.yaml`: hands over to the stage, which owns its flags."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Final

STAGES: Final = {"base": "qzoom_agent.rl.base"}


def main(argv: Sequence[str]) -> int:
    """Run one training stage; everything after its name goes to the stage's own `main(argv)`."""
    parser = argparse.ArgumentParser(
        prog="qzoom train",
        usage="qzoom train STAGE --config RECIPE.yaml ...",
        description="Train a model from a recipe. 'qzoom train STAGE --help' explains one stage.",
    )
    parser.add_argument("stage", choices=STAGES, help="base: the small model that ships with this package")
    stage = parser.parse_args(argv[:1]).stage
    # A stage that returns nothing has finished.
    return int(importlib.import_module(STAGES[stage]).main(list(argv[1:])) or 0)
