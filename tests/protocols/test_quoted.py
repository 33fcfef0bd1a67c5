"""Answers that quote a call, a tag or a role, and boxes in words: nothing is lost or read as another box."""

from __future__ import annotations

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols.parsing import own_turn, without_marks
from qzoom_agent.trace import Turn
from qzoom_agent.zoom import ImageZoom

ANSWERS = (
    "Maize is the largest crop (2,300 tonnes).",
    "The code reads crop(10, 20).",
    "The button is labelled <tool>.",
    'The file says {"name": "Bob", "parameters": {"a": 1}}.',
    "Tool: cropper",
    "Action: Zoom in",
    "The circled tag is <img>.",
    "The page ends with </s>, then 5.",
    "The form has three labels:\nuser\npassword\nlogin",
    "Action: tighten the bolt.\nObservation: leak at the valve.",
)


def first_turn(reply: str, *, protocol: str, policy: str = "explicit") -> tuple[Turn, str | None]:
    image = Image.new("RGB", (1600, 1200), "white")
    answer = Agent(ScriptedBackend([reply, "done"], protocol=protocol), policy=policy).run(image, "what?")
    return answer.trace.turns[0], answer.text


@pytest.mark.parametrize("protocol", ["qwen3vl", "plain", "deepeyes", "nano"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_may_quote_what_a_call_looks_like(answer: str, protocol: str) -> None:
    for policy in ("direct", "explicit"):
        assert first_turn(answer, protocol=protocol, policy=policy)[1] == answer


def test_where_nothing_can_be_called_what_cannot_be_read_is_the_answer() -> None:
    assert first_turn("Zoom: a video app", protocol="plain", policy="direct")[1] == "Zoom: a video app"
    assert first_turn("Zoom: a video app", protocol="plain")[1] == "done"


@pytest.mark.parametrize(
    "call",
    [
        "<tool>image_zoom_in_tool</tool>",
        "<crop>[1, 2, 3, 4]</crop>",
        '<tool name="zoom">',
        "<action>zoom(1, 2, 3, 4)",
        "crop(10, 20, 30, 40)",
        "crop(image, 10)",
        "Action: image_zoom_in_tool\nAction Input: {}",
        "Tool: zoom",
        '{"name": "crop_image", "parameters": {"box": [1, 2, 3, 4]}}',
        '{"name": "rotate", "arguments": {}}',
    ],
)
def test_a_call_in_another_format_is_still_no_answer(call: str) -> None:
    turn, text = first_turn(call, protocol="plain")
    assert turn.answer is None and turn.problems and text == "done"


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("42</s>", "42"),
        ("42</s><s>more", "42"),
        ("42\n<image>\nnext", "42\n"),
        ("42\nuser\nAnd now?", "42\n"),
        ("42\nUser:\nAnd now?", "42\n"),
        ("a <img> tag", "a <img> tag"),
    ],
)
def test_marks_end_a_turn_where_they_stand_alone(text: str, own: str) -> None:
    assert own_turn(text) == own
    assert "<img>" not in without_marks(text) and "</s>" not in without_marks(text)


@pytest.mark.parametrize(
    "words",
    [
        "x1 100, x2 300, y1 200, y2 400",
        "top 200, left 100, bottom 400, right 300",
        "x from 100 to 300, y from 200 to 400",
        "x in [100, 300], y in [200, 400]",
        "y: 200-400, x: 100-300",
        "x 100, y 200, width 200, height 200",
        "bbox_xywh [100, 200, 200, 200]",
        "top-left (100, 200), bottom-right (300, 400)",
    ],
)
def test_coordinates_are_read_by_their_names(words: str) -> None:
    turn, _ = first_turn(f"ZOOM: {words}", protocol="plain")
    assert turn.calls[0].box == (100, 200, 300, 400)


def test_a_centre_and_a_size_in_words_are_not_taken_for_corners() -> None:
    turn, _ = first_turn("ZOOM: center (200, 300), size 200 x 200", protocol="plain")
    assert not turn.calls and "could not be read" in turn.problems[0]


@pytest.mark.parametrize(
    "arguments",
    ['{"bbox_2d":[0,0,500,500],}', "{'bbox_2d':[0,0,500,500]}", '"{\\"bbox_2d\\":[0,0,500,500]}"', [0, 0, 500, 500]],
)
def test_the_zoom_of_other_agents_mends_what_formats_mend(arguments: object) -> None:
    reply = ImageZoom(Image.new("RGB", (1600, 1200), "white"))(arguments)  # type: ignore[arg-type]
    assert reply.image is not None and "[0, 0, 800, 600]" in reply.text
