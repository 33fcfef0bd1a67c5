"""Uncertainty of measured figures: an interval for a share, an interval for a mean, and a paired comparison.

Everything is deterministic. Nothing here returns a zero-width interval because there is too little data: where an
interval cannot be had, the result is None or the whole range.

Values that share a cluster (questions about one image, rotations of one question) are not independent. `clusters` names
each value's cluster (Miller 2024, "Adding error bars to evals"). Intervals and tests hold for few clusters of any size:
`evals/interval_coverage.py` counts how often, and docs/evaluation.md has its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from qzoom_agent.extras import require

_Floats = NDArray[np.float64]
CONFIDENCE: Final = 0.95
"""Share of the intervals that hold the true figure."""
_FLIPS: Final = 9_999
_NOISE: Final = 1e-9
"""Values of about 1 that are closer to one another are the same but for rounding."""
_NORMAL: Final = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Figures(BaseModel):
    """Base of results that are written to a file."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class Paired(NamedTuple):
    """The change between two runs over the same samples: `after` minus `before`."""

    n: int
    difference: float
    """Mean of the per-sample differences; for right/wrong values, the change of accuracy as a share."""
    interval: Interval | None
    gained: int
    """Samples whose value rose (wrong before, right after)."""
    lost: int
    """Samples whose value fell."""
    p: float
    """Two-sided, of a sign-flip test; for right/wrong values of independent samples that is McNemar's exact test."""


class Figure(NamedTuple):
    """A measured mean and how sure it is."""

    n: int
    mean: float
    se: float | None
    """Standard error; None for fewer than two clusters."""
    interval: Interval | None
    """95 %; None where it cannot be had."""


def require_scipy() -> None:
    """Raise MissingDependency without scipy, whose import takes a second."""
    require("scipy", extra="eval", use="Evaluation")


def wilson(successes: int, n: int) -> Interval:
    """Return the Wilson score interval for `successes` out of `n` independent right/wrong values.

    It has no zero width at 0 of n and n of n (20 of 20 gives 0.84 to 1), and covers from about five samples on. With
    n = 0 it is the whole range, so that an empty category does not end a report.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n; got {successes} of {n}.")
    return _score_interval(successes / n, n) if n else Interval(0.0, 1.0)


def _score_interval(share: float, n: float) -> Interval:
    z = _NORMAL
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def draws(n: int, resamples: int) -> Iterator[NDArray[np.intp]]:
    """Yield `resamples` samples of n out of n places, with replacement, as matrices of some samples each."""
    rng = np.random.default_rng(0)
    # A matrix of all samples of 100 000 values would take over a gigabyte.
    rows = max(1, 1_000_000 // n)
    for at in range(0, resamples, rows):
        yield rng.integers(0, n, (min(rows, resamples - at), n))


class _Spread(NamedTuple):
    """A mean and the variance of it, of values in clusters of any sizes."""

    n: int
    mean: float
    deviation: float
    """Mean square of the distances from the mean."""
    variance: float
    """0 for fewer than two clusters, and where all values are the same."""
    groups: int
    effective: float
    """Clusters of one size that would be worth as much (Kish)."""

    @classmethod
    def of(cls, values: Sequence[float], clusters: Sequence[str] | None) -> _Spread:
        data = np.asarray(values, dtype=np.float64)
        n, mean = len(data), float(data.mean())
        around = data - mean
        sums, counts = _by_cluster(around, clusters)
        groups, share = len(sums), counts / n
        effective = 1 / float((share**2).sum())
        # Differences of the same size differ in their last bits: 0.3 - 0.2 is not 0.2 - 0.1.
        if groups < 2 or float(np.ptp(data)) <= _NOISE * max(1.0, float(np.abs(data).max())):
            return cls(n, mean, 0.0, 0.0, groups, effective)
        deviation = float((around**2).mean())
        # What the clusters' residuals say (CR2 of Bell and McCaffrey) is too small where by chance only small clusters
        # differ; what a common correlation within clusters says (of an analysis of variance) is not.
        variance = float((sums**2 / (1 - share)).sum()) / n**2
        if groups < n:
            explained = float((sums**2 / counts).sum())
            between, within = explained / (groups - 1), (n * deviation - explained) / (n - groups)
            size = (n - n / effective) / (groups - 1)
            total = max((between + (size - 1) * within) / size, deviation)
            correlation = min(1.0, max(0.0, (between - within) / size / total))
            variance = max(variance, total / n * (1 + (n / effective - 1) * correlation))
        return cls(n, mean, deviation, variance, groups, effective)

    @property
    def quantile(self) -> float:
        """Return Student's t for as many clusters."""
        require_scipy()
        from scipy.special import stdtrit  # scipy.stats has the same under plainer names, and takes seconds to import

        return float(stdtrit(self.groups - 1, (1 + CONFIDENCE) / 2))

    def interval(self) -> Interval | None:
        """Return the interval of the mean of values of any range; None if nothing tells how much they vary."""
        if not self.variance:
            return None
        half = self.quantile * math.sqrt(self.variance)
        return Interval(self.mean - half, self.mean + half)

    def share_interval(self) -> Interval:
        """Return the interval of the mean of values from 0 to 1 (Korn and Graubard)."""
        if not self.variance:
            return _score_interval(self.mean, self.effective)
        from scipy.special import betaincinv

        # Clopper and Pearson's for the number of independent right/wrong values that would be as sure.
        n = self.mean * (1 - self.mean) / self.variance
        n *= (_NORMAL / self.quantile) ** 2
        right, wrong, tail = n * self.mean, n * (1 - self.mean), (1 - CONFIDENCE) / 2
        return Interval(float(betaincinv(right, wrong + 1, tail)), float(betaincinv(right + 1, wrong, 1 - tail)))

    def change_interval(self) -> Interval | None:
        """Return the interval of the mean of differences from -1 to 1 (Bonett and Price)."""
        if self.groups < 2:
            return None
        factor = self.quantile if self.variance else _NORMAL
        # One gain and one loss more than there were: where few or no values changed, the change is not known to be 0.
        # n independent values would be as sure; all equal, as many as there are effective clusters.
        n = self.deviation / self.variance if self.variance else self.effective
        mean = self.mean * n / (n + 2)
        square = self.deviation + self.mean**2
        half = factor * math.sqrt(((n * square + 2) / (n + 2) - mean**2) / (n + 2))
        return Interval(max(-1.0, mean - half), min(1.0, mean + half))


def _by_cluster(values: _Floats, clusters: Sequence[str] | None) -> tuple[_Floats, _Floats]:
    """Return sum and count of each cluster's values, in order of first appearance."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"Every value has one cluster; got {len(values)} values and {len(clusters)} clusters.")
    places: dict[str, int] = {}
    at = np.array([places.setdefault(name, len(places)) for name in clusters], dtype=np.intp)
    return np.bincount(at, weights=values).astype(np.float64), np.bincount(at).astype(np.float64)


def figure(values: Sequence[float], *, clusters: Sequence[str] | None = None, share: bool | None = None) -> Figure:
    """Return mean, standard error and interval of at least one value.

    Args:
        values: Scores, tokens, seconds.
        clusters: The cluster of each value; None: all are independent.
        share: The values are worths from 0 to 1, whose interval stays in that range and has no zero width; None: if
            they are all 0 or 1, as tokens and seconds may be by chance.
    """
    spread = _Spread.of(values, clusters)
    binary = set(values) <= {0, 1}
    if not (binary if share is None else share):
        interval = spread.interval()
    elif binary and spread.groups == spread.n:
        interval = wilson(round(spread.mean * spread.n), spread.n)
    else:
        interval = spread.share_interval()
    return Figure(spread.n, spread.mean, math.sqrt(spread.variance) if spread.groups > 1 else None, interval)


def paired(
    before: Sequence[float],
    after: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    share: bool | None = None,
) -> Paired:
    """Compare two runs sample by sample; `before[i]` and `after[i]` must be of the same sample.

    Pairing removes what makes samples easy or hard, so it finds differences that two separate intervals hide. With
    fewer than six changed clusters no outcome is below p = 0.05.

    Args:
        before: Values of the first run.
        after: Values of the second run.
        clusters: The cluster of each sample; None: all are independent.
        share: The values are worths from 0 to 1; None: if they are all 0 or 1.

    Raises:
        ValueError: The lengths differ, or nothing is given.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Paired runs have the same samples, at least one; got {len(before)} and {len(after)}.")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    spread = _Spread.of(differences, clusters)
    bounded = {*before, *after} <= {0, 1} if share is None else share
    return Paired(
        n=spread.n,
        difference=spread.mean,
        interval=spread.change_interval() if bounded else spread.interval(),
        gained=sum(d > 0 for d in differences),
        lost=sum(d < 0 for d in differences),
        p=_sign_flip(_by_cluster(np.array(differences), clusters)[0]),
    )


def _sign_flip(sums: _Floats) -> float:
    """Return the two-sided p of a mean difference of 0: the share of all signs of the clusters' sums that give more.

    Under that hypothesis either run may have been the first in each cluster. All signs are tried for up to 13 clusters
    that changed, else `_FLIPS` random ones. For right/wrong values of independent samples it is McNemar's exact test.
    """
    sums = sums[np.abs(sums) > 1e-12]
    count = len(sums)
    if count == 0:
        return 1.0
    if np.ptp(np.abs(sums)) < 1e-12:
        require_scipy()
        from scipy.stats import binomtest

        return float(binomtest(int((sums > 0).sum()), count).pvalue)
    reached = abs(sums.sum()) * (1 - 1e-9)
    if count <= 13:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(signs @ sums) >= reached).mean())
    rng, rows, found = np.random.default_rng(0), max(1, 1_000_000 // count), 1
    for at in range(0, _FLIPS, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, _FLIPS - at), count), dtype=np.int8)
        found += int((np.abs(signs @ sums) >= reached).sum())
    return found / (_FLIPS + 1)
