"""From a training folder to the model inside the package: drop the training heads, halve the numbers, add a processor.

    python -m qzoom_agent.rl.nano.ship runs/nano/boards/final qzoom_agent/models/nano

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

from qzoom_agent.errors import ConfigError
from qzoom_agent.rl.base import load_training
from qzoom_agent.rl.nano.model import CELL, PATCH

LIMIT_BYTES = 20_000_000
"""What the weights in the package may weigh."""


def ship(source: Path, target: Path) -> int:
    """Write the model of a finished stage as a bfloat16 stock folder; returns the size of its weights in bytes.

    Raises:
        ConfigError: `source` is not a finished stage, or the weights would be too large for the package.
    """
    if not (source / "model.safetensors").exists():
        raise ConfigError(
            f"There is no trained model in {source}. Give the `final` folder of a stage of qzoom train base."
        )
    tokenizer, model = load_training(source)
    del model.training_heads
    cast(torch.nn.Module, model).to(torch.bfloat16)
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
    parser.add_argument("source", type=Path, help="folder of a finished stage")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    print(f"{options.target}: {ship(options.source, options.target) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
