"""A turn of the Responses API, assembled from the JSON that a server sends: one response, or the events of a stream.

As for chat completions nothing is trusted. The text of a stream is that of its pieces; everything else is read from the
response that ends it.
"""

from collections.abc import Callable
from typing import Any

from qzoom_agent.models.chat_reply import BUSY, Completion, ReplyReader, dig, joined, message_of
from qzoom_agent.models.chat_stream import UnusableReply


class ResponseReader(ReplyReader):
    """Reads a response."""

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        super().__init__(on_text)
        self._output: list[Any] = []
        self._streamed = False

    def take(self, value: Any) -> None:
        kind, self._other = dig(value, "type"), value
        if kind == "response.output_text.delta":
            self._streamed = True
            self._say(joined(dig(value, "delta"), ""))
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
            self.finish = reason if isinstance(reason, str) else "length" if status == "incomplete" else "stop"

    def completion(self) -> Completion:
        items: list[dict[str, Any]] = []
        for item in self._output:
            kind, content = dig(item, "type"), dig(item, "content")
            if kind == "message":
                text = joined([part for part in _parts(content) if dig(part, "type") == "output_text"], "text")
                self._refusal.append(joined(content, "refusal", plain=False))
                if not self._streamed:
                    self._say(text)
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
        return self._completed(
            "response", items if called else [], "input_tokens", "output_tokens", "input_tokens_details"
        )


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kept(item: Any, *keys: str) -> dict[str, Any]:
    """Return the fields of an item that it has."""
    return {key: item[key] for key in keys if item.get(key) is not None}
