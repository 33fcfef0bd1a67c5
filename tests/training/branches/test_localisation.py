"""Where a map points, against boxes: figures that a hand computes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.geometry import Box, Size
from qzoom_agent.perception.adapters import Grid
from qzoom_agent.perception.labels import BACKGROUND, FOREGROUND, LabelRules
from qzoom_agent.perception.maps import MapRegion
from qzoom_agent.training.branches.base_inference import ask
from qzoom_agent.training.branches.dataset import Records
from qzoom_agent.training.branches.labelling import labels_on_grid, padded_size
from qzoom_agent.training.branches.proposals import (
    LookOutcome,
    auc,
    bounding_box,
    in_pixels,
    localisation,
    look_at_batch,
    look_at_records,
    needle_cells,
)
from qzoom_agent.views import View, ViewStore
from tests.training.branches.conftest import Load


def at(threshold: float) -> PerceptionConfig:
    return PerceptionConfig(threshold=threshold)


GRID = Grid(6, 6, (28.0, 28.0))


def coarse() -> View:
    """A coarse view of 6 x 6 cells, 168 pixels wide as the image itself: a cell is 28 pixels."""
    store = ViewStore()
    store.add_original(Image.new("RGB", (168, 168)))
    return store.add_coarse(factor=28, min_tokens=36, max_tokens=36)


def seen(heat: list[list[float]], *boxes: Box) -> LookOutcome:
    return LookOutcome(0.5, torch.tensor(heat), coarse(), Size(168, 168), list(boxes), GRID)


ONE = [[0.9 if (row, column) == (2, 2) else 0.0 for column in range(6)] for row in range(6)]
"""A single hot cell, of pixels 56 to 84."""


def test_recall_iou_and_area_by_hand() -> None:
    """Blurred, a single cell of .9 gives .184 there, .111 beside it and .068 in the corners."""
    inside = seen(ONE, Box(58, 58, 78, 78))
    found = localisation([inside], at(0.15))
    assert found.recall == 1.0 and found.area == pytest.approx(1 / 36) and found.iou == pytest.approx(400 / 784)
    wider = localisation([inside], at(0.06))
    assert wider.recall == 1.0 and wider.area == pytest.approx(9 / 36) and wider.iou == pytest.approx(400 / 84**2)
    nothing = localisation([inside], at(0.5))
    assert (nothing.recall, nothing.iou, nothing.area, nothing.proposed) == (0.0, 0.0, 0.0, 0.0)


def test_a_needle_counts_from_95_percent() -> None:
    for right, wanted in ((85.0, 1.0), (88.0, 0.0)):  # the cell ends at 84: 20 of 21 pixels, and 20 of 24
        found = localisation([seen(ONE, Box(64, 58, right, 78))], at(0.15))
        assert found.recall == wanted


def test_a_share_of_the_peak_does_not_care_how_sure_the_map_is() -> None:
    """Beside the cell the blurred map has .61 of its peak, in the corners .37."""
    for scale in (1.0, 0.01):
        one = seen([[scale * value for value in row] for row in ONE], Box(58, 58, 78, 78))
        for share, side in ((0.7, 1), (0.5, 3), (0.2, 3)):
            found = localisation([one], PerceptionConfig(peak_share=share))
            assert found.recall == 1.0 and found.area == pytest.approx(side**2 / 36)


def test_of_several_needles_all_have_to_be_there() -> None:
    both = seen(ONE, Box(58, 58, 78, 78), Box(90, 90, 100, 100))
    assert localisation([both], at(0.15)).recall == 0.0
    assert bounding_box(both.boxes or []) == Box(58, 58, 100, 100)


def test_auc_by_hand() -> None:
    """One cell of the needle against 35: above 32, equal to two, below one."""
    heat = [[0.0] * 6 for _ in range(6)]
    heat[2][2] = heat[0][0] = heat[0][1] = 0.5
    heat[5][5] = 0.7
    assert auc(seen(heat, Box(58, 58, 78, 78))) == pytest.approx((32 + 0.5 * 2) / 35)
    assert auc(seen(heat, Box(0, 0, 168, 168))) is None
    cold, whole = seen(heat, Box(2, 142, 26, 166)), seen(heat, Box(0, 0, 168, 168))
    rows = [seen(heat, Box(58, 58, 78, 78)), cold, whole]
    assert localisation(rows, at(0.15)).auc == pytest.approx((33 / 35 + 15.5 / 35) / 2)


def test_questions_without_a_box_do_not_count() -> None:
    nobody_knows = LookOutcome(None, torch.zeros(6, 6), coarse(), Size(168, 168), None, GRID)
    rows = [seen(ONE), seen(ONE, Box(58, 58, 78, 78)), nobody_knows]
    assert localisation(rows, at(0.15)).n == 1
    empty = localisation(rows[:1], at(0.15))
    assert empty.n == 0 and empty.recall is None and empty.auc is None


@given(st.floats(0, 130), st.floats(0, 130), st.floats(1, 30), st.floats(1, 30))
def test_needle_cells_are_those_that_the_box_touches(x: float, y: float, wide: float, high: float) -> None:
    found = needle_cells(GRID, coarse(), [Box(x, y, x + wide, y + high)])
    for row in range(6):
        for column in range(6):
            touches = x < (column + 1) * 28 and x + wide > column * 28 and y < (row + 1) * 28 and y + high > row * 28
            assert bool(found[row, column]) == touches


def test_looking_keeps_boxes_scores_and_order(load: Load, rows: Records) -> None:
    backend = load("qwen2_5_vl")
    found = look_at_records(backend, rows, tokens=None, batch=5)
    assert all(one.score is not None and 0 <= one.score <= 1 for one in found)
    assert [bool(one.boxes) for one in found] == [index % 2 == 0 for index in range(12)]
    alone = [look_at_batch(backend, [rows[index]], tokens=None)[0] for index in range(3)]
    for one, other in zip(alone, found, strict=False):
        assert torch.allclose(one.heat, other.heat, atol=1e-5)


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_a_view_that_is_padded_to_a_square_is_measured_where_it_lies(size: tuple[int, int], load: Load) -> None:
    """LLaVA's map covers the padded square: training reads its cells as inference does, and padding is background."""
    backend = load("llava")
    sample = Sample("q", "textual", "textual", Image.new("RGB", size), "what?", "a")
    (one,) = ask(backend, [sample], [None])
    view, needle = one.store.view("coarse"), Box(0, 0, 50, 50)
    assert any(one.cells.corner)
    touched = needle_cells(one.cells, view, [needle])
    for row in range(one.cells.rows):
        for column in range(one.cells.columns):
            cell = view.to_original(one.cells.to_view(column, row, column + 1, row + 1, view="coarse"))
            assert bool(touched[row, column]) == (cell.coverage(needle) > 1e-6 or needle.coverage(cell) > 1e-6)
            shown = in_pixels(MapRegion(column, row, column + 1, row + 1, 1.0), one.cells, view)
            assert shown.x1 >= 0 and shown.y1 >= 0 and shown.x2 <= size[0] and shown.y2 <= size[1]
    whole = in_pixels(MapRegion(0, 0, one.cells.columns, one.cells.rows, 1.0), one.cells, view)
    assert whole.as_list() == pytest.approx([0, 0, *size])
    shape = one.cells.rows, one.cells.columns
    heat = np.full(shape, 1e-4)
    heat[0, 0] = 0.9  # all of the attention is on padding
    heat[shape[0] // 2, shape[1] // 2] = 0.3
    labels = labels_on_grid(
        heat, None, shape, LabelRules(blur_kernel=1), norm_ratio=None, shown=padded_size(one)
    ).labels
    assert labels[0, 0] == BACKGROUND and labels[shape[0] // 2, shape[1] // 2] == FOREGROUND
