"""Ask for a box, then look: a model without a zoom tool is asked where it has to look, and its reply is read.

The box is asked for in the frame of the model's family, as the JSON that Qwen-VL models and their fine-tunes write
(`{"bbox_2d": [x1, y1, x2, y2]}`). A protocol whose model knows its own format alone has a method `locate`.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

from qzoom_agent.errors import BoxError
from qzoom_agent.geometry import Frame
from qzoom_agent.messages import Message, image_part, message
from qzoom_agent.protocols.boxes import box_argument, box_key, numbers_in, read_box
from qzoom_agent.protocols.calls import Payload, image_index, json_payloads, read_label, several
from qzoom_agent.protocols.interface import Parsed, ToolCall, ZoomProtocol
from qzoom_agent.protocols.parsing import first_view, own_turn, split_thought
from qzoom_agent.views import View

_FRAMES: Final[dict[Frame, str]] = {
    "pixel": "pixels of the image, which has {width} x {height}",
    "per_mille": "thousandths of the image's width and height, from 0 to 1000",
    "unit": "shares of the image's width and height, from 0 to 1",
}
_ASK: Final = (
    "{question}\n\nDo not answer yet. First say which part of the image has to be seen enlarged to answer. Reply with "
    'JSON only: {{"bbox_2d": [x1, y1, x2, y2]}}, where x1, y1 is the top-left and x2, y2 the bottom-right corner of '
    'that part in {frame}.{several} If nothing has to be enlarged, reply {{"bbox_2d": null}}.'
)
_NOTHING: Final[tuple[object, ...]] = (None, "", "null", "none", "None", [], [None] * 4)
"""Ways to write that there is no box."""
_IMAGES: Final = ' Add "img_idx", the number of the image that the box is in, counted from 0.'
_SEVERAL: Final = " If several parts are needed, give a list of up to {limit} of them, the most important first."


def ask_for_boxes(protocol: ZoomProtocol, question: str, views: Sequence[View], *, limit: int) -> list[Message]:
    """Return the conversation that asks where to look.

    Args:
        views: The views to show; boxes are measured on the first, or of several images on the one that is named.
    """
    own = getattr(protocol, "locate", None)
    if own is not None:
        asked: list[Message] = own(question, views, limit=limit)
        return asked
    width, height = views[0].size
    text = _ASK.format(
        question=question,
        frame=_FRAMES[_frame(protocol)].format(width=width, height=height),
        several=(_SEVERAL.format(limit=limit) if limit > 1 else "") + (_IMAGES if several(views) else ""),
    )
    return [message("user", *(image_part(view.id) for view in views), text)]


def read_boxes(protocol: ZoomProtocol, text: str, views: Sequence[View], *, limit: int) -> Parsed:
    """Read the reply to `ask_for_boxes`: calls in the model's own format, or boxes as JSON or four numbers.

    The reply never answers the question. One without a box, or with null, asks for no crop.
    """
    found = protocol.parse(text, views)
    if found.calls or hasattr(protocol, "locate"):
        return found.model_copy(update={"calls": found.calls[:limit], "answer": None, "problems": []})
    repairs, problems, calls = list[str](), list[str](), list[ToolCall]()
    thought, rest = split_thought(own_turn(text, repairs))
    rest = rest or thought
    for name, arguments in _named(json_payloads(rest, [])):
        key = box_key(arguments)
        if all(value in _NOTHING for value in ([arguments[key]] if key else arguments.values())):
            continue
        try:
            view = views[image_index(arguments, views, repairs)]
            box, frame = box_argument(arguments, _frame(protocol), repairs, size=view.size)
        except BoxError as error:
            problems.append(str(error))
        else:
            label = read_label(arguments)
            calls.append(ToolCall(name=name, box=box, frame=frame, view=view.id, label=label, raw=rest))
    if not calls and len(numbers_in(rest)) == 4:
        with suppress(BoxError):
            box, frame = read_box(rest, _frame(protocol), repairs, size=views[0].size)
            calls, problems = [ToolCall(name="locate", box=box, frame=frame, view=first_view(views), raw=rest)], []
    return Parsed(thought=thought, calls=calls[:limit], problems=problems, repairs=list(dict.fromkeys(repairs)))


def _frame(protocol: ZoomProtocol) -> Frame:
    return protocol.frame if protocol.frame in _FRAMES else "per_mille"


def _named(payloads: Sequence[Payload]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the name and arguments of each box; those in a list under another key, one by one."""
    for payload in payloads:
        lists = [(key, value) for key, value in payload.arguments.items() if isinstance(value, list)]
        inner = [item for _, value in lists for item in value if isinstance(item, dict)]
        for key, value in lists:
            if value and all(isinstance(item, list) and len(item) == 4 for item in value):
                inner += [{**payload.arguments, key: item} for item in value]
        name = payload.name or "locate"
        yield from ((name, item) for item in inner) if inner else [(name, payload.arguments)]
