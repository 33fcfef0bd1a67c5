"""What the review saves: the same weights with and without it, or two ways of training, on an even mix of the suites.

    python -m qzoom_agent.evals.saving runs/evidence                          explicit against hybrid
    python -m qzoom_agent.evals.saving runs/accuracy-only runs/crop-price --policies explicit
    python -m qzoom_agent.evals.saving runs/evidence:explicit runs/judge:hybrid

Reads the run folders that `evals.evidence` wrote and asks the model nothing. Every suite counts with as many questions;
differences are paired, question by question, with their bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

from qzoom_agent.config import PolicyName
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evals.evidence import POLICIES, Case
from qzoom_agent.evals.folder import RunFolder
from qzoom_agent.evals.rows import Row
from qzoom_agent.evals.stats import Paired, paired
from qzoom_agent.evals.suites.needle import SUITES


class Side(NamedTuple):
    """One policy of one model."""

    name: str
    rows: list[Row]
    """Of all suites, as many of each, suite by suite."""


def _redundant(row: Row) -> float:
    return 0.0 if row.redundancy is None else 100.0 * row.redundancy.redundant


FIGURES: Final[dict[str, Callable[[Row], float]]] = {
    "accuracy, %": lambda row: 100.0 * (next(iter(row.scores.values())).value if row.scores else 0.0),
    "crops for 100 questions": lambda row: 100.0 * row.zooms,
    "redundant": _redundant,
    "turns": lambda row: float(row.turns),
    "written tokens": lambda row: float(row.usage.written_tokens),
    "visual tokens": lambda row: float(row.visual_tokens),
}
"""What is compared, each a mean over questions."""


def load(folder: Path, policy: PolicyName) -> Side:
    """The rows of a policy.

    Raises:
        ConfigError: a suite was not run to its end, or was run before redundant crops were counted.
    """
    each: list[list[Row]] = []
    for suite in SUITES:
        place = folder / Case(suite, policy).name
        if not (place / "results.json").is_file():
            raise ConfigError(
                f"{place} has no results yet. Run `python -m qzoom_agent.evals.evidence --out {folder}` with its model."
            )
        rows = RunFolder.existing(place).latest()
        if any(row.redundancy is None and row.status != "error" for row in rows):
            raise ConfigError(f"{place} does not say which crops were redundant. Delete it and run it again.")
        each.append(sorted(rows, key=lambda row: row.index))
    count = min(len(rows) for rows in each)
    return Side(f"{folder.name}: {policy}", [row for rows in each for row in rows[:count]])


def table(sides: Sequence[Side]) -> str:
    """One line a side, and one for each side minus the first."""
    lines = [
        f"| {len(sides[0].rows)} questions | "
        + " | ".join(FIGURES)
        + " | needless / repeated / missed | zoomed on needle-global | visual tokens a right answer |",
        "|---" * (len(FIGURES) + 4) + "|",
    ]
    for side in sides:
        cells = [f"{fmean(value(row) for row in side.rows):.1f}" for value in FIGURES.values()]
        lines.append(f"| {side.name} | {' | '.join([*cells, _reasons(side), _needless(side), _price(side)])} |")
    first = sides[0]
    for side in sides[1:]:
        if [row.id for row in side.rows] != [row.id for row in first.rows]:
            raise ConfigError(f"{side.name} and {first.name} were asked different questions: use the same --n, --seed.")
        found = [_difference(first, side, value) for value in FIGURES.values()]
        lines.append(f"| {side.name} minus {first.name} | {' | '.join(found)} | | | |")
    return "\n".join(lines)


def _difference(first: Side, second: Side, value: Callable[[Row], float]) -> str:
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
    easy = [row.zooms > 0 for row in side.rows if row.suite == "needle-global"]
    return f"{fmean(easy):.1%}" if easy else "-"


def _price(side: Side) -> str:
    right = sum(FIGURES["accuracy, %"](row) for row in side.rows) / 100
    return f"{sum(row.visual_tokens for row in side.rows) / right:.0f}" if right else "-"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders that evals.evidence wrote; FOLDER:POLICY for one row of it")
    parser.add_argument("--policies", default="explicit,hybrid", help="to compare; the first of the first is the base")
    options = parser.parse_args(argv)
    print(table([side for text in options.folders for side in _sides(text, options.policies)]))
    return 0


def _sides(text: str, policies: str) -> list[Side]:
    """The sides that one argument names: of a folder those of `policies`, unless it says which itself."""
    folder, colon, own = text.rpartition(":")
    asked = (own if colon else policies).split(",")
    if strange := sorted(set(asked) - set(POLICIES)):
        raise ConfigError(f"There is no policy {', '.join(strange)}. Choose from {', '.join(POLICIES)}.")
    return [load(Path(folder if colon else text), policy) for policy in POLICIES if policy in asked]


if __name__ == "__main__":
    sys.exit(finished("saving", main))
