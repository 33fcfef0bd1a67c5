"""Keep the weights of a stage in half precision, with the heads of its training, as a place to go on from.

    python rl/keep_stage.py runs/paper/again/final rl/nano/checkpoints/paper_grown

A recipe goes on from it with `start: rl/nano/checkpoints/paper_grown` (or `--start`). Of several folders the mean of
their weights is kept. The optimizer's state is left out, so the next stage warms up again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qzoom_agent.errors import finished
from train_nano import load_mean


def keep_stage(sources: Sequence[Path], target: Path) -> int:
    """Write the mean of the weights of some stages to a folder and return the size of its weights in bytes."""
    tokenizer, model = load_mean(sources)
    halved: Any = model
    halved.to(torch.bfloat16).save_pretrained(target, save_original_format=False)
    tokenizer.save_pretrained(target)
    return (target / "model.safetensors").stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folder of a stage, or several to average")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    print(f"{options.target}: {keep_stage(options.sources, options.target) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(finished("rl/keep_stage.py", main))
