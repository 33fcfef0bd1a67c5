"""What a stage will cost, before anything is loaded: rows, steps, tokens and memory, from the recipe alone.

Counted is what goes through the base: questions that are answered or looked at, and rows that are trained on. Tokens
are those of prompts. What cannot be known is said to be unknown: how many rows a hub dataset has that is taken whole,
and how large a base is whose config is not on this machine.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final, NamedTuple

from qzoom_agent.config import ViewBudget
from qzoom_agent.models.presets import UNKNOWN_BUDGET, preset_of, resolve_model
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation
from qzoom_agent.training.branches.calibrate import candidates
from qzoom_agent.training.branches.dataset_size import rows_of
from qzoom_agent.training.branches.fitting import steps
from qzoom_agent.training.branches.memory import DEVICE_GB, Shape, fitting, passing, shape_of, trained_weights

_TEXT_TOKENS: Final = 60
"""Of a prompt, about."""
_LOOKED_AT: Final = 16
"""Rows of a batch that is only looked at."""


class Pass(NamedTuple):
    """Questions that go through the base."""

    what: str
    rows: int | None
    """None: unknown."""
    tokens: float
    """Of a prompt."""
    batch: int
    times: int = 1
    """How often each."""


class Fit(NamedTuple):
    """Weights that are trained."""

    what: str
    how: Optimisation
    rows: int | None
    """Of all epochs, at most; None: unknown."""
    tokens: float
    layers: float
    own: bool = False
    """Of the base itself."""


Work = Pass | Fit


class Planner:
    """The work of each stage of one recipe."""

    def __init__(self, recipe: BranchRecipe, views: ViewBudget, *, layers: int) -> None:
        """`layers`: of the base; 0 if that is not known."""
        self.recipe, self.layers = recipe, layers
        self.coarse = views.coarse_max_tokens + _TEXT_TOKENS
        self.crop = views.crop_max_tokens

    def of(self, stage: str) -> list[Work]:
        """In order."""
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
            return [*self._at_budgets(rows), Fit("the gate", how, times(rows, how.epochs), tokens, recipe.gate_depth)]
        return self._calibrated()

    def _calibrated(self) -> list[Work]:
        """Where no box is known, all are answered once, and those that are wrong with all that may mend them."""
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
            "SD-RPN", how, times(used, how.epochs), tokens, self.recipe.depth - 0.7
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
            Fit("the base", how, times(rows, how.epochs), self.coarse + self.crop, self.layers, own=True),
            *self._labelled(" anew", again),
            *self._sdrpn(stage.refit, again),
        ]


def least(*counts: int | None) -> int | None:
    """The least of those that are known."""
    return min((count for count in counts if count is not None), default=None)


def times(count: int | None, factor: int) -> int | None:
    """A count so many times; None where it is unknown."""
    return None if count is None else count * factor


def describe(recipe: BranchRecipe, stage: str, *, processes: int = 1) -> str:
    """The plan of one stage as lines of text.

    Raises:
        ConfigError: a local source of data is not there.
    """
    preset = resolve_model(preset_of(recipe.model) or recipe.model)
    shape = shape_of(recipe.model)
    planner = Planner(recipe, preset.budget or UNKNOWN_BUDGET, layers=0 if shape is None else shape.layers)
    work = planner.of(stage)
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
    batch = how.batch * how.accumulation * processes
    count = "unknown" if one.rows is None else f"at most {steps(how, one.rows, processes=processes)}"
    size = f"{batch} rows: {how.batch} a device, {how.accumulation} accumulated, on {processes} devices"
    weights = "unknown" if shape is None else f"about {_amount(trained_weights(shape, one.layers, own=one.own))}"
    return [f"steps        {count}, of {size}", f"weights      {weights}"]


def _memory(model: str, shape: Shape | None, work: Sequence[Work], processes: int) -> list[str]:
    if shape is None or shape.base_gb is None:
        lacking = "config" if shape is None else "weights"
        return [f"memory       unknown: the {lacking} of {model} cannot be looked at without a download"]
    needed = [
        passing(shape, rows=one.batch, tokens=one.tokens)
        if isinstance(one, Pass)
        else fitting(shape, one.how, tokens=one.tokens, layers=one.layers, own=one.own)
        for one in work
    ]
    lines = [f"memory       about {max(needed):.1f} GB a device"]
    for one, need in zip(work, needed, strict=True):
        if need <= DEVICE_GB:
            continue
        lines.append(f"too large    {need:.0f} GB for {one.what} do not fit a device of {DEVICE_GB} GB")
        if isinstance(one, Fit) and one.own:
            spread = max(2, processes)
            less = fitting(shape, one.how, tokens=one.tokens, layers=one.layers, own=True, sharded=spread)
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
