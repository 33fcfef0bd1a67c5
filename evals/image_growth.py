"""Cost as images grow: one picture at several sizes, asked under `implicit` and read whole at its own resolution.

    python evals/image_growth.py receipt.jpg "what is the total?" --model nano-paper

Each size is a JPEG file, so that seconds include decoding it. Sizes are asked in turn, and medians of `--repeats` runs
are compared. Whole images are asked up to `--whole` megapixels: attention among their patches grows with the square.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.errors import finished
from qzoom_agent.geometry import Size, fit_tokens
from qzoom_agent.report.markdown import markdown_table

SIZES = (0.25, 1.0, 4.0, 16.0)
"""Millions of pixels."""


def resized(image: Image.Image, megapixels: float, path: Path) -> tuple[int, int]:
    """Write the picture at a size and return that size."""
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    size = round(image.width * scale), round(image.height * scale)
    image.resize(size, Image.Resampling.BICUBIC).save(path, quality=92)
    return size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="nano-paper")
    parser.add_argument("--whole", type=float, default=4.0, help="most megapixels of an image that is read whole")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with Image.open(options.image) as opened:
        image = opened.convert("RGB")
    rows = []
    with TemporaryDirectory() as folder, Agent.from_pretrained(options.model, policy="implicit") as agent:
        factor = agent.backend.defaults.factor
        for megapixels in SIZES:
            path = Path(folder) / f"{megapixels}.jpg"
            size = resized(image, megapixels, path)
            shown = fit_tokens(Size(*size), factor=factor, min_tokens=1, max_tokens=2**31)
            whole = shown.width * shown.height // factor**2
            arms = {"implicit": agent}
            if megapixels <= options.whole:
                arms["whole"] = agent.replace(**{"policy": "direct", "budget.coarse_tokens": whole})
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            tokens = {"whole": whole}
            for _ in range(options.repeats):
                for name, arm in arms.items():
                    began = perf_counter()
                    tokens[name] = arm.run(path, options.question).usage.visual_tokens
                    seconds[name].append(perf_counter() - began)
            said = [f"{median(seconds[name]):.2f}" if name in seconds else "-" for name in ("implicit", "whole")]
            rows.append([f"{megapixels:g}", str(tokens["implicit"]), said[0], str(tokens["whole"]), said[1]])
    head = ["megapixels", "tokens, implicit", "seconds", "tokens, whole image", "seconds"]
    print(markdown_table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(finished("image_growth", main))
