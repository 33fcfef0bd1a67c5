"""Asking a model where to look, and reading the boxes that it writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qzoom_agent.messages import plain_text, view_ids
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.protocols.locate import ask_for_boxes, read_boxes
from qzoom_agent.protocols.wording import PromptFile, Reworded
from qzoom_agent.views import View
from tests.cases import each_case

COARSE = View(
    id="coarse", parent="original", kind="coarse", box=(0, 0, 900, 600), width=252, height=168, digest="d", tokens=54
)
PLAIN = PROTOCOLS["plain"]
ONE, TWO = '{"bbox_2d": [10, 20, 300, 400]}', '{"bbox_2d": [1, 2, 3, 4]}'


def boxes(text: str, *, protocol: str = "plain", limit: int = 4) -> list[tuple[float, ...] | None]:
    return [call.box for call in read_boxes(PROTOCOLS[protocol], text, [COARSE], limit=limit).calls]


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        ("plain", "thousandths of the image's width and height, from 0 to 1000"),
        ("deepeyes", "pixels of the image, which has 252 x 168"),
        ("mini_o3", "shares of the image's width and height, from 0 to 1"),
    ],
)
def test_the_box_is_asked_for_in_the_frame_of_the_family(protocol: str, told: str) -> None:
    (asked,) = ask_for_boxes(PROTOCOLS[protocol], "What {is} it?", [COARSE], limit=1)
    assert asked["role"] == "user" and view_ids([asked]) == ["coarse"]
    assert plain_text(asked).startswith("What {is} it?\n\nDo not answer yet.") and told in plain_text(asked)
    assert "a list of up to" not in plain_text(asked)
    (several,) = ask_for_boxes(PROTOCOLS[protocol], "?", [COARSE], limit=3)
    assert "a list of up to 3" in plain_text(several)


def test_nano_is_asked_in_the_one_way_that_it_knows() -> None:
    for nano in (PROTOCOLS["nano"], Reworded(PROTOCOLS["nano"], PromptFile())):
        (asked,) = ask_for_boxes(nano, "where?", [COARSE], limit=1)
        assert plain_text(asked) == "where? You may zoom."
    assert boxes("<zoom><loc_7><loc_14><loc_70><loc_77></zoom>", protocol="nano") == [(7, 14, 70, 77)]
    assert read_boxes(PROTOCOLS["nano"], "1 2 3 4", [COARSE], limit=1).model_dump(include={"answer", "calls"}) == {
        "answer": None,
        "calls": [],
    }


@each_case(
    ("text", "found"),
    [
        ('{"bbox_2d": [10, 20, 300, 400], "label": "the total"}', [(10, 20, 300, 400)]),
        (f"```json\n[{ONE}, {TWO}]\n```", [(10, 20, 300, 400), (1, 2, 3, 4)]),
        ("[10, 20, 300, 400]", [(10, 20, 300, 400)]),
        ("The box is 10, 20, 300, 400.", [(10, 20, 300, 400)]),
        ('<think>at [1, 1, 2, 2]?</think>{"bbox_2d": [10, 20, 300, 400]}', [(10, 20, 300, 400)]),
        ('{"box_2d": [20, 10, 400, 300]}', [(10, 20, 300, 400)]),
        ("ZOOM: 10, 20, 300, 400", [(10, 20, 300, 400)]),
        ("\\boxed{[10, 20, 300, 400]}", [(10, 20, 300, 400)]),
        ("<|box_start|>(10,20),(300,400)<|box_end|>", [(10, 20, 300, 400)]),
        (f'{{"boxes": [{ONE}, {TWO}]}}', [(10, 20, 300, 400), (1, 2, 3, 4)]),
        ('{"bbox_2d": null}', []),
        ('{"bbox_2d": "none"}', []),
        ('{"bbox_2d": []}', []),
        ("The whole image.", []),
        ("", []),
    ],
)
def test_boxes_are_read_as_models_write_them(text: str, found: list[tuple[float, ...]]) -> None:
    assert boxes(text) == found
    assert read_boxes(PLAIN, text, [COARSE], limit=4).answer is None


@each_case(
    "text",
    [
        '{"bbox_2d": null, "label": "all is legible"}',
        '[{"bbox_2d": [], "img_idx": 0}]',
        '{"bbox_2d": [null, null, null, null]}',
    ],
)
def test_a_reply_that_nothing_has_to_be_enlarged_is_no_problem(text: str) -> None:
    found = read_boxes(PLAIN, text, [COARSE], limit=4)
    assert (found.calls, found.problems) == ([], [])


def test_a_label_is_kept_and_no_more_boxes_than_asked_for() -> None:
    text = '[{"bbox_2d": [10, 20, 300, 400], "label": "total"}, {"bbox_2d": [1, 2, 3, 4]}]'
    (call,) = read_boxes(PLAIN, text, [COARSE], limit=1).calls
    assert (call.label, call.view, call.frame) == ("total", "coarse", "per_mille")


def test_a_box_that_cannot_be_meant_is_a_problem() -> None:
    found = read_boxes(PLAIN, '{"bbox_2d": [10, 20, 30000, 400]}', [COARSE], limit=1)
    assert not found.calls and "from 0 to 1000" in found.problems[0]


@given(st.text() | st.from_regex(r'[\[{"bbox_2d:\s0-9,.\]}<think/>null-]{0,80}'))
def test_any_reply_is_read(text: str) -> None:
    for name in ("plain", "nano", "qwen3vl", "pixel_reasoner"):
        found = read_boxes(PROTOCOLS[name], text, [COARSE], limit=2)
        assert len(found.calls) <= 2 and found.answer is None
