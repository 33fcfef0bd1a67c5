"""The cost of a stage, estimated from the recipe before anything is loaded: rows, steps, tokens and memory.

Counted are the rows that go through the base, and the tokens of their prompts. Unknown are the rows of a hub dataset
that is taken whole, and the memory of a base whose config is not on this machine. Memory follows from the shape of a
base, well enough to tell 12 GB from 40 GB.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.models.presets import PRESETS, UNKNOWN_BUDGET, preset_of, resolve_model
from qzoom_agent.perception.adapters import full_layers, text_model
from qzoom_agent.perception.branch_config import default_k
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation, StageName
from qzoom_agent.training.branches.calibrate import candidates
from qzoom_agent.training.branches.dataset import count_rows
from qzoom_agent.training.branches.fitting import optimizer_steps

_TEXT_TOKENS: Final = 60
"""Text tokens of a prompt, roughly."""
_LOOKED_AT: Final = 16
"""Rows of a batch that is only looked at."""

_BASE: Final = "the base"
_HELD_OUT: Final = "held out, looked at"
_OWN_CALLS: Final = "at most answered by own calls"
DEVICE_GB: Final = 80
"""Memory of a large device."""
_STATES: Final = 20
"""Numbers that a layer works with, or training keeps of it, for each token and unit of width, roughly."""


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

    def cache_gb(self, tokens: float, *, number: int) -> float:
        """Return the cache of so many tokens in GB, in numbers of so many bytes."""
        return tokens * self.layers * self.cached * number / 1e9

    def states_gb(self, tokens: float, *, number: int, layers: float = 1) -> float:
        """Return what so many layers work with for these tokens in GB, in numbers of so many bytes."""
        return tokens * self.hidden * _STATES * layers * number / 1e9


SHAPES: Final = {
    name: shape._replace(base_gb=PRESETS[name].memory_gb)
    for name, shape in {
        "nano": Shape(9, 192, 0.3e6, 192),
        "nano-paper": Shape(9, 192, 0.48e6, 192),
        "qwen2.5-vl-3b": Shape(36, 2048, 77.1e6, 512),
        "qwen2.5-vl-7b": Shape(28, 3584, 233.0e6, 1024, 545.0e6),
        "qwen3-vl-4b": Shape(36, 2560, 100.9e6, 2048),
        "qwen3-vl-8b": Shape(36, 4096, 192.9e6, 2048, 622.3e6),
        "llava-1.5-7b": Shape(32, 4096, 202.4e6, 8192, 131.3e6),
    }.items()
}
_FINE_TUNES: Final = {"deepeyes": "qwen2.5-vl-7b", "mini-o3": "qwen2.5-vl-7b", "zwz-4b": "qwen3-vl-4b"}
"""Presets with the shape of another one."""


def shape_of(model: str) -> Shape | None:
    """Return the shape of a model by its preset, or by its config if that is on this machine; None: unknown."""
    name = preset_of(model) or ""
    known = SHAPES.get(_FINE_TUNES.get(name, name))
    if known is not None:
        return known
    source = resolve_model(model).source
    maker: Any = AutoModelForImageTextToText
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # without weights; families differ in what their configs say of experts and heads
            built = maker.from_config(config)
        text = text_model(built)
        copied = [text.layers[index] for index in full_layers(text.config)]
        cached = 2 * copied[-1].self_attn.k_proj.out_features
    except (OSError, ValueError, AttributeError):
        return None
    stored = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return Shape(
        layers=len(text.layers),
        hidden=text.config.hidden_size,
        layer_weights=fmean(sum(weight.numel() for weight in layer.parameters()) for layer in copied),
        cached=cached,
        head_weights=0.0 if config.tie_word_embeddings else float(built.get_output_embeddings().weight.numel()),
        base_gb=stored / 1e9 or None,
    )


class Work(NamedTuple):
    """One pass over rows, or with `how` one training on them."""

    what: str
    rows: int | None
    """Rows, of all epochs; None: unknown."""
    tokens: float
    batch: int
    times: int = 1
    """Passes over each row."""
    how: Optimisation | None = None
    layers: float = 0.0
    own: bool = False
    """They are the base's own, with its output layer, and not beside it."""

    def weights(self, shape: Shape) -> float:
        """Return the number of weights that are trained."""
        return self.layers * shape.layer_weights + (shape.head_weights if self.own else 0.0)

    def gb(self, shape: Shape, *, sharded: int = 1) -> float:
        """Return the memory of a device in GB; ZeRO-2 spreads all but activations and 16-bit weights over `sharded`.

        Training keeps weights, gradients and Adam's two moments in float32, and activations.
        """
        base, tokens = shape.base_gb or 0.0, self.batch * self.tokens
        if self.how is None:
            return base + shape.cache_gb(tokens, number=2) + shape.states_gb(tokens, number=2)
        held = 16 / sharded - (2 if self.own and sharded == 1 else 0)  # in place of those in 16 bit
        kept = 1 if self.how.gradient_checkpointing else max(1.0, self.layers)
        return base + self.weights(shape) * held / 1e9 + shape.states_gb(tokens, number=4, layers=kept)

    def describe(self, shape: Shape | None, processes: int) -> list[str]:
        """Describe rows, steps and weights in lines of text."""
        count = "unknown" if self.rows is None else str(self.rows)
        if self.how is None:
            each = f" {self.times} times" if self.times > 1 else ""
            return [f"rows         {count} {self.what}{each}, about {self.tokens:.0f} tokens each"]
        accumulated, steps = self.how.gradient_accumulation_steps, "unknown"
        if self.rows is not None:
            steps = f"at most {optimizer_steps(self.how, self.rows, processes=processes)}"
        weights = "unknown" if shape is None else f"about {_amount(self.weights(shape))}"
        return [
            f"rows         {count} at most to train {self.what}, about {self.tokens:.0f} tokens each",
            f"steps        {steps}, of {self.batch * accumulated * processes} rows: {self.batch} a device, "
            f"{accumulated} accumulated, on {processes} devices",
            f"weights      {weights}",
        ]


@dataclass(frozen=True)
class _Estimate:
    """The work of each stage, in order, for a base with these budgets and layers (0: unknown)."""

    recipe: BranchRecipe
    views: ViewBudget
    layers: int

    def tokens(self, budget: int | None) -> int:
        """Return the tokens of a prompt over a view at a budget (None: the preset's)."""
        return (self.views.coarse_max_tokens if budget is None else budget) + _TEXT_TOKENS

    @property
    def crop(self) -> int:
        return self.views.crop_max_tokens

    def training(self, what: str, how: Optimisation, rows: int | None, tokens: float, layers: float) -> Work:
        total = None if rows is None else rows * how.num_train_epochs
        return Work(what, total, tokens, how.per_device_train_batch_size, how=how, layers=layers, own=what == _BASE)

    def attended(self, rows: int | None, when: str = "") -> list[Work]:
        how = self.recipe.labelling
        names = ["read with the answer"] if how.response == "gold" else ["answered", "read with the answer"]
        return [Work(name + when, rows, self.tokens(how.tokens), how.batch) for name in names]

    def labelled(self, rows: int | None, when: str = "") -> list[Work]:
        how, tokens = self.recipe.labelling, self.tokens(None) + self.crop
        cropped = [Work(f"answered with a crop{when}", rows, tokens, how.batch)] if how.keep == "crop" else []
        return self.attended(rows, when) + cropped

    def fitted(self, how: Optimisation, rows: int | None) -> list[Work]:
        """Return the training of SD-RPN on labelled rows, and its measurement."""
        stage = self.recipe.sdrpn
        used = None if rows is None else math.ceil(stage.share * rows * (1 + stage.absent))
        held = least(stage.report, count_rows(self.recipe.held_out))
        tokens = fmean(map(self.tokens, stage.tokens))
        return [self.sdrpn(how, used, tokens), Work(_HELD_OUT, held, tokens, _LOOKED_AT, len(stage.tokens))]

    def sdrpn(self, how: Optimisation, rows: int | None, tokens: float) -> Work:
        return self.training("SD-RPN", how, rows, tokens, self.recipe.depth - 0.7)  # of the last layer query and keys

    def postsft(self, rows: int | None) -> list[Work]:
        stage, coarse = self.recipe.postsft, self.tokens(None)
        rows, again = least(stage.records, rows), least(stage.refit_records, count_rows(self.recipe.data))
        return [
            Work("answered", rows, coarse, stage.batch),
            Work("looked at", rows, coarse, stage.batch),
            Work("answered with a crop", rows, coarse + self.crop, stage.batch),
            self.training(_BASE, stage.optimisation, rows, coarse + self.crop, self.layers),
            *self.labelled(again, " anew"),
            *self.fitted(stage.refit, again),
        ]

    def regions(self, rows: int | None) -> list[Work]:
        stage, shown = self.recipe.regions, self.recipe.max_regions
        rows, tokens = least(stage.records, rows), fmean(map(self.tokens, stage.tokens))
        # without a region, with those proposed, without each of several, with a control, and with each candidate
        sets = 3 + (shown if shown > 1 else 0) + stage.next_peaks + stage.moves
        read = tokens + shown * self.crop
        return [
            Work("looked at", rows, tokens, stage.batch, stage.rounds),
            Work("at most read with the answer", rows, read, stage.batch, stage.rounds * sets),
            self.sdrpn(stage.optimisation, None if rows is None else rows * stage.rounds, tokens),
        ]

    def gate(self, rows: int | None) -> list[Work]:
        stage = self.recipe.gate
        rows, lowest = least(stage.records, rows), self.tokens(stage.tokens[0])
        work = [Work("answered", rows, fmean(map(self.tokens, stage.tokens)), stage.batch, len(stage.tokens))]
        if stage.with_crop:
            work.append(Work("looked at", rows, lowest, stage.batch))
            work.append(Work("answered with a crop", rows, lowest + self.crop, stage.batch))
        if stage.own_calls:
            work.append(Work(_OWN_CALLS, rows, lowest + 2 * self.crop, 1))
        read = fmean(self.tokens(stage.tokens[at]) for at in stage.budgets_read)
        return [*work, self.training("the gate", stage.optimisation, rows, read, self.recipe.gate_depth)]

    def further(self, rows: int | None) -> list[Work]:
        stage, looked = self.recipe.further, self.tokens(self.recipe.labelling.tokens)
        rows, longest = least(stage.records, rows), looked + stage.crops * self.crop
        read = fmean(map(self.tokens, stage.tokens)) + self.crop * stage.crops / 2
        layers = self.recipe.depth - 0.7 + self.recipe.gate_depth
        return [
            Work("looked at", rows, looked, stage.batch),
            Work("at most answered, and asked for a call", rows, longest, stage.batch, 2 * stage.crops),
            self.training("gate and SD-RPN", stage.optimisation, rows, read, layers),
        ]

    def calibrate(self) -> list[Work]:
        """Without known boxes, all questions are answered once, and wrong ones with everything that may help."""
        recipe, target, gate = self.recipe, self.recipe.calibration, self.recipe.gate
        rows, seen = least(target.records, count_rows(recipe.held_out)), self.tokens(target.tokens)
        work = [Work(_HELD_OUT, rows, seen, _LOOKED_AT)]
        if all(one.is_needle for one in recipe.held_out):
            return work
        work.append(Work("answered if their boxes are unknown", rows, seen, gate.batch))
        higher = [self.tokens(one) for one in target.higher_tokens or gate.tokens if self.tokens(one) > seen]
        if higher:
            work.append(Work("at most answered at more tokens", rows, fmean(higher), gate.batch, len(higher)))
        tried = len(candidates(recipe))
        work.append(Work("at most answered with a crop", rows, seen + self.crop, gate.batch, tried))
        if gate.own_calls:
            work.append(Work(_OWN_CALLS, rows, seen + 2 * self.crop, 1))
        return work


def work_of(recipe: BranchRecipe, stage: StageName, views: ViewBudget, *, layers: int) -> list[Work]:
    """Return the work of a stage in order, for a base with these budgets and layers (0: unknown)."""
    estimate = _Estimate(recipe, views, layers)
    works: dict[StageName, Callable[[int | None], list[Work]]] = {
        "select-heads": lambda rows: estimate.attended(least(recipe.heads.records, rows)),
        "label": estimate.labelled,
        "sdrpn": lambda rows: estimate.fitted(recipe.sdrpn.optimisation, rows),
        "postsft": estimate.postsft,
        "regions": estimate.regions,
        "gate": estimate.gate,
        "calibrate": lambda _: estimate.calibrate(),
        "further": estimate.further,
    }
    return works[stage](count_rows(recipe.asked(stage)))


def least(*counts: int | None) -> int | None:
    """Return the lowest of the counts that are known."""
    return min((count for count in counts if count is not None), default=None)


def require_layers(recipe: BranchRecipe) -> None:
    """Raise ConfigError if a base whose shape is known has no layers that a new SD-RPN could start from."""
    shape = shape_of(recipe.model)
    if shape is None:
        return
    k = default_k(shape.layers) if recipe.k is None else recipe.k
    if k + recipe.depth > shape.layers:
        raise ConfigError(
            f"k {k} and depth {recipe.depth} need a base of {k + recipe.depth} layers or more; {recipe.model} has "
            f"{shape.layers}. Choose a smaller k or depth."
        )


def describe(recipe: BranchRecipe, stage: StageName, *, processes: int = 1) -> str:
    """Describe the cost of one stage on so many devices in lines; ConfigError if a local source of data is missing."""
    preset = resolve_model(preset_of(recipe.model) or recipe.model)
    shape = shape_of(recipe.model)
    work = work_of(recipe, stage, preset.budget or UNKNOWN_BUDGET, layers=0 if shape is None else shape.layers)
    lines = [f"model        {recipe.model} ({preset.source})", f"stage        {stage}"]
    lines += [line for one in work for line in one.describe(shape, processes)]
    if all(one.how is None for one in work):
        lines.append("steps        none: nothing is trained")
    total = sum(one.rows * one.times * one.tokens for one in work if one.rows is not None)
    unknown = ", and those of unknown rows" if any(one.rows is None for one in work) else ""
    lines.append(f"in all       {_amount(total)} tokens{unknown}")
    if shape is None or shape.base_gb is None:
        lacking = "config" if shape is None else "weights"
        lines.append(f"memory       unknown: the {lacking} of {recipe.model} cannot be looked at without a download")
        return "\n".join(lines)
    lines.append(f"memory       about {max(one.gb(shape) for one in work):.1f} GB a device")
    for one in work:
        if one.gb(shape) <= DEVICE_GB:
            continue
        lines.append(f"too large    {one.gb(shape):.0f} GB for {one.what} do not fit a device of {DEVICE_GB} GB")
        if one.own:
            least_count = max(2, processes)
            fitting = (n for n in range(least_count, 65) if one.gb(shape, sharded=n) <= DEVICE_GB)
            spread = next(fitting, least_count)
            lines += [
                "             every device holds weights, gradients and moments, however many there are. Spread them",
                f"             (about {one.gb(shape, sharded=spread):.0f} GB on each of {spread}): accelerate launch "
                "--config_file",
                f"             rl/recipes/accelerate/zero2.yaml --num_processes {spread} -m ...",
            ]
        else:
            lines.append("             take smaller batches, or gradient_checkpointing")
    return "\n".join(lines)


def _amount(count: float) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"
