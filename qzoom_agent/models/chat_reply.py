"""The reply of a server: the JSON values in its body, within limits of bytes, and the turn that they make up.

A body is one JSON value or server-sent events: the bytes decide which, because servers name the type wrong. Compressed
bodies are unpacked only as far as the limits go. `CompletionReader` reads Chat Completions, `ResponseReader` Responses;
of a streamed response the text is that of its pieces, everything else is read from the response that ends it.

Nothing is trusted. A part of another shape than documented counts as absent, a count of tokens that cannot be true is 0
(unknown), and secrets are masked before a text goes anywhere.
"""

import codecs
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qzoom_agent.errors import mask_secrets, redact, secret_begins, visible

MIB: Final = 2**20
MOST_BYTES: Final = 8 * MIB
"""Bytes of a whole reply, or of one event of a stream."""
MOST_STREAMED: Final = 64 * MIB
"""Bytes of all events of a stream."""
_SHOWN: Final = 300
"""Characters of a server's text in an error."""
_FIELD: Final = re.compile(rb"data:|event:|id:|retry:|:")
_DONE: Final = b"[DONE]"
_MOST_TOKENS: Final = 10**9
_DEEPEST: Final = 8
BUSY: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""
_REASONING: Final = ("reasoning_content", "reasoning")
_ABORTED: Final = frozenset(
    {"abort", "aborted", "error", "cancelled", "canceled", "failed", "insufficient_system_resource"}
)
"""Reasons to finish of a reply that its server gave up: vLLM and SGLang, OpenRouter, Responses, DeepSeek."""
_FILTERED: Final = frozenset({"content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii"})


class UnusableReply(Exception):
    """A reply of a server that is cut off, an error, or of another form; the text goes on after "The server"."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again
        """The same request may succeed."""


def short(text: str) -> str:
    """Return the beginning of a server's text, on one line, without secrets and control characters."""
    return visible(redact(" ".join(text.split())))[:_SHOWN]  # cut last: half a key would not be recognised


async def unpacked(chunks: AsyncIterator[bytes], packing: str) -> AsyncIterator[bytes]:
    """Yield the bytes of a body with this Content-Encoding. Raises UnusableReply if they are too many or damaged."""
    packing = packing.strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise UnusableReply(f"compressed its reply in a way that it was not asked for ({short(packing)})")
    unpack = None if packing in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    total = 0
    async for chunk in chunks:
        if unpack is not None:
            try:
                chunk = unpack.decompress(chunk, MOST_BYTES)
            except zlib.error as error:
                raise UnusableReply(f"returned a damaged {packing} body ({error})", again=True) from None
            if unpack.unconsumed_tail:
                raise _too_large(MOST_BYTES)
        total += len(chunk)
        if total > MOST_STREAMED:
            raise _too_large(MOST_STREAMED)
        yield chunk


async def json_values(chunks: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    """Yield the JSON of a whole body, or of each event of a stream as it comes, up to `[DONE]`.

    Raises:
        UnusableReply: it is too large, no JSON, or cut off.
    """
    held, event, waiting = bytearray(), list[bytes](), 0
    streamed: bool | None = None
    async for chunk in chunks:
        held += chunk
        if streamed is None and len(start := held.lstrip(b"\xef\xbb\xbf \t\r\n")[:6]) == 6:
            streamed = _FIELD.match(start) is not None
        if streamed and b"\n" in chunk:
            *lines, held = held.split(b"\n")
            for line in lines:
                line = line.strip(b"\xef\xbb\xbf\r")
                if line.startswith(b"data:"):
                    event.append(bytes(line[5:]))
                    waiting += len(line)
                elif not line:
                    for value in _parsed(event):
                        if value is _DONE:
                            return
                        yield value
                    event, waiting = [], 0
        if len(held) + waiting > MOST_BYTES:
            raise _too_large(MOST_BYTES)
    if not streamed:
        yield _json(bytes(held))
        return
    if held.startswith(b"data:"):
        event.append(bytes(held[5:]))
    for value in _parsed(event):
        if value is _DONE:
            return
        yield value
    raise UnusableReply("ended its stream before the reply was complete", again=True)


def _parsed(event: list[bytes]) -> list[Any]:
    """Return the JSON of an event's data: all lines as one, or of each where blank lines between events are missing."""
    if len(event) > 1:
        try:
            return [json.loads(b"\n".join(event))]
        except (ValueError, RecursionError):
            pass
    return [_json(line) for line in event]


def _json(data: bytes) -> Any:
    if data.strip() == _DONE:
        return _DONE
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        begun = data.lstrip()[:1] in (b"{", b"[")
        what = "JSON that is cut off or damaged" if begun else "no JSON" if data.strip() else "nothing"
        shown = short(data[: MIB // 16].decode("utf-8", "replace"))
        raise UnusableReply(f"returned {what}{f': {shown}' if shown else ''}", again=True) from None


def _too_large(limit: int) -> UnusableReply:
    return UnusableReply(f"sent more than {limit // MIB} MiB in one reply, which was not read further")


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
    """Text and log-probability of each token of the content, where the server tells them; tokens that share a character
    are one, as likely as the least likely of them."""

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
        self._logprobs = list[tuple[bytes, float]]()
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
        ended = (self.finish or "").lower()
        if ended in _ABORTED:
            raise UnusableReply(f"gave up its reply ({ended})", again=True)
        self._say("", last=True)
        prompt, written = (_count(dig(self._usage, key)) for key in usage[:2])
        return Completion(
            text="".join(self._text),
            reasoning=_cleaned("".join(self._reasoning)),
            items=tuple(_cleaned_json(item) for item in items),
            finish=self.finish,
            stop=self._stop,
            withheld=_cleaned("".join(self._refusal).strip()) or (ended if ended in _FILTERED else ""),
            prompt_tokens=prompt,
            cached_tokens=min(prompt, _count(dig(self._usage, usage[2], "cached_tokens"))),
            new_tokens=written,
            logprobs=tuple((_cleaned(text), value) for text, value in _whole_characters(self._logprobs)),
        )

    def _read_logprobs(self, tokens: Any) -> None:
        for token in tokens if isinstance(tokens, list) else ():
            text, value = dig(token, "token"), dig(token, "logprob")
            if isinstance(text, str) and isinstance(value, int | float) and value <= 0:  # NaN is none either
                self._logprobs.append((_bytes(dig(token, "bytes"), text), float(value)))


class CompletionReader(ReplyReader):
    """Reads a chat completion."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        super().__init__(on_text)
        self._calls: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}
        self._pieces = False
        """The reply comes in pieces: a whole message at its end repeats them (MiniMax)."""

    def take(self, value: Any) -> None:
        if error := dig(value, "error"):
            raise UnusableReply(f"returned an error: {message_of(value)}", again=dig(error, "code") in [*BUSY])
        choices = dig(value, "choices")
        if not isinstance(choices, list):
            self._other = value
            return
        self._usage = dig(value, "usage") or self._usage
        choice = next((one for one in choices if isinstance(one, dict) and not one.get("index")), {})
        part = choice.get("delta") or (None if self._pieces else choice.get("message"))
        self._pieces = self._pieces or bool(choice.get("delta"))
        if isinstance(part, dict):
            self._began = True
            self._read(part)
        elif not self._began:
            self._other = value
        self._read_logprobs(dig(choice, "logprobs", "content"))
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
        # some write "" or "null" until the end
        self.finish = finish if isinstance(finish, str) and finish not in ("", "null") else self.finish
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


class ResponseReader(ReplyReader):
    """Reads a response."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        super().__init__(on_text)
        self._output: list[Any] = []
        self._streamed: int | None = None
        """Place of the item whose text came last in a stream."""
        self._asides = set[int]()
        """Places of items that are commentary."""

    def take(self, value: Any) -> None:
        kind, self._other = dig(value, "type"), value
        place = given if isinstance(given := dig(value, "output_index"), int) else 0
        if kind == "response.output_item.added" and dig(value, "item", "phase") == "commentary":
            self._asides.add(place)
        if kind == "response.output_text.delta" and place not in self._asides:
            self._say(("\n" if self._streamed not in (None, place) else "") + joined(dig(value, "delta"), ""))
            self._streamed = place
        elif kind == "response.output_item.done":
            self._output.append(dig(value, "item"))
        response = dig(value, "response") or value
        if (error := dig(response, "error")) or kind == "error":
            again = dig(error or value, "code") in [*BUSY, "server_error", "rate_limit_exceeded"]
            raise UnusableReply(f"returned an error: {message_of(response)}", again=again)
        output, status = dig(response, "output"), dig(response, "status")
        if isinstance(output, list) and status not in ("in_progress", "queued"):
            self._began, self._output = True, output or self._output
            self._usage = dig(response, "usage")
            reason = dig(response, "incomplete_details", "reason")
            ended = {"incomplete": "length", "failed": "failed", "cancelled": "cancelled"}.get(str(status), "stop")
            self.finish = reason if isinstance(reason, str) else ended

    def completion(self) -> Completion:
        items: list[dict[str, Any]] = []
        texts, asides = list[str](), list[str]()
        for item in self._output:
            kind, content = dig(item, "type"), dig(item, "content")
            if kind == "message":
                text = joined([part for part in _parts(content) if dig(part, "type") == "output_text"], "text")
                self._refusal.append(joined(content, "refusal", plain=False))
                (asides if item.get("phase") == "commentary" else texts).append(text)
                for part in _parts(content):
                    self._read_logprobs(dig(part, "logprobs"))
                items.append({"type": kind, "text": text, **_kept(item, "phase")})
            elif kind == "reasoning":
                self._reasoning.append(joined(content, "text") or joined(dig(item, "summary"), "text"))
                if dig(item, "encrypted_content") or content:  # else it can only be named, and is kept nowhere
                    kept = _kept(item, "id", "content", "encrypted_content")
                    items.append({"type": kind, "summary": _parts(dig(item, "summary")), **kept})
            elif kind == "function_call":
                id, name, given = (joined(dig(item, key), "") for key in ("call_id", "name", "arguments"))
                items.append({"type": kind, "call_id": id, "name": name, "arguments": given})
        called = any(item["type"] == "function_call" for item in items)
        if self._streamed is None:
            self._say("\n".join(filter(None, texts if any(texts) or called else asides)))
        if any(texts) or called:
            self._reasoning += asides
        return self._completed(
            "response", items if called else [], "input_tokens", "output_tokens", "input_tokens_details"
        )


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kept(item: Any, *keys: str) -> dict[str, Any]:
    """Return the fields of an item that it has."""
    return {key: item[key] for key in keys if item.get(key) is not None}


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


def _bytes(value: Any, text: str) -> bytes:
    """Return the bytes of a token: those told, because the text of half a character is a mark that stands for it."""
    told = isinstance(value, list) and all(isinstance(one, int) and 0 <= one <= 255 for one in value)
    return bytes(value) if told else text.encode("utf-8", "surrogatepass")


def _whole_characters(tokens: Sequence[tuple[bytes, float]]) -> Iterator[tuple[str, float]]:
    """Yield text and log-probability of tokens; those that share a character are one, as likely as the least likely."""
    decoder, text, values = codecs.getincrementaldecoder("utf-8")("replace"), "", list[float]()
    for data, value in tokens:
        text += decoder.decode(data)
        values.append(value)
        if text and not decoder.getstate()[0]:
            yield text, min(values)
            text, values = "", []
    if values:
        yield text + decoder.decode(b"", final=True), min(values)


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
