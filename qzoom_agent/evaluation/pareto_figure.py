"""Figure of `pareto`: a column for each task, accuracy over seconds and over visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from qzoom_agent.evaluation.pareto import LABELS, ParetoPoint, by_policy
from qzoom_agent.extras import require

_STYLES: Final[dict[str, dict[str, Any]]] = {
    "direct": {"color": "#777777", "marker": "o"},
    "rival": {"color": "#bc4c00", "marker": "D", "linestyle": "--"},
    "implicit": {"color": "#1f6feb", "marker": "o"},
    "always": {"color": "#1f6feb", "marker": "^", "linestyle": ":", "alpha": 0.6},
    "oracle": {"color": "#2da44e", "marker": "s", "linestyle": "--", "alpha": 0.6},
}
_AXES: Final = (("seconds", "seconds a question"), ("visual_tokens", "visual tokens a question"))


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
    for policy, curve in by_policy(found).items():
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
