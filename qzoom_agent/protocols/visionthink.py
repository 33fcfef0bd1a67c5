"""visionthink and adaptvision: one call at most, from an image at half its sides (the coarse view) to a larger one.

VisionThink asks for the whole image: `resize_image` with `{"action": "resize"}`, a zoom on all of the first view at the
crop budget. AdaptVision asks for a region: `request_local_region`, `bbox_2d` in pixels of the image as shown. Answers
in `<answer>`, with `\\boxed{}` inside for choices.
"""

from collections.abc import Sequence

from qzoom_agent.protocols.hermes import (
    first_image_region,
    hermes_how,
    hermes_loose,
    hermes_payloads,
    hermes_system,
)
from qzoom_agent.protocols.parsing import MAX_NAME, ParsedReply, first_view
from qzoom_agent.protocols.tagged import Arguments, CallRegion, PromptTexts, Tagged, box_schema, tool_schema
from qzoom_agent.views import View

_RESIZE = "resize_image"
_LOCAL = "request_local_region"


def _whole_image(arguments: Arguments, views: Sequence[View], reply: ParsedReply, how: str) -> CallRegion | None:
    action = arguments.get("action")
    if action is None:
        reply.repairs.append("action missing, resize taken")
    elif action != "resize":
        reply.problems.append(f"There is no action {str(action)[:MAX_NAME]!r}. {how}")
        return None
    return CallRegion((0.0, 0.0, 1.0, 1.0), "unit", first_view(views))


def _wording(schema: str, *, shown: str, tool: str) -> PromptTexts:
    form = "inside <answer> and </answer>; wrap a number or the letter of a choice in \\boxed{} there"
    return PromptTexts(
        system=hermes_system(schema),
        plain_system="You are a helpful assistant.",
        before=(
            "Answer the question based on the image provided. Begin each step with reasoning within <think> and "
            "</think>. To see better you may call ONE function tool per step, at its end, within <tool_call> and "
            "</tool_call>, and go on reasoning from what it returns. Once the final answer is confirmed, place it "
            f"{form}. Here is the image and question:\n"
        ),
        plain_before=(
            "Answer the question based on the image provided. Begin with reasoning within <think> and </think>. Once "
            f"the final answer is confirmed, place it {form}. Here is the image and question:\n"
        ),
        between="\n",
        result_before=f"<tool_response>\n{shown}\n",
        result_end=(
            f"\n</tool_response>\nStudy what the {tool} tool returned together with the question and the image from "
            "the user, continue your reasoning inside <think> and </think>, then write your final answer inside "
            "<answer> and </answer>."
        ),
        refusal_after="\nConsider the error, adjust your response, and continue reasoning inside <think> and </think>.",
        final=f"There are no more tools. Reason within <think> and </think>, then place the final answer {form}.",
    )


VISIONTHINK = Tagged(
    name="visionthink",
    frame="unit",
    tools=(_RESIZE,),
    how=hermes_how(_RESIZE, '{"action": "resize"}', ""),
    payloads=hermes_payloads,
    region=_whole_image,
    loose=hermes_loose(_RESIZE),
    wording=_wording(
        tool_schema(
            _RESIZE,
            "Resize the image resolution.",
            {
                "action": {
                    "type": "string",
                    "enum": ["resize"],
                    "description": "`resize` doubles the resolution of the image. Use it only if the image as it is "
                    "does not show what the answer needs.",
                }
            },
            required=("action",),
        ),
        shown="The resized image is shown below:",
        tool="image resize",
    ),
)

ADAPTVISION = Tagged(
    name="adaptvision",
    frame="pixel",
    tools=(_LOCAL,),
    how=hermes_how(_LOCAL, '{"bbox_2d": [x1, y1, x2, y2]}', " with x and y in pixels of the first image"),
    payloads=hermes_payloads,
    region=first_image_region,
    loose=hermes_loose(_LOCAL),
    wording=_wording(
        tool_schema(
            _LOCAL,
            "Request a high-resolution local region of the current image and zoom in.",
            {"bbox_2d": box_schema("in absolute pixels of the current image", number="integer")},
            required=("bbox_2d",),
        ),
        shown="The cropped region of the image is shown below:",
        tool=_LOCAL,
    ),
)
