"""How replies are weighed and mended, family by family."""

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import image_part, message, plain_text, text, view_ids
from qzoom_agent.protocols import PROTOCOLS, Parsed, ToolCall, ZoomProtocol, get_protocol
from qzoom_agent.protocols.json_repair import MAX_CHARS, read_json
from qzoom_agent.views import View
from tests.cases import each_case
from tests.protocols.shown_views import COARSE, CROP1, CROP2

VIEWS = [COARSE, CROP1, CROP2]
FAMILIES = [name for name in PROTOCOLS if name not in ("nano", "plain")]


def hermes(name: str = "image_zoom_in_tool", **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


CALLS = {
    "nano": "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>",
    "plain": "ZOOM: 100, 200, 300, 400",
    "qwen3vl": hermes(bbox_2d=[100, 200, 300, 400], label="sign", img_idx=0),
    "qwen3_5": "<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[100, 200, 300, 400]\n</parameter>\n"
    "<parameter=label>\nsign\n</parameter>\n</function>\n</tool_call>",
    "deepeyes": hermes(bbox_2d=[100, 200, 300, 330], label="sign"),
    "mini_o3": '<grounding>{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "source": "original_image"}</grounding>',
    "pixel_reasoner": hermes("crop_image_normalized", bbox_2d=[0.2, 0.3, 0.4, 0.5], target_image=1),
    "adaptvision": hermes("request_local_region", bbox_2d=[100, 200, 300, 330]),
    "visionthink": hermes("resize_image", action="resize"),
}


def parse(name: str, reply: str, views: Sequence[View] = VIEWS) -> Parsed:
    return PROTOCOLS[name].parse(reply, views)


def only_call(parsed: Parsed) -> ToolCall:
    assert parsed.answer is None and not parsed.problems and len(parsed.calls) == 1, parsed
    return parsed.calls[0]


def test_protocols_are_named_by_their_key_and_an_unknown_name_says_which_there_are() -> None:
    assert set(PROTOCOLS) == set(CALLS)
    for name, protocol in PROTOCOLS.items():
        found: ZoomProtocol = get_protocol(name)
        assert found is protocol and found.name == name
    with pytest.raises(ConfigError, match="deepeyes, mini_o3"):
        get_protocol("deepeye")


@each_case("name", PROTOCOLS)
def test_a_well_formed_call_is_read_without_repairs(name: str) -> None:
    parsed = parse(name, CALLS[name], [COARSE])
    call = only_call(parsed)
    assert call.raw == CALLS[name] and call.view == "coarse" and call.frame == PROTOCOLS[name].frame
    box = call.as_box
    assert box is not None and (box.frame, box.view) == (call.frame, call.view)
    assert parsed.thought == ""
    assert [repair for repair in parsed.repairs if "img_idx missing" not in repair] == []


@each_case("name", PROTOCOLS)
def test_a_parsed_reply_survives_json(name: str) -> None:
    parsed = parse(name, f"Look. {CALLS[name]}")
    assert Parsed.model_validate_json(parsed.model_dump_json()) == parsed


@each_case("name", PROTOCOLS)
@each_case("reply", ["", " \n\t"])
def test_an_empty_reply_is_a_problem(name: str, reply: str) -> None:
    parsed = parse(name, reply)
    assert parsed.answer is None and not parsed.calls and "empty" in parsed.problems[0]


@each_case("name", PROTOCOLS)
def test_free_text_is_the_answer(name: str) -> None:
    parsed = parse(name, "  The sign says STOP. ")
    assert parsed.answer == "The sign says STOP." and not parsed.problems
    tagged = name in ("deepeyes", "mini_o3", "adaptvision", "visionthink", "pixel_reasoner")
    assert (parsed.repairs == ["free text taken as the answer"]) is tagged


@each_case("name", PROTOCOLS)
def test_text_around_a_call_is_thought(name: str) -> None:
    parsed = parse(name, f"Too small.\n{CALLS[name]}\nWait.")
    assert only_call(parsed).raw == CALLS[name]
    assert parsed.thought == "Too small.\nWait."


@each_case("name", [*FAMILIES, "plain"])
def test_an_answer_tag_ends_the_episode_and_the_call_is_noted(name: str) -> None:
    for reply in (f"{CALLS[name]}\n<answer> B </answer>", f"<answer>B</answer>\n{CALLS[name]}"):
        parsed = parse(name, reply)
        assert parsed.answer == "B" and not parsed.calls
        assert "call beside an answer not run" in parsed.repairs


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_answer_tag_or_a_boxed_guess_does_not_stop_a_call(name: str) -> None:
    assert only_call(parse(name, f"<answer></answer>{CALLS[name]}"))
    assert only_call(parse(name, f"Perhaps \\boxed{{B}}. {CALLS[name]}"))


@each_case(
    ("reply", "answer", "thought"),
    [
        ("<think>Clear.</think><answer>B</answer>", "B", "Clear."),
        ("<think>Clear.</think>\n<answer>\\boxed{B}</answer>", "B", "Clear."),
        ("<answer>first</answer> no: <answer>second</answer>", "second", "no:"),
        ("<think>Clear.</think><answer>the red car", "the red car", "Clear."),
        ("Clear.\n</think>\n\nthe red car", "the red car", "Clear."),
        ("<think>a</think>x<think>b</think>", "x", "a\nb"),
        ("<think>Clear. <answer>B</answer>", "B", "Clear."),
        ("So \\boxed{\\text{the red car}}.", "the red car", "So \\boxed{\\text{the red car}}."),
        ("So \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "So \\boxed{\\frac{1}{2}}"),
        ("B<|im_end|>\n<|im_start|>user\nThanks.", "B", ""),
        ("The red car.</answer>", "The red car.", ""),
    ],
)
@each_case("name", FAMILIES)
def test_answers_are_found(name: str, reply: str, answer: str, thought: str) -> None:
    parsed = parse(name, reply)
    assert (parsed.answer, parsed.thought, parsed.problems) == (answer, thought, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thought_alone_is_a_problem_and_not_the_answer(name: str) -> None:
    for reply in ("<think>It may be red", "<think>It may be red</think>", "It may be red</think>"):
        parsed = parse(name, reply)
        assert parsed.answer is None and parsed.thought == "It may be red"
        assert "before an answer or a call" in parsed.problems[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_inside_the_thought_counts_only_if_nothing_stands_outside(name: str) -> None:
    parsed = parse(name, f"<think>Look: {CALLS[name]}</think>")
    assert only_call(parsed) and "read from inside the thought" in parsed.repairs
    assert parse(name, f"<think>Look: {CALLS[name]}</think>The red one.").answer == "The red one."


@each_case("name", [name for name in PROTOCOLS if name != "plain"])
def test_the_closing_tag_may_be_missing(name: str) -> None:
    reply = CALLS[name]
    cut = reply[: reply.rindex("</")]
    parsed = parse(name, cut)
    assert only_call(parsed).box == only_call(parse(name, reply)).box
    closing = reply[reply.rindex("</") :]
    assert any("closing" in repair for repair in parsed.repairs) is (closing not in PROTOCOLS[name].stop)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_opening_tag_or_both_may_be_missing(name: str) -> None:
    reply = CALLS[name]
    body = reply[reply.index(">") + 1 :]
    for broken in (body, body[: body.rindex("</")], f"```json\n{body[: body.rindex('</')]}\n```"):
        parsed = parse(name, broken)
        assert only_call(parsed).box == only_call(parse(name, reply)).box
        assert "call without its tags read" in parsed.repairs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_closing_tag_after_an_unreadable_call_is_a_problem(name: str) -> None:
    tag = PROTOCOLS[name].parse(CALLS[name], VIEWS).calls[0].raw.partition(">")[0][1:]
    parsed = parse(name, f"1, 2, 3, 4</{tag}>")
    assert parsed.answer is None and "Write <" in parsed.problems[0]


def test_an_opening_tag_written_as_the_closing_one_is_mended() -> None:
    parsed = parse("deepeyes", CALLS["deepeyes"].replace("</tool_call>", "<tool_call>"))
    assert only_call(parsed) and any("written for" in repair for repair in parsed.repairs)


@pytest.mark.parametrize("name", ["qwen3vl", "qwen3_5", "deepeyes"])
def test_several_calls_are_served_up_to_the_limit(name: str) -> None:
    limit = PROTOCOLS[name].max_calls_per_turn
    parsed = parse(name, CALLS[name] * limit)
    assert len(parsed.calls) == limit > 1 and not parsed.problems
    parsed = parse(name, CALLS[name] * (limit + 1))
    assert len(parsed.calls) == limit and f"at most {limit}" in parsed.problems[0]


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if PROTOCOLS[name].max_calls_per_turn == 1])
def test_where_one_call_is_allowed_the_rest_is_a_problem(name: str) -> None:
    parsed = parse(name, f"{CALLS[name]}\n{CALLS[name]}")
    assert len(parsed.calls) == 1 and "Only the first call was run" in parsed.problems[0]


def test_several_calls_in_one_tag_are_read() -> None:
    one = json.dumps({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}})
    for body in (f"{one}\n{one}", f"[{one}, {one}]"):
        assert len(parse("deepeyes", f"<tool_call>{body}</tool_call>").calls) == 2


@each_case(
    ("body", "repair"),
    [
        ("{'name': 'image_zoom_in_tool', 'arguments': {'bbox_2d': [1, 2, 3, 4]}}", "broken JSON repaired"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4,],},}', "broken JSON repaired"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]', "broken JSON repaired"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4}}', "broken JSON repaired"),
        ('{"name": "image_zoom_in_tool" "arguments": {"bbox_2d": [1 2 3 4]}}', "broken JSON repaired"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}}', ""),
        ('```json\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}\n```', ""),
        ('I call {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}} now', ""),
        ("{name: image_zoom_in_tool, arguments: {bbox_2d: [1, 2, 3, 4], label: None}}", "broken JSON repaired"),
        (
            "{\u201cname\u201d: \u201cimage_zoom_in_tool\u201d, 'arguments': {'bbox_2d': [1, 2, 3, 4]}}",
            "broken JSON repaired",
        ),
        ('{"arguments": {"bbox_2d": [1, 2, 3, 4]}}', "tool name missing"),
        ('{"name": "image_zoom_in_tool", "bbox_2d": [1, 2, 3, 4]}', "arguments read beside the name"),
        ('{"name": "image_zoom_in_tool", "parameters": {"bbox_2d": [1, 2, 3, 4]}}', ""),
        ('{"function": {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}}', "call unwrapped"),
        (
            '{"name": "image_zoom_in_tool", "arguments": "{\\"bbox_2d\\": [1, 2, 3, 4]}"}',
            "arguments read from a string",
        ),
        ('{"name": "image_zoom_in_tool", "arguments": [1, 2, 3, 4]}', "arguments given as a list"),
        ("[1, 2, 3, 4]", "box without a call read"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox": [1, 2, 3, 4]}}', "box read from bbox"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": "[1, 2, 3, 4]"}}', "box read from a string"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": ["1", "2", "3", "4"]}}', "number read from a string"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [[1, 2, 3, 4]]}}', "box taken from a list of 1"),
        ('{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [[1, 2], [3, 4]]}}', "box read from points"),
        (
            '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}}',
            "box read from an object",
        ),
    ],
)
def test_broken_calls_are_mended_and_the_repair_is_noted(body: str, repair: str) -> None:
    parsed = parse("deepeyes", f"<tool_call>{body}</tool_call>")
    assert only_call(parsed).box == (1, 2, 3, 4)
    assert repair in parsed.repairs if repair else parsed.repairs == []


@each_case(
    "box",
    ["[1, 2, 3]", "[1, 2, 3, 4, 5]", '["a", 2, 3, 4]', "[NaN, 2, 3, 4]", "[1e999, 2, 3, 4]", "[true, 2, 3, 4]", "null"],
)
@each_case("name", ["qwen3vl", "deepeyes", "pixel_reasoner", "adaptvision", "mini_o3", "qwen3_5"])
def test_an_unreadable_box_is_a_problem_that_shows_the_right_form(name: str, box: str) -> None:
    tools = {"pixel_reasoner": "crop_image_normalized", "adaptvision": "request_local_region"}
    tool = tools.get(name, "image_zoom_in_tool")
    reply = f'<tool_call>{{"name": "{tool}", "arguments": {{"bbox_2d": {box}}}}}</tool_call>'
    if name == "mini_o3":
        reply = f'<grounding>{{"bbox_2d": {box}, "source": "original_image"}}</grounding>'
    parsed = parse(name, reply)
    assert parsed.answer is None and not parsed.calls
    assert "four finite numbers" in parsed.problems[0] and "Write <" in parsed.problems[0]


def test_boxes_outside_are_left_to_the_tool_and_swapped_corners_are_kept_but_noted() -> None:
    assert only_call(parse("deepeyes", hermes(bbox_2d=[-5, -5, 9999, 9999]))).box == (-5, -5, 9999, 9999)
    parsed = parse("deepeyes", hermes(bbox_2d=[300, 330, 100, 200]))
    assert only_call(parsed).box == (300, 330, 100, 200) and parsed.repairs == ["box corners were swapped"]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_tool_is_named_back_to_the_model(name: str) -> None:
    reply = '<tool_call>{"name": "image_rotate_tool", "arguments": {"bbox_2d": [1, 2, 3, 4], "angle": 90}}</tool_call>'
    parsed = parse(name, reply)
    assert parsed.answer is None and not parsed.calls
    assert ("no tool 'image_rotate_tool'" in parsed.problems[0]) is (name != "mini_o3")
    assert "Write <" in parsed.problems[0]


def test_a_call_in_another_familys_format_is_a_problem_and_not_an_answer() -> None:
    for name, foreign in (
        ("mini_o3", "deepeyes"),
        ("deepeyes", "mini_o3"),
        ("plain", "qwen3_5"),
        ("qwen3vl", "mini_o3"),
    ):
        parsed = parse(name, CALLS[foreign])
        assert parsed.answer is None and not parsed.calls and parsed.problems
    assert parse("mini_o3", "1, 2, 3, 4</tool_call>").answer is None


@each_case(("index", "served"), [(0, True), ("0", True), (0.0, True), (None, True), (1, False), (-1, False)])
@each_case("name", ["qwen3vl", "qwen3_5"])
def test_img_idx_counts_the_users_images_only(name: str, index: object, served: bool) -> None:
    parsed = parse(name, hermes(bbox_2d=[1, 2, 3, 4], img_idx=index))
    if served:
        assert only_call(parsed).view == "coarse" and only_call(parsed).frame == "per_mille"
    else:
        assert not parsed.calls and "img_idx must be a whole number from 0 to 0" in parsed.problems[0]


def test_a_missing_img_idx_is_noted() -> None:
    assert parse("qwen3vl", hermes(bbox_2d=[1, 2, 3, 4])).repairs == ["img_idx missing, 0 taken"]


@each_case(
    ("source", "where"),
    [
        ("original_image", "coarse"),
        ("observation_0", "coarse"),
        ("observation_1", "crop1"),
        ("Observation 2", "crop2"),
        (None, "coarse"),
        ("observation_3", None),
        ("the sign", None),
        (["original_image"], None),
    ],
)
def test_mini_o3_names_its_source(source: object, where: str | None) -> None:
    parsed = parse("mini_o3", f"<grounding>{json.dumps({'bbox_2d': [0.1, 0.2, 0.3, 0.4], 'source': source})}")
    if where is None:
        assert not parsed.calls and "original_image and observation_1 to observation_2" in parsed.problems[0]
    else:
        call = only_call(parsed)
        assert (call.view, call.frame, call.box) == (where, "unit", (0.1, 0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("box", "target", "where", "padded"),
    [
        ([0.2, 0.3, 0.4, 0.5], 1, "coarse", (0.1, 0.2, 0.5, 0.6)),
        ([0.05, 0.3, 0.98, 1.0], 2, "crop1", (0.0, 0.2, 1.0, 1.0)),
        ([0.4, 0.5, 0.2, 0.3], 3, "crop2", (0.1, 0.2, 0.5, 0.6)),
        ([112, 84, 224, 168], 1, "coarse", (0.15, 0.15, 0.6, 0.6)),
        ([-0.5, -0.5, -0.2, 1.5], 1, "coarse", (-0.5, -0.5, -0.1, 1.5)),
    ],
)
def test_pixel_reasoner_pads_by_a_tenth_of_the_image(
    box: list[float], target: int, where: str, padded: tuple[float, ...]
) -> None:
    call = only_call(parse("pixel_reasoner", hermes("crop_image_normalized", bbox_2d=box, target_image=target)))
    assert (call.view, call.frame) == (where, "unit")
    assert call.box == pytest.approx(padded)


@pytest.mark.parametrize("target", [0, 4, "first", 1.5])
def test_pixel_reasoner_refuses_images_that_are_not_there(target: object) -> None:
    parsed = parse("pixel_reasoner", hermes("crop_image", bbox_2d=[0.1, 0.1, 0.2, 0.2], target_image=target))
    assert not parsed.calls and "whole number from 1 to 3" in parsed.problems[0]


def test_pixel_reasoner_has_no_video_tool() -> None:
    assert "select_frames" in parse("pixel_reasoner", hermes("select_frames", target_frames=[1, 2])).problems[0]


@pytest.mark.parametrize("name", ["deepeyes", "adaptvision"])
def test_pixels_are_those_of_the_first_view_whatever_was_shown_since(name: str) -> None:
    call = only_call(parse(name, CALLS[name], VIEWS))
    assert (call.view, call.frame, call.box) == ("coarse", "pixel", (100, 200, 300, 330))


def test_adaptvision_boxes_reach_the_original_through_the_view() -> None:
    """Its released code multiplies by two, since its image is shown at half its sides."""
    half = COARSE.model_copy(update={"box": (0, 0, 896, 672)})
    box = only_call(parse("adaptvision", CALLS["adaptvision"], [half])).as_box
    assert box is not None and half.to_original(box).as_list() == [200, 400, 600, 660]


def test_visionthink_asks_for_the_whole_image_and_nothing_else() -> None:
    call = only_call(parse("visionthink", CALLS["visionthink"]))
    assert (call.box, call.frame, call.view) == ((0, 0, 1, 1), "unit", "coarse")
    assert only_call(parse("visionthink", hermes("resize_image"))).box == (0, 0, 1, 1)
    assert "no action 'crop'" in parse("visionthink", hermes("resize_image", action="crop")).problems[0]


def test_qwen3_5_reads_json_and_unclosed_parameters() -> None:
    assert only_call(parse("qwen3_5", CALLS["qwen3vl"])).box == (100, 200, 300, 400)
    for value in ("[100, 200, 300, 400]", "100, 200, 300, 400", "[100, 200, 300, 400"):
        reply = f"<tool_call><function=image_zoom_in_tool><parameter=bbox_2d>{value}"
        assert only_call(parse("qwen3_5", reply)).box == (100, 200, 300, 400)


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("ZOOM: 100, 200, 300, 400", (100, 200, 300, 400)),
        ("**Zoom:** [100, 200, 300, 400]", (100, 200, 300, 400)),
        ("I cannot read it.\n- ZOOM: (12.5 20 30 40)", (12.5, 20, 30, 40)),
        ("zoom 1 2 3 4", (1, 2, 3, 4)),
        ("1. ZOOM: 100, 200, 300, 400", (100, 200, 300, 400)),
        ("Too small.\nAction: ZOOM: 100, 200, 300, 400", (100, 200, 300, 400)),
    ],
)
def test_plain_zoom_lines(reply: str, box: tuple[float, ...]) -> None:
    assert only_call(parse("plain", reply)).box == box


def test_plain_tells_sentences_from_calls() -> None:
    assert parse("plain", "Zoom lenses have 4 parts.").answer == "Zoom lenses have 4 parts."
    assert parse("plain", "The ZOOM: 1, 2, 3, 4 plate").answer == "The ZOOM: 1, 2, 3, 4 plate"
    assert "ZOOM: x1" in parse("plain", "ZOOM: the sign").problems[0]
    assert parse("plain", "**Answer:** B").answer == "B"
    assert parse("plain", "Answer:").answer == "Answer:"
    assert parse("plain", "Answer\uff1a 北京").answer == "北京"


def test_a_call_of_nano_that_names_no_image_there_is() -> None:
    for number in ("0", "2", "999"):
        parsed = parse("nano", f"<zoom>{number}<loc_84><loc_112><loc_140><loc_154></zoom>")
        assert not parsed.calls
        assert f"There is no image {number}: the images are numbered from 1 to 1." in parsed.problems[0]
    assert only_call(parse("nano", "<zoom>1<loc_84><loc_112><loc_140><loc_154></zoom>")).box == (84, 112, 140, 154)


def test_nano_reads_plain_numbers_and_tells_what_is_wrong() -> None:
    assert only_call(parse("nano", CALLS["nano"])).box == (84, 112, 140, 154)
    parsed = parse("nano", "<zoom>84 112 140 154</zoom>")
    assert only_call(parsed).box == (84, 112, 140, 154) and "plain numbers" in parsed.repairs[0]
    assert "four finite numbers" in parse("nano", "<zoom><loc_1></zoom>").problems[0]


@pytest.mark.parametrize(
    ("reply", "thought", "added"),
    [
        ("<loc_84><loc_112><loc_140><loc_154></zoom>", "", ["opening <zoom> added"]),
        ("<loc_84><loc_112><loc_140><loc_154>", "", ["opening <zoom> added", "closing </zoom> added"]),
        ("Red. <loc_84> <loc_112> <loc_140> <loc_154> </ZOOM> So.", "Red.\nSo.", ["opening <zoom> added"]),
    ],
)
def test_a_call_of_nano_without_its_opening_tag_is_read(reply: str, thought: str, added: list[str]) -> None:
    parsed = parse("nano", reply)
    assert only_call(parsed).box == (84, 112, 140, 154)
    assert (parsed.thought, parsed.repairs) == (thought, added)


@pytest.mark.parametrize(
    "reply", ["A <loc_1> B", "</zoom>", "X7</zoom>", "<loc_84><loc_112><loc_140></zoom>", "84 112 140 154</zoom>"]
)
def test_what_is_left_of_a_call_is_never_the_answer_of_nano(reply: str) -> None:
    parsed = parse("nano", reply)
    assert parsed.answer is None and not parsed.calls
    assert "four finite numbers" in parsed.problems[0] and "<zoom><loc_x1>" in parsed.problems[0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["<zoom>", "</zoom>", "< /ZOOM >", "<loc_84>", "<loc_-7>", "</zoom><zoom>", "84 "]),
            st.text(max_size=4),
        ),
        max_size=9,
    )
)
def test_no_answer_of_nano_holds_a_mark_of_a_call(pieces: list[str]) -> None:
    reply = "".join(pieces)
    parsed = parse("nano", reply)
    marked = re.search(r"<loc_[-+]?\d+>|<\s*/?\s*zoom\s*>", reply, re.IGNORECASE) is not None
    assert (parsed.answer is None) or not marked
    assert parsed.calls or parsed.problems or not marked
    assert all(call.raw in reply for call in parsed.calls)


def test_labels_are_kept_short() -> None:
    assert only_call(parse("deepeyes", hermes(bbox_2d=[1, 2, 3, 4], label="the man's hat"))).label == "the man's hat"
    assert len(only_call(parse("deepeyes", hermes(bbox_2d=[1, 2, 3, 4], label="x" * 999))).label) == 200


@each_case("name", PROTOCOLS)
def test_parsing_works_before_any_view_is_known(name: str) -> None:
    assert only_call(parse(name, CALLS[name], [])).view == "coarse"


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_no_text_raises_and_every_reading_says_something(name: str, data: st.DataObject) -> None:
    marks = st.sampled_from(
        [*CALLS.values(), "<think>", "</think>", "<answer>", "</answer>", "{", "}", "[", "]", "'", '"']
    )
    reply = "".join(data.draw(st.lists(st.one_of(st.text(st.characters(), max_size=20), marks), max_size=8)))
    parsed = parse(name, reply)
    assert bool(parsed.answer) + bool(parsed.calls) <= 1
    assert parsed.answer or parsed.calls or parsed.problems
    assert Parsed.model_validate_json(parsed.model_dump_json()) == parsed


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**15), 10**15)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    ).filter(lambda value: isinstance(value, list | dict)),
    st.text("abc \n", max_size=20),
)
def test_sound_json_is_read_as_it_is(value: object, around: str) -> None:
    written = json.dumps(value)
    found = read_json(f"{around}{written}{around}")
    assert found is not None and found.value == value and not found.repaired
    assert found.end == len(around) + len(written)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abcdef_", min_size=1), st.integers(0, 1000) | st.text("abc d"), min_size=1), st.data())
def test_cut_json_keeps_what_was_complete(value: dict[str, object], data: st.DataObject) -> None:
    written = json.dumps(value)
    cut = data.draw(st.integers(1, len(written)))
    found = read_json(written[:cut])
    assert found is not None and isinstance(found.value, dict)
    complete = list(found.value)[:-1]
    assert complete == list(value)[: len(complete)]
    assert all(found.value[key] == value[key] for key in complete)


def test_json_is_bounded() -> None:
    assert read_json("[" * 100_000) is None
    assert read_json('{"a": ' * 300 + "1") is None
    long = read_json('{"a": "' + "x" * 100_000 + '"}')
    assert long is not None and long.end <= MAX_CHARS and long.repaired
    assert read_json("no json here") is None


def test_quotes_inside_strings_are_kept() -> None:
    found = read_json('{\'label\': \'the man\'s "big" hat\', "x": "the "STOP" sign"}')
    assert found is not None
    assert found.value == {"label": 'the man\'s "big" hat', "x": 'the "STOP" sign'}


@pytest.mark.parametrize("end", ["}", ",}", ""])
def test_escaped_characters_are_those_that_they_stand_for_in_broken_json_too(end: str) -> None:
    found = read_json(r'{"label": "caf\u00e9 \ud83d\ude00 \u4e2d\"", "cut": "\ud83d"' + end)
    assert found is not None and isinstance(found.value, dict)
    assert found.value["label"] == 'caf\u00e9 \U0001f600 \u4e2d"'
    assert not found.repaired or found.value["cut"] == "\ufffd"


def test_messages_are_plain_json() -> None:
    made = message("user", "Look: ", image_part("coarse"), "", "What is it?")
    assert json.loads(json.dumps(made)) == made
    assert made["content"] == [
        {"type": "text", "text": "Look: "},
        {"type": "image", "view": "coarse"},
        {"type": "text", "text": "What is it?"},
    ]
    assert plain_text(made) == "Look: What is it?"
    assert view_ids([made, text("user", "And now?"), made]) == ["coarse", "coarse"]
