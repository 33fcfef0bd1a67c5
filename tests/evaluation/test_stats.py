"""Intervals against published values, and their behaviour with next to no data."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.evaluation.stats import Interval, bootstrap, paired, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)


def test_wilson_at_the_ends_is_not_certainty() -> None:
    assert wilson(20, 20).low == pytest.approx(0.839, abs=1e-3)
    assert wilson(20, 20).high == 1.0
    assert wilson(1, 1).low < 0.3


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson(successes, n)


@given(st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low < high <= 1
    if n:
        assert low <= successes / n <= high
    mirrored = wilson(n - successes, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-9)
    narrow = wilson(successes, n, confidence=0.5)
    assert low <= narrow.low <= narrow.high <= high


def test_bootstrap_needs_two_values() -> None:
    assert bootstrap([]) is None
    assert bootstrap([3.0]) is None
    assert bootstrap([3.0, 3.0]) == Interval(3.0, 3.0)


def test_bootstrap_agrees_with_the_normal_interval_on_many_values() -> None:
    draw = random.Random(1)
    values = [draw.gauss(10, 2) for _ in range(400)]
    mean = sum(values) / 400
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 399)
    interval = bootstrap(values)
    assert interval is not None
    assert interval == pytest.approx((mean - 1.96 * spread / 20, mean + 1.96 * spread / 20), abs=0.03)


def test_bootstrap_is_repeatable_and_seeded() -> None:
    values = [1.0, 2.0, 5.0, 9.0]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3, resamples=50) != bootstrap(values, seed=4, resamples=50)


def test_paired_counts_flips() -> None:
    before = [True] * 30 + [False] * 30
    after = [True] * 28 + [False] * 2 + [True] * 12 + [False] * 18
    result = paired(before, after)
    assert (result.n, result.gained, result.lost) == (60, 12, 2)
    assert result.difference == pytest.approx(10 / 60)
    # Exact McNemar for 12 against 2: 2 * (1 + 14 + 91) / 2**14.
    assert result.p == pytest.approx(2 * 106 / 2**14)
    assert result.interval is not None
    assert result.interval.low > 0


def test_paired_with_few_changes_claims_nothing() -> None:
    assert paired([0, 0, 0], [0, 0, 0]).p == 1.0
    assert paired([0] * 5, [1] * 5).p > 0.05
    assert paired([0] * 6, [1] * 6).p < 0.05
    assert paired([0], [1]).interval is None


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0])])
def test_paired_refuses_runs_that_do_not_pair(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired(before, after)
