"""The picture of a look: cells keep their edges, boxes lie where they should, and any numbers can be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.errors import ConfigError
from qzoom_agent.report.overlay import MAX_SIDE, fractions, heat_image, overlay
from qzoom_agent.trace import PerceptionRecord

GREY = (128, 128, 128)
ANY = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324])
HEAT = st.integers(0, 7).flatmap(
    lambda columns: st.lists(st.lists(ANY, min_size=columns, max_size=columns), max_size=7)
)
BOXES = st.lists(st.tuples(ANY, ANY, ANY, ANY) | st.tuples(*[st.floats(-50, 450)] * 4), max_size=4)


def grey(width: int = 400, height: int = 300) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


@settings(max_examples=40, deadline=None)
@given(heat=HEAT, boxes=BOXES, size=st.tuples(st.integers(1, 90), st.integers(1, 90)), opacity=st.floats(0, 1))
def test_any_heat_and_any_boxes_make_a_picture_of_the_right_size(
    heat: list[list[float]], boxes: list[tuple[float, float, float, float]], size: tuple[int, int], opacity: float
) -> None:
    image = grey(*size)
    drawn = overlay(image, PerceptionRecord(heat=heat, boxes=boxes), opacity=opacity)
    assert (drawn.size, drawn.mode) == (size, "RGB")
    assert image.tobytes() == grey(*size).tobytes()


@settings(max_examples=40, deadline=None)
@given(heat=HEAT.filter(any))
def test_a_heat_map_is_one_pixel_a_cell(heat: list[list[float]]) -> None:
    drawn = heat_image(heat)
    assert (drawn.size, drawn.mode) == ((len(heat[0]), len(heat)), "RGBA")


def test_the_hottest_cell_is_red_and_the_coldest_clear() -> None:
    drawn = np.asarray(heat_image([[0.0, 0.5, 1.0], [math.nan, math.inf, -math.inf]]))
    assert list(drawn[0, :, 3]) == [0, 150, 255]
    assert list(drawn[1, :, 3]) == [0, 0, 0]
    red, green, blue = drawn[0, 2, :3]
    assert red > 3 * green and red > 3 * blue


def test_every_cell_keeps_its_edges() -> None:
    pixels = np.asarray(overlay(grey(), PerceptionRecord(heat=[[0, 1], [0, 0]])))
    hot = pixels[:150, 200:]
    assert (hot == hot[0, 0]).all() and (hot[0, 0] != GREY).any()
    assert (pixels[:, :200] == GREY).all() and (pixels[150:] == GREY).all()


PADDED = PerceptionRecord(heat=[[0, 0, 0, 0], [0, 1, 0, 0], [0] * 4, [0] * 4], extent=(0, -50, 400, 350))
"""A look at the grey image that was shown in the middle of a square: its hot cell covers 100, 50 to 200, 150."""


def test_the_map_of_an_image_that_was_shown_padded_covers_what_it_covered() -> None:
    changed = (np.asarray(overlay(grey(), PADDED)) != GREY).any(axis=-1)
    assert changed[50:150, 100:200].all() and changed.sum() == 100 * 100


@pytest.mark.parametrize("extent", [(math.nan, 0, 1, 1), (5, 5, 5, 5), (-1e300, -1e300, 1e300, 1e300), (0, 0, 1e-9, 1)])
def test_a_map_of_any_extent_is_drawn(extent: tuple[float, float, float, float]) -> None:
    assert overlay(grey(), PADDED.model_copy(update={"extent": extent})).size == grey().size


def test_opacity_runs_from_nothing_to_the_colour_itself() -> None:
    record = PerceptionRecord(heat=[[0, 1]])
    image = grey()
    assert overlay(image, record, opacity=0).tobytes() == image.tobytes()
    assert overlay(image, record, opacity=1).getpixel((300, 150)) == heat_image(record.heat).getpixel((1, 0))[:3]  # type: ignore[index]


@pytest.mark.parametrize("opacity", [-0.1, 1.1, math.nan])
def test_an_opacity_that_is_none_is_refused(opacity: float) -> None:
    with pytest.raises(ConfigError, match=r"share of 1, got .* Give a number"):
        overlay(grey(), PerceptionRecord(), opacity=opacity)


def test_a_box_is_an_outline_with_its_number_and_nothing_elsewhere() -> None:
    changed = (np.asarray(overlay(grey(), PerceptionRecord(boxes=[(100, 100, 200, 180)]))) != GREY).any(axis=-1)
    assert changed[100, 100:200].all() and changed[179, 100:200].all()
    assert changed[100:180, 100].all() and changed[100:180, 199].all()
    assert not changed[110:170, 110:190].any()
    assert changed[85:99, 100:110].any(), "the number, on top"
    assert not changed[:, :90].any() and not changed[190:].any()


def test_a_number_at_the_edge_stays_inside() -> None:
    changed = (np.asarray(overlay(grey(), PerceptionRecord(boxes=[(380, 0, 400, 60)]))) != GREY).any(axis=-1)
    assert changed[4:14, 384:396].sum() > 20


def test_boxes_keep_their_place_on_an_image_that_is_drawn_smaller() -> None:
    drawn = overlay(grey(3200, 1600), PerceptionRecord(heat=[[0, 0]], boxes=[(1600, 800, 2400, 1200)]))
    assert drawn.size == (MAX_SIDE, MAX_SIDE // 2)
    changed = (np.asarray(drawn) != GREY).any(axis=-1)
    assert changed[400:600, 800].all() and changed[599, 800:1200].all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "I;16"])
def test_an_image_of_another_mode_is_drawn_too(mode: str) -> None:
    assert overlay(Image.new(mode, (40, 30)), PerceptionRecord(heat=[[1.0, 0.0]])).size == (40, 30)


@settings(max_examples=50, deadline=None)
@given(box=st.tuples(ANY, ANY, ANY, ANY), size=st.tuples(st.integers(0, 5000), st.integers(0, 5000)))
def test_fractions_are_inside_and_in_order(box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    place = fractions(box, size)
    if place is None:
        assert 0 in size or not all(map(math.isfinite, box))
    else:
        assert 0 <= place[0] <= place[2] <= 1 and 0 <= place[1] <= place[3] <= 1
