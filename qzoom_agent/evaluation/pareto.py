"""Accuracy against cost: the coarse view alone at every budget, against a model that looks first.

The baseline is `direct` at each budget up to the full-resolution board. It is compared, at the coarse budgets, with
Q-Zoom (`implicit`: gate, then the proposed crop), the same without its gate (`always`) and with the known needle
instead of the proposal (`oracle`, the upper bound). All are measured in one interleaved run (`interleaved`): same
weights, prompts, questions and machine. `rival` is a second baseline with other weights, such as those of a model that
was fine-tuned on full-resolution images; the better of the two is the baseline of the results.

Two figures sum it up, as in the paper (arXiv 2604.06912): how much faster Q-Zoom is where it is at least as accurate as
the best baseline, and how much more accurate its best is than the baseline's best.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import numpy as np
from pydantic import AliasChoices, Field

from qzoom_agent.agent import Agent
from qzoom_agent.config import PolicyName
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.interleaved import Cell, Table
from qzoom_agent.evaluation.stats import Figures, Interval, draws, paired, wilson
from qzoom_agent.extras import require
from qzoom_agent.report.markdown import markdown_table, percent

TASKS: Final = ("needle-scene", "needle-doc", "needle-global")
BUDGETS: Final = (64, 100, 144, 256, 400, 576)
"""Of the baseline, in visual tokens; the last is the whole board."""
COARSE: Final = (64, 100, 144, 256)
"""Of the coarse view of those that zoom."""
ZOOMING: Final[tuple[PolicyName, ...]] = ("implicit", "always", "oracle")
LABELS: Final = {
    "direct": "baseline",
    "rival": "rival",
    "implicit": "Q-Zoom",
    "always": "Q-Zoom, no gate",
    "oracle": "oracle crop",
}
_PLAIN: Final = ("direct", "rival")
"""Configurations that never zoom."""
_STYLES: Final[dict[str, dict[str, Any]]] = {
    "direct": {"color": "#777777", "marker": "o"},
    "rival": {"color": "#bc4c00", "marker": "D", "linestyle": "--"},
    "implicit": {"color": "#1f6feb", "marker": "o"},
    "always": {"color": "#1f6feb", "marker": "^", "linestyle": ":", "alpha": 0.6},
    "oracle": {"color": "#2da44e", "marker": "s", "linestyle": "--", "alpha": 0.6},
}
_AXES: Final = (("seconds", "seconds a question"), ("visual_tokens", "visual tokens a question"))


class ParetoPoint(Figures):
    """One configuration on one task."""

    task: str = Field(validation_alias=AliasChoices("task", "suite"))
    policy: str
    budget: int
    """Most visual tokens of the coarse view."""
    n: int
    accuracy: float
    interval: Interval
    visual_tokens: float
    """Mean, crops included."""
    token_layers: float
    """Mean."""
    seconds: float
    """Mean; throughput is its inverse."""
    median_seconds: float
    zooms: float
    """Share of the questions that were zoomed."""
    covered: float | None
    """Share of the needles of which 95 % lie in a crop."""


class Headline(Figures):
    """The two figures of a task."""

    task: str
    baseline: ParetoPoint
    """The most accurate of baseline and rival, the cheapest of those."""
    fastest: ParetoPoint | None
    """The fastest Q-Zoom that is no less accurate; None where none is."""
    speed: float | None
    """Seconds of that baseline over seconds of that Q-Zoom."""
    speed_interval: Interval | None
    best: ParetoPoint
    """The most accurate Q-Zoom."""
    gain: float
    """Its accuracy minus that of the baseline, over the same questions."""
    gain_interval: Interval | None


def arms(
    model: str,
    *,
    budgets: Sequence[int],
    coarse: Sequence[int],
    branches: str | Path | None = None,
    rival: str | None = None,
) -> dict[str, Agent]:
    """Return the agents to compare, by "policy@budget"; all but the rival share one copy of the weights.

    Args:
        model: Preset name, folder or hub id.
        budgets: Visual tokens of the baseline.
        coarse: Visual tokens of the coarse view of the others.
        branches: Folder or hub id of the gate and SD-RPN; None: those of the model.
        rival: Another model, under policy `direct` at the budgets of the baseline.

    Raises:
        ConfigError: The model has no branches.
    """
    first = Agent.from_pretrained(model, branches=branches, policy="direct")
    if not first.backend.perceives:
        raise ConfigError(
            f"The model '{model}' has no branches, so there is nothing to compare. Train them (qzoom train branches), "
            "or give their folder with --branches."
        )
    named: list[tuple[PolicyName, int]] = [("direct", budget) for budget in budgets]
    named += [(policy, budget) for policy in ZOOMING for budget in coarse]
    found = {
        f"{policy}@{budget}": first.replace(policy=policy, **{"budget.coarse_tokens": budget})
        for policy, budget in named
    }
    if rival is not None:
        other = Agent.from_pretrained(rival, policy="direct")
        found |= {f"rival@{budget}": other.replace(**{"budget.coarse_tokens": budget}) for budget in budgets}
    return found


def points(task: str, table: Table) -> list[ParetoPoint]:
    """Return the figures of every configuration."""
    return [_point(task, name, cells) for name, cells in table.items()]


def _point(task: str, name: str, cells: Sequence[Cell]) -> ParetoPoint:
    policy, _, budget = name.partition("@")
    right = sum(cell.correct for cell in cells)
    covered = [cell.covered for cell in cells if cell.covered is not None]
    return ParetoPoint(
        task=task,
        policy=policy,
        budget=int(budget),
        n=len(cells),
        accuracy=right / len(cells),
        interval=wilson(right, len(cells)),
        visual_tokens=fmean(cell.visual_tokens for cell in cells),
        token_layers=fmean(cell.token_layers for cell in cells),
        seconds=fmean(cell.seconds for cell in cells),
        median_seconds=median(cell.seconds for cell in cells),
        zooms=fmean(cell.zoomed for cell in cells),
        covered=fmean(covered) if covered else None,
    )


def headline(task: str, table: Table) -> Headline:
    """Return the speed-up at no lower accuracy, and the gain of the best over the best."""
    every = {name: _point(task, name, cells) for name, cells in table.items()}
    plain = {name: one for name, one in every.items() if one.policy in _PLAIN}
    ours = {name: one for name, one in every.items() if one.policy == "implicit"}
    base = min(plain, key=lambda name: (-plain[name].accuracy, plain[name].budget))
    best = min(ours, key=lambda name: (-ours[name].accuracy, ours[name].budget))
    enough = [name for name in ours if ours[name].accuracy >= plain[base].accuracy]
    fastest = min(enough, key=lambda name: ours[name].seconds) if enough else None
    gain = paired([cell.correct for cell in table[base]], [cell.correct for cell in table[best]])
    seconds = {name: [cell.seconds for cell in cells] for name, cells in table.items()}
    speed, speed_interval = (None, None) if fastest is None else ratio(seconds[base], seconds[fastest])
    return Headline(
        task=task,
        baseline=plain[base],
        fastest=None if fastest is None else ours[fastest],
        speed=speed,
        speed_interval=speed_interval,
        best=ours[best],
        gain=gain.difference,
        gain_interval=gain.interval,
    )


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, Interval | None]:
    """Return the ratio of the means of paired values, and its 95 % bootstrap interval (None for fewer than two)."""
    pairs = np.array([above, below], dtype=np.float64)
    value = float(pairs[0].mean() / pairs[1].mean())
    if pairs.shape[1] < 2:
        return value, None
    sums = np.concatenate([pairs[:, drawn].sum(axis=2) for drawn in draws(pairs.shape[1], 2000)], axis=1)
    low, high = np.quantile(sums[0] / sums[1], [0.025, 0.975])
    return value, Interval(float(low), float(high))


def headline_table(headlines: Sequence[Headline]) -> str:
    """Return a Markdown table with a line for each task."""
    names = ("task", "n", "baseline's best", "Q-Zoom at least as accurate", "speed", "Q-Zoom's best", "difference")
    return markdown_table(names, map(_headline_cells, headlines))


def _headline_cells(one: Headline) -> tuple[str, ...]:
    whose = " (rival)" if one.baseline.policy == "rival" else ""
    return (
        one.task,
        str(one.baseline.n),
        f"{percent(one.baseline.accuracy, 1)} at {one.baseline.budget}{whose}",
        "none" if one.fastest is None else f"{percent(one.fastest.accuracy, 1)} at {one.fastest.budget}",
        "not reached" if one.speed is None else f"{one.speed:.2f}x{_range(one.speed_interval, '.2f')}",
        f"{percent(one.best.accuracy, 1)} at {one.best.budget}",
        f"{100 * one.gain:+z.1f}{_range(one.gain_interval, '+z.1f', 100)} points",
    )


def points_table(found: Sequence[ParetoPoint]) -> str:
    """Return a Markdown table with a line for each configuration."""
    names = ("task", "", "coarse budget", "accuracy", "95 % interval", "zooms", "needle in crop", "visual tokens")
    return markdown_table((*names, "token-layers", "seconds", "a second"), map(_point_cells, found))


def _point_cells(one: ParetoPoint) -> tuple[str, ...]:
    return (
        one.task,
        LABELS[one.policy],
        str(one.budget),
        percent(one.accuracy, 1),
        f"{percent(one.interval.low, 1)} to {percent(one.interval.high, 1)}",
        percent(one.zooms),
        "-" if one.covered is None or one.policy in _PLAIN else percent(one.covered, 1),
        f"{one.visual_tokens:.0f}",
        f"{one.token_layers:.0f}",
        f"{one.seconds:.3f}",
        f"{1 / one.seconds:.1f}",
    )


def _range(interval: Interval | None, form: str, scale: float = 1.0) -> str:
    return "" if interval is None else f" ({scale * interval[0]:{form}} to {scale * interval[1]:{form}})"


def draw(found: Sequence[ParetoPoint], *paths: Path) -> None:
    """Write the figure in the formats of the paths' names; the same points give the same bytes of SVG."""
    require("matplotlib", extra="eval", use="A figure")
    import matplotlib

    matplotlib.use("Agg")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "pareto", "font.size": 9, "axes.spines.top": False}):
            _draw(found, path)


def _draw(found: Sequence[ParetoPoint], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    tasks = list(dict.fromkeys(one.task for one in found))
    figure, grid = pyplot.subplots(
        len(_AXES), len(tasks), figsize=(3.6 * len(tasks), 5.6), squeeze=False, sharey="col", layout="constrained"
    )
    for row, (key, label) in enumerate(_AXES):
        for column, task in enumerate(tasks):
            axes = grid[row][column]
            _curves(axes, [one for one in found if one.task == task], key)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
            axes.spines["right"].set_visible(False)
            if row == 0:
                axes.set_title(f"{task} (n = {next(one.n for one in found if one.task == task)})")
            if column == 0:
                axes.set_ylabel("accuracy")
    grid[0][0].legend(frameon=False, fontsize=8)
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=130, metadata=metadata)
    pyplot.close(figure)


def _curves(axes: Any, found: Sequence[ParetoPoint], key: str) -> None:
    curves: dict[str, list[ParetoPoint]] = {}
    for one in sorted(found, key=lambda one: one.budget):
        curves.setdefault(one.policy, []).append(one)
    for policy, curve in curves.items():
        high = [one.interval.high - one.accuracy for one in curve]
        low = [one.accuracy - one.interval.low for one in curve]
        axes.errorbar(
            [getattr(one, key) for one in curve],
            [one.accuracy for one in curve],
            yerr=[low, high],
            label=LABELS[policy],
            markersize=4,
            linewidth=1.3,
            elinewidth=0.7,
            capsize=2,
            **_STYLES[policy],
        )
