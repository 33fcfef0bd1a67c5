"""The search for heads that look at what an answer rests on."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from qzoom_agent.training.branches.branch_recipe import HeadSearch, Labelling
from qzoom_agent.training.branches.dataset import Records
from qzoom_agent.training.branches.labelling import rank, select_heads
from tests.tiny_models import Family
from tests.training.branches.conftest import Load

NAMES = [(layer, head) for layer in (2, 3) for head in range(4)]


def planted(seed: int, *, strength: float) -> tuple[NDArray[np.float32], NDArray[np.bool]]:
    """Maps of eight heads over 30 cells: (3, 1) looks at the box, (2, 2) always at the first cell, others anywhere."""
    rng = np.random.default_rng(seed)
    maps = rng.dirichlet(np.ones(30), size=len(NAMES)).astype(np.float32)
    inside = np.zeros(30, dtype=np.bool)
    inside[rng.integers(1, 30, 2)] = True
    maps[NAMES.index((3, 1)), inside] += strength
    maps[NAMES.index((2, 2)), 0] += strength
    return maps / maps.sum(1, keepdims=True), inside


def test_with_boxes_the_head_that_looks_inside_is_found() -> None:
    pairs = [planted(seed, strength=1.0) for seed in range(20)]
    found = rank(NAMES, [maps for maps, _ in pairs], [inside for _, inside in pairs], count=1)
    assert found.heads == {3: [1]} and found.criterion == "attention inside boxes" and found.questions == 20
    best, second = found.ranked[:2]
    assert best.inside is not None and best.inside > 0.5 and best.lift is not None and best.lift > 5
    assert second.inside is not None and second.inside < 0.3
    assert "    3    1" in found.table() and found.table().count("*") == 1


def test_shares_inside_are_those_that_a_hand_computes() -> None:
    maps = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=np.float32)
    inside = np.array([True, False, False, True])
    found = rank([(0, 0), (0, 1)], [maps], [inside], count=1)
    by_head = {(one.layer, one.head): one for one in found.ranked}
    assert by_head[0, 0].inside == pytest.approx(0.5) and by_head[0, 0].lift == pytest.approx(1.0)
    assert by_head[0, 0].peak == pytest.approx(2.0) and by_head[0, 1].peak == pytest.approx(1.0)


def test_without_boxes_peaked_heads_that_agree_win_over_one_that_stares() -> None:
    """Two heads look where the answer is; one stares at a corner, more peaked than either."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(30):
        each = rng.dirichlet(np.ones(30), size=len(NAMES)).astype(np.float32)
        where = rng.integers(1, 30)
        each[NAMES.index((3, 1)), where] += 1.0
        each[NAMES.index((3, 2)), where] += 1.0
        each[NAMES.index((2, 2)), 0] += 2.0
        maps.append(each / each.sum(1, keepdims=True))
    found = rank(NAMES, maps, [None] * 30, count=2)
    assert found.heads == {3: [1, 2]} and found.criterion.startswith("peak")
    assert found.ranked[0].inside is None and found.ranked[0].lift is None


def test_agreement_is_the_mean_correlation_with_the_maps_of_the_other_heads() -> None:
    questions = [
        np.random.default_rng(seed).dirichlet(np.ones(30), size=len(NAMES)).astype(np.float32) for seed in (0, 1)
    ]
    questions[1] *= np.arange(1, 9, dtype=np.float32)[:, None]  # how much attention a head pays in all says nothing
    found = rank(NAMES, questions, [None, None], count=1)
    agreement = {(one.layer, one.head): one.agreement for one in found.ranked}
    for at, name in enumerate(NAMES):
        others = [np.corrcoef(maps)[at, other] for maps in questions for other in range(8) if other != at]
        assert agreement[name] == pytest.approx(np.mean(others), abs=1e-5)


@pytest.mark.parametrize(("family", "layers"), [("qwen2_5_vl", {3, 4, 5}), ("qwen3_5", {3, 5}), ("gemma4", {3, 5})])
def test_a_model_is_searched_above_its_lowest_layers_with_full_attention(
    family: Family, layers: set[int], load: Load, rows: Records
) -> None:
    how = Labelling(max_new_tokens=4, batch=4, asking="prediction")
    found = select_heads(load(family), rows, HeadSearch(records=6, count=3, from_layer=0.5), how)
    assert {one.layer for one in found.ranked} == layers and len(found.ranked) == 4 * len(layers)
    assert sum(len(heads) for heads in found.heads.values()) == 3
    # questions that are known to need no part of the image do not count
    assert found.questions == 3 and found.criterion == "attention inside boxes"
    unknown = [replace(rows[at], boxes=(), coarse_suffices=None) for at in range(2)]
    assert select_heads(load(family), unknown, HeadSearch(records=6), how).questions == 2
