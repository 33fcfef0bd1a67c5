"""Zoom calls and answers in the format of each model family, for demonstrations.

`protocol.parse` reads back what is written here without a repair. Boxes refer to the first image, as shares of it.
Families that were trained to reason before they act get a sentence of reasoning.
"""

import json
from typing import Final

from qzoom_agent.geometry import Box, Size
from qzoom_agent.protocols.calls import PADDING, ZOOM
from qzoom_agent.protocols.nano import LOCATION_STEP

LOOK_THOUGHT: Final = "What decides the answer is too small to be sure of here, so I look closer at that part."
ANSWER_THOUGHT: Final = "What I was shown is enough to answer."
_TAGGED: Final = frozenset({"deepeyes", "mini_o3", "visionthink", "adaptvision"})


def write_call(protocol: str, box: Box, shown: Size) -> str:
    """Return a call for a box in shares ("unit") of the first image, which the model sees at `shown` pixels."""
    x1, y1, x2, y2 = box.to_pixel(shown).as_list()
    step = LOCATION_STEP
    mille = [round(1000 * value) for value in (box.x1, box.y1, box.x2, box.y2)]
    pixel = [int(x1), int(y1), min(shown.width, -int(-x2 // 1)), min(shown.height, -int(-y2 // 1))]
    unit = [round(value, 4) for value in (box.x1, box.y1, box.x2, box.y2)]
    if protocol == "nano":
        low = [int(value // step) * step for value in (x1, y1)]
        high = [min(-int(-value // step) * step, side) for value, side in zip((x2, y2), shown, strict=True)]
        return "<zoom>" + "".join(f"<loc_{value}>" for value in (*low, *high)) + "</zoom>"
    if protocol == "plain":
        return "ZOOM: " + ", ".join(map(str, mille))
    if protocol == "qwen3_5":
        return (
            f"<tool_call>\n<function={ZOOM}>\n<parameter=bbox_2d>\n{json.dumps(mille)}\n</parameter>\n"
            "<parameter=img_idx>\n0\n</parameter>\n</function>\n</tool_call>"
        )
    if protocol == "mini_o3":
        call = json.dumps({"bbox_2d": unit, "source": "original_image"})
        return f"<think>{LOOK_THOUGHT}</think>\n<grounding>{call}</grounding>"
    narrow = [_narrowed(low, high) for low, high in ((box.x1, box.x2), (box.y1, box.y2))]
    shares = [round(narrow[axis][end], 4) for end in (0, 1) for axis in (0, 1)]
    calls: dict[str, tuple[str, dict[str, object]]] = {
        "pixel_reasoner": ("crop_image_normalized", {"bbox_2d": shares, "target_image": 1}),
        "visionthink": ("resize_image", {"action": "resize"}),
        "adaptvision": ("request_local_region", {"bbox_2d": pixel}),
        "deepeyes": (ZOOM, {"bbox_2d": pixel}),
    }
    name, arguments = calls.get(protocol, (ZOOM, {"bbox_2d": mille, "img_idx": 0}))
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    if protocol == "pixel_reasoner":
        return f"{LOOK_THOUGHT}\n{call}"
    return f"<think>{LOOK_THOUGHT}</think>\n{call}" if protocol in _TAGGED else call


def write_answer(protocol: str, answer: str) -> str:
    """Return the last turn, with the answer."""
    if protocol == "pixel_reasoner":
        return f"{ANSWER_THOUGHT} \\boxed{{{answer}}}"
    if protocol in _TAGGED:
        return f"<think>{ANSWER_THOUGHT}</think>\n<answer>{answer}</answer>"
    return answer


def _narrowed(low: float, high: float) -> tuple[float, float]:
    """Shrink an interval by as much as the tool will widen it, but never to nothing."""
    middle, half = (low + high) / 2, max(0.01, (high - low) / 2 - PADDING)
    return max(0.0, middle - half), min(1.0, middle + half)
