"""Measure how well a stage of nano's training reads the lines of real receipts that no training saw.

    python rl/score_lines.py runs/paper/settle/final --receipts DIR
    python rl/score_lines.py ... --split test --height 28 --height 44

Each line is shown alone at a height in pixels and spelled by the reader of the training (`nano.line_scores`). Of
several folders the mean of their weights is measured.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from nano.line_scores import HEIGHT, score_lines
from nano.receipts import Receipts
from qzoom_agent.data.receipts import Split
from qzoom_agent.errors import finished
from train_nano import load_training


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", type=Path, nargs="+", help="folder of a stage, or several to average")
    parser.add_argument("--receipts", type=Path, required=True, metavar="DIR", help="folder of real receipts")
    parser.add_argument("--split", choices=get_args(Split), default="validation")
    parser.add_argument("--height", type=float, action="append", help=f"pixels of a line (default: {HEIGHT:g})")
    parser.add_argument("--most", type=int, help="lines of each receipt at most")
    options = parser.parse_args(argv)
    receipts = Receipts(options.receipts, options.split)
    loaded = [load_training(stage)[1] for stage in options.stages]
    model: Any = loaded[0]
    model.eval()
    with torch.no_grad():
        for weight, *others in zip(*(other.parameters() for other in loaded), strict=True):
            weight.copy_(torch.stack([weight, *others]).mean(0))
    for height in options.height or [HEIGHT]:
        start = time.perf_counter()
        scores = score_lines(model, [receipts[at] for at in range(len(receipts))], height=height, most=options.most)
        seconds = time.perf_counter() - start
        print(
            f"{options.split}, {height:g} px: character error rate {scores.error:.4f}, lines exact {scores.exact:.3f} "
            f"({scores.lines} lines, {scores.characters} characters, {len(receipts)} receipts, {seconds:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(finished("rl/score_lines.py", main))
