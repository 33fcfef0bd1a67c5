"""Which tokens of a sparse crop are kept, and at which scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from qzoom_agent.config import ReviewConfig
from qzoom_agent.geometry import Box, Size
from qzoom_agent.review import adds
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig, ZoomPlan, sparse_plan

FACTOR = 10
ZOOM = Zoom(ZoomConfig(factor=FACTOR, min_tokens=16, max_tokens=16))


def stored() -> ViewStore:
    store = ViewStore()
    store.add_original(Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)))
    store.add_coarse(factor=FACTOR, min_tokens=16, max_tokens=16)
    return store


def test_the_larger_the_foreground_the_smaller_the_scale() -> None:
    plan = ZOOM.plan(stored(), Box(0, 0, 100, 100))
    assert (plan.size, plan.tokens) == (Size(40, 40), 16)
    point = sparse_plan(plan, [Box(49, 49, 51, 51)], scale=2, factor=FACTOR)
    assert point.size == Size(80, 80) and point.kept is not None
    # four cells meet there, and each has neighbours
    assert point.kept == (*["00000000"] * 2, *["00111100"] * 4, *["00000000"] * 2) and point.tokens == 16
    half = sparse_plan(plan, [Box(0, 0, 100, 20)], scale=2, factor=FACTOR)
    assert half.kept is not None and half.size.width < 80 and half.tokens <= 16
    assert half.kept[0] == "1" * len(half.kept[0])


def test_a_crop_that_is_foreground_all_over_stays_whole() -> None:
    plan = ZOOM.plan(stored(), Box(0, 0, 100, 100))
    assert sparse_plan(plan, [Box(0, 0, 100, 100)], scale=3, factor=FACTOR) is plan
    assert sparse_plan(plan, [Box(200, 200, 300, 300)], scale=3, factor=FACTOR) is plan
    refused = ZoomPlan("coarse", error="no")
    assert sparse_plan(refused, [Box(0, 0, 9, 9)], scale=3, factor=FACTOR) is refused


def test_a_sparse_crop_costs_the_tokens_that_are_shown_whatever_the_model_counts_of_a_whole_one() -> None:
    store = stored()
    store.count = lambda image: 99
    kept = ("0110", "0100")
    crop = store.add_sparse_crop(Box(350, 0, 450, 50), size=Size(40, 20), kept=kept)
    assert (crop.tokens, crop.box, crop.kept) == (3, (350, 0, 400, 50), kept)
    assert store.add_crop(Box(0, 0, 40, 40), factor=FACTOR, min_tokens=1, max_tokens=16).tokens == 99


parts = st.tuples(*[st.floats(0, 400)] * 4).map(
    lambda c: Box(min(c[0], c[2]), min(c[1], c[3]), max(c[::2]), max(c[1::2]))
)


@settings(max_examples=25)
@given(box=parts, foreground=st.lists(parts, max_size=4), scale=st.floats(1.1, 4))
def test_no_foreground_of_the_crop_is_lost_and_no_token_is_added(box: Box, foreground: list[Box], scale: float) -> None:
    store = stored()
    plan = ZOOM.plan(store, box)
    found = sparse_plan(plan, foreground, scale=scale, factor=FACTOR)
    assert found.tokens <= plan.tokens and found.box == plan.box
    crop = ZOOM.cut(store, found).view
    assert crop is not None and (crop.size, crop.tokens, crop.kept) == (found.size, found.tokens, found.kept)
    for part in foreground:
        inside = Box(
            max(part.x1, crop.box[0]), max(part.y1, crop.box[1]), min(part.x2, crop.box[2]), min(part.y2, crop.box[3])
        )
        if inside.width > 0.01 and inside.height > 0.01:
            assert crop.coverage(inside) == pytest.approx(1, abs=1e-3)


def test_what_is_left_out_of_a_crop_is_not_shown() -> None:
    """Neither the review nor the evaluation takes it for shown."""
    store = stored()
    plan = sparse_plan(ZOOM.plan(store, Box(0, 0, 100, 100)), [Box(0, 0, 30, 30)], scale=3, factor=FACTOR)
    crop = ZOOM.cut(store, plan).view
    assert crop is not None and crop.kept is not None and crop.cell == FACTOR
    assert crop.coverage(Box(0, 0, 30, 30)) == pytest.approx(1)
    assert crop.coverage(Box(70, 70, 100, 100)) == 0
    again, corner = ZOOM.plan(store, Box(60, 60, 100, 100)), ZOOM.plan(store, Box(0, 0, 28, 28))
    assert adds(again, store.shown, ReviewConfig())
    assert adds(corner, store.shown, ReviewConfig(native=0.9, density=None)) is False
    assert View.model_validate_json(crop.model_dump_json()) == crop
    assert "kept" not in store.view("coarse").model_dump()


@pytest.mark.parametrize("kept", [["10", "1"], ["11", "11"], ["1x"], []])
def test_rows_that_do_not_fit_a_view_are_refused(kept: list[str]) -> None:
    fields = {"id": "crop1", "parent": "coarse", "kind": "crop", "box": [0, 0, 9, 9], "width": 20, "height": 20}
    with pytest.raises(ValidationError):
        View.model_validate({**fields, "digest": "x", "tokens": 2, "kept": kept})
