# /// script
# requires-python = ">=3.11"
# dependencies = ["qzoom-agent[train]"]
# ///
"""GRPO of the zooming policy, step by step: the same run as `qzoom train grpo`, to copy and change.

On one GPU, or on the CPU:

    python rl/train_grpo.py --config rl/recipes/nano/grpo.yaml --output runs/grpo --set max_steps=2

On N GPUs:

    accelerate launch --num_processes N --config_file rl/recipes/accelerate/zero2.yaml rl/train_grpo.py \\
        --config rl/recipes/qwen2_5_vl_7b/grpo.yaml --output runs/grpo

A killed run resumes when the same command is given again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.errors import finished
from qzoom_agent.training import trained_model
from qzoom_agent.training.branches.fitting import checkpoint_to_resume
from qzoom_agent.training.branches.sharded_table import together
from qzoom_agent.training.grpo import launch
from qzoom_agent.training.grpo.callbacks import MetricsCallback, RolloutPageCallback
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.question_rows import load_held_out, load_rows
from qzoom_agent.training.grpo.trainer import build_trainer
from qzoom_agent.training.recipe_io import recipe_parser, writing
from qzoom_agent.training.reward_list import accuracy_of, build


def main(argv: Sequence[str] | None = None) -> int:
    # 1. The recipe: a YAML file, any key of which can be overridden with --set KEY=VALUE.
    parser = recipe_parser(__doc__, output="runs/grpo")
    options = parser.parse_args(argv)
    recipe, output = load_grpo_recipe(options.config, overrides=options.overrides), options.output
    if options.dry_run:
        launch.print_plan(recipe, output, processes=1)
        return 0
    if trained_model.is_finished(recipe, output):
        return 0
    with writing(output, together()):  # refuses a folder that another run writes into
        train(recipe, output)
    return 0


def train(recipe: GRPORecipe, output: Path) -> None:
    """Train the model of the recipe into `output/final`."""
    trained_model.keep_recipe(recipe, output)  # refuses a folder with checkpoints of another recipe
    launch.require_packages(recipe, processes=together().num_processes)

    # 2. The model with its branches, and the configuration of the agent that runs the episodes with it.
    backend = launch.load_model(recipe)
    config = launch.episode_config(recipe, backend)
    looker = launch.load_looker(recipe, backend, config)  # None if neither the policy nor a reward asks the branches

    # 3. The questions. Both limits follow from the longest episode that the budgets allow.
    completion_tokens, question_tokens = launch.episode_room(recipe, backend, config)
    questions = load_rows(recipe, tokenizer=backend.codec.tokenizer, room=question_tokens)

    # 4. The rewards. To add your own, append {"name": a_function, "weight": 0.5} to `recipe.rewards` in the recipe.
    judge = recipe.ready_judge(output)
    rewards = build(recipe.rewards, judge=judge, mask_truncated=recipe.loss.mask_truncated)

    # 5. TRL's GRPOTrainer over episodes: it samples, compares, computes the loss, and writes checkpoints.
    trainer = build_trainer(
        recipe,
        backend,
        config=config,
        looker=looker,
        rewards=rewards,
        accuracy=accuracy_of(recipe.rewards, judge=judge),
        args=launch.trl_config(recipe, output, completion=completion_tokens),
        train_dataset=questions,
        eval_dataset=load_held_out(recipe, tokenizer=backend.codec.tokenizer, room=question_tokens),
        peft_config=launch.lora_config(recipe, backend),
        callbacks=[MetricsCallback(output / "log.jsonl")],
        pages=RolloutPageCallback(output / "rollouts", every=recipe.watch.every, episodes=recipe.watch.episodes),
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(output))

    # 6. A folder that `Agent.from_pretrained` loads.
    final = launch.save_model(trainer, recipe, output)
    if trainer.accelerator.is_main_process:
        print(f"written {final}")


if __name__ == "__main__":
    sys.exit(finished("train_grpo", main))
