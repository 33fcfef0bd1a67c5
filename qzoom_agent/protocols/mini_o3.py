"""mini_o3: `<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>`, one a turn.

Boxes are relative (0..1) to the image named by `source`: "original_image", or "observation_i" for the i-th crop, those
of a policy included. `</grounding>` is a stop string, and a call without it is complete. Crops come back in a user turn
that numbers them: Action k (from 0), Observation k + 1; the doubled "the" in it is the checkpoint's.
"""

import re
from collections.abc import Sequence

from qzoom_agent.protocols.json_repair import objects_in
from qzoom_agent.protocols.parsing import (
    MAX_CALLS_READ,
    MAX_NAME,
    ParsedReply,
    box_argument,
    first_view,
    has_box,
    read_box,
)
from qzoom_agent.protocols.tagged import Arguments, CallRegion, Payload, PromptTexts, Tagged, loose_call
from qzoom_agent.views import View

_OBSERVATION = re.compile(r"observation[ _-]?(\d{1,4})", re.IGNORECASE)
_ORIGINAL = ("original_image", "original image", "original", "image", "observation_0")


def _payloads(body: str, reply: ParsedReply) -> list[Payload]:
    values = objects_in(body, reply.repairs, limit=MAX_CALLS_READ)
    return [Payload("grounding", value) for value in values if isinstance(value, dict)]


def _region(arguments: Arguments, views: Sequence[View], reply: ParsedReply, how: str) -> CallRegion | None:
    view = _source(arguments, views, reply)
    if view is None:
        crops = f"observation_1 to observation_{len(views) - 1}" if len(views) > 1 else "no observation yet"
        reply.problems.append(f"There is no such source. There are original_image and {crops}. {how}")
        return None
    box = read_box(box_argument(arguments, reply), reply, how=how)
    return box and CallRegion(box, "unit", view)


def _source(arguments: Arguments, views: Sequence[View], reply: ParsedReply) -> str | None:
    source = arguments.get("source")
    if source is None:
        reply.repairs.append("source missing, original_image taken")
        return first_view(views)
    named = str(source)[:MAX_NAME].strip().lower()
    if named in _ORIGINAL:
        return first_view(views)
    numbered = _OBSERVATION.fullmatch(named)
    index = int(numbered[1]) if numbered else 0
    return views[index].id if 0 < index < len(views) else None


def _name(index: int) -> str:
    return f"observation_{index}" if index else "original_image"


_CALL = '<grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>'
_ASK = "Reason inside <think> and </think>, then give the final answer inside <answer> and </answer>."
MINI_O3 = Tagged(
    name="mini_o3",
    frame="unit",
    tools=("grounding",),
    how=f"Write {_CALL}, where the image's width and height are 1.0.",
    payloads=_payloads,
    region=_region,
    loose=loose_call("bbox_2d", accepts=lambda value: has_box(value) and "source" in value, reach=MAX_NAME),
    tag="grounding",
    names=_name,
    stop=("</grounding>",),
    wording=PromptTexts(
        system=(
            "You are a helpful assistant. Answer the question about the image. Put your reasoning inside <think> and "
            "</think>. Wherever something is not clear, zoom into a region of an image by writing "
            f"{_CALL}, where (x0, y0) and (x1, y1) are the region's top-left and bottom-right corner, the image's "
            "width and height being 1.0, and 'source' is the image to zoom into: 'original_image' or 'observation_i'. "
            "Once the answer is certain, put it inside <answer> and </answer>."
        ),
        plain_system=f"You are a helpful assistant. Answer the question about the image. {_ASK}",
        between="\n",
        result_before="After the above Action {action}, here is the the zoom-in image (Observation {observation}):\n",
        result_after=".",
        result_end=(
            "\nContinue your reasoning process inside <think> and </think>. If needed, you can continue to zoom in on "
            "the original image or any of the observations, by outputting <grounding> and </grounding> as before. If "
            "the final answer is confirmed, put your final answer inside <answer> and </answer>."
        ),
        refusal_before="ERROR occurs during grounding. Error Information: ",
        refusal_after="\nConsider the error and continue your reasoning inside <think> and </think>.",
        final=f"Zooming is over. {_ASK}",
    ),
)
