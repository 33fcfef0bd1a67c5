# /// script
# requires-python = ">=3.11"
# dependencies = ["qzoom-agent[train]"]
# ///
"""Gate and SD-RPN for a model, stage by stage: the same run as `qzoom train branches`, to copy and change.

On one GPU, or on the CPU:

    python rl/train_branches.py --config rl/recipes/nano/branches.yaml --output runs/branches

On N GPUs:

    accelerate launch --num_processes N rl/train_branches.py \\
        --config rl/recipes/qwen2_5_vl_7b/branches.yaml --output runs/branches

No boxes are needed: the labels come from the model's own attention. A killed run resumes when the same command is given
again, and finished stages are skipped.
"""

import sys
from collections.abc import Sequence

from qzoom_agent.errors import finished
from qzoom_agent.training.branches import stages
from qzoom_agent.training.branches.branch_recipe import load_branch_recipe
from qzoom_agent.training.branches.cost_estimate import describe
from qzoom_agent.training.branches.run_dir import RunDirectory
from qzoom_agent.training.recipe_io import keep_recipe, recipe_parser, writing


def main(argv: Sequence[str] | None = None) -> int:
    # 1. The recipe: a YAML file, any key of which can be overridden with --set KEY=VALUE.
    parser = recipe_parser(__doc__, output="runs/branches")
    options = parser.parse_args(argv)
    recipe = load_branch_recipe(options.config, overrides=options.overrides)
    if options.dry_run:
        for stage in recipe.stages:
            print(describe(recipe, stage, processes=1) + "\n")
        return 0

    # 2. The output folder: it knows the results of every stage, and refuses another recipe, or another run meanwhile.
    run = RunDirectory(recipe, options.output)
    with writing(options.output, run.processes):
        run.require_recipe()
        if run.processes.is_main_process:
            keep_recipe(recipe, options.output)
        train(run)
    return 0


def train(run: RunDirectory) -> None:
    """Run the stages of the recipe."""

    # 3. The stages, in the order of the recipe:
    #    select-heads  find the attention heads that look at what the answer rests on
    #    label         collect their attention maps on the training questions
    #    sdrpn         train SD-RPN to predict these maps from the first layers
    #    postsft       optional: fine-tune the base on questions that a crop made it answer wrongly
    #    regions       optional: reinforce SD-RPN by the answers that its crops lead to
    #    gate          train the gate on whether more visual tokens change the answer
    #    calibrate     choose the thresholds of both on held-out questions
    #    further       train both for further looks, at conversations that show crops already
    for stage in run.recipe.stages:
        stages.run_stage(run, stage)


if __name__ == "__main__":
    sys.exit(finished("train_branches", main))
