"""pixel_reasoner: Hermes calls of `crop_image_normalized`, shares of `target_image`, padded; answers in \\boxed{}.

`target_image` counts all images from 1, crops included; missing, it is 1. A box with a value over 2 is in pixels of
that image as shown (the released code takes pixels from 1 on, which turns a border written as 1.0 into one pixel). As
there, every box is widened by 0.1 of the image on each side, up to its border; `raw` has the call as written.
`select_frames`, the released tool for videos, is refused.
"""

from collections.abc import Sequence

from qzoom_agent.protocols.hermes import hermes_how, hermes_loose, hermes_payloads, hermes_system
from qzoom_agent.protocols.parsing import ParsedReply, box_argument, first_view, read_box, read_index
from qzoom_agent.protocols.tagged import Arguments, CallRegion, PromptTexts, Tagged, box_schema, tool_schema
from qzoom_agent.views import View

PADDING = 0.1
"""Share of the image's side added on each side of a box."""
LARGEST_SHARE = 2.0
"""Values above it are pixels."""
_TOOLS = ("crop_image_normalized", "crop_image", "zoom_in")


def _region(arguments: Arguments, views: Sequence[View], reply: ParsedReply, how: str) -> CallRegion | None:
    count = max(1, len(views))
    index = read_index(arguments, ("target_image",), reply, default=1)
    if index is None or not 1 <= index <= count:
        reply.problems.append(f"target_image must be a whole number from 1 to {count}. {how}")
        return None
    box = read_box(box_argument(arguments, reply), reply, how=how)
    if box is None:
        return None
    (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    if max(box) > LARGEST_SHARE and views:
        width, height = views[index - 1].size
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
    padded = (_less(x1), _less(y1), _more(x2), _more(y2))
    return CallRegion(padded, "unit", views[index - 1].id if views else first_view(views))


def _less(edge: float) -> float:
    return min(edge, max(0.0, edge - PADDING))


def _more(edge: float) -> float:
    return max(edge, min(1.0, edge + PADDING))


_SCHEMA = tool_schema(
    _TOOLS[0],
    "Zoom in on a region of an image along its bounding box. Useful where an object or a text is too small to be seen.",
    {
        "bbox_2d": box_schema("as shares of the image's width and height within [0.0, 1.0]"),
        "target_image": {
            "type": "number",
            "description": "The image to crop, counted from 1 to the number of images; 1 is the original image.",
        },
    },
    required=("bbox_2d", "target_image"),
)
_GUIDELINES = (
    "\n\nGuidelines: Understand the image and the question. Decide whether it helps to use the given visual operation: "
    "look closer with `crop_image`. Reason with the visual information step by step, and put your final answer within "
    "\\boxed{}."
)
PIXEL_REASONER = Tagged(
    name="pixel_reasoner",
    frame="unit",
    tools=_TOOLS,
    how=hermes_how(_TOOLS[0], '{"bbox_2d": [x1, y1, x2, y2], "target_image": 1}', " with x and y within [0.0, 1.0]"),
    payloads=hermes_payloads,
    region=_region,
    loose=hermes_loose(*_TOOLS),
    mark="boxed",
    names=lambda index: f"target_image {index + 1}",
    wording=PromptTexts(
        system=hermes_system(_SCHEMA),
        plain_system="You are a helpful assistant.",
        after=_GUIDELINES,
        plain_after="\n\nReason step by step, and put your final answer within \\boxed{}.",
        result_before="\nHere is the cropped image (Image Size: {width}x{height}):",
        refusal_before="\nExecution error:\n",
        refusal_after="\n",
        final="Zooming is over. Put your final answer within \\boxed{} now.",
    ),
)
