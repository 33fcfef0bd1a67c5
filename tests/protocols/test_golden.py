"""What each family is shown, to the letter, and published-style replies as they are read: a change here breaks
checkpoints.

Conversations are written as `<<role>>text[[view]]text`, one message after another, each ended by a line break.
"""

import json
from collections.abc import Sequence

import pytest

from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message
from qzoom_agent.protocols import PROTOCOLS, Parsed, ToolCall
from tests.cases import each_case
from tests.protocols.shown_views import COARSE, CROP1, CROP2

HERMES_HEAD = """<<system>>You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
HERMES_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
"""
DEEPEYES_REMINDER = (
    "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
    "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> "
)
DEEPEYES_ANSWER = "\nThink first, then answer. Format strictly as:  <think>...</think>  <answer>...</answer> "
MINI_O3_GO_ON = (
    "\nContinue your reasoning process inside <think> and </think>. If needed, you can continue to zoom in on the "
    "original image or any of the observations, by outputting <grounding> and </grounding> as before. If the final "
    "answer is confirmed, put your final answer inside <answer> and </answer>."
)
MINI_O3_ASK = "Reason inside <think> and </think>, then give the final answer inside <answer> and </answer>."
VISIONTHINK_FORM = "inside <answer> and </answer>; wrap a number or the letter of a choice in \\boxed{} there"
VISIONTHINK_ASK = (
    "<<user>>Answer the question based on the image provided. Begin each step with reasoning within <think> and "
    "</think>. To see better you may call ONE function tool per step, at its end, within <tool_call> and "
    "</tool_call>, and go on "
    f"reasoning from what it returns. Once the final answer is confirmed, place it {VISIONTHINK_FORM}. "
    "Here is the image and question:\n[[coarse]]\nWhat is it?\n"
)
VISIONTHINK_DIRECT = (
    "<<user>>Answer the question based on the image provided. Begin with reasoning within <think> and </think>. Once "
    "the "
    f"final answer is confirmed, place it {VISIONTHINK_FORM}. "
    "Here is the image and question:\n[[coarse]]\nWhat is it?\n"
)
VISIONTHINK_GO_ON = (
    " tool returned together with the question and the image from the user, continue your reasoning inside <think> and "
    "</think>, then write your final answer inside <answer> and </answer>.\n"
)
VISIONTHINK_ERROR = (
    "<<user>>Bad box.\nConsider the error, adjust your response, and continue reasoning inside <think> and </think>.\n"
)
VISIONTHINK_FINAL = (
    "<<user>>There are no more tools. Reason within <think> and </think>, then place the final answer "
    f"{VISIONTHINK_FORM}.\n"
)
PLAIN_SYSTEM = "<<system>>You are a helpful assistant.\n"
QWEN_FINAL = "<<user>>Zooming is over. Answer the question now.\n"

TURNS: dict[str, dict[str, str]] = {
    "nano": {
        "opening": "<<user>>[[coarse]]What is it? You may zoom.\n",
        "direct": "<<user>>[[coarse]]What is it?\n",
        "result": "<<user>>[[crop1]]\n",
        "noted": "<<user>>[[crop2]]\n",
        "refusal": "<<user>>No crop.\n",
        "final": "<<user>>Answer now.\n",
    },
    "plain": {
        "opening": "<<user>>[[coarse]]What is it?\n\nIf something in the image is too small to be sure, do not "
        "answer yet: reply with one line\nZOOM: x1, y1, x2, y2\nand you will see that part enlarged. x1, y1 is the "
        "part's top-left and x2, y2 its bottom-right corner, in thousandths of the first image's width and height: "
        "0, 0, 1000, 1000 is all of it. Otherwise reply with the answer only.\n",
        "direct": "<<user>>[[coarse]]What is it?\n",
        "result": "<<user>>The part you asked for, enlarged:[[crop1]]\nZoom again, or answer.\n",
        "noted": "<<user>>The part you asked for, enlarged:[[crop2]]\nGrown.\nZoom again, or answer.\n",
        "refusal": "<<user>>No zoom: Bad box.\nZoom again, or answer.\n",
        "final": "<<user>>Do not zoom any more. Reply with the answer only.\n",
    },
    "qwen3vl": {
        "opening": HERMES_HEAD + "SCHEMA" + HERMES_TAIL + "<<user>>[[coarse]]What is it?\n",
        "direct": "<<user>>[[coarse]]What is it?\n",
        "result": "<<tool>>[[crop1]]\n",
        "noted": "<<tool>>[[crop2]]\nGrown.\n",
        "refusal": "<<tool>>Error: Bad box.\n",
        "final": QWEN_FINAL,
    },
    "qwen3_5": {
        "opening": "<<system>># Tools\n\nYou have access to the following functions:\n\n<tools>\nSCHEMA\n</tools>\n\n"
        "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
        "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nvalue_2\n</parameter>\n</function>\n</tool_call>\n\n"
        "Nest the function in <tool_call></tool_call>, give every required parameter, and put reasoning before the "
        "call only. Without a call, just answer the question.\n<<user>>[[coarse]]What is it?\n",
        "direct": "<<user>>[[coarse]]What is it?\n",
        "result": "<<tool>>[[crop1]]\n",
        "noted": "<<tool>>[[crop2]]\nGrown.\n",
        "refusal": "<<tool>>Error: Bad box.\n",
        "final": QWEN_FINAL,
    },
    "deepeyes": {
        "opening": f"{HERMES_HEAD}SCHEMA{HERMES_TAIL}<<user>>[[coarse]]Question: What is it?\n{DEEPEYES_REMINDER}\n",
        "direct": f"{PLAIN_SYSTEM}<<user>>[[coarse]]Question: What is it?\n{DEEPEYES_ANSWER}\n",
        "result": f"<<user>><tool_response>[[crop1]]{DEEPEYES_REMINDER}</tool_response>\n",
        "noted": f"<<user>><tool_response>[[crop2]]\nGrown.{DEEPEYES_REMINDER}</tool_response>\n",
        "refusal": f"<<user>>Error: Bad box.{DEEPEYES_REMINDER}\n",
        "final": f"<<user>>Zooming is over.{DEEPEYES_ANSWER}\n",
    },
    "mini_o3": {
        "opening": "<<system>>You are a helpful assistant. Answer the question about the image. Put your reasoning "
        "inside <think> and </think>. Wherever something is not clear, zoom into a region of an image by writing "
        '<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>, where (x0, y0) and (x1, '
        "y1) are "
        "the region's top-left and bottom-right corner, the image's width and height being 1.0, and 'source' is the "
        "image to zoom into: 'original_image' or 'observation_i'. Once the answer is certain, put it inside <answer> "
        "and </answer>.\n<<user>>[[coarse]]\nWhat is it?\n",
        "direct": f"<<system>>You are a helpful assistant. Answer the question about the image. {MINI_O3_ASK}\n"
        "<<user>>[[coarse]]\nWhat is it?\n",
        "result": "<<user>>After the above Action 0, here is the the zoom-in image (Observation 1):\n[[crop1]]."
        f"{MINI_O3_GO_ON}\n",
        "noted": "<<user>>After the above Action 1, here is the the zoom-in image (Observation 2):\n[[crop2]].\nGrown."
        f"{MINI_O3_GO_ON}\n",
        "refusal": "<<user>>ERROR occurs during grounding. Error Information: Bad box.\n"
        "Consider the error and continue your reasoning inside <think> and </think>.\n",
        "final": f"<<user>>Zooming is over. {MINI_O3_ASK}\n",
    },
    "pixel_reasoner": {
        "opening": f"{HERMES_HEAD}SCHEMA{HERMES_TAIL}<<user>>[[coarse]]What is it?\n\nGuidelines: Understand the "
        "image and the question. Decide whether it helps to use the given visual operation: look closer with "
        "`crop_image`. Reason with the visual information step by step, and put your final answer within \\boxed{}.\n",
        "direct": f"{PLAIN_SYSTEM}<<user>>[[coarse]]What is it?\n\n"
        "Reason step by step, and put your final answer within \\boxed{}.\n",
        "result": "<<user>>\nHere is the cropped image (Image Size: 224x140):[[crop1]]\n",
        "noted": "<<user>>\nHere is the cropped image (Image Size: 140x140):[[crop2]]\nGrown.\n",
        "refusal": "<<user>>\nExecution error:\nBad box.\n\n",
        "final": "<<user>>Zooming is over. Put your final answer within \\boxed{} now.\n",
    },
    "adaptvision": {
        "opening": HERMES_HEAD + "SCHEMA" + HERMES_TAIL + VISIONTHINK_ASK,
        "direct": PLAIN_SYSTEM + VISIONTHINK_DIRECT,
        "result": "<<user>><tool_response>\nThe cropped region of the image is shown "
        "below:\n[[crop1]]\n</tool_response>\n"
        f"Study what the request_local_region{VISIONTHINK_GO_ON}",
        "noted": "<<user>><tool_response>\nThe cropped region of the image is shown below:\n[[crop2]]\nGrown.\n"
        f"</tool_response>\nStudy what the request_local_region{VISIONTHINK_GO_ON}",
        "refusal": VISIONTHINK_ERROR,
        "final": VISIONTHINK_FINAL,
    },
    "visionthink": {
        "opening": HERMES_HEAD + "SCHEMA" + HERMES_TAIL + VISIONTHINK_ASK,
        "direct": PLAIN_SYSTEM + VISIONTHINK_DIRECT,
        "result": "<<user>><tool_response>\nThe resized image is shown below:\n[[crop1]]\n</tool_response>\n"
        f"Study what the image resize{VISIONTHINK_GO_ON}",
        "noted": "<<user>><tool_response>\nThe resized image is shown below:\n[[crop2]]\nGrown.\n</tool_response>\n"
        f"Study what the image resize{VISIONTHINK_GO_ON}",
        "refusal": VISIONTHINK_ERROR,
        "final": VISIONTHINK_FINAL,
    },
}

BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
SAID = "The region to look at, as [x1, y1, x2, y2] (top-left and bottom-right corner), "
SCHEMAS: dict[str, tuple[str, dict[str, object], list[str]]] = {
    "qwen3vl": (
        "image_zoom_in_tool",
        {
            "bbox_2d": {**BOX, "description": SAID + "in thousandths (0 to 1000) of the image's width and height."},
            "label": {"type": "string", "description": "What is expected in the region."},
            "img_idx": {"type": "number", "description": "Which of the user's images to zoom into, counted from 0."},
        },
        ["bbox_2d", "label", "img_idx"],
    ),
    "deepeyes": (
        "image_zoom_in_tool",
        {
            "bbox_2d": {**BOX, "description": SAID + "in pixels of the image."},
            "label": {"type": "string", "description": "What is expected in the region."},
        },
        ["bbox_2d"],
    ),
    "pixel_reasoner": (
        "crop_image_normalized",
        {
            "bbox_2d": {**BOX, "description": SAID + "as shares of the image's width and height within [0.0, 1.0]."},
            "target_image": {
                "type": "number",
                "description": "The image to crop, counted from 1 to the number of images; 1 is the original image.",
            },
        },
        ["bbox_2d", "target_image"],
    ),
    "adaptvision": (
        "request_local_region",
        {
            "bbox_2d": {
                **BOX,
                "items": {"type": "integer"},
                "description": SAID + "in absolute pixels of the current image.",
            }
        },
        ["bbox_2d"],
    ),
    "visionthink": (
        "resize_image",
        {
            "action": {
                "type": "string",
                "enum": ["resize"],
                "description": "`resize` doubles the resolution of the image. Use it only if the image as it is does "
                "not show what the answer needs.",
            }
        },
        ["action"],
    ),
}
SCHEMAS["qwen3_5"] = (*SCHEMAS["qwen3vl"][:2], ["bbox_2d"])

SETTINGS = {
    "nano": ("pixel", (), 1),
    "plain": ("per_mille", (), 1),
    "qwen3vl": ("per_mille", (), 4),
    "qwen3_5": ("per_mille", (), 4),
    "deepeyes": ("pixel", (), 4),
    "mini_o3": ("unit", ("</grounding>",), 1),
    "pixel_reasoner": ("unit", (), 1),
    "adaptvision": ("pixel", (), 1),
    "visionthink": ("unit", (), 1),
}

Read = tuple[str, str, tuple[float, ...], Frame, str]
REPLIES: list[tuple[str, str, str, list[Read]]] = [
    (
        "nano",
        "<zoom><loc_84><loc_112><loc_140><loc_154></zoom>",
        "",
        [("zoom", "", (84, 112, 140, 154), "pixel", "coarse")],
    ),
    (
        "plain",
        "The sign is too small.\nZOOM: 120, 340, 260, 420",
        "The sign is too small.",
        [("zoom", "", (120, 340, 260, 420), "per_mille", "coarse")],
    ),
    (
        "qwen3vl",
        'The plate is small.\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [412, 300, 520, '
        '391], "label": "plate", "img_idx": 0}}\n</tool_call>\n<tool_call>\n{"name": "image_zoom_in_tool", '
        '"arguments": {"bbox_2d": [0, 0, 1000, 500], "label": "sky", "img_idx": 0}}\n</tool_call>',
        "The plate is small.",
        [
            ("image_zoom_in_tool", "plate", (412, 300, 520, 391), "per_mille", "coarse"),
            ("image_zoom_in_tool", "sky", (0, 0, 1000, 500), "per_mille", "coarse"),
        ],
    ),
    (
        "qwen3_5",
        "The plate is small.\n</think>\n\n<tool_call>\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n"
        "[412, 300, 520, 391]\n</parameter>\n<parameter=label>\nthe plate\n</parameter>\n<parameter=img_idx>\n0\n"
        "</parameter>\n</function>\n</tool_call>",
        "The plate is small.",
        [("image_zoom_in_tool", "the plate", (412, 300, 520, 391), "per_mille", "coarse")],
    ),
    (
        "deepeyes",
        '<think>I should look at the hat.</think>  <tool_call>\n{"name": "image_zoom_in_tool", "arguments": '
        '{"bbox_2d": [10, 20, 100, 200], "label": "the hat"}}\n</tool_call>  ',
        "I should look at the hat.",
        [("image_zoom_in_tool", "the hat", (10, 20, 100, 200), "pixel", "coarse")],
    ),
    (
        "mini_o3",
        '<think>Still small.</think><grounding>{"bbox_2d": [0.12, 0.5, 0.43, 0.75], "source": "observation_1"}',
        "Still small.",
        [("grounding", "", (0.12, 0.5, 0.43, 0.75), "unit", "crop1")],
    ),
    (
        "mini_o3",
        '<think>Small.</think><grounding>{"bbox_2d": [0.12, 0.5, 0.43, 0.75], "source": "original_image"}</grounding>',
        "Small.",
        [("grounding", "", (0.12, 0.5, 0.43, 0.75), "unit", "coarse")],
    ),
    (
        "pixel_reasoner",
        'Let me zoom in.\n<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.25, 0.5, 0.5, '
        '0.75], "target_image": 2}}\n</tool_call>',
        "Let me zoom in.",
        [("crop_image_normalized", "", (0.15, 0.4, 0.6, 0.85), "unit", "crop1")],
    ),
    (
        "adaptvision",
        '<think>Blurred.</think>\n<tool_call>\n{"name": "request_local_region", "arguments": {"bbox_2d": [30, 40, 130, '
        "90]}}\n</tool_call>",
        "Blurred.",
        [("request_local_region", "", (30, 40, 130, 90), "pixel", "coarse")],
    ),
    (
        "visionthink",
        '<think>Blurred.</think>\n<tool_call>\n{"name": "resize_image", "arguments": {"action": '
        '"resize"}}\n</tool_call>',
        "Blurred.",
        [("resize_image", "", (0, 0, 1, 1), "unit", "coarse")],
    ),
]


def shown(messages: Sequence[Message]) -> str:
    turns = []
    for item in messages:
        parts = (part["text"] if part["type"] == "text" else f"[[{part['view']}]]" for part in item["content"])
        turns.append(f"<<{item['role']}>>{''.join(parts)}\n")
    return "".join(turns)


@each_case("name", PROTOCOLS)
def test_the_turns_are_rendered_to_the_letter(name: str) -> None:
    protocol, golden = PROTOCOLS[name], TURNS[name]
    opening, schema = golden["opening"], ""
    if name in SCHEMAS:
        system = shown(protocol.opening("What is it?", [COARSE], tools=True))
        schema = system.partition("<tools>\n")[2] if name == "qwen3_5" else system.rpartition("<tools>\n")[2]
        schema = schema.partition("\n</tools>")[0]
        opening = opening.replace("SCHEMA", schema)
    assert shown(protocol.opening("What is it?", [COARSE], tools=True)) == opening
    assert shown(protocol.opening("What is it?", [COARSE], tools=False)) == golden["direct"]
    assert shown(protocol.result(CROP1, 0, [])) == golden["result"]
    assert shown(protocol.result(CROP2, 1, ["Grown."])) == golden["noted"]
    assert shown(protocol.refusal("Bad box.")) == golden["refusal"]
    assert shown(protocol.final()) == golden["final"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_in_the_system_message_is_one_line_of_json(name: str) -> None:
    system = shown(PROTOCOLS[name].opening("What is it?", [COARSE], tools=True))
    line = next(line for line in system.splitlines() if line.startswith("{") and "<" not in line)
    function = json.loads(line)
    tool, properties, required = SCHEMAS[name]
    assert function["type"] == "function" and function["function"]["name"] == tool
    assert function["function"]["parameters"] == {"type": "object", "properties": properties, "required": required}


@each_case("name", PROTOCOLS)
def test_frame_stop_strings_and_calls_per_turn(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert (protocol.frame, protocol.stop, protocol.max_calls_per_turn) == SETTINGS[name]


@each_case("name", PROTOCOLS)
def test_inserted_crops_follow_the_coarse_view_in_the_first_user_turn(name: str) -> None:
    opening = shown(PROTOCOLS[name].opening("What is it?", [COARSE, CROP1, CROP2], tools=True))
    assert opening.count("[[") == 3 and "[[coarse]][[crop1]][[crop2]]" in opening
    assert opening.index("[[crop2]]") < opening.index("What is it?")


@each_case("name", PROTOCOLS)
def test_braces_and_marks_in_a_question_are_left_alone(name: str) -> None:
    question = "Is {action} or %s in <tool_call> [x]?"
    assert question in shown(PROTOCOLS[name].opening(question, [COARSE], tools=True))
    assert question in shown(PROTOCOLS[name].refusal(question)) or name == "nano"


def test_a_call_of_nano_without_its_opening_tag_is_read_to_the_letter() -> None:
    reply = "<loc_84><loc_63><loc_105><loc_112></zoom>"
    call = ToolCall(name="zoom", box=(84, 63, 105, 112), frame="pixel", view="coarse", raw=reply)
    assert PROTOCOLS["nano"].parse(reply, [COARSE]) == Parsed(calls=[call], repairs=["opening <zoom> added"])


@each_case(("name", "reply", "thought", "calls"), REPLIES)
def test_calls_are_read_exactly(name: str, reply: str, thought: str, calls: list[Read]) -> None:
    parsed = PROTOCOLS[name].parse(reply, [COARSE, CROP1])
    assert (parsed.thought, parsed.answer, parsed.problems, parsed.repairs) == (thought, None, [], [])
    assert [call.model_dump(exclude={"raw"}) for call in parsed.calls] == [
        ToolCall(name=tool, label=label, box=_four(box), frame=frame, view=where).model_dump(exclude={"raw"})
        for tool, label, box, frame, where in calls
    ]
    assert all(call.raw in reply for call in parsed.calls)


def _four(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (round(edge, 9) for edge in box)
    return x1, y1, x2, y2
