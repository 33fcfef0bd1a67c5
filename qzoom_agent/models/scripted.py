"""A backend with scripted replies, for tests, demonstrations, and replaying a recorded conversation.

It behaves like a model with a cache: it counts tokens (one per four characters; of an image, one per square of
`defaults.factor` pixels), knows which of them a session already holds, streams, and honours stop strings and the limit
of tokens. Replies come from a list, shared in order by all sessions, or from a function of the conversation. Nothing is
random and `seconds` is always 0.0, so traces made with it are reproducible.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import takewhile
from operator import eq
from threading import Lock
from typing import Unpack

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import tokens
from qzoom_agent.messages import Message
from qzoom_agent.models.interface import ImageSource, LookOptions, OnText, Reply, SamplingParams, Session
from qzoom_agent.models.presets import NANO_BUDGET
from qzoom_agent.trace import PerceptionRecord

_CHARS_PER_TOKEN = 4


class ScriptedBackend:
    """A backend with replies from a list (in order) or from a function of the whole conversation.

    ScriptedBackend(["<zoom>...</zoom>", "42"]) answers twice and then raises BackendError.
    """

    def __init__(
        self,
        replies: Sequence[str] | Callable[[list[Message]], str],
        *,
        protocol: str = "nano",
        defaults: ViewBudget = NANO_BUDGET,
        name: str = "scripted",
        looks: Callable[[list[Message]], list[PerceptionRecord]] | None = None,
    ) -> None:
        """
        Args:
            replies: texts in order, or a function of the conversation.
            protocol: format in which the replies call tools.
            defaults: visual tokens of a view.
            name: of the model.
            looks: makes it a model with branches: returns the result of a look at a conversation.
        """
        self.name = name
        self.protocol = protocol
        self.defaults = defaults
        self.looks = looks
        self._replies = replies
        self._used = 0
        self._lock = Lock()

    @property
    def perceives(self) -> bool:
        return self.looks is not None

    def session(self, image: ImageSource) -> Session:
        return _ScriptedSession(self, image)

    def next_text(self, messages: Sequence[Message]) -> str:
        """Return the reply to `messages`. Raises BackendError when the list is used up."""
        if callable(self._replies):
            return self._replies(deepcopy(list(messages)))
        with self._lock:
            if self._used >= len(self._replies):
                raise BackendError(
                    f"The scripted backend ran out of replies: {len(self._replies)} were given and another is needed. "
                    "Give it more replies, or a function that makes them."
                )
            self._used += 1
            return self._replies[self._used - 1]


class _ScriptedSession:
    def __init__(self, backend: ScriptedBackend, image: ImageSource) -> None:
        self._backend = backend
        self._image = image
        self._held: list[Message] = []
        self.places: dict[str, tuple[str, tuple[float, float, float, float]]] = {}

    def look(self, messages: Sequence[Message], **how: Unpack[LookOptions]) -> list[PerceptionRecord]:
        if self._backend.looks is None:
            raise BackendError("The scripted backend cannot look. Give it `looks`, a function that returns records.")
        return self._backend.looks(deepcopy(list(messages)))

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        self.places[view] = (source, cells)

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        shared = sum(takewhile(bool, map(eq, self._held, messages)))
        cached = sum(sum(self._count(message)) for message in messages[:shared])
        counts = [self._count(message) for message in messages[shared:]]
        whole = self._backend.next_text(messages)
        text = whole[: settings.max_new_tokens * _CHARS_PER_TOKEN]
        ends = [text.find(mark) + len(mark) for mark in settings.stop if mark in text]
        text = text[: min(ends, default=len(text))]
        if on_text is not None:
            for start in range(0, len(text), _CHARS_PER_TOKEN):
                on_text(text[start : start + _CHARS_PER_TOKEN])
        self._held = [*deepcopy(list(messages)), {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        return Reply(
            text=text,
            finish="stop" if ends or text == whole else "length",
            prompt_tokens=cached + sum(sum(count) for count in counts),
            cached_tokens=cached,
            new_tokens=_text_tokens(text),
            visual_tokens=sum(visual for _, visual in counts),
            seconds=0.0,
        )

    def close(self) -> None:
        self._held = []

    def _count(self, message: Message) -> tuple[int, int]:
        """Return (text tokens, visual tokens) of a message."""
        text = visual = 0
        for part in message["content"]:
            if part["type"] == "image":
                visual += tokens(self._image(part["view"]).size, self._backend.defaults.factor)
            else:
                text += _text_tokens(part["text"])
        return text, visual


def _text_tokens(text: str) -> int:
    return -(-len(text) // _CHARS_PER_TOKEN)
