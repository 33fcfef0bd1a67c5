"""A chat completion, assembled from the JSON that a server sends: one whole reply, or the chunks of a stream.

Nothing is trusted. A part of another shape than documented counts as absent, a count of tokens that cannot be true is
0 (unknown), and secrets are masked before a text goes anywhere.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from qzoom_agent.errors import mask_secrets, secret_begins
from qzoom_agent.models.chat_stream import UnusableReply, short

_MOST_TOKENS: Final = 10**9
BUSY: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""
_REASONING: Final = ("reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One assistant turn as a server returned it."""

    text: str
    """The content; a list of parts is joined."""
    reasoning: str
    """The thought that the server separated from the content."""
    calls: tuple[tuple[str, str], ...]
    """Name and arguments (JSON, unless the model or the server broke it) of each tool call."""
    finish: str | None
    """The server's `finish_reason`."""
    stop: str | None
    """The stop string that ended the text, where the server names it."""
    withheld: str
    """The reason why the model or a filter kept the answer back; empty if none did."""
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int

    @property
    def cut(self) -> bool:
        """True if the turn was cut off by its limit of tokens."""
        return self.finish in ("length", "max_tokens")


class CompletionReader:
    """Collects the JSON values of one reply; `completion` returns the turn."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        """`on_text` is called with each new piece of content; the pieces joined are `Completion.text`."""
        self.finish: str | None = None
        self.spoke = False
        """A piece was given to `on_text`: the request cannot be repeated."""
        self._on_text = on_text
        self._stop: str | None = None
        self._text, self._reasoning, self._refusal = list[str](), list[str](), list[str]()
        self._calls: dict[int, tuple[str, list[str]]] = {}
        self._usage: Any = None
        self._held = ""
        self._other: Any = None
        self._began = False

    def take(self, value: Any) -> None:
        """Read the next JSON value. Raises UnusableReply if it is an error."""
        if error := dig(value, "error"):
            raise UnusableReply(f"returned an error: {message_of(value)}", again=dig(error, "code") in BUSY)
        choices = dig(value, "choices")
        if not isinstance(choices, list):
            self._other = value
            return
        self._usage = dig(value, "usage") or self._usage
        choice = next((one for one in choices if isinstance(one, dict) and not one.get("index")), {})
        part = choice.get("delta") or choice.get("message")
        if isinstance(part, dict):
            self._began = True
            self._read(part)
        elif not self._began:
            self._other = value
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
        self.finish = finish if isinstance(finish, str) else self.finish
        self._stop = stop if isinstance(stop, str) else self._stop

    def completion(self) -> Completion:
        """Return the turn. Raises UnusableReply if there was none."""
        if not self._began and self.finish is None:
            raise UnusableReply(f"returned something that is no chat completion: {short(json.dumps(self._other))}")
        self._say("", last=True)
        refusal = "".join(self._refusal).strip()
        prompt, written = (_count(dig(self._usage, key)) for key in ("prompt_tokens", "completion_tokens"))
        return Completion(
            text="".join(self._text),
            reasoning=_cleaned("".join(self._reasoning)),
            calls=tuple((_cleaned(name), _cleaned("".join(given))) for name, given in self._calls.values()),
            finish=self.finish,
            stop=self._stop,
            withheld=refusal or ("content_filter" if self.finish == "content_filter" else ""),
            prompt_tokens=prompt,
            cached_tokens=min(prompt, _count(dig(self._usage, "prompt_tokens_details", "cached_tokens"))),
            new_tokens=written,
        )

    def _read(self, part: dict[str, Any]) -> None:
        content = part.get("content")
        self._say(_joined(content, "text"))
        self._refusal += [_joined(part.get("refusal"), "refusal"), _joined(content, "refusal", plain=False)]
        self._reasoning.append(next((found for key in _REASONING if (found := _joined(part.get(key), "text"))), ""))
        calls = part.get("tool_calls") or [{"function": part.get("function_call")}]
        for place, call in enumerate(calls if isinstance(calls, list) else []):
            index, function = dig(call, "index"), dig(call, "function")
            if not isinstance(function, dict):
                continue
            key = index if isinstance(index, int) else place
            name, given = self._calls.get(key, ("", []))
            arguments = function.get("arguments")
            if arguments is not None:
                given.append(arguments if isinstance(arguments, str) else json.dumps(arguments))
            self._calls[key] = (_joined(function.get("name"), "") or name, given)

    def _say(self, piece: str, *, last: bool = False) -> None:
        """Add a piece of content; keep back what may be half a secret or half a character."""
        held = mask_secrets(self._held + piece)
        half = 0 if last else max(secret_begins(held), int("\ud800" <= held[-1:] <= "\udbff"))
        ready, self._held = _cleaned(held[: len(held) - half]), held[len(held) - half :]
        if ready:
            self._text.append(ready)
            if self._on_text is not None:
                self.spoke = True
                self._on_text(ready)


def dig(value: Any, *path: str) -> Any:
    """Return the value under these keys of nested JSON objects; None if there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def message_of(value: Any) -> str:
    """Return the message in the JSON of an error; the JSON itself if there is none."""
    paths = (("error", "message"), ("error",), ("message",), ("detail",))
    found = next((text for path in paths if isinstance(text := dig(value, *path), str)), None)
    return short(json.dumps(value) if found is None else found)


def _joined(value: Any, key: str, *, plain: bool = True) -> str:
    """Return a text, or those under `key` of a list of parts, joined; `plain` also takes strings as they are."""
    parts = value if isinstance(value, list) else [value]
    texts = (part.get(key) if isinstance(part, dict) else part if plain else None for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _count(value: Any) -> int:
    known = isinstance(value, int | float) and 0 <= value <= _MOST_TOKENS
    return int(value) if known else 0


def _cleaned(text: str) -> str:
    """Return a text without secrets, as valid Unicode."""
    return mask_secrets(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
