"""Speed of rollouts: the same episodes with the batching engine and with TRL's own generation.

    python evals/grpo_benchmark.py --config rl/recipes/nano/grpo.yaml --rounds 3 [--colocate]

All run the agent's loop over the same questions; only the generation of turns differs. --colocate adds TRL's generation
with vLLM in this process. The first round of each is a
warm-up. The distance is the mean difference between the sampled log-probabilities and those of the trainer's own
forward pass over the finished sequences: 0 up to rounding if the engine is right.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch

from qzoom_agent.config import positive_int
from qzoom_agent.errors import finished
from qzoom_agent.training.grpo.checks import logp_distances
from qzoom_agent.training.grpo.grpo_recipe import VLLM, GRPORecipe, load_grpo_recipe
from qzoom_agent.training.grpo.launch import make_trainer


class Speed(NamedTuple):
    """Speed of one way of generating turns."""

    by: str
    seconds: float
    """Of a round of rollouts, mean."""
    written: float
    """Tokens generated in a round, mean."""
    distance: float | None
    """See the module's note; None without sampled log-probabilities."""


def measure(recipe: GRPORecipe, by: Literal["shared", "generate"], *, rounds: int, vllm: VLLM | None = None) -> Speed:
    """Run the first rounds of rollouts of a recipe without training on them."""
    chosen = recipe.model_copy(
        update={
            "rollouts": recipe.rollouts.model_copy(update={"by": by, "vllm": vllm}),
            "max_steps": (rounds + 1) * recipe.minibatches * recipe.num_iterations,
        }
    )
    seconds, written, distances = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make_trainer(chosen, Path(folder))
        trainer.model.train()
        for at in range(rounds + 1):
            asked = [trainer.train_dataset[at * recipe.prompts + one] for one in range(recipe.prompts)]
            rows = [dict(row) for row in asked for _ in range(recipe.num_generations)]
            batch = trainer._generate_and_score_completions(rows)
            if not at:
                continue
            seconds.append(trainer._metrics["train"]["rollout/seconds"][-1])
            mask = batch["completion_mask"] * batch["tool_mask"]
            written.append(float(mask.sum()))
            if "sampling_per_token_logps" in batch:
                found = logp_distances(batch["sampling_per_token_logps"], _again(trainer, batch), mask)
                distances.append(found[0].mean)
    return Speed(
        by if vllm is None else f"{by}, vLLM", fmean(seconds), fmean(written), fmean(distances) if distances else None
    )


@torch.no_grad()
def _again(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the trainer's own log-probabilities of a round."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    given = {name: batch[name] for name in names if name in batch}
    width = batch["completion_ids"].shape[1]
    rows = trainer.args.per_device_train_batch_size
    logps: torch.Tensor = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, width, batch_size=rows, **given
    )[0]
    return logps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of each way, beside the one that warms up")
    parser.add_argument("--colocate", action="store_true", help="measure vLLM in this process, too")
    options = parser.parse_args(argv)
    recipe = load_grpo_recipe(options.config, **({} if options.model is None else {"model": options.model}))
    print(f"{recipe.prompts} questions x {recipe.num_generations} rollouts a round, {options.rounds} rounds each")
    found = [measure(recipe, by, rounds=options.rounds) for by in ("generate", "shared")]
    if options.colocate:
        found.insert(1, measure(recipe, "generate", rounds=options.rounds, vllm=VLLM(mode="colocate")))
    print("| turns written by | seconds a round | tokens written | tokens a second | distance |\n|---|---|---|---|---|")
    for one in found:
        distance = "-" if one.distance is None else f"{one.distance:.1e}"
        cells = (one.by, f"{one.seconds:.2f}", f"{one.written:.0f}", f"{one.written / one.seconds:.0f}", distance)
        print(f"| {' | '.join(cells)} |")
    plain, *_, shared = (one.written / one.seconds for one in found)
    print(f"shared writes {shared / plain:.1f} times the tokens a second of TRL's own generation")
    return 0


if __name__ == "__main__":
    sys.exit(finished("speed", main))
