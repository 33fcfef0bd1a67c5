"""What a stage will cost, before anything is loaded: rows, steps, tokens and memory, from the recipe alone.

Memory is an estimate (weights, branch weights with gradients and Adam's two moments in float32, activations of the
trained layers), meant to tell 12 GB from 40 GB.
"""

import math
from typing import Final, NamedTuple

from qzoom_agent.backends.presets import UNKNOWN_BUDGET, resolve_model
from qzoom_agent.rl.branches.recipe import BranchRecipe, Optimisation
from qzoom_agent.rl.branches.records import Source
from qzoom_agent.rl.branches.stage import steps


class Shape(NamedTuple):
    """What decides the memory of a base's branches."""

    layers: int
    hidden: int
    layer_weights: float


SHAPES: Final = {
    "nano": Shape(9, 192, 0.3e6),
    "qwen2.5-vl-3b": Shape(36, 2048, 77.1e6),
    "qwen2.5-vl-7b": Shape(28, 3584, 233.0e6),
    "qwen3-vl-4b": Shape(36, 2560, 100.9e6),
    "qwen3-vl-8b": Shape(36, 4096, 192.9e6),
    "llava-1.5-7b": Shape(32, 4096, 202.4e6),
}
_TEXT_TOKENS: Final = 60
"""Of a prompt, about."""
_STATES: Final = 20
"""Numbers that training keeps for each token and unit of width in a layer, about."""


def describe(recipe: BranchRecipe, stage: str, *, processes: int = 1) -> str:
    """The plan of one stage as lines of text."""
    data = recipe.asked(stage)
    rows = _rows(data)
    shape = SHAPES.get(recipe.model)
    preset = resolve_model(recipe.model)
    coarse = (preset.budget or UNKNOWN_BUDGET).coarse_max_tokens
    lines = [f"model        {recipe.model} ({preset.source})", f"stage        {stage}"]
    lines.append(f"records      {'all rows of ' + ', '.join(one.path for one in data) if rows is None else rows}")
    if stage in ("select-heads", "label"):
        used = recipe.heads.records if stage == "select-heads" else rows
        budget = recipe.labelling.tokens or coarse
        lines.append(f"tokens       about {budget + _TEXT_TOKENS} a question, answered once and read once")
        lines += _total(used, budget + _TEXT_TOKENS)
        return "\n".join(lines)
    if stage == "calibrate":
        held = recipe.calibration.records or _rows(recipe.held_out)
        lines += [
            f"held out     {held if held is not None else 'all rows'}",
            f"tokens       {(recipe.calibration.tokens or coarse) + _TEXT_TOKENS} each",
        ]
        return "\n".join(lines)
    optimisation, budgets, trained_layers = _trained(recipe, stage, coarse, shape)
    tokens = sum(budgets) / len(budgets) + _TEXT_TOKENS
    limits = [{"gate": recipe.gate.records, "postsft": recipe.postsft.records}.get(stage), rows]
    used = min((limit for limit in limits if limit is not None), default=None)
    if stage == "sdrpn" and used is not None:
        used = math.ceil(recipe.sdrpn.share * used)
    lines.append(f"tokens       about {tokens:.0f} a row, budgets {', '.join(map(str, budgets))}")
    if used is not None:
        total = used * optimisation.epochs
        lines.append(f"rows         at most {total} ({used} x {optimisation.epochs} epochs)")
        lines += _total(total, tokens)
        lines.append(f"steps        at most {steps(optimisation, total, processes=processes)} on {processes} devices")
    batch = optimisation.batch * optimisation.accumulation * processes
    lines.append(f"batch        {batch} ({optimisation.batch} a device, {optimisation.accumulation} accumulated)")
    if shape is not None:
        weights = trained_layers * shape.layer_weights
        states = optimisation.batch * tokens * shape.hidden * _STATES * 4
        states *= 1 if optimisation.gradient_checkpointing else max(1.0, trained_layers)
        base = (preset.memory_gb or 0.0) * 1e9
        lines.append(f"trained      about {weights / 1e6:.1f} M weights")
        lines.append(f"memory       about {(base + 16 * weights + states) / 1e9:.1f} GB a device")
    return "\n".join(lines)


def _rows(sources: list[Source]) -> int | None:
    """Rows in all; None where a source is taken whole."""
    limits = [1000 if one.path == "needle" and one.limit is None else one.limit for one in sources]
    return sum(limit for limit in limits if limit is not None) if all(limits) else None


def _total(rows: int | None, tokens: float) -> list[str]:
    return [] if rows is None else [f"in all       {rows * tokens / 1e6:.1f} M tokens"]


def _trained(
    recipe: BranchRecipe, stage: str, coarse: int, shape: Shape | None
) -> tuple[Optimisation, list[int], float]:
    """How a stage is trained, at which budgets, and how many layers of weights."""
    if stage == "sdrpn":
        return recipe.sdrpn.optimisation, [one or coarse for one in recipe.sdrpn.tokens], recipe.depth - 0.7
    if stage == "gate":
        gate = recipe.gate
        return gate.optimisation, [gate.tokens[at] for at in gate.budgets_read], float(recipe.gate_depth)
    return recipe.postsft.optimisation, [2 * coarse], float(0 if shape is None else shape.layers)
