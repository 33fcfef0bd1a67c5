"""Messages: what a conversation with a model is made of, as plain JSON.

A message is `{"role": ..., "content": [part, ...]}`; a part is a text or the *id* of a view, never pixels, so that a
conversation can be stored in a checkpoint, compared part by part with a session's cache, and rendered by any chat
template. `content` is always a list: one shape, no string shortcut. Tool calls are not fields here: a protocol writes
and reads them as text.
"""

from collections.abc import Iterable
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    type: Literal["image"]
    view: str


Part = TextPart | ImagePart


class Message(TypedDict):
    role: Role
    content: list[Part]


def text_part(value: str) -> TextPart:
    """A piece of text."""
    return {"type": "text", "text": value}


def image_part(view: str) -> ImagePart:
    """A place where the view with this id is shown."""
    return {"type": "image", "view": view}


def message(role: Role, *parts: Part | str) -> Message:
    """A message of these parts in order; a bare string is a text part, and an empty string is left out."""
    full = [text_part(part) if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": [part for part in full if part["type"] == "image" or part["text"]]}


def text(role: Role, value: str) -> Message:
    """A message of one text part."""
    return message(role, value)


def plain_text(item: Message) -> str:
    """The text parts of a message joined as they stand; images leave no mark."""
    return "".join(part["text"] for part in item["content"] if part["type"] == "text")


def view_ids(items: Iterable[Message]) -> list[str]:
    """Ids of all views shown in these messages, in order, with repetitions."""
    return [part["view"] for item in items for part in item["content"] if part["type"] == "image"]
