"""The cost of a stage, estimated from the recipe before anything is loaded: rows, steps, tokens and memory.

Counted are the rows that go through the base: questions that are answered or looked at, and rows that are trained on.
Tokens are those of prompts. Unknown are the rows of a hub dataset that is taken whole, and the memory of a base whose
config is not on this machine. Memory is estimated from the shape of the base, well enough to tell 12 GB from 40 GB.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

from transformers import AutoConfig

from qzoom_agent.config import ViewBudget
from qzoom_agent.models.presets import PRESETS, UNKNOWN_BUDGET, preset_of, resolve_model
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation
from qzoom_agent.training.branches.calibrate import candidates
from qzoom_agent.training.branches.dataset_size import rows_of
from qzoom_agent.training.branches.fitting import optimizer_steps


class Shape(NamedTuple):
    """Sizes of a base that decide its memory."""

    layers: int
    hidden: int
    layer_weights: float
    """Number of weights of one decoder layer."""
    cached: int
    """Numbers that a layer keeps in the cache for each token."""
    head_weights: float = 0.0
    """Number of weights of the output layer, where it is not tied to the embeddings: trained with the decoder."""
    base_gb: float | None = None
    """GB of the weights in 16 bit and the cache of one run; None: unknown."""


SHAPES: Final = {
    name: shape._replace(base_gb=PRESETS[name].memory_gb)
    for name, shape in {
        "nano": Shape(9, 192, 0.3e6, 192),
        "qwen2.5-vl-3b": Shape(36, 2048, 77.1e6, 512),
        "qwen2.5-vl-7b": Shape(28, 3584, 233.0e6, 1024, 545.0e6),
        "qwen3-vl-4b": Shape(36, 2560, 100.9e6, 2048),
        "qwen3-vl-8b": Shape(36, 4096, 192.9e6, 2048, 622.3e6),
        "llava-1.5-7b": Shape(32, 4096, 202.4e6, 8192, 131.3e6),
    }.items()
}
DEVICE_GB: Final = 80
"""Memory of a large device."""
_STATES: Final = 20
"""Numbers that a layer works with, or training keeps of it, for each token and unit of width, roughly."""


def shape_of(model: str) -> Shape | None:
    """Return the shape of a base by its preset, or by its config if that is on this machine; None: unknown."""
    known = SHAPES.get(preset_of(model) or "")
    if known is not None:
        return known
    source = resolve_model(model).source
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    width = getattr(text, "head_dim", None) or hidden // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * width
    stored = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return Shape(
        layers=text.num_hidden_layers,
        hidden=hidden,
        layer_weights=2.0 * hidden * (heads * width + keys) + 3.0 * hidden * text.intermediate_size,
        cached=2 * keys,
        head_weights=0.0 if config.tie_word_embeddings else float(hidden * text.vocab_size),
        base_gb=stored / 1e9 or None,
    )


_TEXT_TOKENS: Final = 60
"""Text tokens of a prompt, roughly."""
_LOOKED_AT: Final = 16
"""Rows of a batch that is only looked at."""


class Pass(NamedTuple):
    """One pass over questions."""

    what: str
    rows: int | None
    """None: unknown."""
    tokens: float
    """Tokens of a prompt."""
    batch: int
    times: int = 1
    """Passes over each question."""


class Fit(NamedTuple):
    """One training of some weights."""

    what: str
    how: Optimisation
    rows: int | None
    """Rows of all epochs, at most; None: unknown."""
    tokens: float
    layers: float
    own: bool = False
    """The layers are the base's own."""


Work = Pass | Fit


class CostModel:
    """The work of each stage of one recipe.

    Args:
        recipe: The recipe.
        views: Budgets of views of the base.
        layers: Decoder layers of the base; 0: unknown.
    """

    def __init__(self, recipe: BranchRecipe, views: ViewBudget, *, layers: int) -> None:
        self.recipe, self.layers = recipe, layers
        self.coarse = views.coarse_max_tokens + _TEXT_TOKENS
        self.crop = views.crop_max_tokens

    def work_of(self, stage: str) -> list[Work]:
        """Return the work of a stage in order."""
        recipe, asked = self.recipe, rows_of(self.recipe.asked(stage))
        if stage == "select-heads":
            return self._attended("", least(recipe.heads.records, asked))
        if stage == "label":
            return self._labelled("", asked)
        if stage == "sdrpn":
            return self._sdrpn(recipe.sdrpn.optimisation, asked)
        if stage == "postsft":
            return self._postsft(asked)
        if stage == "gate":
            rows, how = least(recipe.gate.records, asked), recipe.gate.optimisation
            tokens = fmean(recipe.gate.tokens[at] for at in recipe.gate.budgets_read) + _TEXT_TOKENS
            return [
                *self._at_budgets(rows),
                Fit("the gate", how, times(rows, how.num_train_epochs), tokens, recipe.gate_depth),
            ]
        return self._calibrated()

    def _calibrated(self) -> list[Work]:
        """Where no box is known, all are answered once, and those that are wrong with everything that may help them."""
        recipe, stage, target = self.recipe, self.recipe.gate, self.recipe.calibration
        rows = least(target.records, rows_of(recipe.held_out))
        seen = self.coarse if target.tokens is None else target.tokens + _TEXT_TOKENS
        work: list[Work] = [Pass("held out, looked at", rows, seen, _LOOKED_AT)]
        if all(one.path == "needle" for one in recipe.held_out):
            return work
        higher = [budget for budget in target.higher_tokens or stage.tokens if budget > seen - _TEXT_TOKENS]
        rules = candidates(
            relative=recipe.peak_share is not None,
            blurs=target.blurs or [recipe.blur],
            margins=target.margins or [recipe.margin],
            box=recipe.box,
        )
        work.append(Pass("answered if their boxes are unknown", rows, seen, stage.batch))
        if higher:
            work.append(
                Pass("at most answered at more tokens", rows, fmean(higher) + _TEXT_TOKENS, stage.batch, len(higher))
            )
        work.append(Pass("at most answered with a crop", rows, seen + self.crop, stage.batch, len(rules)))
        if stage.own_calls:
            work.append(Pass("at most answered by own calls", rows, seen + 2 * self.crop, 1))
        return work

    def _attended(self, when: str, rows: int | None) -> list[Work]:
        how = self.recipe.labelling
        tokens = self.coarse if how.tokens is None else how.tokens + _TEXT_TOKENS
        read = Pass(f"read with the answer{when}", rows, tokens, how.batch)
        return [read] if how.response == "gold" else [Pass(f"answered{when}", rows, tokens, how.batch), read]

    def _labelled(self, when: str, rows: int | None) -> list[Work]:
        how = self.recipe.labelling
        cropped = Pass(f"answered with a crop{when}", rows, self.coarse + self.crop, how.batch)
        return [*self._attended(when, rows), *([cropped] if how.keep == "crop" else [])]

    def _sdrpn(self, how: Optimisation, rows: int | None) -> list[Work]:
        stage = self.recipe.sdrpn
        tokens = fmean(self.coarse if one is None else one + _TEXT_TOKENS for one in stage.tokens)
        used = None if rows is None else math.ceil(stage.share * rows)
        held = least(stage.report, rows_of(self.recipe.held_out))
        fit = Fit(
            "SD-RPN", how, times(used, how.num_train_epochs), tokens, self.recipe.depth - 0.7
        )  # its last layer: query, keys
        return [fit, Pass("held out, looked at", held, tokens, _LOOKED_AT, len(stage.tokens))]

    def _at_budgets(self, rows: int | None) -> list[Work]:
        stage = self.recipe.gate
        tokens, lowest = fmean(stage.tokens) + _TEXT_TOKENS, stage.tokens[0] + _TEXT_TOKENS
        work: list[Work] = [Pass("answered", rows, tokens, stage.batch, len(stage.tokens))]
        if stage.with_crop:
            work.append(Pass("looked at", rows, lowest, stage.batch))
            work.append(Pass("answered with a crop", rows, lowest + self.crop, stage.batch))
        if stage.own_calls:
            work.append(Pass("at most answered by own calls", rows, lowest + 2 * self.crop, 1))
        return work

    def _postsft(self, asked: int | None) -> list[Work]:
        stage = self.recipe.postsft
        rows, how = least(stage.records, asked), stage.optimisation
        again = least(stage.refit_records, rows_of(self.recipe.data))
        return [
            Pass("answered", rows, self.coarse, stage.batch),
            Pass("looked at", rows, self.coarse, stage.batch),
            Pass("answered with a crop", rows, self.coarse + self.crop, stage.batch),
            Fit("the base", how, times(rows, how.num_train_epochs), self.coarse + self.crop, self.layers, own=True),
            *self._labelled(" anew", again),
            *self._sdrpn(stage.refit, again),
        ]


def least(*counts: int | None) -> int | None:
    """Return the lowest of the counts that are known."""
    return min((count for count in counts if count is not None), default=None)


def times(count: int | None, factor: int) -> int | None:
    """Multiply a count, which may be unknown (None)."""
    return None if count is None else count * factor


def describe(recipe: BranchRecipe, stage: str, *, processes: int = 1) -> str:
    """Describe the cost of one stage in lines of text.

    Args:
        recipe: The recipe.
        stage: Name of the stage.
        processes: Number of devices.

    Raises:
        ConfigError: A local source of data is missing.
    """
    preset = resolve_model(preset_of(recipe.model) or recipe.model)
    shape = shape_of(recipe.model)
    model = CostModel(recipe, preset.budget or UNKNOWN_BUDGET, layers=0 if shape is None else shape.layers)
    work = model.work_of(stage)
    lines = [f"model        {recipe.model} ({preset.source})", f"stage        {stage}"]
    total, unknown = 0.0, ""
    for one in work:
        often = one.times if isinstance(one, Pass) else 1
        lines.append(_rows(one, often))
        if isinstance(one, Fit):
            lines += _fit(one, shape, processes)
        if one.rows is None:
            unknown = ", and those of unknown rows"
        else:
            total += one.rows * often * one.tokens
    if not any(isinstance(one, Fit) for one in work):
        lines.append("steps        none: nothing is trained")
    lines.append(f"in all       {_amount(total)} tokens{unknown}")
    return "\n".join([*lines, *_memory(recipe.model, shape, work, processes)])


def _rows(one: Work, often: int) -> str:
    count = "unknown" if one.rows is None else str(one.rows)
    each = f" {often} times" if often > 1 else ""
    if isinstance(one, Fit):
        return f"rows         {count} at most to train {one.what}, about {one.tokens:.0f} tokens each"
    return f"rows         {count} {one.what}{each}, about {one.tokens:.0f} tokens each"


def _fit(one: Fit, shape: Shape | None, processes: int) -> list[str]:
    how = one.how
    rows, accumulated = how.per_device_train_batch_size, how.gradient_accumulation_steps
    count = "unknown" if one.rows is None else f"at most {optimizer_steps(how, one.rows, processes=processes)}"
    size = f"{rows * accumulated * processes} rows: {rows} a device, {accumulated} accumulated, on {processes} devices"
    weights = "unknown" if shape is None else f"about {_amount(trained_weights(shape, one.layers, own=one.own))}"
    return [f"steps        {count}, of {size}", f"weights      {weights}"]


def _memory(model: str, shape: Shape | None, work: Sequence[Work], processes: int) -> list[str]:
    if shape is None or shape.base_gb is None:
        lacking = "config" if shape is None else "weights"
        return [f"memory       unknown: the {lacking} of {model} cannot be looked at without a download"]
    needed = [
        pass_gb(shape, rows=one.batch, tokens=one.tokens)
        if isinstance(one, Pass)
        else fit_gb(shape, one.how, tokens=one.tokens, layers=one.layers, own=one.own)
        for one in work
    ]
    lines = [f"memory       about {max(needed):.1f} GB a device"]
    for one, need in zip(work, needed, strict=True):
        if need <= DEVICE_GB:
            continue
        lines.append(f"too large    {need:.0f} GB for {one.what} do not fit a device of {DEVICE_GB} GB")
        if isinstance(one, Fit) and one.own:
            spread = max(2, processes)
            less = fit_gb(shape, one.how, tokens=one.tokens, layers=one.layers, own=True, sharded=spread)
            lines += [
                "             every device holds weights, gradients and moments, however many there are. Spread them",
                f"             (about {less:.0f} GB on each of {spread}): accelerate launch --config_file",
                f"             rl/recipes/accelerate/zero2.yaml --num_processes {spread} -m ...",
            ]
        else:
            lines.append("             take smaller batches, or gradient_checkpointing")
    return lines


def _amount(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def pass_gb(shape: Shape, *, rows: int, tokens: float) -> float:
    """Return the GB that a batch of rows needs, with its cache."""
    return (shape.base_gb or 0.0) + rows * tokens * 2 * (shape.layers * shape.cached + shape.hidden * _STATES) / 1e9


def fit_gb(
    shape: Shape, how: Optimisation, *, tokens: float, layers: float, own: bool = False, sharded: int = 1
) -> float:
    """Return the GB that training needs: weights, gradients and Adam's moments in float32, and activations.

    Args:
        shape: The base.
        how: Batch size and gradient checkpointing.
        tokens: Tokens of a row.
        layers: Number of layers that are trained.
        own: They are the base's own, with its output layer, and not beside it.
        sharded: Devices over which ZeRO-2 spreads everything but the weights in 16 bit.
    """
    states = (
        how.per_device_train_batch_size
        * tokens
        * shape.hidden
        * _STATES
        * 4
        * (1 if how.gradient_checkpointing else max(1.0, layers))
    )
    weights = trained_weights(shape, layers, own=own)
    held = 16 / sharded - (2 if own and sharded == 1 else 0)  # in place of those in 16 bit
    return (shape.base_gb or 0.0) + (weights * held + states) / 1e9


def trained_weights(shape: Shape, layers: float, *, own: bool = False) -> float:
    """Return the number of weights that are trained."""
    return layers * shape.layer_weights + (shape.head_weights if own else 0.0)
