"""Measure the savings of the review: the same weights with and without it, or two trainings, on an even mix of tasks.

    python evals/review_savings.py runs/evidence                          explicit against hybrid
    python evals/review_savings.py runs/accuracy-only runs/crop-price --policies explicit
    python evals/review_savings.py runs/evidence:explicit runs/judge:hybrid
    python evals/review_savings.py runs/evidence --whole runs/boards    and what a right answer costs beside that

Reads the run folders that `evals/evidence.py` wrote and asks the model nothing. Every task counts with as many
questions; differences are paired, question by question, with their intervals. `--whole` is a run of a model
that reads whole boards instead, of some or all of the tasks (all: needle-global needle-scene needle-doc needle-hop):

    qzoom eval needle-scene needle-doc --n 500 --policy direct --budget 576 --model runs/rival --out runs/boards
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

import numpy as np

from evidence import POLICIES, Case
from qzoom_agent.config import PolicyName
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.stats import Paired, draws, paired
from qzoom_agent.evaluation.tasks.needle import TASK_NAMES
from qzoom_agent.report.markdown import markdown_table


class Side(NamedTuple):
    """One policy of one model."""

    name: str
    rows: list[SampleResult]
    """Of all tasks, as many of each, task by task."""


def _redundant(row: SampleResult) -> float:
    return 0.0 if row.redundancy is None else 100.0 * row.redundancy.redundant


def _right(row: SampleResult) -> float:
    return next(iter(row.scores.values())).value if row.scores else 0.0


FIGURES: Final[dict[str, Callable[[SampleResult], float]]] = {
    "accuracy, %": lambda row: 100.0 * _right(row),
    "crops for 100 questions": lambda row: 100.0 * row.zooms,
    "redundant": _redundant,
    "turns": lambda row: float(row.turns),
    "written tokens": lambda row: float(row.usage.written_tokens),
    "visual tokens": lambda row: float(row.visual_tokens),
}
"""Compared figures, each a mean over questions."""


def load(folder: Path, policy: PolicyName) -> Side:
    """Return the rows of a policy.

    Raises:
        ConfigError: a task was not run to its end, or was run before redundant crops were counted.
    """
    each: list[list[SampleResult]] = []
    for task in TASK_NAMES:
        place = folder / Case(task, policy).name
        if not (place / "results.json").is_file():
            raise ConfigError(
                f"{place} has no results yet. Run `python evals/evidence.py --out {folder}` with its model."
            )
        rows = RunFolder.existing(place).latest()
        if any(row.redundancy is None and row.status != "error" for row in rows):
            raise ConfigError(f"{place} does not say which crops were redundant. Delete it and run it again.")
        each.append(sorted(rows, key=lambda row: row.index))
    count = min(len(rows) for rows in each)
    return Side(f"{folder.name}: {policy}", [row for rows in each for row in rows[:count]])


def table(sides: Sequence[Side]) -> str:
    """Return a table with a line for each side, and one for each side minus the first."""
    names = [f"{len(sides[0].rows)} questions", *FIGURES, "needless / repeated / missed", "zoomed on needle-global"]
    lines = []
    for side in sides:
        cells = [f"{fmean(value(row) for row in side.rows):.1f}" for value in FIGURES.values()]
        lines.append([side.name, *cells, _reasons(side), _needless(side), _price(side)])
    first = sides[0]
    for side in sides[1:]:
        if [row.id for row in side.rows] != [row.id for row in first.rows]:
            raise ConfigError(f"{side.name} and {first.name} were asked different questions: use the same --n, --seed.")
        found = [_difference(first, side, value) for value in FIGURES.values()]
        lines.append([f"{side.name} minus {first.name}", *found, "", "", ""])
    return markdown_table([*names, "visual tokens a right answer"], lines)


def _difference(first: Side, second: Side, value: Callable[[SampleResult], float]) -> str:
    before, after = ([value(row) for row in side.rows] for side in (first, second))
    found: Paired = paired(before, after, clusters=[row.cluster for row in second.rows])
    mean = fmean(before)
    change = f", {found.difference / mean:+.0%}" if mean else ""
    interval = f" ({found.interval.low:+.1f} to {found.interval.high:+.1f})" if found.interval else ""
    return f"{found.difference:+.1f}{interval}{change}"


def _reasons(side: Side) -> str:
    known = [row.redundancy for row in side.rows if row.redundancy is not None]
    sums = [sum(getattr(one, reason) for one in known) for reason in ("needless", "repeated", "missed")]
    return " / ".join(f"{100 * value / len(side.rows):.1f}" for value in sums)


def _needless(side: Side) -> str:
    easy = [row.zooms > 0 for row in side.rows if row.task == "needle-global"]
    return f"{fmean(easy):.1%}" if easy else "-"


def _price(side: Side) -> str:
    right = sum(map(_right, side.rows))
    return f"{sum(row.visual_tokens for row in side.rows) / right:.0f}" if right else "-"


def whole_table(sides: Sequence[Side], folder: Path) -> str:
    """Return the cost of a right answer of each side, as a share of that of a model that reads whole boards.

    Counted are the tasks that the run in `folder` asked.

    Raises:
        ConfigError: that run is not finished, or was asked other questions.
    """
    if not (folder / "results.json").is_file():
        raise ConfigError(f"{folder} has no results yet. Let `qzoom eval` finish that run, or give another --whole.")
    known = {row.id: row for row in RunFolder.existing(folder).latest()}
    asked = {row.task for row in known.values()}
    parts = [Side(side.name, [row for row in side.rows if row.task in asked]) for side in sides]
    for side in parts:
        if not side.rows or any(row.id not in known for row in side.rows):
            raise ConfigError(
                f"{folder} and {side.name} were asked different questions: use the same tasks, --n and --seed."
            )
    whole = Side(f"{folder.name}: whole boards", [known[row.id] for row in parts[0].rows])
    tasks = ", ".join(task for task in TASK_NAMES if task in asked)
    names = [f"{len(whole.rows)} questions of {tasks}", "accuracy, %", "visual tokens a right answer"]
    lines = []
    for side in (whole, *parts):
        share = "1" if side is whole else _share(side, whole)
        lines.append([side.name, f"{100 * fmean(map(_right, side.rows)):.1f}", _price(side), share])
    return markdown_table([*names, "of whole boards'"], lines)


def _share(side: Side, whole: Side, *, resamples: int = 2000) -> str:
    """Return the price of a right answer over that of `whole`, with its bootstrap interval over the questions."""
    pairs = zip(side.rows, whole.rows, strict=True)
    sums = np.array([(row.visual_tokens, _right(row), one.visual_tokens, _right(one)) for row, one in pairs])
    resampled = [sums[drawn].sum(axis=1) for drawn in draws(len(sums), resamples)]
    tokens, right, all_tokens, all_right = np.concatenate([sums.sum(axis=0)[None], *resampled]).T
    if not right.all() or not all_tokens.all():
        return "-"
    found = tokens / right * all_right / all_tokens
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return f"{found[0]:.3f} ({low:.3f} to {high:.3f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", help="folders that evals/evidence.py wrote; FOLDER:POLICY for one row of it"
    )
    parser.add_argument("--policies", default="explicit,hybrid", help="to compare; the first of the first is the base")
    parser.add_argument(
        "--whole", type=Path, metavar="RUN", help="a run of whole boards, which right answers are priced by"
    )
    options = parser.parse_args(argv)
    sides = [side for text in options.folders for side in _sides(text, options.policies)]
    print(table(sides))
    if options.whole is not None:
        print(f"\n{whole_table(sides, options.whole)}")
    return 0


def _sides(text: str, policies: str) -> list[Side]:
    """Return the sides that one argument names: of a folder those of `policies`, unless it says which itself."""
    folder, colon, own = text.rpartition(":")
    asked = (own if colon else policies).split(",")
    if strange := sorted(set(asked) - set(POLICIES)):
        raise ConfigError(f"There is no policy {', '.join(strange)}. Choose from {', '.join(POLICIES)}.")
    return [load(Path(folder if colon else text), policy) for policy in POLICIES if policy in asked]


if __name__ == "__main__":
    sys.exit(finished("review_savings", main))
