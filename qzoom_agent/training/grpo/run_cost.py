"""The longest possible episode, and the plan of a run with its memory and time, before anything is loaded.

A rollout that outgrows the model or the trainer's limit would be cut in the middle of an image. The longest one has
every turn written to its limit, every crop at its largest, every turn between them as long as the protocol makes it.

Memory is that of a device without sharding, part by part. Time is never guessed: it is that of the steps in the log of
a run of the same recipe, or follows from a throughput that somebody states.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import UNKNOWN_BUDGET, resolve_model
from qzoom_agent.perception.branch_config import CONFIG, branch_folder
from qzoom_agent.policy import LOOK_AGAIN, LOOK_FIRST, OFFER_TOOLS
from qzoom_agent.protocols import get_protocol
from qzoom_agent.training.branches.cost_estimate import DEVICE_GB, Shape, shape_of
from qzoom_agent.training.branches.dataset import count_rows
from qzoom_agent.training.grpo.grpo_recipe import GRPORecipe
from qzoom_agent.training.recipe_io import require_same

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
    """Return the completion length to give the trainer: the recipe's `limit`, or what the longest episode needs.

    Raises ConfigError if that does not fit into the model's `context`, or into `limit`.
    """
    advice = (
        "Lower budget.coarse_tokens, budget.max_turns, budget.max_views, budget.crop_max_tokens or "
        "generation.max_new_tokens."
    )
    if need.total > context:
        raise ConfigError(f"The longest episode ({need}) does not fit into the model's context of {context}. {advice}")
    if limit is not None and need.completion > limit:
        raise ConfigError(
            f"The longest episode ({need}) has a completion of {need.completion} tokens, but max_completion_length is "
            f"{limit}. Raise it, leave it out, or: {advice[0].lower()}{advice[1:]}"
        )
    return limit or need.completion


class Memory(NamedTuple):
    """GB on one device, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of one batch that is learned from."""
    cache: float
    """Of the rollouts that run at a time; it is free again when activations are needed."""

    @property
    def states(self) -> float:
        """What ZeRO-3 spreads over the devices."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.states + max(self.activations, self.cache)


def trained_weights(recipe: GRPORecipe, size: Shape) -> float:
    """Return the number of weights that are trained, those of a vision tower left out."""
    layers = size.layers - recipe.from_layer
    if recipe.lora is None:
        return layers * size.layer_weights + size.head_weights
    keys = size.cached / 2
    inner = (size.layer_weights - 2 * size.hidden * (size.hidden + keys)) / (3 * size.hidden)
    sides = 4 * size.hidden + 2 * (size.hidden + keys) + 3 * (size.hidden + inner)
    return layers * recipe.lora.r * sides


def memory(recipe: GRPORecipe, size: Shape, *, tokens: int, processes: int) -> Memory:
    """Return the memory of a device without sharding, for rollouts as long as the longest episode (`tokens`)."""
    number = 4 if recipe.dtype == "float32" else 2
    trained, stored = trained_weights(recipe, size), (size.base_gb or 0.0) * number / 2
    copies = 1 + (recipe.loss.beta > 0 and recipe.lora is None)
    looks = recipe.agent_config().policy in (None, *LOOK_FIRST) or any(one.needs_look for one in recipe.rewards)
    copies += looks and recipe.rollouts.perception == "frozen"
    held = trained * (4 if recipe.lora else 4 - number)  # adapters beside the weights, or their float32 form
    half = recipe.bf16 or number == 2
    kept = 1 if recipe.gradient_checkpointing else max(1, size.layers - recipe.from_layer)
    rows = min(recipe.rollouts.rows, recipe.prompts * recipe.num_generations // processes)
    worked = 2 if half else 4
    return Memory(
        weights=stored * copies + held / 1e9,
        gradients=4 * trained / 1e9,
        optimizer=8 * trained / 1e9,
        activations=size.states_gb(recipe.per_device_train_batch_size * tokens, number=worked, layers=kept),
        cache=size.cache_gb(rows * tokens, number=worked),
    )


def operations(recipe: GRPORecipe, size: Shape, *, tokens: int) -> float:
    """Return the floating-point operations of the decoder in a run whose episodes all are the longest."""
    weights = size.layers * size.layer_weights + size.head_weights
    forwards = 1 + (recipe.rollouts.max_resample_times or 0)  # of the rollouts, all of which may be replaced
    forwards += (recipe.loss.beta > 0) + (recipe.steps_of_round > 1)  # of the reference, and before the first step
    passes = 2 * forwards + recipe.num_iterations * (8 if recipe.gradient_checkpointing else 6)
    episodes = recipe.rounds * recipe.prompts * recipe.num_generations
    asked = 0  # held-out questions, which are asked after the last step, too
    if (how := recipe.evaluation) is not None:
        asked = how.questions * (1 + -(-recipe.max_steps // recipe.whole_rounds(how.eval_steps)))
    return weights * tokens * (passes * episodes + 2 * asked)


def describe(recipe: GRPORecipe, *, processes: int = 1, output: Path | None = None, tflops: float | None = None) -> str:
    """Return the plan of a run as lines of text; nothing is loaded.

    Args:
        output: Folder of a run whose log may be that of this recipe.
        tflops: Throughput of a device that is stated, in 10^12 operations a second.

    Raises:
        ConfigError: It cannot be run on so many devices, a local source of questions is missing, there is no such
            protocol or layer, or `tflops` is no positive number.
    """
    share, rounds = recipe.accumulation(processes), recipe.rounds
    where = "1 device" if processes == 1 else f"each of {processes} devices"
    preset, size = resolve_model(recipe.model), shape_of(recipe.model)
    if size is not None and recipe.from_layer >= size.layers:
        raise ConfigError(
            f"from_layer is {recipe.from_layer}, but '{recipe.model}' has {size.layers} decoder layers. Lower it."
        )
    has_branches = recipe.branches is not None or (branch_folder(preset.source) / CONFIG).is_file()
    config = recipe.agent_config()
    if config.protocol is not None:
        get_protocol(config.protocol)
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
        "questions": _questions(recipe),
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
    plan |= _memory_lines(recipe, size, tokens=need.total, processes=processes)
    plan["hours"] = _hours(recipe, size, tokens=need.total, processes=processes, output=output, tflops=tflops)
    return "\n".join(f"{name:<13}{text}" for name, text in plan.items())


def _questions(recipe: GRPORecipe) -> str:
    """Return where the questions come from, and how often each is asked."""
    if recipe.needle:
        return "needle boards, drawn without end"
    count, held = count_rows(recipe.data), count_rows(recipe.evaluation.data) if recipe.evaluation else 0
    asked = recipe.rounds * recipe.prompts
    often = "an unknown number of rows" if count is None else f"{count} rows, {asked / max(1, count):.2g} times each"
    return often + ("" if held == 0 else f"; {'unknown' if held is None else held} rows are held out")


def _memory_lines(recipe: GRPORecipe, size: Shape | None, *, tokens: int, processes: int) -> dict[str, str]:
    if size is None:
        known = resolve_model(recipe.model).memory_gb
        weights = f"; about {known:g} GB for the weights in 16 bit" if known else ""
        return {"memory": f"unknown: the config of {recipe.model} cannot be looked at without a download{weights}"}
    need = memory(recipe, size, tokens=tokens, processes=processes)
    parts = ", ".join(f"{name} {gb:.1f}" for name, gb in need._asdict().items())
    found = {"memory": f"about {need.total:.1f} GB a device without sharding, in GB: {parts}"}
    spread = need.states / processes + need.total - need.states
    if processes > 1:
        found["with zero3"] = f"about {spread:.1f} GB on each of {processes} devices"
    if min(spread, need.total) > DEVICE_GB:
        advice = "more --devices with zero3, adapters (lora), or fewer rollouts.rows"
        found["too large"] = f"for a device of {DEVICE_GB} GB; take {advice}"
    return found


def _hours(
    recipe: GRPORecipe, size: Shape | None, *, tokens: int, processes: int, output: Path | None, tflops: float | None
) -> str:
    if tflops is not None and not tflops > 0:
        raise ConfigError(f"--tflops is a throughput above 0, in 10^12 operations a second; got {tflops:g}.")
    if (seconds := seconds_a_step(recipe, output)) is not None:
        return f"{recipe.max_steps * seconds / 3600:.2f}, at {seconds:.1f} seconds a step as logged in {output}"
    work = None if size is None else operations(recipe, size, tokens=tokens)
    if work is not None and tflops is not None:
        hours = work / (tflops * 1e12 * processes) / 3600
        return f"at most {hours:.2f}, of {work:.2g} operations at {tflops:g} TFLOP/s a device as stated"
    count = "" if work is None else f" of at most {work:.2g} operations"
    return f"unknown{count}: state a throughput (--tflops), or run some steps into --output first"


def seconds_a_step(recipe: GRPORecipe, output: Path | None) -> float | None:
    """Return the mean time of a logged step of the recipe's run in a folder; None if there is no such run.

    Only the first step of a round has its rollouts, so that a median would leave them out.
    """
    if output is None or not (output / "log.jsonl").is_file():
        return None
    try:
        require_same(output / recipe.stored, recipe.decisive(), made=output, kind=GRPORecipe)
    except ConfigError:
        return None
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [line["step_time"] for line in lines if "step_time" in line]
    return fmean(times) if times else None
