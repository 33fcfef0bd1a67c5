"""The longest possible episode, checked before the first step, and the plan of a run.

A rollout that outgrows the model or the trainer's limit would be cut in the middle of an image. The longest one has
every turn written to its limit, every crop at its largest, every turn between them as long as the protocol makes it.
"""

from pathlib import Path
from typing import Final, NamedTuple

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import UNKNOWN_BUDGET, resolve_model
from qzoom_agent.perception.branches import CONFIG
from qzoom_agent.policy import LOOK_FIRST, OFFER_TOOLS
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe

TURN_TEXT: Final = 160
"""Tokens around a result, a refusal or the last request, where no tokenizer has counted them."""
OPENING_TEXT: Final = 400
"""Tokens of an opening beside its views: system message, tool schema, question."""
QUESTION_TEXT: Final = 100
"""Of those, tokens of a question, where the rest of the opening has been counted."""


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
    budget = config.budget
    looks, asks = config.policy in LOOK_FIRST, config.policy in OFFER_TOOLS
    inserted = config.perception.max_regions if looks else 0
    largest = max(views.crop_max_tokens, config.perception.roi_max_tokens or 0)
    room = budget.max_views - 1
    if budget.max_visual_tokens is not None:
        room = min(room, (budget.max_visual_tokens - views.coarse_min_tokens) // max(1, views.crop_min_tokens))
    inserted = min(inserted, room)
    crops = min(room - inserted, budget.max_turns * 4) if asks else 0  # a turn may call several times
    turns = budget.max_turns + 1 if asks else 1
    visual = crops * largest
    if budget.max_visual_tokens is not None:
        visual = min(visual, budget.max_visual_tokens - views.coarse_min_tokens)
    return Longest(
        prompt=opening + views.coarse_max_tokens + inserted * largest,
        written=turns * config.generation.max_new_tokens,
        crops=visual,
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
    parts = (
        f"prompt {need.prompt}, written {need.written}, crops {need.crops}, text between {need.between}: "
        f"{need.total} tokens"
    )
    advice = "Lower budget.max_turns, budget.max_views, budget.crop_max_tokens or generation.max_new_tokens."
    if need.total > context:
        raise ConfigError(f"The longest episode ({parts}) does not fit into the model's context of {context}. {advice}")
    if limit is not None and need.completion > limit:
        raise ConfigError(
            f"The longest episode ({parts}) has a completion of {need.completion} tokens, but max_completion_length is "
            f"{limit}. Raise it, leave it out, or: {advice[0].lower()}{advice[1:]}"
        )
    return limit or need.completion


def accumulation(recipe: GRPORecipe, processes: int) -> int:
    """Return TRL's `gradient_accumulation_steps` on so many devices.

    Raises:
        ConfigError: The rollouts of a round do not divide into batches, or a group would be torn.
    """
    if recipe.prompts % processes:  # rewards compare the rollouts of a group, so a device gets whole ones
        raise ConfigError(
            f"{recipe.prompts} prompts do not divide over {processes} devices, so rollouts of one question would be "
            f"scored apart. Set prompts to a multiple of {processes}."
        )
    rows, batch = recipe.prompts * recipe.num_generations, recipe.per_device_train_batch_size
    share, left = divmod(rows, batch * processes * recipe.minibatches)
    if left:
        raise ConfigError(
            f"{recipe.prompts} prompts x {recipe.num_generations} rollouts do not divide into {recipe.minibatches} "
            f"minibatches of batches of {batch} on {processes} devices. Change prompts or per_device_train_batch_size."
        )
    return share


def describe(recipe: GRPORecipe, *, processes: int = 1) -> str:
    """Return the plan of a run as lines of text; nothing is loaded.

    Raises:
        ConfigError: It cannot be run on so many devices.
    """
    share = accumulation(recipe, processes)
    where = "1 device" if processes == 1 else f"each of {processes} devices"
    preset = resolve_model(recipe.model)
    config = recipe.agent_config()
    has_branches = recipe.branches is not None or (Path(preset.source) / CONFIG).is_file()
    config = config.replace(policy=config.policy_for(perceives=has_branches))
    views = config.budget.view_budget(preset.budget or UNKNOWN_BUDGET)
    need = longest(config, views)
    rows = recipe.prompts * recipe.num_generations
    rounds = recipe.rounds
    typical = views.coarse_max_tokens + views.crop_max_tokens
    lines = [
        f"model        {recipe.model} ({preset.source})",
        f"trained      {_trained(recipe)}",
        f"policy       {config.policy}",
        f"steps        {recipe.max_steps}, {rounds} rounds of rollouts",
        f"a round      {recipe.prompts} questions x {recipe.num_generations} rollouts = {rows} episodes",
        f"a step       {rows // recipe.minibatches} episodes, {share} batches of "
        f"{recipe.per_device_train_batch_size} on {where}",
        f"episodes     {rounds * rows} in all, about {rounds * rows * typical / 1e6:.1f} M visual tokens",
        f"longest      {need.total} tokens: prompt {need.prompt}, written {need.written}, crops {need.crops}, "
        f"text between {need.between} (the tokenizer will count the text)",
        f"rollouts     {recipe.rollouts.by}" + (", vLLM " + recipe.rollouts.vllm.mode if recipe.rollouts.vllm else ""),
        "rewards      " + ", ".join(f"{one.weight:g} x {one.name}" for one in recipe.rewards),
        f"loss         {recipe.loss.loss_type}",
    ]
    if preset.memory_gb:
        lines.append(f"memory       {preset.memory_gb:g} GB for the weights in bfloat16, and training's own")
    return "\n".join(lines)


def _trained(recipe: GRPORecipe) -> str:
    what = f"LoRA of rank {recipe.lora.r}" if recipe.lora else "all weights"
    if recipe.from_layer:
        return f"{what} from decoder layer {recipe.from_layer}, all below frozen"
    return what + (" with the vision tower" if recipe.tower else ", vision tower frozen")
