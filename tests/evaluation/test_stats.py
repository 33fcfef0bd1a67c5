"""Intervals against published values, and their behaviour with next to no data."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interval_coverage
from qzoom_agent.evaluation.stats import Interval, figure, paired, wilson


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


def test_a_mean_needs_values_that_vary() -> None:
    for values in ([3.0], [3.0, 3.0], [100.0] * 50):
        found = figure(values)
        assert found.interval is None, "nothing tells how much they vary"


def test_a_mean_of_many_values_gets_the_normal_interval() -> None:
    draw = random.Random(1)
    values = [draw.gauss(10, 2) for _ in range(400)]
    mean = sum(values) / 400
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 399)
    found = figure(values)
    assert found.se == pytest.approx(spread / 20)
    assert found.interval == pytest.approx((mean - 1.966 * spread / 20, mean + 1.966 * spread / 20), abs=1e-3)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("abcde")), min_size=1, max_size=40),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_a_worth_has_an_interval_that_is_no_point(rows: list[tuple[float, str]], clustered: bool) -> None:
    values, names = [value for value, _ in rows], [name for _, name in rows] if clustered else None
    found = figure(values, clusters=names, share=True)
    assert found.interval is not None
    low, high = found.interval
    assert 0 <= low <= found.mean <= high <= 1 and high - low > 0.01
    change = paired(values, values[::-1], clusters=names, share=True)
    assert 0 < change.p <= 1
    if len(set(names or range(len(values)))) > 1:
        assert change.interval is not None and -1 <= change.interval.low < change.interval.high <= 1


@pytest.mark.parametrize("clusters", [None, [*"aabcd"], [*"aaaab"]])
@pytest.mark.parametrize("share", [True, False])
def test_values_that_differ_by_rounding_alone_are_the_same(clusters: list[str] | None, share: bool) -> None:
    """0.3 - 0.2 is not 0.2 - 0.1 in floating point."""
    before, after = [0.1, 0.2, 0.3, 0.4, 0.7], [0.2, 0.3, 0.4, 0.5, 0.8]
    rounded = paired(before, after, clusters=clusters, share=share)
    exact = paired([0.0] * 5, [0.1] * 5, clusters=clusters, share=share)
    assert len({b - a for a, b in zip(before, after, strict=True)}) > 1
    assert (rounded.interval is None) is (exact.interval is None) is not share
    assert rounded.interval == (pytest.approx(exact.interval) if share else None)
    assert rounded.p == exact.p
    near = figure([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2, 0.3], clusters=clusters, share=share)
    same = figure([0.3] * 5, clusters=clusters, share=share)
    assert near.se == same.se == 0.0
    assert near.interval == (pytest.approx(same.interval) if share else None)


def test_an_interval_of_clusters_is_the_published_one() -> None:
    """Korn and Graubard 1998 with CR2: clusters of four with 3, 4, 1 and 4 right, worked out by hand."""
    from scipy.stats import beta  # half a second, for every worker that collects the tests

    values = [1.0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]
    found = figure(values, clusters=[str(index // 4) for index in range(16)])
    assert found.interval is not None
    variance = (0 + 1 + 4 + 1) / (1 - 1 / 4) / 16**2
    assert found.se == pytest.approx(math.sqrt(variance))
    like = 0.75 * 0.25 / variance * (1.959964 / 3.182446) ** 2
    assert found.interval == pytest.approx(
        (beta.ppf(0.025, 0.75 * like, 0.25 * like + 1), beta.ppf(0.975, 0.75 * like + 1, 0.25 * like)), abs=1e-5
    )


def test_clusters_that_are_alike_by_chance_make_nothing_surer() -> None:
    """Their residuals are 0, or small where the large ones are alike: the analysis of variance counts, by hand."""
    halves = figure([1.0, 0.0] * 20, clusters=[str(index // 10) for index in range(40)])
    assert halves.se == pytest.approx(math.sqrt(0.25 / 40))
    # 0.375 between clusters of 1.25 values in effect, nothing within: 0.3 in all, times a design effect of 1.5
    assert figure([1.0, 1.0, 1.0, 0.0], clusters="aabc").se == pytest.approx(math.sqrt(0.3 / 4 * 1.5))


@pytest.mark.parametrize(("clusters", "p"), [(2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125), (10, 2 / 1024)])
def test_few_clusters_are_tested_exactly(clusters: int, p: float) -> None:
    names = [str(cluster) for cluster in range(clusters) for _ in range(3 + cluster)]  # of different sizes
    assert paired([0.0] * len(names), [1.0] * len(names), clusters=names).p == pytest.approx(p)


def test_many_clusters_are_tested_by_random_signs() -> None:
    values = [1.0, 2.0, 3.0, -3.0] * 10
    found = paired([0.0] * 40, values)
    assert found.p == paired([0.0] * 40, values).p
    assert found.p == pytest.approx(0.048, abs=0.012)  # by the normal approximation: 30 / sqrt(230) = 1.98


@pytest.mark.parametrize("clusters", [2, 5, 10, 50])
def test_intervals_hold_and_the_test_does_not_cry_wolf(clusters: int) -> None:
    """Of 100 drawn runs: a share of 0.95 is below 0.88 with a probability of 0.3 %."""
    for sizes, correlation in (("1 to 20", 0.3), ("equal", 1.0)):
        held = interval_coverage.simulate(
            clusters=clusters, accuracy=0.97, sizes=sizes, correlation=correlation, runs=100, seed=1
        )
        assert held.accuracy >= 0.88 and held.difference >= 0.88 and held.found <= 0.12


def test_paired_counts_flips() -> None:
    before = [True] * 30 + [False] * 30
    after = [True] * 28 + [False] * 2 + [True] * 12 + [False] * 18
    result = paired(before, after)
    assert (result.n, result.gained, result.lost) == (60, 12, 2)
    assert result.difference == pytest.approx(10 / 60)
    # Exact McNemar for 12 against 2: 2 * (1 + 14 + 91) / 2**14.
    assert result.p == pytest.approx(2 * 106 / 2**14)
    # Bonett and Price: one gain and one loss more, with Student's t of 59 and 59 for the 60 pairs.
    mean, square, n = 10 / 60 * 59 / 61, (14 / 60 * 59 + 2) / 61, 61
    half = 2.000995 * math.sqrt((square - mean**2) / n)
    assert result.interval == pytest.approx((mean - half, mean + half), abs=1e-6)
    # Where nothing changed, as many values count as there are clusters.
    same = paired([0.0] * 8, [0.0] * 8, clusters=[str(index // 2) for index in range(8)])
    assert same.interval == pytest.approx((-1.959964 * math.sqrt(2) / 6, 1.959964 * math.sqrt(2) / 6), abs=1e-6)


def test_paired_with_few_changes_claims_nothing() -> None:
    assert paired([0, 0, 0], [0, 0, 0]).p == 1.0
    assert paired([0] * 5, [1] * 5).p > 0.05
    assert paired([0] * 6, [1] * 6).p < 0.05
    assert paired([0], [1]).interval is None


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 0.0])])
def test_paired_refuses_runs_that_do_not_pair(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="same samples"):
        paired(before, after)
