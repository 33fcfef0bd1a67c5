# /// script
# requires-python = ">=3.11"
# dependencies = ["qzoom-agent[train]"]
# ///
"""The zoom format from demonstrations, before GRPO: the same run as `qzoom train coldstart`, to copy and change.

On one GPU, or on the CPU:

    python rl/train_sft.py --config rl/recipes/nano/coldstart.yaml --output runs/coldstart

On N GPUs:

    accelerate launch --num_processes N rl/train_sft.py \\
        --config rl/recipes/qwen2_5_vl_7b/coldstart.yaml --output runs/coldstart

A killed run resumes when the same command is given again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.errors import finished
from qzoom_agent.training import trained_model
from qzoom_agent.training.branches.base_inference import load_frozen
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.training.recipe_io import recipe_parser, writing
from qzoom_agent.training.sft import fine_tune as sft
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe, load_coldstart_recipe


def main(argv: Sequence[str] | None = None) -> int:
    # 1. The recipe: a YAML file, any key of which can be overridden with --set KEY=VALUE.
    parser = recipe_parser(__doc__, output="runs/coldstart")
    options = parser.parse_args(argv)
    recipe, output = load_coldstart_recipe(options.config, overrides=options.overrides), options.output
    if options.dry_run:
        print(sft.describe(recipe))
        return 0
    if trained_model.is_finished(recipe, output):
        return 0
    with writing(output, together()):  # refuses a folder that another run writes into
        train(recipe, output)
    return 0


def train(recipe: ColdStartRecipe, output: Path) -> None:
    """Train the model of the recipe into `output/final`."""
    trained_model.keep_recipe(recipe, output)  # refuses a folder with results of another recipe

    # 2. The base model, with its branches if it has some.
    backend = load_frozen(recipe.model, dtype=recipe.dtype, protocol=recipe.protocol, branches=recipe.branches)

    # 3. Demonstrations: episodes of the agent whose calls are given (`boxes`). Those that are right, well formed and
    #    show the evidence are kept in `conversations/` as `messages` and `images`.
    table = sft.demonstrations(backend, recipe, output)

    # 4. Fine-tuning on what the assistant says in them, with the optimizer and the checkpoints of transformers.
    sft.fine_tune(backend, table, recipe, output / "train")

    # 5. A folder that `Agent.from_pretrained` loads, and that GRPO starts from (`model: .../final`).
    sft.save_model(backend, recipe, output, conversations=len(table))


if __name__ == "__main__":
    sys.exit(finished("train_sft", main))
