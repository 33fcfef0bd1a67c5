"""Regions as actions: the groups of a map, and the arithmetic of their rewards."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.perception.maps import MapRegion, foreground, regions
from qzoom_agent.training.branches.regions import (
    Advantages,
    Region,
    advantages,
    cell_targets,
    cells_inside,
    control_region,
    log_odds,
    moved,
    moved_regions,
    next_regions,
    noise_margin,
    proposed_regions,
)

HEAT = torch.zeros(6, 8)
HEAT[1, 1], HEAT[1, 2], HEAT[4, 6], HEAT[0, 7] = 0.9, 0.6, 0.5, 0.05
"""A region of two cells, one of one cell, and a faint one."""


def rules(**changes: Any) -> PerceptionConfig:
    options = {"blur": "none", "threshold": 0.0, "peak_share": 0.2, "max_regions": 3, **changes}
    return PerceptionConfig(**options)


def test_the_proposed_regions_are_those_of_inference_and_the_next_ones_what_they_leave() -> None:
    proposed = proposed_regions(HEAT, rules())
    assert [one.box for one in proposed] == regions(HEAT, foreground(HEAT, 0.0, rules()), limit=3)
    assert [tuple(one.box)[:4] for one in proposed] == [(1, 1, 3, 2), (6, 4, 7, 5)]
    assert proposed[0].weights[1, 1] == pytest.approx(0.6) and proposed[0].weights[1, 2] == pytest.approx(0.4)
    (faint,) = next_regions(HEAT, proposed, 5, rules())
    assert tuple(faint.box)[:4] == (7, 0, 8, 1) and faint.weights[0, 7] == 1
    around = proposed_regions(HEAT, rules(max_regions=1))
    assert [tuple(one.box)[:4] for one in around] == [(1, 1, 7, 5)]


def test_a_map_of_sinks_alone_has_no_regions() -> None:
    nothing = torch.zeros(4, 4)
    assert proposed_regions(nothing, rules()) == [] == next_regions(nothing, [], 3, rules())
    assert moved_regions([], 3, reach=0.5, rng=Random(0)) == []


def test_a_box_of_fixed_sides_is_its_centre() -> None:
    first, *_ = proposed_regions(HEAT, rules(box=(0.25, 0.5)))
    for one in (first, moved(first, 0.5, 1.0)):
        x, y = (one.box.x1 + one.box.x2) / 2, (one.box.y1 + one.box.y2) / 2
        assert one.centred and (one.weights > 0).sum() <= 4
        assert (one.weights.sum(0) * (np.arange(8) + 0.5)).sum() == pytest.approx(x, abs=1e-5)
        assert (one.weights.sum(1) * (np.arange(6) + 0.5)).sum() == pytest.approx(y, abs=1e-5)
    tiny, *_ = proposed_regions(HEAT, rules(box=(0.05, 0.05)))
    assert moved(tiny, -9.0, -9.0).weights[0, 0] == pytest.approx(1), (
        "its centre is less than half a cell from the edge"
    )


def test_a_moved_region_takes_its_cells_along_and_stays_inside_the_map() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[1, 1] = 1
    one = Region(MapRegion(1, 1, 2, 2, 0.5), weights)
    half = moved(one, 0.5, 0.0)
    assert tuple(half.box)[:4] == (1.5, 1, 2.5, 2)
    assert half.weights[1, 1] == half.weights[1, 2] == 0.5 and half.weights.sum() == 1
    corner = moved(one, 9.0, -9.0)
    assert tuple(corner.box)[:4] == (3, 0, 4, 1) and corner.weights[0, 3] == 1


def test_sinks_that_the_blur_makes_foreground_are_a_region_of_the_cells_around_them() -> None:
    ring = torch.zeros(7, 7)
    ring[2:5, 2:5], ring[3, 3] = 0.5, 0.0
    options = rules(blur="fixed", peak_share=0.98)
    (one,) = proposed_regions(ring, options)
    assert tuple(one.box)[:4] == (3, 3, 4, 4) and one.weights[3, 3] == 0
    assert one.weights[2:5, 2:5].sum() == pytest.approx(1) and next_regions(ring, [one], 2, options) == []
    (box,) = regions(ring, np.arange(49).reshape(7, 7) == 24, sides=(2 / 7, 2 / 7))
    assert tuple(box)[:4] == pytest.approx((2.5, 2.5, 4.5, 4.5))
    (alone,) = regions(ring * 0, np.arange(49).reshape(7, 7) == 24, sides=(2 / 7, 2 / 7))
    assert tuple(alone)[:4] == pytest.approx((2.5, 2.5, 4.5, 4.5))


def any_map(seed: int) -> torch.Tensor:
    """A map with some hot cells, and a fifth of sinks."""
    drawn = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(seed))
    return drawn[0] ** 6 * (drawn[1] > 0.2)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000).map(any_map),
    st.sampled_from([None, (0.3, 0.4)]),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from(["none", "fixed"]),
    st.sampled_from([0.2, 0.9]),
)
def test_regions_of_any_map(heat: torch.Tensor, sides: Any, limit: int, seed: int, blur: str, share: float) -> None:
    """All lie inside the map with weights of sum 1; the cells of the next ones are none of those before them."""
    options, rng = rules(box=sides, max_regions=limit, blur=blur, peak_share=share), Random(seed)
    proposed = proposed_regions(heat, options)
    assert 1 <= len(proposed) <= limit
    more = next_regions(heat, proposed, 4, options)
    seen = np.zeros((5, 7), dtype=np.bool)
    for one in proposed:
        seen |= cells_inside(one, (5, 7))
    for one in more:
        assert one.centred or not (seen & (one.weights > 0)).any()
        seen |= cells_inside(one, (5, 7))
    others = moved_regions(proposed, 5, reach=1.0, rng=rng)
    assert len(others) == 5
    for one in [*proposed, *more, *others, control_region(proposed, rng)]:
        assert -1e-6 <= one.box.x1 < one.box.x2 <= 7 + 1e-6 and -1e-6 <= one.box.y1 < one.box.y2 <= 5 + 1e-6
        assert one.weights.min() >= 0 and float(one.weights.sum()) == pytest.approx(1, abs=1e-5)


def test_a_control_lies_beside_the_proposed_regions() -> None:
    first, *_ = proposed = proposed_regions(HEAT, rules())
    for seed in range(20):
        box = control_region(proposed, Random(seed)).box
        assert (box.x2 - box.x1, box.y2 - box.y1) == pytest.approx((2, 1))
        assert box.x1 >= first.box.x2 or box.x2 <= first.box.x1 or box.y1 >= first.box.y2 or box.y2 <= first.box.y1


def test_rewards_by_hand() -> None:
    """A distractor among two proposed regions is pruned; a candidate counts if it beats the one it would replace."""
    assert advantages([4.5, 0.0], [], margin=0.5) == ([1.0, -0.125], [])
    assert advantages([0.2], [], margin=0.5).kept == [pytest.approx(-0.3)]
    # room for one more: what is gained beyond the margin
    assert advantages([2.5], [2.5, 0.4, 8.5], margin=0.5).added == [0.0, 0.0, 1.0]
    # in its place: only what is better than the region, and than nothing, counts, and then the region is not kept
    assert advantages([4.0], [3.0, 4.4], margin=0.5, replaced=0) == ([1.0], [0.0, 0.0])
    assert advantages([4.0], [3.0, 5.5], margin=0.5, replaced=0) == ([0.0], [0.0, 1.0])
    assert advantages([-9.0, 2.5], [0.0, 1.0], margin=0.5, replaced=0) == ([-1.0, pytest.approx(2 / 9.5)], [0.0, 0.5])


def test_the_margin_is_what_controls_gain_by_chance() -> None:
    assert noise_margin([], quantile=0.75, least=0.5) == 0.5
    assert noise_margin([-9.0, -3.0, -2.0, 0.1], quantile=0.75, least=0.5) == 0.5
    assert noise_margin([0.0, 1.0, 2.0, 3.0], quantile=1.0, least=0.5) == 3.0


def test_cells_are_raised_by_advantages_and_pruned_by_negative_ones() -> None:
    one, two, three = np.eye(3, dtype=np.float32)
    up, down = cell_targets([one, two], [three], Advantages([0.5, -0.25], [1.0]))
    assert up.tolist() == [0.5, 0.0, 1.0] and down.tolist() == [0.0, 0.25, 0.0]
    # in the place of the first, half of whose cells it shares
    up, down = cell_targets([one], [(one + two) / 2], Advantages([0.0], [0.8]), replaced=0)
    assert up == pytest.approx([0.4, 0.4, 0.0]) and down == pytest.approx([0.4, 0.0, 0.0])


@given(st.floats(1e-9, 1 - 1e-3))
def test_log_odds(probability: float) -> None:
    assert log_odds(float(np.log(probability))) == pytest.approx(np.log(probability / (1 - probability)), abs=1e-6)


def test_a_certain_answer_has_finite_log_odds() -> None:
    assert log_odds(0.0) == log_odds(-1e-9) == pytest.approx(9.21, abs=0.01)
