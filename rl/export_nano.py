"""From a training folder to the model inside the package: drop the training heads, halve the numbers, add a processor.

    python rl/export_nano.py runs/nano/finish/final qzoom_agent/weights/nano

Of several folders of one run the mean of their weights is taken: a short last stage teaches something new and unsettles
something old, and the mean of before and after keeps most of both (docs/maintainers/notebook.md, 16).

The result is a stock Qwen2.5-VL folder: `AutoModelForImageTextToText.from_pretrained` loads it, and so does anything
else that knows the family.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nano.model import CELL, PATCH
from qzoom_agent.errors import ConfigError, finished
from train_nano import load_mean

LIMIT_BYTES = 25_000_000
"""Largest size of the weights in the package."""


def ship(sources: Sequence[Path], target: Path) -> int:
    """Write the model of a finished stage, or the mean of several, as a bfloat16 stock folder.

    Returns the size of its weights in bytes.

    Raises:
        ConfigError: one of `sources` is not a finished stage, or the weights would be too large for the package.
    """
    for source in sources:
        if not (source / "model.safetensors").exists():
            raise ConfigError(
                f"There is no trained model in {source}. Give the `final` folder of a stage of rl/train_nano.py."
            )
    tokenizer, model = load_mean(sources)
    del model.training_heads
    cast(torch.nn.Module, model).to(torch.bfloat16)
    for part in ("text_config", "vision_config"):
        getattr(model.config, part).dtype = None  # of a model that was loaded in float32, they would say so for ever
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > LIMIT_BYTES:
        raise ConfigError(f"The weights are {size / 1e6:.1f} MB; the package takes at most {LIMIT_BYTES / 1e6:.0f} MB.")
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=CELL // PATCH,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * CELL * CELL, "longest_edge": 1024 * CELL * CELL},
    ).save_pretrained(target)
    return (target / "model.safetensors").stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turn a trained stage into the model that ships.")
    parser.add_argument("sources", type=Path, nargs="+", help="folder of a finished stage, or several to average")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    print(f"{options.target}: {ship(options.sources, options.target) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(finished("export_nano", main))
