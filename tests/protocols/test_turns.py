"""The model's own turn ends where it writes a result or a turn that is not its own; foreign calls are told the format;
a long reply is read up to a limit."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.protocols.parsing import MAX_REPLY, cut_off, own_turn
from tests.cases import each_case
from tests.protocols.test_protocols import CALLS, COARSE, FAMILIES, hermes, parse

MARKS = [
    "<tool_response>The valve is open.</tool_response>",
    "<|im_start|>user\nThe valve is open.<|im_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "\nuser\nThe valve is open.\nassistant\n",
    "\nassistant\n",
    "\nUSER: go on\nASSISTANT: ",
    "<image>\n",
    "<|eot_id|><|start_header_id|>user<|end_header_id|>",
    "<end_of_turn>\n<start_of_turn>user\n",
    "\nObservation: the valve is open.\n",
    "\nObservation 1: the valve is open.\n",
    "\nAfter the above Action 0, here is the the zoom-in image (Observation 1):\n",
]
TOOL_CALL = hermes(bbox_2d=[10, 20, 200, 220])
ARGUMENTS = '{"bbox_2d": [10, 20, 200, 220]}'
FOREIGN = [
    f"Thought: too small.\nAction: zoom\nAction Input: {ARGUMENTS}",
    f"**Action:** image_zoom_in_tool\n**Action Input:** {ARGUMENTS}",
    f"\u273fFUNCTION\u273f: image_zoom_in_tool\n\u273fARGS\u273f: {ARGUMENTS}",
    "image_zoom_in_tool(bbox_2d=[10, 20, 200, 220])",
    "I will use crop_image(image, (10, 20, 200, 220)).",
    "<tool_code>image_zoom_in_tool(bbox_2d=[10, 20, 200, 220])</tool_code>",
    "```tool_code\nimage_zoom_in_tool(bbox_2d=[10, 20, 200, 220])\n```",
    '{"actions": [{"name": "image_zoom_in_tool", "arguments": ' + ARGUMENTS + "}]}",
    '{"thought": "small", "actions": [{"name": "Crop", "arguments": {"bbox": [1, 2, 3, 4]}}]}',
    '{"action": "zoom_in", "action_input": ' + ARGUMENTS + "}",
    '<|python_tag|>{"name": "image_zoom_in_tool", "parameters": ' + ARGUMENTS + "}",
    '[TOOL_CALLS] [{"name": "image_zoom_in_tool", "arguments": ' + ARGUMENTS + "}]",
    '<function_calls><invoke name="zoom"><parameter name="bbox">[1, 2, 3, 4]</parameter></invoke></function_calls>',
    "<\uff5ctool\u2581calls\u2581begin\uff5c>zoom",
    "<|channel|>commentary to=functions.zoom <|message|>{}",
]


@each_case("mark", MARKS)
@each_case("name", PROTOCOLS)
def test_the_call_before_an_invented_result_is_run_and_the_rest_is_not_read(name: str, mark: str) -> None:
    parsed = parse(name, f"{CALLS[name]}{mark}<answer>open</answer>", [COARSE])
    assert parsed.answer is None and len(parsed.calls) == 1 and "open" not in parsed.thought
    assert any("nothing read from" in repair for repair in parsed.repairs)


@each_case("mark", [mark for mark in MARKS if "Observation" not in mark])
@each_case("name", PROTOCOLS)
def test_an_answer_ends_where_another_turn_begins(name: str, mark: str) -> None:
    assert parse(name, f"The sign says STOP.{mark}Next question?").answer == "The sign says STOP."


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("user", "user"),
        ("B<|im_end|>", "B"),
        ("<|im_start|>assistant\nB<|im_end|>", "B"),
        ("assistant\nB", "B"),
        ("The user name is assistant", "The user name is assistant"),
        ("Observation: it is red.", "Observation: it is red."),
    ],
)
def test_words_that_only_look_like_marks_are_the_answer(reply: str, answer: str) -> None:
    assert parse("qwen3vl", reply).answer == answer


@each_case("reply", FOREIGN)
@each_case("name", PROTOCOLS)
def test_a_foreign_call_is_told_how_to_call_here(name: str, reply: str) -> None:
    parsed = parse(name, reply)
    assert parsed.answer is None and not parsed.calls
    assert "not read in this format. Write " in parsed.problems[0]


@each_case(
    "reply",
    [
        "The camera has an optical zoom (10x).",
        "Action: the genre on the poster.",
        "Step 1: crop the image.",
        "The menu says zoom (2 times).",
        "The tool is a hammer.",
    ],
)
@each_case("name", PROTOCOLS)
def test_sentences_about_zooming_are_answers(name: str, reply: str) -> None:
    assert parse(name, reply).answer == reply


@each_case("name", [*FAMILIES, "plain"])
def test_an_answer_beside_a_foreign_call_stands(name: str) -> None:
    assert parse(name, f"<answer>B</answer>{FOREIGN[0]}").answer == "B"


@pytest.mark.parametrize("name", ["qwen3vl", "qwen3_5", "deepeyes", "adaptvision"])
def test_shares_in_a_frame_of_larger_numbers_are_not_a_dot_in_the_corner(name: str) -> None:
    tool = "request_local_region" if name == "adaptvision" else "image_zoom_in_tool"
    parsed = parse(name, hermes(tool, bbox_2d=[0.62, 0.28, 0.78, 0.39]))
    assert (parsed.calls[0].frame, parsed.calls[0].box) == ("unit", (0.62, 0.28, 0.78, 0.39))
    assert any("read as shares" in repair for repair in parsed.repairs)


@pytest.mark.parametrize(
    ("line", "box", "frame"),
    [
        ("ZOOM: 62%, 28%, 78%, 39%", (0.62, 0.28, 0.78, 0.39), "unit"),
        ("ZOOM: 0.62, 0.28, 0.78, 0.39", (0.62, 0.28, 0.78, 0.39), "unit"),
        ("ZOOM: 620-280-780-390", (620, 280, 780, 390), "per_mille"),
        ("ZOOM: x1=620, y1=280, x2=780, y2=390", (620, 280, 780, 390), "per_mille"),
        ("ZOOM: box_2d [280, 620, 390, 780]", (620, 280, 780, 390), "per_mille"),
    ],
)
def test_zoom_lines_of_plain(line: str, box: tuple[float, ...], frame: str) -> None:
    call = parse("plain", line).calls[0]
    assert call.box == pytest.approx(box) and call.frame == frame


def test_thousandths_are_told_the_range_where_shares_are_expected() -> None:
    parsed = parse("mini_o3", '<grounding>{"bbox_2d": [620, 280, 780, 390], "source": "original_image"}</grounding>')
    assert not parsed.calls and "x and y from 0 to 1. Write <grounding>" in parsed.problems[0]


def test_a_key_known_for_y_first_is_read_so() -> None:
    parsed = parse("qwen3vl", hermes(box_2d=[280, 620, 390, 780], img_idx=0))
    assert parsed.calls[0].box == (620, 280, 780, 390)
    assert "box_2d read as y1, x1, y2, x2" in parsed.repairs


def test_a_reply_that_was_cut_off_is_neither_an_answer_nor_a_call() -> None:
    for text in (TOOL_CALL, "<answer>B</answer>", "I think the car is", ""):
        parsed = cut_off(text, limit=99)
        assert parsed.answer is None and not parsed.calls
        assert "cut off at its limit of 99 tokens" in parsed.problems[0] and "shorter" in parsed.problems[0]


UNITS = ["<", "\n", "'\"", '{"a": ', "[1, 2", "zoom(", "<answer>a</answer>", "word ", "\ud800"]
MEGABYTES = [unit * (1_000_000 // len(unit)) for unit in UNITS]


@each_case("text", MEGABYTES)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_megabyte_is_read_in_no_time(name: str, text: str) -> None:
    began = time.process_time()
    parsed = parse(name, text)
    assert time.process_time() - began < 1
    assert any(f"only the first {MAX_REPLY}" in repair for repair in parsed.repairs)


@each_case("text", MEGABYTES)
def test_the_own_turn_of_a_megabyte_is_not_longer_than_a_reply(text: str) -> None:
    assert len(own_turn(text)) <= MAX_REPLY


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*MARKS, *FOREIGN, TOOL_CALL, "<think>", "</think>", "B", "\n"]), max_size=6))
def test_the_own_turn_is_a_part_of_the_reply_and_stays_as_it_is(pieces: list[str]) -> None:
    own = own_turn("".join(pieces))
    assert own in "".join(pieces)
    assert own_turn(own) in own
