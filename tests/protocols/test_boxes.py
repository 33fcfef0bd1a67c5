"""Boxes in the shapes and frames that models write them in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Box, Frame, Size
from qzoom_agent.protocols.boxes import numbers_in, read_box
from qzoom_agent.zoom import ImageZoom
from tests.cases import each_case

SIZE = Size(448, 336)
BOX = (620.0, 280.0, 780.0, 390.0)


@each_case(
    ("value", "key"),
    [
        ([620, 280, 780, 390], ""),
        (["620", "280", "780", "390"], ""),
        ("620-280-780-390", ""),
        ("620 - 280 - 780 - 390", ""),
        ("(620,280),(780,390)", ""),
        ("<|box_start|>(620,280),(780,390)<|box_end|>", ""),
        ("x1=620, y1=280, x2=780, y2=390", ""),
        ("x: 620-780, y: 280-390", ""),
        ("x=620, y=280, w=160, h=110", ""),
        ("x\uff1a620\uff0cy\uff1a280\uff0cw\uff1a160\uff0ch\uff1a110", ""),
        ("\uff16\uff12\uff10\uff0c280\uff0c780\uff0c390", ""),
        ('{"bbox_2d": [620, 280, 780, 390]}', ""),
        ('{"box_2d": [280, 620, 390, 780]}', ""),
        ([[[620, 280, 780, 390]]], ""),
        ([[620, 280], [780, 390]], ""),
        ([{"x": 620, "y": 280}, {"x": 780, "y": 390}], ""),
        ([[620, 280, 780, 390], [1, 2, 3, 4]], ""),
        ([[620, 280], [780, 280], [780, 390], [620, 390]], ""),
        ([{"bbox_2d": [620, 280, 780, 390], "label": "car"}], ""),
        ({"x1": 620, "y1": 280, "x2": 780, "y2": 390}, ""),
        ({"x0": 620, "y0": 280, "x1": 780, "y1": 390}, ""),
        ({"x_min": 620, "y_min": 280, "x_max": 780, "y_max": 390}, ""),
        ({"left": 620, "top": 280, "right": 780, "bottom": 390}, ""),
        ({"top_left": [620, 280], "bottom_right": {"x": 780, "y": 390}}, ""),
        ({"x": 620, "y": 280, "width": 160, "height": 110}, ""),
        ({"cx": 700, "cy": 335, "w": 160, "h": 110}, ""),
        ({"center": [700, 335], "size": [160, 110]}, ""),
        ([620, 280, 160, 110], "bbox_xywh"),
        ([280, 620, 390, 780], "box_2d"),
        ({"box_2d": [280, 620, 390, 780]}, ""),
    ],
)
@each_case("frame", ["per_mille", "pixel"])
def test_a_box_is_read_in_every_shape(value: object, key: str, frame: Frame) -> None:
    assert read_box(value, frame, [], size=SIZE, key=key) == (BOX, frame)


@each_case(
    "value",
    [
        [0.62, 0.28, 0.78, 0.39],
        "0.62, 0.28, 0.78, 0.39",
        "62\uff05\uff0c28\uff05\uff0c78\uff05\uff0c39\uff05",
        ["62\u066a", "28\uff05", "78%", "39\uff05"],
        "\uff10\uff0e62\uff0c0\uff0e28\uff0c0\uff0e78\uff0c0\uff0e39",
        "62%, 28%, 78%, 39%",
        "62 %, 28 %, 78 %, 39 %",
        "62-28-78-39%",
        ["62%", "28%", "78%", "39%"],
        {"x": "62%", "y": "28%", "width": "16%", "height": "11%"},
    ],
)
@each_case("frame", ["per_mille", "pixel", "unit"])
def test_shares_and_percentages_are_read_as_such_and_said_so(value: object, frame: Frame) -> None:
    notes: list[str] = []
    found = read_box(value, frame, notes, size=SIZE)
    assert found.frame == "unit" and found.box == pytest.approx((0.62, 0.28, 0.78, 0.39))
    assert frame == "unit" or any("read as shares" in note for note in notes)


@pytest.mark.parametrize(
    ("value", "frame", "legal"),
    [
        ([620, 280, 780, 390], "unit", "shares of the image: x and y from 0 to 1"),
        ([0, 0, 780, 390], "unit", "x and y from 0 to 1"),
        ([300, 200, 1900, 1100], "per_mille", "thousandths of the image: x and y from 0 to 1000"),
        ([0.9, 0.1, 1.7, 1.2], "pixel", "pixels of the image as shown: x from 0 to 448, y from 0 to 336"),
        ([0.9, 0.1, 1.7, 1.2], "per_mille", "x and y from 0 to 1000"),
        ("62%, 28%, 780, 390", "per_mille", "0% to 100%"),
        (["62%", 0.28, "78%", 0.39], "unit", "some numbers are percentages and some are not"),
    ],
)
def test_a_box_that_cannot_be_meant_is_told_the_frame_and_its_range(value: object, frame: Frame, legal: str) -> None:
    with pytest.raises(BoxError, match="cannot be meant") as told:
        read_box(value, frame, [], size=SIZE)
    assert legal in str(told.value)


@each_case(
    "value", [None, True, "here", {}, [], [1, 2, 3], "1_000, 2_000, 3_000, 4_000", "1px, 2px, 3px, 4px", {"x": 1}]
)
def test_what_is_no_box_is_an_error(value: object) -> None:
    with pytest.raises(BoxError, match="four finite numbers"):
        read_box(value, "per_mille", [], size=None)


@each_case(
    ("arguments", "named"),
    [
        ({"cx": 700, "cy": 335, "w": 160, "h": 110}, True),
        ({"X_Min": 620, "Y_Min": 280, "X_Max": 780, "Y_Max": 390}, True),
        ({"top_left": [620, 280], "bottom_right": [780, 390]}, True),
        ({"center": [700, 335], "size": [160, 110]}, True),
        ({"bbox_2d": [620, 280, 780, 390], "xyz": 1}, False),
    ],
)
def test_the_zoom_tool_reads_a_box_given_by_its_parts(arguments: dict[str, object], named: bool) -> None:
    reply = ImageZoom(np.zeros((500, 2000)))(arguments)
    assert (reply.result and reply.result.served) == ((1240, 140, 1560, 195) if named else None)
    assert ("There is no argument 'xyz'" in reply.text) is not named


def test_signs_count_and_hyphens_do_not() -> None:
    assert numbers_in("-5, -6.5 7-8 9 -10") == ["-5", "-6.5", "7", "8", "9", "-10"]
    assert numbers_in("crop1 v2 33x 0x10 12%") == ["12%"]
    assert numbers_in("\u22125, \uff0d6.5") == ["-5", "-6.5"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 1000), min_size=4, max_size=4), st.sampled_from([", ", "-", " ", "; ", " to "]))
def test_numbers_of_the_frame_are_never_changed(numbers: list[int], between: str) -> None:
    found = read_box(between.join(map(str, numbers)), "per_mille", [], size=None)
    assert found == (tuple(numbers), "per_mille")


@settings(max_examples=25, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | st.just(10**400),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "y", "w", "box"]), inner),
        max_leaves=8,
    ),
    st.sampled_from(["pixel", "unit", "per_mille"]),
)
def test_any_value_is_a_finite_box_or_an_error_with_words(value: object, frame: Frame) -> None:
    try:
        found = read_box(value, frame, [], size=SIZE)
    except BoxError as error:
        assert 20 < len(str(error)) < 300
    else:
        assert Box(*found.box).finite
