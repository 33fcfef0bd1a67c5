"""How often the intervals of `qzoom eval` hold the true value, and how often its test finds a difference where none is.

    python evals/interval_coverage.py --runs 1000

Draws runs whose answers agree within clusters (questions of one image) and gives them to `figure` and `paired`. Prints
a Markdown table: for each number of clusters and accuracy, the least and the greatest share over all cluster sizes and
correlations. Nominal are 95 % for intervals and at most 5 % for the test; with few clusters only certain values are
possible, so that both err on the careful side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qzoom_agent.evaluation.stats import figure, paired
from qzoom_agent.report.markdown import markdown_table

SIZES: Final[dict[str, Callable[[int], NDArray[np.intp]]]] = {
    "equal": lambda clusters: np.full(clusters, 4),
    "1 to 20": lambda clusters: 1 + np.arange(clusters) * 19 // (clusters - 1),
    "one holds half": lambda clusters: np.array([2 * clusters, *[2] * (clusters - 1)]),
}
"""Samples of each cluster."""
CORRELATIONS: Final = (0.0, 0.3, 1.0)
"""Of the answers within a cluster."""
CLUSTERS: Final = (2, 5, 10, 50)
ACCURACIES: Final = (0.5, 0.9, 0.97)


class Shares(NamedTuple):
    """Shares of the drawn runs."""

    accuracy: float
    """Their interval held the true accuracy."""
    difference: float
    """The interval of a paired difference held the true one."""
    found: float
    """The test found a difference (p < 0.05) where there was none."""


def simulate(
    *, clusters: int, accuracy: float, sizes: str, correlation: float, runs: int, loss: float = 0.2, seed: int = 0
) -> Shares:
    """Return the shares for one setting; the second run of a pair with a difference is right `loss` less often."""
    rng = np.random.default_rng(seed)
    counts = SIZES[sizes](clusters)
    names = [str(cluster) for cluster, count in enumerate(counts) for _ in range(count)]

    def answers(share: float) -> NDArray[np.float64]:
        if correlation in (0, 1):
            chances = np.full(clusters, share) if correlation == 0 else (rng.random(clusters) < share).astype(float)
        else:
            spread = (1 - correlation) / correlation
            chances = rng.beta(share * spread, (1 - share) * spread, clusters)
        return (rng.random(len(names)) < np.repeat(chances, counts)).astype(float)

    held, held_difference, found = 0, 0, 0
    for _ in range(runs):
        first = answers(accuracy)
        alone = figure(list(first), clusters=names)
        assert alone.interval is not None
        held += alone.interval.low <= accuracy <= alone.interval.high
        # Half the samples are answered alike by both.
        same = rng.random(len(names)) < 0.5
        other = paired(list(first), list(np.where(same, first, answers(accuracy))), clusters=names)
        found += other.p < 0.05
        worse = paired(list(first), list(np.where(same, first, answers(accuracy - loss))), clusters=names)
        assert worse.interval is not None
        held_difference += worse.interval.low <= -loss / 2 <= worse.interval.high
    return Shares(held / runs, held_difference / runs, found / runs)


def table(clusters: Sequence[int], accuracies: Sequence[float], runs: int) -> str:
    """Return the Markdown table of some numbers of clusters and accuracies."""
    lines = []
    for count, accuracy in product(clusters, accuracies):
        shares = [
            simulate(clusters=count, accuracy=accuracy, sizes=sizes, correlation=correlation, runs=runs)
            for sizes, correlation in product(SIZES, CORRELATIONS)
        ]
        cells = [f"{100 * min(each):.1f} to {100 * max(each):.1f} %" for each in zip(*shares, strict=True)]
        lines.append([str(count), str(accuracy), *cells])
    names = ("clusters", "accuracy", "accuracy held", "difference held", "difference found where none is")
    return markdown_table(names, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table for the settings of the command line."""
    flags = argparse.ArgumentParser(description="Coverage of intervals and error rate of the paired test.")
    flags.add_argument("--runs", type=int, default=1000, help="drawn runs of each setting")
    flags.add_argument("--clusters", type=int, nargs="+", default=CLUSTERS)
    flags.add_argument("--accuracies", type=float, nargs="+", default=ACCURACIES)
    options = flags.parse_args(argv)
    print(table(options.clusters, options.accuracies, options.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
