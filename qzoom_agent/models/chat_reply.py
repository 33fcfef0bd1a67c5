"""A turn of a server, assembled from the JSON that it sends: one whole reply, or the chunks of a stream.

`CompletionReader` reads Chat Completions; `response_reply.ResponseReader` reads Responses. Nothing is trusted. A part
of another shape than documented counts as absent, a count of tokens that cannot be true is 0 (unknown), and secrets are
masked before a text goes anywhere.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qzoom_agent.errors import mask_secrets, secret_begins
from qzoom_agent.models.chat_stream import UnusableReply, short

_MOST_TOKENS: Final = 10**9
_DEEPEST: Final = 8
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
    items: tuple[dict[str, Any], ...]
    """Tool calls (type "function_call": call_id, name, and arguments, in JSON unless the model or the server broke it),
    with the parts of the turn around them that have to be sent again; as items of Responses."""
    finish: str | None
    """The server's `finish_reason`."""
    stop: str | None
    """The stop string that ended the text, where the server names it."""
    withheld: str
    """The reason why the model or a filter kept the answer back; empty if none did."""
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    logprobs: tuple[tuple[str, float], ...] = ()
    """Text and log-probability of each token of the content, where the server tells them."""

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tool calls."""
        return [item for item in self.items if item["type"] == "function_call"]

    @property
    def cut(self) -> bool:
        """True if the turn was cut off by its limit of tokens."""
        return self.finish in ("length", "max_tokens", "max_output_tokens")


class ReplyReader(ABC):
    """Collects the JSON values of one reply, in the form of its API; `completion` returns the turn."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        """`on_text` is called with each new piece of content; the pieces joined are `Completion.text`."""
        self.finish: str | None = None
        self.spoke = False
        """A piece was given to `on_text`: the request cannot be repeated."""
        self._on_text = on_text
        self._stop: str | None = None
        self._text, self._reasoning, self._refusal = list[str](), list[str](), list[str]()
        self._usage: Any = None
        self._logprobs = list[tuple[str, float]]()
        self._held = ""
        self._other: Any = None
        self._began = False

    @abstractmethod
    def take(self, value: Any) -> None:
        """Read the next JSON value. Raises UnusableReply if it is an error."""

    @abstractmethod
    def completion(self) -> Completion:
        """Return the turn. Raises UnusableReply if there was none."""

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

    def _completed(self, kind: str, items: Sequence[dict[str, Any]], *usage: str) -> Completion:
        """Return the turn; `usage` are the server's keys of tokens read, written, and details of those read."""
        if not self._began and self.finish is None:
            raise UnusableReply(f"returned something that is no {kind}: {short(json.dumps(self._other))}")
        self._say("", last=True)
        prompt, written = (_count(dig(self._usage, key)) for key in usage[:2])
        return Completion(
            text="".join(self._text),
            reasoning=_cleaned("".join(self._reasoning)),
            items=tuple(_cleaned_json(item) for item in items),
            finish=self.finish,
            stop=self._stop,
            withheld=_cleaned("".join(self._refusal).strip())
            or ("content_filter" if self.finish == "content_filter" else ""),
            prompt_tokens=prompt,
            cached_tokens=min(prompt, _count(dig(self._usage, usage[2], "cached_tokens"))),
            new_tokens=written,
            logprobs=tuple(self._logprobs),
        )

    def _read_logprobs(self, tokens: Any) -> None:
        for token in tokens if isinstance(tokens, list) else ():
            text, value = dig(token, "token"), dig(token, "logprob")
            if isinstance(text, str) and isinstance(value, int | float) and value <= 0:  # NaN is none either
                self._logprobs.append((_cleaned(text), float(value)))


class CompletionReader(ReplyReader):
    """Reads a chat completion."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        super().__init__(on_text)
        self._calls: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}

    def take(self, value: Any) -> None:
        if error := dig(value, "error"):
            raise UnusableReply(f"returned an error: {message_of(value)}", again=dig(error, "code") in [*BUSY])
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
        self._read_logprobs(dig(choice, "logprobs", "content"))
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
        self.finish = finish if isinstance(finish, str) else self.finish
        self._stop = stop if isinstance(stop, str) else self._stop

    def completion(self) -> Completion:
        usage = ("prompt_tokens", "completion_tokens", "prompt_tokens_details")
        said = {"type": "message", "text": "".join([*self._text, self._held])}
        return self._completed("chat completion", [said, *self._calls] if self._calls else [], *usage)

    def _read(self, part: dict[str, Any]) -> None:
        content = part.get("content")
        self._say(joined(content, "text"))
        self._refusal += [joined(part.get("refusal"), "refusal"), joined(content, "refusal", plain=False)]
        self._reasoning.append(next((found for key in _REASONING if (found := joined(part.get(key), "text"))), ""))
        calls = part.get("tool_calls") or [{"function": part.get("function_call")}]
        for place, call in enumerate(calls if isinstance(calls, list) else []):
            if isinstance(function := dig(call, "function"), dict):
                self._call(call, function, place)

    def _call(self, call: dict[str, Any], function: dict[str, Any], place: int) -> None:
        """Add a tool call, or the next piece of one."""
        index = given if isinstance(given := call.get("index"), int) else place
        known = self._places.get(index)
        id = joined(call.get("id"), "")
        if known is None or (id and self._calls[known]["call_id"] not in ("", id)):  # Gemini has index 0 for each call
            known = self._places[index] = len(self._calls)
            self._calls.append({"type": "function_call", "call_id": id, "name": "", "arguments": ""})
        item = self._calls[known]
        item["name"] = joined(function.get("name"), "") or item["name"]
        part = function.get("arguments")
        item["arguments"] += part if isinstance(part, str) else "" if part is None else json.dumps(part)
        if isinstance(more := call.get("extra_content"), dict):
            item["extra_content"] = more  # Gemini's signature, without which it refuses the next request


def dig(value: Any, *path: str) -> Any:
    """Return the value under these keys of nested JSON objects; None if there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def message_of(value: Any) -> str:
    """Return the message in the JSON of an error; the JSON itself if there is none."""
    value = value[0] if isinstance(value, list) and value else value  # Gemini's
    paths = (("error", "message"), ("error",), ("message",), ("detail",))
    found = next((text for path in paths if isinstance(text := dig(value, *path), str)), None)
    return short(json.dumps(value) if found is None else found)


def joined(value: Any, key: str, *, plain: bool = True) -> str:
    """Return a text, or those under `key` of a list of parts, joined; `plain` also takes strings as they are."""
    parts = value if isinstance(value, list) else [value]
    texts = (part.get(key) if isinstance(part, dict) else part if plain else None for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _count(value: Any) -> int:
    known = isinstance(value, int | float) and 0 <= value <= _MOST_TOKENS
    return int(value) if known else 0


def _cleaned_json(value: Any, depth: int = 0) -> Any:
    """Return JSON with each text cleaned, and nothing below the depth that real items have."""
    if isinstance(value, str):
        return _cleaned(value)
    if isinstance(value, list | dict) and depth > _DEEPEST:
        return None
    if isinstance(value, list):
        return [_cleaned_json(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned_json(one, depth + 1) for key, one in value.items()}
    return value


def _cleaned(text: str) -> str:
    """Return a text without secrets, as valid Unicode."""
    return mask_secrets(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
