"""The longest possible episode, checked before the first step, and the plan of a run.

A rollout that outgrows the model or the trainer's limit would be cut in the middle of an image. The longest one has
every turn written to its limit, every crop at its largest, every turn between them as long as the protocol makes it.
"""

from pathlib import Path
from typing import Final, NamedTuple

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import UNKNOWN_BUDGET, resolve_model
from qzoom_agent.perception.branches import CONFIG, branch_folder
from qzoom_agent.policy import LOOK_AGAIN, LOOK_FIRST, OFFER_TOOLS
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.grpo.run_cost import describe_cost

TURN_TEXT: Final = 160
"""Tokens around a result, a refusal or the last request, where no tokenizer has counted them."""
OPENING_TEXT: Final = 400
"""Tokens of an opening beside its views: system message, tool schema, question."""
QUESTION_TEXT: Final = 100
"""Of those, tokens of a question, where the rest of the opening has been counted."""


_NO_LIMIT: Final = 2**40


class Longest(NamedTuple):
    """The longest episode that the budgets allow, in tokens."""

    prompt: int
    """Opening, coarse view and inserted crops."""
    written: int
    """Tokens that the model writes."""
    crops: int
    """Visual tokens of crops that it asks for."""
    between: int
    """Text of the turns between its own."""

    @property
    def completion(self) -> int:
        return self.written + self.crops + self.between

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __str__(self) -> str:
        parts = f"prompt {self.prompt}, written {self.written}, crops {self.crops}, text between {self.between}"
        return f"{self.total} tokens: {parts}"


def longest(
    config: AgentConfig, views: ViewBudget, *, opening: int = OPENING_TEXT, between: int = TURN_TEXT
) -> Longest:
    """Return the longest episode under a configuration.

    Args:
        config: Of the episodes.
        views: Sizes of the views.
        opening: Text tokens of the opening.
        between: Text tokens of the longest turn between two of the model's own.
    """
    budget, asks = config.budget, config.policy in OFFER_TOOLS
    largest = max(views.crop_max_tokens, config.perception.roi_max_tokens or 0)
    most = (budget.max_visual_tokens or _NO_LIMIT) - views.coarse_min_tokens
    room = min(budget.max_views - 1, most // max(1, views.crop_min_tokens))
    most_looks = min(budget.max_turns, config.perception.max_looks or budget.max_turns)
    looks = most_looks if config.policy in LOOK_AGAIN else int(config.policy in LOOK_FIRST)
    inserted = min(config.perception.max_regions * looks, room)
    crops = min(room - inserted, budget.max_turns * 4) if asks else 0  # a turn may call several times
    turns = budget.max_turns + 1 if asks else 2  # a reply that was cut off is followed by a last one
    return Longest(
        prompt=opening + views.coarse_max_tokens + inserted * largest,
        written=turns * config.generation.max_new_tokens,
        crops=min(crops * largest, most),
        between=(turns - 1 + crops) * between,
    )


def require_room(need: Longest, *, context: int, limit: int | None) -> int:
    """Return the completion length to give the trainer.

    Args:
        need: The longest episode.
        context: Tokens that the model can read.
        limit: The recipe's own completion length.

    Raises:
        ConfigError: The longest episode does not fit.
    """
    advice = "Lower budget.max_turns, budget.max_views, budget.crop_max_tokens or generation.max_new_tokens."
    if need.total > context:
        raise ConfigError(f"The longest episode ({need}) does not fit into the model's context of {context}. {advice}")
    if limit is not None and need.completion > limit:
        raise ConfigError(
            f"The longest episode ({need}) has a completion of {need.completion} tokens, but max_completion_length is "
            f"{limit}. Raise it, leave it out, or: {advice[0].lower()}{advice[1:]}"
        )
    return limit or need.completion


def describe(recipe: GRPORecipe, *, processes: int = 1, output: Path | None = None, tflops: float | None = None) -> str:
    """Return the plan of a run as lines of text; nothing is loaded. `output` and `tflops`: see `describe_cost`.

    Raises:
        ConfigError: It cannot be run on so many devices.
    """
    share, rounds = recipe.accumulation(processes), recipe.rounds
    where = "1 device" if processes == 1 else f"each of {processes} devices"
    preset = resolve_model(recipe.model)
    has_branches = recipe.branches is not None or (branch_folder(preset.source) / CONFIG).is_file()
    config = recipe.agent_config()
    config = config.replace(policy=config.policy_for(perceives=has_branches))
    views = config.budget.view_budget(preset.budget or UNKNOWN_BUDGET)
    need = longest(config, views)
    rows = recipe.prompts * recipe.num_generations
    tokens = rounds * rows * (views.coarse_max_tokens + views.crop_max_tokens) / 1e6
    trained = f"LoRA of rank {recipe.lora.r}" if recipe.lora else "all weights"
    if recipe.from_layer:
        trained += f" from decoder layer {recipe.from_layer}, all below frozen"
    else:
        trained += " with the vision tower" if recipe.tower else ", vision tower frozen"
    plan = {
        "model": f"{recipe.model} ({preset.source})",
        "trained": trained,
        "policy": config.policy,
        "steps": f"{recipe.max_steps}, {rounds} rounds of rollouts",
        "a round": f"{recipe.prompts} questions x {recipe.num_generations} rollouts = {rows} episodes",
        "a step": f"{rows // recipe.minibatches} episodes, {share} batches of {recipe.per_device_train_batch_size} on "
        + where,
        "episodes": f"{rounds * rows} in all, about {tokens:.1f} M visual tokens",
        "longest": f"{need} (the tokenizer will count the text)",
        "rollouts": recipe.rollouts.by + (f", vLLM {recipe.rollouts.vllm.mode}" if recipe.rollouts.vllm else ""),
        "rewards": ", ".join(f"{one.weight:g} x {one.name}" for one in recipe.rewards),
        "loss": recipe.loss.loss_type,
    }
    plan |= describe_cost(recipe, tokens=need.total, processes=processes, output=output, tflops=tflops)
    return "\n".join(f"{name:<13}{text}" for name, text in plan.items())
