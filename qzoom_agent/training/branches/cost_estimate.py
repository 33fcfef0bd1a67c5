"""The cost of a stage, estimated from the recipe before anything is loaded: rows, steps, tokens and memory.

Counted are the rows that go through the base, and the tokens of their prompts. Unknown are the rows of a hub dataset
that is taken whole, and the memory of a base whose config is not on this machine. Memory follows from the shape of a
base, well enough to tell 12 GB from 40 GB.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qzoom_agent.config import ViewBudget
from qzoom_agent.models.presets import PRESETS, UNKNOWN_BUDGET, preset_of, resolve_model
from qzoom_agent.perception.adapters import full_layers, text_model
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation, StageName
from qzoom_agent.training.branches.calibrate import candidates
from qzoom_agent.training.branches.dataset import count_rows
from qzoom_agent.training.branches.fitting import optimizer_steps

_TEXT_TOKENS: Final = 60
"""Text tokens of a prompt, roughly."""
_LOOKED_AT: Final = 16
"""Rows of a batch that is only looked at."""

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


def work_of(recipe: BranchRecipe, stage: StageName, views: ViewBudget, *, layers: int) -> list[Work]:
    """Return the work of a stage in order, for a base with these budgets and layers (0: unknown)."""
    coarse, crop = views.coarse_max_tokens + _TEXT_TOKENS, views.crop_max_tokens
    rows, how, gate = count_rows(recipe.asked(stage)), recipe.labelling, recipe.gate

    def over(tokens: int | None) -> int:
        return coarse if tokens is None else tokens + _TEXT_TOKENS

    def training(what: str, optimisation: Optimisation, count: int | None, tokens: float, trained: float) -> Work:
        total = None if count is None else count * optimisation.num_train_epochs
        batch = optimisation.per_device_train_batch_size
        return Work(what, total, tokens, batch, how=optimisation, layers=trained, own=what == "the base")

    def attended(when: str, count: int | None) -> list[Work]:
        names = ["read with the answer"] if how.response == "gold" else ["answered", "read with the answer"]
        return [Work(name + when, count, over(how.tokens), how.batch) for name in names]

    def labelled(when: str, count: int | None) -> list[Work]:
        cropped = [Work(f"answered with a crop{when}", count, coarse + crop, how.batch)] if how.keep == "crop" else []
        return attended(when, count) + cropped

    def sdrpn(optimisation: Optimisation, count: int | None) -> list[Work]:
        used = None if count is None else math.ceil(recipe.sdrpn.share * count * (1 + recipe.sdrpn.absent))
        held = least(recipe.sdrpn.report, count_rows(recipe.held_out))
        tokens = fmean(map(over, recipe.sdrpn.tokens))
        fit = training("SD-RPN", optimisation, used, tokens, recipe.depth - 0.7)  # of the last layer query and keys
        return [fit, Work("held out, looked at", held, tokens, _LOOKED_AT, len(recipe.sdrpn.tokens))]

    if stage == "select-heads":
        return attended("", least(recipe.heads.records, rows))
    if stage == "label":
        return labelled("", rows)
    if stage == "sdrpn":
        return sdrpn(recipe.sdrpn.optimisation, rows)
    if stage == "postsft":
        tuning, rows = recipe.postsft, least(recipe.postsft.records, rows)
        again = least(tuning.refit_records, count_rows(recipe.data))
        return [
            Work("answered", rows, coarse, tuning.batch),
            Work("looked at", rows, coarse, tuning.batch),
            Work("answered with a crop", rows, coarse + crop, tuning.batch),
            training("the base", tuning.optimisation, rows, coarse + crop, layers),
            *labelled(" anew", again),
            *sdrpn(tuning.refit, again),
        ]
    if stage == "regions":
        learn = recipe.regions
        rows, tokens, shown = least(learn.records, rows), fmean(map(over, learn.tokens)), recipe.max_regions
        # without a region, with those proposed, without each of several, with a control, and with each candidate
        sets = 3 + (shown if shown > 1 else 0) + learn.next_peaks + learn.moves
        again = None if rows is None else rows * learn.rounds
        return [
            Work("looked at", rows, tokens, learn.batch, learn.rounds),
            Work("at most read with the answer", rows, tokens + shown * crop, learn.batch, learn.rounds * sets),
            training("SD-RPN", learn.optimisation, again, tokens, recipe.depth - 0.7),
        ]
    if stage == "gate":
        rows, lowest = least(gate.records, rows), over(gate.tokens[0])
        work = [Work("answered", rows, fmean(map(over, gate.tokens)), gate.batch, len(gate.tokens))]
        if gate.with_crop:
            work.append(Work("looked at", rows, lowest, gate.batch))
            work.append(Work("answered with a crop", rows, lowest + crop, gate.batch))
        if gate.own_calls:
            work.append(Work("at most answered by own calls", rows, lowest + 2 * crop, 1))
        read = fmean(over(gate.tokens[at]) for at in gate.budgets_read)
        return [*work, training("the gate", gate.optimisation, rows, read, recipe.gate_depth)]
    if stage == "further":
        more = recipe.further
        rows, longest = least(more.records, rows), over(how.tokens) + more.crops * crop
        read = fmean(map(over, more.tokens)) + crop * more.crops / 2
        return [
            Work("looked at", rows, over(how.tokens), more.batch),
            Work("at most answered, and asked for a call", rows, longest, more.batch, 2 * more.crops),
            training("gate and SD-RPN", more.optimisation, rows, read, recipe.depth - 0.7 + recipe.gate_depth),
        ]
    # without known boxes, all questions are answered once, and wrong ones with everything that may help
    target = recipe.calibration
    rows, seen = least(target.records, count_rows(recipe.held_out)), over(target.tokens)
    work = [Work("held out, looked at", rows, seen, _LOOKED_AT)]
    if all(one.is_needle for one in recipe.held_out):
        return work
    work.append(Work("answered if their boxes are unknown", rows, seen, gate.batch))
    higher = [over(budget) for budget in target.higher_tokens or gate.tokens if over(budget) > seen]
    if higher:
        work.append(Work("at most answered at more tokens", rows, fmean(higher), gate.batch, len(higher)))
    work.append(Work("at most answered with a crop", rows, seen + crop, gate.batch, len(candidates(recipe))))
    if gate.own_calls:
        work.append(Work("at most answered by own calls", rows, seen + 2 * crop, 1))
    return work


def least(*counts: int | None) -> int | None:
    """Return the lowest of the counts that are known."""
    return min((count for count in counts if count is not None), default=None)


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
            spread = max(2, processes)
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
