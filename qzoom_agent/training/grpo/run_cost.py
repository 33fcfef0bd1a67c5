"""Memory and time of a run, estimated from the recipe before anything is loaded.

Memory is that of a device without sharding, part by part. Time is never guessed: it is that of the steps in the log of
a run of the same recipe, or follows from a throughput that somebody states.
"""

import json
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import preset_of, resolve_model
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.training.branches.cost_estimate import DEVICE_GB, SHAPES, STATES, Shape, shape_of
from qzoom_agent.training.fingerprint import require_same
from qzoom_agent.training.grpo.grpo_recipe import FREE, GRPORecipe

_FINE_TUNES: Final = {
    "deepeyes": "qwen2.5-vl-7b",
    "mini-o3": "qwen2.5-vl-7b",
    "zwz-4b": "qwen3-vl-4b",
}
"""Presets with the shape of another one."""
_ADAPTED: Final = 7
"""Matrices of a decoder layer that get adapters."""


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


def shape(model: str) -> Shape | None:
    """Return the shape of a model by its preset, that of the model it was fine-tuned from, or its config."""
    name = preset_of(model) or ""
    return SHAPES.get(_FINE_TUNES.get(name, name)) or shape_of(model)


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
    """Return the memory of a device without sharding.

    Args:
        recipe: Of the run.
        size: Of its model.
        tokens: Of the longest episode.
        processes: Devices.
    """
    number = 4 if recipe.dtype == "float32" else 2
    trained, stored = trained_weights(recipe, size), (size.base_gb or 0.0) * number / 2
    copies = 1 + (recipe.loss.beta > 0 and recipe.lora is None)
    looks = recipe.agent_config().policy in (None, *LOOK_FIRST) or any(one.needs_look for one in recipe.rewards)
    copies += looks and recipe.rollouts.perception == "frozen"
    held = trained * (4 if recipe.lora else 4 - number)  # adapters beside the weights, or their float32 form
    half = recipe.bf16 or number == 2
    kept = 1 if recipe.gradient_checkpointing else max(1, size.layers - recipe.from_layer)
    states = recipe.per_device_train_batch_size * tokens * size.hidden * STATES * (2 if half else 4) * kept
    rows = min(recipe.rollouts.rows, recipe.prompts * recipe.num_generations // processes)
    return Memory(
        weights=stored * copies + held / 1e9,
        gradients=4 * trained / 1e9,
        optimizer=8 * trained / 1e9,
        activations=states / 1e9,
        cache=rows * tokens * size.layers * size.cached * (2 if half else 4) / 1e9,
    )


def operations(recipe: GRPORecipe, size: Shape, *, tokens: int) -> float:
    """Return the floating-point operations of the decoder in a run whose episodes all are the longest."""
    weights = size.layers * size.layer_weights + size.head_weights
    passes = 2 + recipe.num_iterations * (8 if recipe.gradient_checkpointing else 6)  # a forward pass is 2 a weight
    episodes = recipe.rounds * recipe.prompts * recipe.num_generations
    return passes * weights * tokens * episodes


def describe_cost(
    recipe: GRPORecipe, *, tokens: int, processes: int, output: Path | None = None, tflops: float | None = None
) -> dict[str, str]:
    """Return lines on memory and time, by their names.

    Args:
        recipe: Of the run.
        tokens: Of the longest episode.
        processes: Devices.
        output: Folder of a run whose log may be that of this recipe.
        tflops: Throughput of a device that is stated, in 10^12 operations a second.

    Raises:
        ConfigError: `tflops` is no positive number.
    """
    if tflops is not None and not tflops > 0:
        raise ConfigError(f"--tflops is a throughput above 0, in 10^12 operations a second; got {tflops:g}.")
    size, found = shape(recipe.model), dict[str, str]()
    if size is None:
        known = resolve_model(recipe.model).memory_gb
        weights = f"; about {known:g} GB for the weights in 16 bit" if known else ""
        found["memory"] = f"unknown: the config of {recipe.model} cannot be looked at without a download{weights}"
    else:
        need = memory(recipe, size, tokens=tokens, processes=processes)
        parts = ", ".join(f"{name} {gb:.1f}" for name, gb in need._asdict().items())
        found["memory"] = f"about {need.total:.1f} GB a device without sharding, in GB: {parts}"
        spread = need.states / processes + need.total - need.states
        if processes > 1:
            found["with zero3"] = f"about {spread:.1f} GB on each of {processes} devices"
        if min(spread, need.total) > DEVICE_GB:
            advice = "more --devices with zero3, adapters (lora), or fewer rollouts.rows"
            found["too large"] = f"for a device of {DEVICE_GB} GB; take {advice}"
    seconds = seconds_a_step(recipe, output)
    work = None if size is None else operations(recipe, size, tokens=tokens)
    if seconds is not None:
        hours = recipe.max_steps * seconds / 3600
        found["hours"] = f"{hours:.2f}, at {seconds:.1f} seconds a step as logged in {output}"
    elif work is not None and tflops is not None:
        hours = work / (tflops * 1e12 * processes) / 3600
        found["hours"] = f"at most {hours:.2f}, of {work:.2g} operations at {tflops:g} TFLOP/s a device as stated"
    else:
        count = "" if work is None else f" of at most {work:.2g} operations"
        found["hours"] = f"unknown{count}: state a throughput (--tflops), or run some steps into --output first"
    return found


def seconds_a_step(recipe: GRPORecipe, output: Path | None) -> float | None:
    """Return the median time of a logged step of the recipe's run in a folder; None if there is no such run."""
    if output is None or not (output / "log.jsonl").is_file():
        return None
    try:
        require_same(
            output / "settings.json", recipe.model_dump(mode="json", exclude=FREE), made=output, kind=GRPORecipe
        )
    except ConfigError:
        return None
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [line["step_time"] for line in lines if "step_time" in line]
    return median(times) if times else None
