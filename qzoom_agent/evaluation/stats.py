"""Uncertainty of measured figures: an interval for a share, an interval for a mean, and a paired comparison.

Everything is deterministic (the bootstrap has a seed). Nothing here returns a zero-width interval because there is too
little data: where an interval cannot be had, the result is None or the whole range.

Values that share a cluster (questions about one image, rotations of one question) are not independent. `clusters` names
each value's cluster; whole clusters are then resampled, which scipy's bootstrap does not do, and the standard error
adds up within a cluster before it is squared (Liang and Zeger 1986; Miller 2024, "Adding error bars to evals").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from qzoom_agent.extras import require

_Floats = NDArray[np.float64]


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
    """Two-sided. The exact sign test (McNemar's for right/wrong values), in which only samples that changed count; with
    clusters, the bootstrap's."""


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


def _binomtest(successes: int, n: int) -> Any:
    require_scipy()
    from scipy.stats import binomtest

    return binomtest(successes, n)


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval for a share: `successes` of `n`.

    It has no zero width at 0 of n and n of n (20 of 20 gives 0.84 to 1), and covers from about five samples on. With
    n = 0 it is the whole range, so that an empty category does not end a report.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n; got {successes} of {n}.")
    if n == 0:
        return Interval(0.0, 1.0)
    found = _binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap(
    values: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Return the percentile bootstrap interval for the mean of `values` (seconds, tokens, differences).

    None for fewer than two values (or clusters), because resampling one would claim certainty. Below about ten values
    the interval is too narrow. Values that are all equal give zero width: for right/wrong values use `wilson`.
    """
    if len(set(clusters) if clusters is not None else values) < 2:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled(values, clusters, resamples, seed), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _resampled(values: Sequence[float], clusters: Sequence[str] | None, resamples: int, seed: int) -> _Floats:
    """Return means of `resamples` samples drawn with replacement, whole clusters at a time."""
    sums, counts = _by_cluster(np.asarray(values, dtype=np.float64), clusters)
    return np.concatenate(
        [sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn in draws(len(sums), resamples, seed=seed)]
    )


def draws(n: int, resamples: int, *, seed: int = 0) -> Iterator[NDArray[np.intp]]:
    """Yield `resamples` samples of n out of n places, with replacement, as matrices of some samples each."""
    rng = np.random.default_rng(seed)
    # A matrix of all samples of 100 000 values would take over a gigabyte.
    rows = max(1, 1_000_000 // n)
    for at in range(0, resamples, rows):
        yield rng.integers(0, n, (min(rows, resamples - at), n))


def _by_cluster(values: _Floats, clusters: Sequence[str] | None) -> tuple[_Floats, _Floats]:
    """Return sum and count of each cluster's values, in order of first appearance."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"Every value has one cluster; got {len(values)} values and {len(clusters)} clusters.")
    places: dict[str, int] = {}
    at = np.array([places.setdefault(name, len(places)) for name in clusters], dtype=np.intp)
    return np.bincount(at, weights=values).astype(np.float64), np.bincount(at).astype(np.float64)


def standard_error(values: Sequence[float], *, clusters: Sequence[str] | None = None) -> float | None:
    """Return the standard error of the mean, clusters added up first; None for fewer than two values (or clusters)."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return None
    sums, _ = _by_cluster(data - data.mean(), clusters)
    groups = len(sums)
    return math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(data) if groups > 1 else None


def figure(values: Sequence[float], *, clusters: Sequence[str] | None = None) -> Figure | None:
    """Return mean, standard error and 95 % interval; None without values.

    Right/wrong values (all 0 or 1) that are independent get Wilson's interval, others the bootstrap's. Where all
    clusters are wholly right or wholly wrong, Wilson's of the clusters: a bootstrap of equal values claims certainty.
    """
    if not values:
        return None
    groups = None if clusters is None or len(set(clusters)) == len(values) else clusters
    mean, binary = sum(values) / len(values), set(values) <= {0, 1}
    if binary and groups is None:
        interval: Interval | None = wilson(sum(value == 1 for value in values), len(values))
    elif binary and len(set(values)) == 1:
        count = len(set(groups or ()))
        interval = wilson(count if mean == 1 else 0, count)
    else:
        interval = bootstrap(values, clusters=groups)
    return Figure(len(values), mean, standard_error(values, clusters=groups), interval)


def paired(
    before: Sequence[float],
    after: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compare two runs sample by sample; `before[i]` and `after[i]` must be of the same sample.

    Pairing removes what makes samples easy or hard, so it finds differences that two separate intervals hide. The
    interval is the bootstrap's over the differences. The sign test is exact: with fewer than six changed samples no
    outcome is below p = 0.05. Raise ValueError if the lengths differ or nothing is given.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"Paired runs have the same samples, at least one; got {len(before)} and {len(after)}.")
    differences = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    groups = None if clusters is None or len(set(clusters)) == len(differences) else clusters
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if groups is None:
        p = float(_binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    else:
        p = _sign_of_mean(differences, groups, seed)
    return Paired(
        n=len(differences),
        difference=sum(differences) / len(differences),
        interval=bootstrap(differences, clusters=groups, confidence=confidence, seed=seed),
        gained=gained,
        lost=lost,
        p=p,
    )


def _sign_of_mean(differences: Sequence[float], clusters: Sequence[str], seed: int, resamples: int = 2000) -> float:
    """Return the two-sided p of a mean difference of 0: the share of resampled means across 0, never quite 0."""
    means = _resampled(differences, clusters, resamples, seed)
    crossing = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (crossing + 1) / (resamples + 1))
