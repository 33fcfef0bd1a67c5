"""Make a kept stage of nano wider and its tower deeper, without changing what it computes.

    python rl/grow_nano.py rl/nano/checkpoints/paper_ask runs/paper_grown
    python rl/grow_nano.py rl/nano/checkpoints/paper_grown runs/paper_deeper --windows 3 --wholes 6 \\
        --intermediate 896 --tower-intermediate 1152

New units of the feed-forward layers and new blocks of the tower begin with outputs of zero, so the larger model answers
as the smaller one and training goes on from there (Net2Net, Chen et al. 2016, with zeros instead of copies). A recipe
goes on from it with `start: runs/paper_grown`.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nano.heads import TrainingHeads
from qzoom_agent.errors import ConfigError, finished
from train_nano import load_training

STD = 0.02
"""Standard deviation of new weights that lead into a unit; those out of it are zero."""


def grow(
    model: Qwen2_5_VLForConditionalGeneration,
    *,
    intermediate: int,
    tower_intermediate: int,
    windows: Collection[int],
    wholes: Collection[int],
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a larger model that computes the same, with the training heads of the smaller one.

    Args:
        model: A nano with training heads.
        intermediate: Width of the decoder's feed-forward layers.
        tower_intermediate: The same of the tower's.
        windows: Places, after growing, of new blocks of the tower that see windows of the image.
        wholes: Places of new blocks that see the whole image.

    Raises:
        ConfigError: a width is below the model's, or a place is not in the grown tower or given twice.
    """
    config = Qwen2_5_VLConfig.from_dict(model.config.to_dict())
    text: Any = config.text_config
    vision: Any = config.vision_config
    for name, wanted, given in (
        ("intermediate", intermediate, text.intermediate_size),
        ("tower-intermediate", tower_intermediate, vision.intermediate_size),
    ):
        if wanted < given:
            raise ConfigError(f"--{name} is {wanted}, but the model has {given}. Growing cannot make it smaller.")
    depth = vision.depth + len(windows) + len(wholes)
    new_blocks = {*windows, *wholes}
    kept = [place for place in range(depth) if place not in new_blocks]
    if len(kept) != vision.depth:
        raise ConfigError(
            f"--windows {sorted(windows)} and --wholes {sorted(wholes)} are no new places in a tower of {depth}. "
            f"Give each once, from 0 to {depth - 1}."
        )
    whole = [kept[old] for old in vision.fullatt_block_indexes] + [*wholes]
    text.intermediate_size, vision.intermediate_size = intermediate, tower_intermediate
    vision.depth, vision.fullatt_block_indexes = depth, sorted(whole)
    larger: Any = Qwen2_5_VLForConditionalGeneration(config)
    larger.generation_config = model.generation_config
    larger.training_heads = TrainingHeads(text.hidden_size)
    old = {_moved(name, kept): value for name, value in model.state_dict().items()}
    new = larger.state_dict()
    with torch.no_grad():
        for name, value in new.items():
            _fill(name, value, old.get(name))
    larger.tie_weights()
    return cast(Qwen2_5_VLForConditionalGeneration, larger)


def _moved(name: str, kept: Sequence[int]) -> str:
    """Return the name of a weight after growing."""
    head, block, rest = name.partition(".visual.blocks.")
    if not block:
        return name
    place, _, tail = rest.partition(".")
    return f"{head}{block}{kept[int(place)]}.{tail}"


def _fill(name: str, value: Tensor, old: Tensor | None) -> None:
    """Write the old weight into the corner of the new one, and new weights beside it."""
    leaving = ".down_proj." in name or ".attn.proj." in name
    if old is None or old.shape != value.shape:
        if value.ndim == 1 and "norm" in name:
            value.fill_(1.0)
        elif leaving or value.ndim == 1:
            value.zero_()
        else:
            value.normal_(0.0, STD)
    if old is not None:
        value[tuple(slice(size) for size in old.shape)] = old


def places(text: str) -> list[int]:
    """Read `2,5` as places of blocks; an empty text names none."""
    return [int(one) for one in text.split(",") if one]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a stage, or a kept one")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--intermediate", type=int, default=640, help="width of the decoder's feed-forward layers")
    parser.add_argument("--tower-intermediate", type=int, default=768, help="the same of the tower's")
    parser.add_argument("--windows", type=places, default=[2], help="places of the tower's new blocks that see windows")
    parser.add_argument("--wholes", type=places, default=[4], help="places of those that see the whole image")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    tokenizer, model = load_training(options.source)
    larger = grow(
        model,
        intermediate=options.intermediate,
        tower_intermediate=options.tower_intermediate,
        windows=options.windows,
        wholes=options.wholes,
    )
    larger.save_pretrained(options.target, save_original_format=False)
    tokenizer.save_pretrained(options.target)
    print(f"{options.target}: {model.num_parameters() / 1e6:.1f} -> {larger.num_parameters() / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(finished("rl/grow_nano.py", main))
