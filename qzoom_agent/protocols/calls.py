"""Zoom calls between tags: the text of a call becomes arguments, and arguments a region of a view.

The tables at the end name the ways that families differ in; `families.yaml` refers to them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from qzoom_agent.errors import BoxError
from qzoom_agent.files import valid_unicode
from qzoom_agent.geometry import Frame
from qzoom_agent.protocols.boxes import Quad, box_argument, box_key, read_index
from qzoom_agent.protocols.json_repair import objects_in, read_json
from qzoom_agent.protocols.parsing import MAX_CALLS_READ, MAX_NAME, TagSpan, first_view
from qzoom_agent.views import View

ZOOM: Final = "image_zoom_in_tool"
INDEX_NAMES: Final = ("img_idx", "image_idx", "image_index", "img_index", "index")
_IMAGE_NAMES: Final = (*INDEX_NAMES, "target_image", "source", "image", "image_id", "image_number", "view")
"""Names under which the formats here, and models that mix them up, say which image is meant."""
PADDING: Final = 0.1
"""Share of the image's side that pixel_reasoner adds on each side of a box."""
_LARGEST_SHARE = 2.0
"""Values above it are pixels for pixel_reasoner."""
_NAME_KEYS = ("name", "function", "tool", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_KINDS: Final[dict[type, tuple[str, ...]]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
}
"""Names of a value's type in a JSON schema."""
_MAX_LABEL = 200
_TRIES = 4
_FUNCTION = re.compile(r"<\s{0,4}function\s{0,4}=\s{0,4}([^<>\n]{1,80})>", re.IGNORECASE)
_PARAMETER = re.compile(r"<\s{0,4}parameter\s{0,4}=\s{0,4}([^<>\n]{1,80})>", re.IGNORECASE)
_CLOSING = re.compile(r"<\s{0,4}/\s{0,4}(?:parameter|function)\s{0,4}>", re.IGNORECASE)
_OBSERVATION = re.compile(r"observation[ _-]?(\d{1,4})", re.IGNORECASE)
_NUMBERED_ORIGINAL = re.compile(r"original[ _-]?image[ _-]?(\d{1,4})", re.IGNORECASE)
_ORIGINAL = ("original_image", "original image", "original", "image", "observation_0")

Arguments = dict[str, object]


class Payload(NamedTuple):
    """A tool name, empty if none was given, its arguments, the id of a native call, and how arguments were written."""

    name: str
    arguments: Arguments
    id: str = ""
    texts: Mapping[str, str] = MappingProxyType({})
    """Arguments of function tags as text: what type each has, its schema says."""


class CallRegion(NamedTuple):
    """The region of a call."""

    box: Quad
    frame: Frame
    view: str


def read_label(arguments: Arguments) -> str:
    """Return the model's words for what it looks for, shortened."""
    label = arguments.get("label")
    return valid_unicode(label[:_MAX_LABEL]) if isinstance(label, str) else ""


# ---- from text to arguments -----------------------------------------------------------------------------------------


def json_payloads(body: str, notes: list[str]) -> list[Payload]:
    """Return the calls in a tag's body: objects one after another or in a list; a bare list of numbers is a box."""
    found: list[Payload] = []
    for value in objects_in(body, notes, limit=MAX_CALLS_READ):
        items = value if isinstance(value, list) and any(isinstance(item, dict) for item in value) else [value]
        found += [_payload(item, notes) for item in items if isinstance(item, dict)]
        if isinstance(value, list) and value and all(isinstance(item, list) and len(item) == 4 for item in value):
            notes.append("boxes without a call read")
            found += [Payload("", {"bbox_2d": item}) for item in value]
        elif isinstance(value, list) and len(value) == 4 and not any(isinstance(item, dict) for item in value):
            notes.append("box without a call read")
            found.append(Payload("", {"bbox_2d": value}))
    return found[:MAX_CALLS_READ]


def _payload(item: Arguments, notes: list[str]) -> Payload:
    inner = item.get("function")
    if isinstance(inner, dict):
        notes.append("call unwrapped")
        item = inner
    name = str(next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), ""))
    given, number = next((item[key] for key in _ARGUMENT_KEYS if key in item), None), item.pop("id", "")
    id = valid_unicode(number)[:MAX_NAME] if isinstance(number, str) else ""
    if isinstance(given, str):
        notes.append("arguments read from a string")
        parsed = read_json(given)
        given = parsed.value if parsed else None
    if isinstance(given, list):
        notes.append("arguments given as a list")
        return Payload(name, given[0] if given and isinstance(given[0], dict) else {"bbox_2d": given}, id)
    if not isinstance(given, dict):
        notes.append("arguments read beside the name")
        given = {key: value for key, value in item.items() if key not in _NAME_KEYS}
    if not name:
        notes.append("tool name missing")
    return Payload(name, given, id)


def bare_payloads(body: str, notes: list[str]) -> list[Payload]:
    """Return the calls in a body whose objects are arguments without a tool name; one that has both is read too."""
    values = [value for value in objects_in(body, notes, limit=MAX_CALLS_READ) if isinstance(value, dict)]
    return [_payload(value, notes) if _has_arguments(value) else Payload("", value) for value in values]


def _has_arguments(item: Arguments) -> bool:
    return any(key in item for key in _ARGUMENT_KEYS)


def function_payloads(body: str, notes: list[str]) -> list[Payload]:
    """Return the calls of the function tags in a body, or of JSON if there are none."""
    functions = _headed(_FUNCTION, body)
    if functions:
        return [Payload(name, *_parameters(inside)) for name, inside in functions]
    found = json_payloads(body, notes)
    if found:
        notes.append("JSON call read in place of a function tag")
    return found


def _parameters(body: str) -> tuple[Arguments, str, dict[str, str]]:
    """Return the arguments in a body as a zoom call takes them, no id, and their texts."""
    found, texts = Arguments(), dict[str, str]()
    for name, inside in _headed(_PARAMETER, body):
        closing = _CLOSING.search(inside)
        texts[name] = text = (inside[: closing.start()] if closing else inside).strip()
        parsed = read_json(text) if text.startswith(("[", "{")) else None
        try:
            found[name] = parsed.value if parsed else float(text)
        except ValueError:
            found[name] = text
    return found, "", texts


def own_arguments(payload: Payload, schema: str) -> Arguments:
    """Return the arguments of a call of an own tool with this function schema, in JSON."""
    known = json.loads(schema)["function"].get("parameters", {}).get("properties", {})
    typed = {name: _typed(text, known.get(name, {}), payload.arguments[name]) for name, text in payload.texts.items()}
    return payload.arguments | typed


def _typed(text: str, schema: Mapping[str, Any], read: object) -> object:
    """Return the text of an argument as its schema says; `read` is its value where that is a list or an object."""
    kinds = set[str]()
    for one in (schema, *schema.get("anyOf", ())):
        kind = one.get("type", ())
        kinds |= {kind} if isinstance(kind, str) else set(kind)
    value: object = text
    if isinstance(read, dict | list):
        value = read
    elif "null" in kinds and text.lower() in ("null", "none"):
        return None
    elif not text.startswith(("[", "{")):
        with suppress(ValueError):
            value = json.loads(text)
    return text if "string" in kinds and not kinds.intersection(_KINDS.get(type(value), ())) else value


def _headed(head: re.Pattern[str], body: str) -> list[tuple[str, str]]:
    """Return the name of each opening tag and the text up to the next one."""
    heads = list(islice(head.finditer(body), MAX_CALLS_READ))
    ends = [*(found.start() for found in heads[1:]), len(body)]
    return [(found[1].strip().strip("\"'"), body[found.end() : end]) for found, end in zip(heads, ends, strict=False)]


# ---- calls without their tags ---------------------------------------------------------------------------------------


def loose_json(text: str, tools: Sequence[str]) -> TagSpan | None:
    """Return an object that names one of these tools and has arguments."""
    return _loose_object(text, tools, 64, _has_arguments)


def loose_bare(text: str, tools: Sequence[str]) -> TagSpan | None:
    """Return an object that has a box and names its source."""
    return _loose_object(text, ("bbox_2d",), MAX_NAME, lambda value: bool(box_key(value)) and "source" in value)


def loose_function(text: str, tools: Sequence[str]) -> TagSpan | None:
    """Return a function tag."""
    head = _FUNCTION.search(text)
    if head is None:
        return None
    closing = text.find("</function>", head.end())
    end = len(text) if closing < 0 else closing + len("</function>")
    whole = text[head.start() : end]
    return TagSpan(whole, whole, head.start(), end, True)


def _loose_object(text: str, marks: Sequence[str], reach: int, accepts: Callable[[Arguments], bool]) -> TagSpan | None:
    """Return the first accepted object with one of `marks` within `reach` characters of its opening brace."""
    found = [span for mark in marks if (span := _marked_object(text, mark, reach, accepts))]
    return min(found, key=lambda span: span.start, default=None)


def _marked_object(text: str, mark: str, reach: int, accepts: Callable[[Arguments], bool]) -> TagSpan | None:
    at = text.find(mark)
    for _ in range(_TRIES):
        if at < 0:
            break
        start = text.rfind("{", max(0, at - reach), at)
        found = read_json(text, start) if start >= 0 else None
        if found and isinstance(found.value, dict) and accepts(found.value):
            whole = text[start : found.end]
            return TagSpan(whole, whole, start, found.end, True)
        at = text.find(mark, at + len(mark))
    return None


# ---- from arguments to a region -------------------------------------------------------------------------------------


def user_image(arguments: Arguments, views: Sequence[View], frame: Frame, notes: list[str]) -> CallRegion:
    """Return a box of image `img_idx`, counted from 0 among the user's images."""
    given = [at for at, view in enumerate(views) if view.kind != "crop"] or [0]
    _require_index(arguments, views, INDEX_NAMES)
    index = read_index(arguments, INDEX_NAMES, notes, default=0)
    if index is None or not 0 <= index < len(given):
        made = ", then those of tools" if any(view.kind == "tool" for view in views) else ""
        raise BoxError(
            f"img_idx must be a whole number from 0 to {len(given) - 1}: it counts the user's images from 0{made}, and "
            "crops do not count. To look into a crop, give its box on the user's image."
        )
    return _boxed(arguments, views, given[index], frame, notes)


def several(views: Sequence[View]) -> bool:
    """Return whether the question is about several images."""
    return any(view.image for view in views)


def first_image(arguments: Arguments, views: Sequence[View], frame: Frame, notes: list[str]) -> CallRegion:
    """Return a box of the first image; of several, that which the call names."""
    if several(views):
        return _boxed(arguments, views, image_index(arguments, views, notes), frame, notes)
    if any(arguments.get(name) not in (None, 0) for name in (*INDEX_NAMES, "target_image")):
        notes.append("image index ignored")
    return _boxed(arguments, views, 0, frame, notes)


def _require_index(arguments: Arguments, views: Sequence[View], names: Sequence[str]) -> None:
    """Raise BoxError for a call about one of several images that names it in the way of another format."""
    other = next((name for name in _IMAGE_NAMES if name not in names and arguments.get(name) is not None), None)
    if other and several(views) and all(arguments.get(name) is None for name in names):
        raise BoxError(f"The image is not named by {other!r} but by {names[0]!r}.")


def image_index(arguments: Arguments, views: Sequence[View], notes: list[str]) -> int:
    """Return the place of the user's image that a call names; without an index, of the first."""
    if not several(views):
        return 0
    count = _images(views)
    _require_index(arguments, views, INDEX_NAMES)
    index = read_index(arguments, INDEX_NAMES, notes, default=0)
    if index is None or not 0 <= index < count:
        raise BoxError(f"img_idx must be a whole number from 0 to {count - 1}: it counts the user's images from 0.")
    return index


def named_source(arguments: Arguments, views: Sequence[View], frame: Frame, notes: list[str]) -> CallRegion:
    """Return a box of the image that `source` names: original_image, or observation_i for the i-th crop.

    Of several images, the second is original_image_2.
    """
    source = arguments.get("source")
    _require_index(arguments, views, ("source",))
    if source is None:
        notes.append("source missing, original_image taken")
    named = "original" if source is None else str(source)[:MAX_NAME].strip().lower()
    numbered, image = _OBSERVATION.fullmatch(named), _NUMBERED_ORIGINAL.fullmatch(named)
    images = max(1, _images(views))
    index = 0 if named in _ORIGINAL else -1
    if numbered and int(numbered[1]):
        index = images - 1 + int(numbered[1])
    elif image and 1 <= int(image[1]) <= images:
        index = int(image[1]) - 1
    if index < 0 or (index and index >= len(views)):
        count = len(views) - images
        crops = f"observation_1 to observation_{count}" if count > 0 else "no observation yet"
        more = f", original_image_2 to original_image_{images}" if images > 1 else ""
        raise BoxError(f"There is no such source. There are original_image{more} and {crops}.")
    return _boxed(arguments, views, index, frame, notes)


def padded_target(arguments: Arguments, views: Sequence[View], frame: Frame, notes: list[str]) -> CallRegion:
    """Return a box of `target_image`, which counts all images from 1, widened by `PADDING` up to the image's border.

    A box with a value over 2 is in pixels of that image as shown. (The released code takes pixels from 1 on, which
    turns a border written as 1.0 into one pixel.)
    """
    count = max(1, len(views))
    _require_index(arguments, views, ("target_image",))
    index = read_index(arguments, ("target_image",), notes, default=1)
    if index is None or not 1 <= index <= count:
        raise BoxError(f"target_image must be a whole number from 1 to {count}.")
    found = _boxed(arguments, views, index - 1, frame, notes, farthest=float("inf"))
    (x1, x2), (y1, y2) = sorted((found.box[0], found.box[2])), sorted((found.box[1], found.box[3]))
    if max(found.box) > _LARGEST_SHARE and views:
        width, height = views[index - 1].size
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
    (x1, x2), (y1, y2) = _padded(x1, x2), _padded(y1, y2)
    return found._replace(box=(x1, y1, x2, y2))


def _padded(low: float, high: float) -> tuple[float, float]:
    return min(low, max(0.0, low - PADDING)), max(high, min(1.0, high + PADDING))


def whole_image(arguments: Arguments, views: Sequence[View], frame: Frame, notes: list[str]) -> CallRegion:
    """Return all of the first image for the action `resize`; of several, that which the call names."""
    action = arguments.get("action")
    if action is None:
        notes.append("action missing, resize taken")
    elif action != "resize":
        raise BoxError(f"There is no action {str(action)[:MAX_NAME]!r}.")
    view = views[image_index(arguments, views, notes)].id if views else first_view(views)
    return CallRegion((0.0, 0.0, 1.0, 1.0), "unit", view)


def _boxed(
    arguments: Arguments, views: Sequence[View], index: int, frame: Frame, notes: list[str], *, farthest: float = 1.5
) -> CallRegion:
    view = views[index] if index < len(views) else None
    found = box_argument(arguments, frame, notes, size=view.size if view else None, farthest=farthest)
    return CallRegion(*found, view.id if view else first_view(views))


PAYLOADS: Final = {"json": json_payloads, "bare": bare_payloads, "function": function_payloads}
"""Ways to write a call between tags."""
LOOSE: Final = {"json": loose_json, "bare": loose_bare, "function": loose_function}
"""The same, for a call without its tags."""
REGIONS: Final = {
    "user_image": user_image,
    "first_image": first_image,
    "named_source": named_source,
    "padded_target": padded_target,
    "whole_image": whole_image,
}
"""Ways to say which region is meant."""
HINTS: Final[dict[str, Callable[[View, Sequence[View]], str]]] = {
    "user_image": lambda view, views: (
        f"To zoom into it, write img_idx {[one.id for one in views if one.kind != 'crop'].index(view.id)}."
    ),
    "first_image": lambda view, views: f'To zoom into it, add "view": "{view.id}" to the arguments.',
    "named_source": lambda view, views: (
        f"To zoom into it, write source observation_{_place(view, views) + 1 - _images(views)}."
    ),
    "padded_target": lambda view, views: f"To zoom into it, write target_image {_place(view, views) + 1}.",
    "whole_image": lambda view, views: "",
}
"""The same for the image of a tool, as a sentence for the model."""


def _images(views: Sequence[View]) -> int:
    return sum(one.kind == "coarse" for one in views)


def _place(view: View, views: Sequence[View]) -> int:
    return [one.id for one in views].index(view.id)
