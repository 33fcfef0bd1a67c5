"""How sure a measured figure is: an interval for a share, an interval for a mean, and a paired comparison.

Everything is deterministic (the bootstrap has a seed) and needs no more than numpy. Nothing here returns a zero-width
interval because there is too little data: where an interval cannot be had, the result is None or the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class Paired(NamedTuple):
    """What changed between two runs over the same samples: `after` minus `before`."""

    n: int
    difference: float
    """Mean of the per-sample differences; for right/wrong values, the change of accuracy as a share."""
    interval: Interval | None
    gained: int
    """Samples whose value rose (wrong before, right after)."""
    lost: int
    """Samples whose value fell."""
    p: float
    """Two-sided exact sign test (McNemar's for right/wrong values): only samples that changed count."""


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share: `successes` of `n`.

    Small n: the textbook interval p +- 1.96 sqrt(p (1 - p) / n) has zero width at 0 of n and at n of n, and leaves
    [0, 1] near them; Wilson's does neither, and holds its promise from about five samples on. 20 of 20 is not
    certainty: it gives 0.84 to 1. With n = 0 nothing is known: the whole range, not an error, so that an empty
    category does not end a report.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n; got {successes} of {n}.")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the exact bound is the end itself; rounding must not put the measured share outside its interval.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def bootstrap(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval for the mean of `values` (seconds, tokens, per-sample differences).

    Small n: None for fewer than two values, because resampling one value gives itself each time, an interval of zero
    width that would claim certainty. Below about ten values the interval exists but is too narrow (it misses the true
    mean more often than 1 - `confidence`), as every resample is drawn from the few values seen. Values that are all
    equal give zero width whatever n is: for right/wrong values use `wilson`, which does not.
    """
    if len(values) < 2:
        return None
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # One resample at a time: an index matrix for 100 000 values would take over a gigabyte.
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired(before: Sequence[float], after: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Paired:
    """Compare two runs sample by sample; `before[i]` and `after[i]` must be of the same sample.

    Pairing removes what makes samples easy or hard, so it finds differences that two separate intervals hide. The
    interval is the bootstrap's over the differences. Small n: the sign test is exact, so with fewer than six changed
    samples no outcome is below p = 0.05; with none changed p is 1 and the interval has zero width because nothing
    differed, which does not prove that nothing would. ValueError if the lengths differ or nothing is given.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Paired runs have the same samples, at least one; got {len(before)} and {len(after)}.")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return Paired(
        n=len(differences),
        difference=sum(differences) / len(differences),
        interval=bootstrap(differences, confidence=confidence, seed=seed),
        gained=gained,
        lost=lost,
        p=min(1.0, 2 * tail / 2**changed),
    )
