"""Whatever box a model writes, zoom cuts a legal crop and says what it changed, or says what would be legal."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.geometry import FRAMES, Box
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom import Zoom, ZoomConfig, ZoomResult
from tests.cases import each_case

NANO = ZoomConfig(factor=28, min_tokens=32, max_tokens=64, min_side=32)


def store_of(width=900, height=700):
    store = ViewStore()
    store.add_original(Image.linear_gradient("L").resize((width, height)).convert("RGB"))
    store.add_coarse(factor=28, min_tokens=16, max_tokens=64)
    return store


def test_a_good_box_is_cut_as_it_is():
    store = store_of()
    found = Zoom(NANO)(store, Box(100, 200, 300, 350), label="the sign")
    assert found.served == (100, 200, 300, 350)
    assert found.notes == [] and found.error is None and found.label == "the sign"
    assert found.view == store.view("crop1")
    assert found.view.parent == "original"
    assert ZoomResult.model_validate_json(found.model_dump_json()) == found


def test_a_plan_costs_what_the_models_processor_makes_of_the_crop():
    store, sizes = store_of(), []
    store.count = lambda image: sizes.append(image.size) or 16  # a family with a fixed number of tokens
    plan = Zoom(NANO).plan(store, Box(100, 200, 300, 350))
    assert (plan.tokens, sizes) == (16, [plan.size])
    assert Zoom(NANO).cut(store, plan).view.tokens == 16


@pytest.mark.parametrize(
    "box",
    [
        Box(28, 28, 84, 112, view="coarse"),
        Box(1 / 9, 1 / 7, 3 / 9, 4 / 7, "unit", "coarse"),
        Box(1000 / 9, 1000 / 7, 3000 / 9, 4000 / 7, "per_mille", "coarse"),
        Box(1, 1, 3, 4, "cell", "coarse"),
        Box(100, 100, 300, 400),
        Box(1 / 9, 1 / 7, 3 / 9, 4 / 7, "unit"),
    ],
)
def test_one_region_from_every_frame(box):
    found = Zoom(NANO)(store_of(), box)
    assert found.served == (100, 100, 300, 400)
    assert found.notes == []
    assert found.view.parent == box.view


def test_a_box_inside_a_crop():
    store = store_of()
    zoom = Zoom(NANO)
    first = zoom(store, Box(100, 100, 500, 500, view="original")).view
    second = zoom(store, Box(500, 500, 1000, 1000, "per_mille", first.id))
    assert second.served == (300, 300, 500, 500)
    third = zoom(store, Box(0, 0, 0.5, 0.5, "unit", second.view.id))
    assert third.served == (300, 300, 400, 400)
    assert [view.parent for view in store.shown] == ["original", "original", "crop1", "crop2"]


def test_swapped_corners_are_mended():
    found = Zoom(NANO)(store_of(), Box(500, 900, 300, 400, "per_mille", "coarse"))
    assert found.served == (270, 280, 450, 630)
    assert found.notes == ["The corners were swapped; read as [300, 400, 500, 900]."]


def test_what_is_partly_outside_is_clamped_and_said():
    found = Zoom(NANO)(store_of(), Box(-50, 600, 200, 1e9))
    assert found.served == (0, 600, 200, 700)
    assert found.notes == ["Box [-50, 600, 200, 1e+09] reached outside the image; only the part inside was cut."]


def test_a_box_of_a_crop_is_clamped_to_that_crop():
    store = store_of()
    zoom = Zoom(NANO)
    zoom(store, Box(100, 100, 500, 500))
    found = zoom(store, Box(0.5, 0.5, 1.5, 1.5, "unit", "crop1"))
    assert found.served == (300, 300, 500, 500)
    assert len(found.notes) == 1


@pytest.mark.parametrize(
    ("box", "served", "note"),
    [
        (Box(100, 100, 109, 112), (88, 90, 120, 122), "Box grown from 9x12 to 32x32 px around its centre."),
        (Box(0, 0, 9, 12), (0, 0, 32, 32), "Box grown from 9x12 to 32x32 px, moved to stay inside the image."),
        (Box(400, 300, 400, 300), (384, 284, 416, 316), "Box grown from 2x2 to 32x32 px around its centre."),
        (
            Box(900, 700, 900, 700),
            (868, 668, 900, 700),
            "Box grown from 1x1 to 32x32 px, moved to stay inside the image.",
        ),
        (Box(0, 300, 900, 310), (0, 282, 900, 327), "Box grown from 900x10 to 900x45 px around its centre."),
    ],
)
def test_small_and_thin_boxes_grow_and_say_so(box, served, note):
    found = Zoom(NANO)(store_of(), box)
    assert found.served == served
    assert found.notes == [note]


def test_a_small_crop_is_magnified_to_its_least_budget():
    found = Zoom(NANO)(store_of(), Box(400, 300, 440, 340))
    assert found.view.size == (168, 168) and found.view.tokens == 36
    assert Zoom()(store_of(), Box(400, 300, 440, 340)).view.tokens == 256


def test_an_image_smaller_than_the_shortest_side():
    found = Zoom(NANO)(store_of(20, 24), Box(3, 3, 9, 9))
    assert found.served == (0, 0, 20, 24)
    assert found.notes == ["Box grown from 6x6 to 20x24 px, moved to stay inside the image."]


def test_a_thin_image_is_shown_in_parts():
    found = Zoom(NANO)(store_of(4000, 30), Box(0, 0, 1, 1, "unit", "coarse"))
    assert found.served == (1700, 0, 2300, 30)
    assert found.notes == [
        "Box shortened from 4000x30 to 600x30 px around its centre: nothing longer than 20:1 can be shown. "
        "Zoom in on one part at a time."
    ]


@each_case(
    ("box", "says"),
    [
        (Box(901, 0, 950, 10), ["[901, 0, 950, 10] lies outside", "900x700 px", "x from 0 to 900, y from 0 to 700"]),
        (Box(900, 0, 950, 10), ["lies outside"]),
        (Box(-9, -9, 0, 9), ["lies outside"]),
        (Box(300, 0, 350, 10, view="coarse"), ["View 'coarse' has 252x196 px, taken from an image of 900x700 px"]),
        (Box(1, 2, 3, 4, "unit", "coarse"), ["in frame unit: x from 0 to 1, y from 0 to 1"]),
        (Box(0, 1001, 9, 1009, "per_mille", "coarse"), ["in frame per_mille: x from 0 to 1000, y from 0 to 1000"]),
        (Box(10, 0, 11, 1, "cell", "coarse"), ["in frame cell: x from 0 to 9, y from 0 to 7"]),
        (Box(math.nan, 0, 1, 1), ["[nan, 0, 1, 1] is not a box", "must be finite", "900x700 px", "x from 0 to 900"]),
        (Box(0, 0, math.inf, 1, "unit", "coarse"), ["[0, 0, inf, 1] is not a box", "x from 0 to 1"]),
        (Box(0, 0, 10**400, 1), ["[0, 0, inf, 1] is not a box"]),
        (Box(0, 0, 1, 1, view="crop4"), ["There is no view 'crop4'; the views are original, coarse."]),
        (Box(0, 0, 1, 1, "cell"), ["'original' has no token grid"]),
    ],
)
def test_what_means_nothing_is_answered_with_what_is_legal(box, says):
    store = store_of()
    found = Zoom(NANO)(store, box, label="x")
    assert found.view is None and found.served is None and found.label == "x"
    for text in says:
        assert text in found.error
    assert len(store.shown) == 1


numbers = st.floats() | st.integers(-(10**400), 10**400) | st.floats(-50, 1050) | st.floats(-0.1, 1.1)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.tuples(numbers, numbers, numbers, numbers),
    st.sampled_from(FRAMES),
    st.sampled_from(["original", "coarse", "crop1", "crop2", "nowhere", ""]),
    st.sampled_from([(900, 700), (20, 24), (1, 1), (1200, 8), (8, 1200)]),
    st.integers(1, 400),
    st.floats(1, 500),
)
def test_no_box_ever_raises_or_is_cut_wrong(values, frame, view, size, min_side, max_aspect):
    store = store_of(*size)
    zoom = Zoom(ZoomConfig(factor=28, min_tokens=4, max_tokens=40, min_side=min_side, max_aspect=max_aspect))
    zoom(store, Box(0.25, 0.25, 0.75, 0.75, "unit", "coarse"))
    shown = len(store.shown)
    plan = zoom.plan(store, Box(*values, frame=frame, view=view))
    assert len(store.shown) == shown
    found = zoom.cut(store, plan)
    assert (found.error, found.notes) == (plan.error, list(plan.notes))
    assert (found.view is None) == (found.error is not None) == (found.served is None)
    assert len(store.shown) == shown + (found.view is not None)
    if found.view is None:
        assert (plan.box, plan.size, plan.tokens) == (None, (0, 0), 0)
    else:
        assert plan.box.as_list() == list(found.served)
        assert (plan.size, plan.tokens, plan.parent) == (found.view.size, found.view.tokens, found.view.parent)
        x1, y1, x2, y2 = found.served
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
        assert all(value.is_integer() for value in found.served)
        width, height = x2 - x1, y2 - y1
        assert max(width, height) / min(width, height) <= min(max_aspect, 200) or min(width, height) == 1
        assert store.image(found.view.id).size == found.view.size


@pytest.fixture(scope="module")
def one_store():
    return store_of()


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_served_boxes_hold_what_was_asked_and_the_budget(one_store, values):
    store = one_store
    asked = Box(*values, frame="unit", view="coarse")
    found = Zoom(NANO)(store, asked)
    assert found.error is None
    assert Box(*found.served).coverage(store.to_original(asked.ordered()).clamp((900, 700))) > 0.99
    width, height = found.served[2] - found.served[0], found.served[3] - found.served[1]
    assert min(width, height) >= 32 and max(width, height) / min(width, height) <= 20
    assert found.view.tokens <= 64


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="at least 9 tokens but at most 4"):
        ZoomConfig(min_tokens=9, max_tokens=4)
    with pytest.raises(ConfigError, match="min_side"):
        ZoomConfig(min_side=0)
    with pytest.raises(ConfigError, match="max_aspect"):
        ZoomConfig(max_aspect=0.5)
    with pytest.raises(ValidationError):
        Zoom().config.factor = 3


def test_a_folder_that_cannot_be_written_is_not_the_models_fault(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = store_of()
    store.folder = tmp_path / "file"
    with pytest.raises(ImageError, match=r"Cannot write .*: there is a file where a folder is needed"):
        Zoom(NANO)(store, Box(1, 1, 99, 99))
