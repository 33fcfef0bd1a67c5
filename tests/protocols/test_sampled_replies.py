"""Replies as models sample them: answer or call, the image that a call is about, and the arguments of own tools."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.protocols import PROTOCOLS, Parsed
from tests.cases import each_case

WIDE, TALL = Image.linear_gradient("L").resize((800, 600)), Image.radial_gradient("L").resize((400, 900))
ZOOM = '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 200, 220]}}'
CALL = f"<tool_call>{ZOOM}</tool_call>"
FUNCTION = "<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n{}\n</parameter>\n</function>"


def parse(name: str, reply: str) -> Parsed:
    return PROTOCOLS[name].parse(reply, [])


def ask(reply: str, *, protocol: str, images: Any = WIDE, **options: Any) -> Answer:
    backend = ScriptedBackend([reply, "done", "done"], protocol=protocol)
    return Agent(backend, **{"policy": "explicit", **options}).run(images, "what?")


# ---- answers --------------------------------------------------------------------------------------------------------


@each_case("reply", [f"<answer>{CALL}</answer>", f"<think>a</think><answer>{CALL}", f"<answer>\n{CALL}\n</answer>"])
def test_an_answer_that_is_nothing_but_a_call_is_a_call(reply: str) -> None:
    parsed = parse("deepeyes", reply)
    assert parsed.answer is None and [call.box for call in parsed.calls] == [(10, 20, 200, 220)]
    assert "call read from inside <answer>" in parsed.repairs


def test_an_answer_may_quote_a_tag_and_follow_on_a_call() -> None:
    parsed = parse("deepeyes", "<answer>Use <tool_call> to call.</answer>")
    assert parsed.answer == "Use <tool_call> to call." and parsed.repairs == []
    parsed = parse("deepeyes", f"{CALL}<answer>red</answer>")
    assert parsed.answer == "red" and parsed.repairs == ["call beside an answer not run"]
    assert parse("plain", "<answer>Zoom: 4x</answer>").answer == "Zoom: 4x"
    parsed = parse("deepeyes", f"<answer>red\n{CALL}</answer>")
    assert parsed.answer == "red" and parsed.repairs == ["call beside an answer not run"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<answer>red</answer> I put it into <answer> tags.", "red"),
        ("I put it into <answer> tags. <answer>red</answer>", "red"),
        ("<answer>red<answer>", "red"),
        ("<answer>red</answer><answer>\\boxed{}</answer>", "red"),
        ("\\boxed{A}, or is it \\boxed{}", "A"),
        ("So \\boxed {A}", "A"),
        ("So \\boxed{ \\text{A} }", "A"),
        ("So <|begin_of_box|>42<|end_of_box|>.", "42"),
        ("<answer>So <|begin_of_box|>42<|end_of_box|></answer>", "42"),
    ],
)
def test_the_answer_is_what_is_marked_and_not_empty(reply: str, answer: str) -> None:
    assert parse("pixel_reasoner", reply).answer == answer


@each_case("reply", ["\\boxed{}", "$\\boxed{ }$", "<answer>\\boxed{}</answer>", "<|begin_of_box|><|end_of_box|>"])
def test_an_empty_box_is_no_answer(reply: str) -> None:
    for name in ("pixel_reasoner", "visionthink", "qwen3vl"):
        parsed = parse(name, reply)
        assert parsed.answer is None and parsed.problems, name
    assert parse("qwen3vl", "The answer is 5. \\boxed{}").answer == "The answer is 5."


# ---- calls ----------------------------------------------------------------------------------------------------------


@each_case("between", ["", "\nand\n"])
def test_every_call_without_its_tags_is_read(between: str) -> None:
    boxes = [(10, 20, 200, 220), (30, 20, 200, 220)]
    objects = between.join((ZOOM, ZOOM.replace("[10, ", "[30, ")))
    functions = between.join(FUNCTION.format(list(box)) for box in boxes)
    for name, reply in (("deepeyes", objects), ("qwen3_5", functions)):
        parsed = parse(name, reply)
        assert [call.box for call in parsed.calls] == boxes and not parsed.problems, name


def test_a_grounding_call_may_have_a_name_and_arguments() -> None:
    inside = '{"name": "grounding", "arguments": {"bbox_2d": [0.1, 0.2, 0.5, 0.6], "source": "original_image"}}'
    parsed = parse("mini_o3", f"<grounding>{inside}</grounding>")
    assert [call.box for call in parsed.calls] == [(0.1, 0.2, 0.5, 0.6)] and not parsed.problems
    own = '<grounding>{"name": "look_up", "arguments": {"code": "7"}}</grounding>'
    (call,) = ask(own, protocol="mini_o3", tools=[look_up]).trace.turns[0].calls
    assert call.text == repr(("7", None, 0, None))


def test_a_tag_opened_twice_and_full_width_punctuation_are_read() -> None:
    parsed = parse("deepeyes", f"<tool_call><tool_call>{ZOOM}</tool_call></tool_call>")
    assert len(parsed.calls) == 1 and not parsed.problems
    wide = ZOOM.replace("}}", ', "label": "a\uff0cb"}}').replace(": ", "\uff1a").replace(", ", "\uff0c")
    (call,) = parse("deepeyes", f"<tool_call>{wide}</tool_call>").calls
    assert call.box == (10, 20, 200, 220) and call.label == "a\uff0cb"


def test_an_index_that_the_schema_leaves_out_is_no_correction() -> None:
    call = f"<tool_call>\n{FUNCTION.format([1, 2, 300, 400])}\n</tool_call>"
    assert ask(call, protocol="qwen3_5").trace.turns[0].repairs == []
    several = ask(call, protocol="qwen3_5", images=[WIDE, TALL])
    assert several.trace.turns[0].repairs == ["img_idx missing, 0 taken"]


@each_case("reply", ["[[1, 2, 300, 400], [5, 6, 700, 800]]", '{"bbox_2d": [[1, 2, 300, 400], [5, 6, 700, 800]]}'])
def test_a_list_of_boxes_is_several_places_to_look_at(reply: str) -> None:
    for most in (1, 2):
        answer = ask(reply, protocol="qwen3vl", policy="locate", perception={"max_regions": most})
        assert answer.boxes == [(0, 1, 240, 240), (4, 3, 560, 480)][:most]


# ---- which image ----------------------------------------------------------------------------------------------------


@each_case(
    "line",
    [
        *("ZOOM image 2: 0, 0, 500, 500", "ZOOM (image 2): 0, 0, 500, 500", "ZOOM image 2 0, 0, 500, 500"),
        *("ZOOM: image 2: 0, 0, 500, 500", "ZOOM image_2: 0, 0, 500, 500", "ZOOM page 2: 0, 0, 500, 500"),
    ],
)
def test_a_zoom_line_names_one_of_several_images_in_many_ways(line: str) -> None:
    assert ask(line, protocol="plain", images=[WIDE, TALL]).evidence == [(1, (0, 0, 200, 450))]


@each_case(
    "line",
    [
        *("ZOOM second image: 0, 0, 500, 500", "ZOOM image two: 0, 0, 500, 500", "ZOOM image 3: 0, 0, 500, 500"),
        *("ZOOM image 1 and image 2: 0, 0, 500, 500", "ZOOM tool1: 0, 0, 500, 500", "ZOOM crop 1: 0, 0, 500, 500"),
    ],
)
def test_a_zoom_line_that_names_no_image_there_is_is_told_and_not_served_on_the_first(line: str) -> None:
    answer = ask(line, protocol="plain", images=[WIDE, TALL])
    assert answer.evidence == [] and "image 1, image 2" in answer.trace.turns[0].problems[0]


def test_a_zoom_line_may_name_a_crop() -> None:
    backend = ScriptedBackend(["ZOOM: 0, 0, 500, 500", "ZOOM crop 1: 500, 500, 1000, 1000", "red"], protocol="plain")
    answer = Agent(backend, policy="explicit").run(WIDE, "what?")
    assert answer.boxes[1] == (200, 150, 400, 300)


def named(tool: str, box: list[float], **image: Any) -> str:
    call = {"name": tool, "arguments": {"bbox_2d": box, **image}}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


@pytest.mark.parametrize(
    ("protocol", "reply", "name"),
    [
        ("qwen3vl", named("image_zoom_in_tool", [0, 0, 500, 500], target_image=2), "img_idx"),
        ("deepeyes", named("image_zoom_in_tool", [0, 0, 50, 50], image=2), "img_idx"),
        ("pixel_reasoner", named("crop_image_normalized", [0, 0, 0.5, 0.5], img_idx=1), "target_image"),
        ("mini_o3", '<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "img_idx": 1}</grounding>', "source"),
        ("visionthink", '<tool_call>{"name": "resize_image", "arguments": {"image": 2}}</tool_call>', "img_idx"),
        ("deepeyes", named("image_zoom_in_tool", [0, 0, 50, 50], view="coarse9"), "coarse2"),
    ],
)
def test_a_call_that_names_its_image_otherwise_is_told_and_not_served_on_the_first(
    protocol: str, reply: str, name: str
) -> None:
    answer = ask(reply, protocol=protocol, images=[WIDE, TALL])
    assert answer.evidence == [] and name in answer.trace.turns[0].problems[0]


# ---- own tools ------------------------------------------------------------------------------------------------------


def look_up(code: str, page: int | None = None, mark: int | str = 0, words: list[str] | None = None) -> str:
    """Look up a code."""
    return repr((code, page, mark, words))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"code": "007"}, ("007", None, 0, None)),
        ({"code": "1_000", "page": "5"}, ("1_000", 5, 0, None)),
        (
            {"code": "[A-Z]+", "page": "null", "mark": "12345678901234567890"},
            ("[A-Z]+", None, 12345678901234567890, None),
        ),
        ({"code": '{"a": 1}', "mark": "x", "words": "['a', 'b']"}, ('{"a": 1}', None, "x", ["a", "b"])),
        ({"code": "None", "page": "None"}, ("None", None, 0, None)),
    ],
)
def test_the_arguments_of_a_function_tag_have_the_types_of_the_schema(arguments: dict[str, str], given: Any) -> None:
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    reply = f"<tool_call>\n<function=look_up>\n{parts}</function>\n</tool_call>"
    (call,) = ask(reply, protocol="qwen3_5", tools=[look_up]).trace.turns[0].calls
    assert (call.decision, call.text) == ("served", repr(given))


@each_case(
    "reply",
    [
        *('TOOL: look_up {"code": "7"}', 'TOOL: look_up\n{"code": "7"}', 'TOOL: look_up: {"code": "7"}'),
        *(
            'TOOL: look_up, {"code": "7"}',
            'TOOL\uff1alook_up {"code": "7"}',
            'TOOL: look_up\n```json\n{"code": "7"}\n```',
        ),
    ],
)
def test_a_tool_line_is_read_with_its_arguments(reply: str) -> None:
    (call,) = ask(reply, protocol="plain", tools=[look_up]).trace.turns[0].calls
    assert call.text == repr(("7", None, 0, None))


def test_a_tool_line_that_cannot_be_read_is_told_and_no_answer() -> None:
    for reply in ("TOOL: look_up(code=7)", "TOOL: look_up 7"):
        answer = ask(reply, protocol="plain", tools=[look_up])
        assert answer.text == "done" and 'TOOL: name {"argument"' in answer.trace.turns[0].problems[0]
    assert ask("Tool: a hammer", protocol="plain", tools=[look_up]).text == "Tool: a hammer"


def test_arguments_of_an_own_tool_without_its_name_are_no_box() -> None:
    reply = "<tool_call>look_up\n<arg_key>words</arg_key>\n<arg_value>[1, 2, 3, 4]</arg_value>\n</tool_call>"
    turn = ask(reply, protocol="qwen3vl", tools=[look_up]).trace.turns[0]
    assert not turn.calls and "could not be read" in turn.problems[0]
