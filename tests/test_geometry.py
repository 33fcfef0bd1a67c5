"""Boxes keep their meaning through every conversion, and views are sized as the model families size them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.errors import BoxError, ConfigError, ImageError
from qzoom_agent.geometry import FRAMES, Box, Size, fit_tokens, tokens
from qzoom_agent.views import View

fixed = settings(deadline=None, derandomize=True)

sizes = st.builds(Size, st.integers(1, 6000), st.integers(1, 6000))
coordinates = st.floats(-1e4, 1e4)
any_number = st.floats(allow_nan=False) | st.integers(-(10**400), 10**400)
pixel_boxes = st.builds(Box, coordinates, coordinates, coordinates, coordinates)
wild_boxes = st.builds(Box, any_number, any_number, any_number, any_number)


def view_of(region: Box, size: Size, name: str = "crop1") -> View:
    box = (region.x1, region.y1, region.x2, region.y2)
    return View(id=name, parent=None, kind="crop", box=box, width=size[0], height=size[1], digest="", tokens=1)


@st.composite
def boxes_inside(draw: st.DrawFn, size: Size) -> Box:
    x1, x2 = sorted((draw(st.integers(0, size.width)), draw(st.integers(0, size.width))))
    y1, y2 = sorted((draw(st.integers(0, size.height)), draw(st.integers(0, size.height))))
    return Box(x1, y1, x2, y2)


@st.composite
def views(draw: st.DrawFn) -> tuple[Box, Size]:
    """A view: where it lies in the original, and the size it is shown at."""
    x1, y1 = draw(st.integers(0, 3000)), draw(st.integers(0, 3000))
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    return Box(x1, y1, x1 + width, y1 + height), draw(sizes)


def assert_legal(box: Box, size: Size) -> None:
    assert 0 <= box.x1 < box.x2 <= size.width
    assert 0 <= box.y1 < box.y2 <= size.height


# ---- frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("pixel", [56, 84, 112, 168]),
        ("unit", [0.25, 0.25, 0.5, 0.5]),
        ("per_mille", [250, 250, 500, 500]),
        ("cell", [2, 3, 4, 6]),
    ],
)
def test_one_rectangle_in_every_frame(frame, expected):
    box = Box(56, 84, 112, 168, view="coarse")
    found = box.to_frame(frame, Size(224, 336), 28)
    assert found.as_list() == pytest.approx(expected)
    assert (found.frame, found.view) == (frame, "coarse")
    assert found.to_pixel(Size(224, 336), 28).as_list() == pytest.approx(box.as_list())


@fixed
@given(pixel_boxes, sizes, st.sampled_from(FRAMES), st.sampled_from(FRAMES), st.sampled_from([7, 28, 32]))
def test_frames_round_trip(box, size, first, second, cell):
    there = box.to_frame(first, size, cell).to_frame(second, size, cell)
    back = there.to_frame("pixel", size, cell)
    assert back.as_list() == pytest.approx(box.as_list(), rel=1e-9, abs=1e-6)


@fixed
@given(pixel_boxes, views())
def test_a_view_round_trips_through_the_original(box, view):
    region, size = view
    seen = Box(*box.as_list(), view="crop1")
    there = view_of(region, size).to_original(seen)
    assert (there.view, there.frame) == ("original", "pixel")
    back = view_of(region, size).from_original(there)
    assert back.as_list() == pytest.approx(seen.as_list(), rel=1e-9, abs=1e-4)
    assert back.view == "crop1"


@fixed
@given(views(), views(), st.tuples(*[st.floats(0, 1)] * 4))
def test_nested_views_compose(outer, inner, unit):
    """A box in a view inside a view lands where the fractions of fractions say."""
    (region, size), (_, inner_size) = outer, inner
    x1, y1, x2, y2 = unit
    nested = Box(size.width / 4, size.height / 4, size.width / 2, size.height / 2, view="coarse")
    inner_region = view_of(region, size, "coarse").to_original(nested)
    found = view_of(inner_region, inner_size).to_original(Box(x1, y1, x2, y2, "unit", "crop1"))
    expected = [
        region.x1 + region.width * (1 + x1) / 4,
        region.y1 + region.height * (1 + y1) / 4,
        region.x1 + region.width * (1 + x2) / 4,
        region.y1 + region.height * (1 + y2) / 4,
    ]
    assert found.as_list() == pytest.approx(expected, rel=1e-9, abs=1e-6)


@fixed
@given(views())
def test_a_whole_view_is_its_region(view):
    region, size = view
    whole = Box(0, 0, *size, view="crop1")
    assert view_of(region, size).to_original(whole).as_list() == pytest.approx(region.as_list())


def test_frames_are_never_mixed_up():
    pixel, unit = Box(0, 0, 1, 1), Box(0, 0, 1, 1, "unit")
    for compare in (pixel.iou, pixel.coverage):
        with pytest.raises(BoxError, match=r"pixel of 'original' and unit of 'original'"):
            compare(unit)
        with pytest.raises(BoxError, match=r"'coarse'"):
            compare(Box(0, 0, 1, 1, view="coarse"))
    for change in (unit.clamp, lambda size: unit.grow_to(3, size), lambda size: unit.scale(2, size)):
        with pytest.raises(BoxError, match="to_pixel"):
            change(Size(10, 10))
    with pytest.raises(BoxError, match="to_pixel"):
        unit.rounded()
    view = view_of(pixel, Size(1, 1))
    with pytest.raises(BoxError, match="'original' was given to view 'crop1'"):
        view.to_original(unit)
    for other in (unit, Box(0, 0, 1, 1, view="coarse")):
        with pytest.raises(BoxError, match="original pixels"):
            view.from_original(other)
    with pytest.raises(BoxError, match="Unknown frame 'px'"):
        Box(0, 0, 1, 1, "px")  # type: ignore[arg-type]


# ---- mending -------------------------------------------------------------------------------------------------------


@fixed
@given(wild_boxes, sizes)
def test_clamp_is_never_empty_and_never_outside(box, size):
    found = box.clamp(size)
    assert_legal(found, size)
    assert min(found.width, found.height) >= 1 - 1e-9
    assert found.clamp(size).as_list() == pytest.approx(found.as_list())


@fixed
@given(st.data(), sizes)
def test_clamp_keeps_a_legal_box(data, size):
    box = data.draw(boxes_inside(size))
    if box.area:
        assert box.clamp(size) == box


@fixed
@given(pixel_boxes, sizes, st.integers(1, 300))
def test_grow_reaches_the_side_or_the_image(box, size, side):
    found = box.grow_to(side, size)
    assert_legal(found, size)
    clamped = box.clamp(size)
    for got, had, limit in zip(
        (found.width, found.height), (clamped.width, clamped.height), (size.width, size.height), strict=True
    ):
        assert got == pytest.approx(max(had, min(side, limit)))
    assert found.coverage(clamped) == pytest.approx(1)


def test_grow_is_about_the_centre_and_slides_in():
    size = Size(100, 80)
    assert Box(40, 40, 50, 44).grow_to(20, size).as_list() == [35, 32, 55, 52]
    assert Box(2, 76, 6, 80).grow_to(20, size).as_list() == [0, 60, 20, 80]
    assert Box(0, 0, 5, 5).grow_to(500, size).as_list() == [0, 0, 100, 80]
    assert Box(10, 10, 60, 60).grow_to(20, size).as_list() == [10, 10, 60, 60]


@fixed
@given(pixel_boxes, sizes, st.floats(1, 100))
def test_limit_aspect_grows_the_short_side(box, size, limit):
    found = box.limit_aspect(limit, size)
    assert_legal(found, size)
    long, short = max(found.width, found.height), min(found.width, found.height)
    short_limit = size.height if found.height < found.width else size.width
    assert long / short <= limit * (1 + 1e-6) or short == pytest.approx(short_limit)
    assert found.coverage(box.clamp(size)) == pytest.approx(1)


@fixed
@given(pixel_boxes, sizes, st.floats(0.01, 100))
def test_scale_stays_inside(box, size, factor):
    found = box.scale(factor, size)
    assert_legal(found, size)
    assert found.width == pytest.approx(min(max(box.clamp(size).width * factor, 1), size.width))


def test_scale_is_about_the_centre():
    assert Box(40, 40, 60, 50).scale(2, Size(100, 100)).as_list() == [30, 35, 70, 55]
    assert Box(40, 40, 60, 50).scale(0.5, Size(100, 100)).as_list() == [45, 42.5, 55, 47.5]


@fixed
@given(pixel_boxes)
def test_rounded_goes_outward_to_whole_pixels(box):
    box = box.ordered()
    found = box.rounded()
    assert all(value.is_integer() for value in found.as_list())
    assert found.x1 <= box.x1 + 1e-5 and found.y1 <= box.y1 + 1e-5
    assert found.x2 >= box.x2 - 1e-5 and found.y2 >= box.y2 - 1e-5
    assert found.width >= 1 and found.height >= 1
    assert found.width < box.width + 2 and found.height < box.height + 2


def test_rounded_forgives_float_noise():
    assert Box(0.1 + 0.2 - 0.3, 2.9999999999, 5.0000000001, 7).rounded().as_list() == [0, 3, 5, 7]


@fixed
@given(wild_boxes)
def test_ordered_keeps_the_rectangle(box):
    found = box.ordered()
    assert found.x1 <= found.x2 and found.y1 <= found.y2
    assert sorted(found.as_list()) == sorted(box.as_list())


def test_odd_numbers_are_held_and_told():
    assert not Box(math.nan, 0, 1, 1).finite
    assert not Box(0, 0, 10**400, 1).finite
    assert Box(-(10**400), 0, 1, 1).x1 == -math.inf
    assert Box(-5, 9, 1e300, 3).finite
    with pytest.raises(BoxError, match="NaN"):
        Box(math.nan, 0, 1, 1).clamp(Size(10, 10))
    with pytest.raises(ImageError, match="0x10"):
        Box(0, 0, 1, 1).clamp(Size(0, 10))


# ---- overlap -------------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    a, b = Box(0, 0, 10, 10), Box(5, 5, 15, 15)
    assert a.iou(b) == pytest.approx(25 / 175)
    assert a.coverage(b) == pytest.approx(0.25)
    assert a.iou(Box(20, 20, 30, 30)) == 0
    assert a.coverage(Box(3, 3, 3, 9)) == 0
    assert Box(0, 0, 0, 0).iou(Box(0, 0, 0, 0)) == 0
    half, right = Box(0, 0, 0.5, 1, "unit"), Box(0.25, 0, 1, 1, "unit")
    assert half.iou(right) == pytest.approx(0.25)
    assert Box(10, 0, 0, 10).area == Box(0, 10, 10, 0).area == Box(10, 10, 0, 0).area == 0


@fixed
@given(st.data(), sizes)
def test_overlap_properties(data, size):
    a, b = data.draw(boxes_inside(size)), data.draw(boxes_inside(size))
    assert a.iou(b) == b.iou(a)
    assert 0 <= a.iou(b) <= min(1, *(share for share in (a.coverage(b), b.coverage(a)))) + 1e-12
    if a.area:
        assert a.iou(a) == 1 and a.coverage(a) == 1
        assert Box(0, 0, *size).coverage(a) == 1


# ---- the families' resize rule -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smart_resize():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    return smart_resize


@settings(fixed, max_examples=250)
@given(
    st.integers(1, 12000),
    st.integers(1, 12000),
    st.sampled_from([28, 32]),
    st.integers(1, 2000),
    st.integers(0, 16000),
)
def test_equal_to_smart_resize(smart_resize, width, height, factor, least, more):
    budget = {"min_tokens": least, "max_tokens": least + more}
    pixels = {"min_pixels": least * factor**2, "max_pixels": (least + more) * factor**2}
    try:
        expected = smart_resize(height, width, factor=factor, **pixels)
    except ValueError:
        with pytest.raises(ImageError, match="200:1"):
            fit_tokens((width, height), factor=factor, **budget)
    else:
        found = fit_tokens((width, height), factor=factor, **budget)
        assert (found.height, found.width) == expected


@fixed
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([28, 32]), st.integers(1, 500), st.integers(4, 20))
def test_the_budget_holds_where_it_is_promised(width, height, factor, least, times):
    most = least * times
    if max(width, height) / min(width, height) > min(most, 200):
        return
    found = fit_tokens((width, height), factor=factor, min_tokens=least, max_tokens=most)
    assert found.width % factor == 0 and found.height % factor == 0
    assert 1 <= tokens(found, factor) <= most
    assert tokens(found, factor) * factor**2 == found.area
    assert fit_tokens(found, factor=factor, min_tokens=1, max_tokens=most) == found


def test_sizes_by_hand():
    assert fit_tokens((900, 700), factor=28, min_tokens=16, max_tokens=64) == Size(252, 196)
    assert fit_tokens((10, 10), factor=28, min_tokens=16, max_tokens=64) == Size(112, 112)
    assert tokens(Size(252, 196), 28) == 63


@pytest.mark.parametrize("budget", [(0, 4), (5, 4), (-1, 4)])
def test_an_impossible_budget_is_named(budget):
    with pytest.raises(ConfigError, match=f"min_tokens={budget[0]}, max_tokens={budget[1]}"):
        fit_tokens((10, 10), factor=28, min_tokens=budget[0], max_tokens=budget[1])


def test_an_extreme_shape_is_named():
    with pytest.raises(ImageError, match=r"1x100000 px is longer than 200:1"):
        fit_tokens((1, 100_000), factor=28, min_tokens=4, max_tokens=64)


def test_padding_is_a_share_of_the_longer_side() -> None:
    assert Box(20, 20, 60, 30).padded(0.25).as_list() == [10, 10, 70, 40]
    assert Box(80, 40, 100, 50).padded(1.0).clamp(Size(100, 50)).as_list() == [60, 20, 100, 50]
    assert Box(80, 40, 120, 60).padded(0.0).clamp(Size(100, 50)).as_list() == [80, 40, 100, 50]
