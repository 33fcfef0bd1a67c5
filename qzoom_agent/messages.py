"""Messages: a conversation with a model as plain JSON.

A part of a message is a text or the id of a view, never pixels, so that a conversation can be stored, compared with a
session's cache, and rendered by any chat template. `content` is always a list. Tool calls are ordinary text, which a
protocol writes and parses; a server with native tool calls is sent `items` and `call` too.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from qzoom_agent.errors import ConfigError

_SURROGATE = re.compile("[\ud800-\udfff]")
Role = Literal["system", "user", "assistant", "tool"]


class TextPart(TypedDict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """A place where a view is shown."""

    type: Literal["image"]
    view: str


Part = TextPart | ImagePart


class Message(TypedDict):
    """One turn."""

    role: Role
    content: list[Part]
    items: NotRequired[list[dict[str, Any]]]
    """An assistant turn with native tool calls as its server wrote it, see `Reply.items`."""
    call: NotRequired[str]
    """Id of the native call that this message answers; empty: it answers the calls that nothing else does."""


def require_question(question: object) -> None:
    """Raise ConfigError for what is no question."""
    if not isinstance(question, str) or not question.strip() or _SURROGATE.search(question):
        raise ConfigError(f"A question is a text of valid characters that is not empty; got {question!r}.")


def text_part(value: str) -> TextPart:
    """Return a text part."""
    return {"type": "text", "text": value}


def image_part(view: str) -> ImagePart:
    """Return an image part that shows the view of this id."""
    return {"type": "image", "view": view}


def message(role: Role, *parts: Part | str) -> Message:
    """Return a message of these parts in order; a string is a text part, and an empty one is left out."""
    full = [text_part(part) if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": [part for part in full if part["type"] == "image" or part["text"]]}


def text(role: Role, value: str) -> Message:
    """Return a message of one text part."""
    return message(role, value)


def with_system(items: list[Message], prompt: str | None) -> list[Message]:
    """Return the opening of a conversation with a system prompt before the text of its own system message, if any."""
    if not prompt:
        return items
    own = [part for one in items if one["role"] == "system" for part in one["content"]]
    said = plain_text({"role": "system", "content": own})
    return [text("system", f"{prompt}\n\n{said}".strip()), *(one for one in items if one["role"] != "system")]


def plain_text(item: Message) -> str:
    """Return the text parts of a message, joined without separators."""
    return "".join(part["text"] for part in item["content"] if part["type"] == "text")


def view_ids(items: Iterable[Message]) -> list[str]:
    """Return the ids of all views shown in these messages, in order, with repetitions."""
    return [part["view"] for item in items for part in item["content"] if part["type"] == "image"]
