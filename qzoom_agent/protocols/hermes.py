"""hermes: a call is a JSON object with `name` and `arguments`; the families qwen3vl and deepeyes use it as it is.

qwen3vl (Qwen3-VL, SenseNova-MARS): boxes in 0..1000 of image `img_idx`, which counts the user's images from 0 and no
crops; missing, it is 0. Several calls a turn, results in role "tool", answers in free text (MARS: `<answer>`).

deepeyes (DeepEyes, Chain-of-Focus, verl's recipe): boxes in pixels of the first image as shown, several calls a turn,
results in a user turn. Ends with `<answer>`. The released loop stops at the end of the turn only; a stop at
`</tool_call>` is parsed alike.
"""

from collections.abc import Callable, Sequence

from qzoom_agent.geometry import Frame
from qzoom_agent.protocols.json_repair import objects_in, read_json
from qzoom_agent.protocols.parsing import (
    MAX_CALLS_READ,
    ParsedReply,
    TagSpan,
    box_argument,
    first_view,
    read_box,
    read_index,
)
from qzoom_agent.protocols.tagged import (
    Arguments,
    CallRegion,
    Payload,
    PromptTexts,
    Tagged,
    box_schema,
    loose_call,
    tool_schema,
)
from qzoom_agent.views import View

ZOOM = "image_zoom_in_tool"
INDEX_NAMES = ("img_idx", "image_idx", "image_index", "img_index", "index")
CALLS_PER_TURN = 4
"""Bound for families that may call several times a turn."""
_NAME_KEYS = ("name", "function", "tool", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")


def hermes_payloads(body: str, reply: ParsedReply) -> list[Payload]:
    """Return the calls in a tag's body: objects one after another or in a list; a bare list of numbers is a box."""
    found: list[Payload] = []
    for value in objects_in(body, reply.repairs, limit=MAX_CALLS_READ):
        items = value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else [value]
        found += [_payload(item, reply) for item in items if isinstance(item, dict)]
        if isinstance(value, list) and len(value) == 4 and not any(isinstance(item, dict) for item in value):
            reply.repairs.append("box without a call read")
            found.append(Payload("", {"bbox_2d": value}))
    return found[:MAX_CALLS_READ]


def _payload(item: dict[str, object], reply: ParsedReply) -> Payload:
    inner = item.get("function")
    if isinstance(inner, dict):
        reply.repairs.append("call unwrapped")
        item = inner
    name = next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), "")
    given = next((item[key] for key in _ARGUMENT_KEYS if key in item), None)
    if isinstance(given, str):
        reply.repairs.append("arguments read from a string")
        parsed = read_json(given)
        given = parsed.value if parsed else None
    if isinstance(given, list):
        reply.repairs.append("arguments given as a list")
        return Payload(str(name), given[0] if given and isinstance(given[0], dict) else {"bbox_2d": given})
    if not isinstance(given, dict):
        reply.repairs.append("arguments read beside the name")
        given = {key: value for key, value in item.items() if key not in _NAME_KEYS}
    if not name:
        reply.repairs.append("tool name missing")
    return Payload(str(name), given)


def hermes_loose(*names: str) -> Callable[[str], TagSpan | None]:
    """Return a search for a call without tags: an object that names one of these tools and has arguments."""
    return loose_call(*names, accepts=lambda value: any(key in value for key in _ARGUMENT_KEYS))


def hermes_system(*schemas: str) -> str:
    """Return the system message that offers tools, in the lines of the Qwen templates."""
    return (
        "You are a helpful assistant.\n\n# Tools\n\nYou may call one or more functions to assist with the user "
        "query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        + "\n".join(schemas)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def hermes_how(tool: str, arguments: str, frame: str) -> str:
    """Return a description of a call of `tool`, for a model that wrote another."""
    return f'Write <tool_call>\n{{"name": "{tool}", "arguments": {arguments}}}\n</tool_call>{frame}.'


def user_image_region(
    arguments: Arguments, views: Sequence[View], reply: ParsedReply, how: str, *, frame: Frame = "per_mille"
) -> CallRegion | None:
    """Return a box of image `img_idx`, counted from 0 among the user's images."""
    given = [view.id for view in views if view.kind != "crop"] or [first_view(views)]
    index = read_index(arguments, INDEX_NAMES, reply, default=0)
    if index is None or not 0 <= index < len(given):
        reply.problems.append(
            f"img_idx must be a whole number from 0 to {len(given) - 1}: it counts the user's images from 0, and "
            f"crops do not count. To look into a crop, give its box on the user's image. {how}"
        )
        return None
    box = read_box(box_argument(arguments, reply), reply, how=how)
    return box and CallRegion(box, frame, given[index])


def first_image_region(arguments: Arguments, views: Sequence[View], reply: ParsedReply, how: str) -> CallRegion | None:
    """Return a box in shown pixels of the first image."""
    if any(arguments.get(name) not in (None, 0) for name in (*INDEX_NAMES, "target_image")):
        reply.repairs.append("image index ignored")
    box = read_box(box_argument(arguments, reply), reply, how=how)
    return box and CallRegion(box, "pixel", first_view(views))


_LABEL = {"type": "string", "description": "What is expected in the region."}


def qwen_schema(*required: str) -> str:
    """Return the tool schema of the Qwen families, with these required arguments."""
    return tool_schema(
        ZOOM,
        "Look at a region of an image more closely: it is cut out and shown enlarged.",
        {
            "bbox_2d": box_schema("in thousandths (0 to 1000) of the image's width and height"),
            "label": _LABEL,
            "img_idx": {"type": "number", "description": "Which of the user's images to zoom into, counted from 0."},
        },
        required=required,
    )


QWEN3VL = Tagged(
    name="qwen3vl",
    frame="per_mille",
    tools=(ZOOM,),
    how=hermes_how(ZOOM, '{"bbox_2d": [x1, y1, x2, y2], "label": "...", "img_idx": 0}', " with x and y from 0 to 1000"),
    payloads=hermes_payloads,
    region=user_image_region,
    loose=hermes_loose(ZOOM),
    max_calls_per_turn=CALLS_PER_TURN,
    result_role="tool",
    mark=None,
    wording=PromptTexts(system=hermes_system(qwen_schema("bbox_2d", "label", "img_idx")), refusal_before="Error: "),
)

_REMINDER = (
    "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
    "<tool_call>...</tool_call> (if tools needed)  <answer>...</answer> "
)
_ANSWER_FORM = "\nThink first, then answer. Format strictly as:  <think>...</think>  <answer>...</answer> "
_DEEPEYES_SCHEMA = tool_schema(
    ZOOM,
    "Zoom in on a region of the image: it is cut out along its bounding box (bbox_2d) and shown.",
    {"bbox_2d": box_schema("in pixels of the image"), "label": _LABEL},
    required=("bbox_2d",),
)
DEEPEYES = Tagged(
    name="deepeyes",
    frame="pixel",
    tools=(ZOOM,),
    how=hermes_how(ZOOM, '{"bbox_2d": [x1, y1, x2, y2], "label": "..."}', " with x and y in pixels of the first image"),
    payloads=hermes_payloads,
    region=first_image_region,
    loose=hermes_loose(ZOOM),
    max_calls_per_turn=CALLS_PER_TURN,
    wording=PromptTexts(
        system=hermes_system(_DEEPEYES_SCHEMA),
        plain_system="You are a helpful assistant.",
        between="Question: ",
        after="\n" + _REMINDER,
        plain_after="\n" + _ANSWER_FORM,
        result_before="<tool_response>",
        result_end=_REMINDER + "</tool_response>",
        refusal_before="Error: ",
        refusal_after=_REMINDER,
        final="Zooming is over." + _ANSWER_FORM,
    ),
)
