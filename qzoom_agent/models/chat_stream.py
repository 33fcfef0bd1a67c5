"""The JSON values in the body of a server's reply, whole or as server-sent events, within limits of bytes.

The bytes decide which of the two it is, because servers name the type wrong. Compressed bodies are unpacked only as far
as the limits go.
"""

import json
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any, Final

from qzoom_agent.errors import redact

MIB: Final = 2**20
MOST_BYTES: Final = 8 * MIB
"""Bytes of a whole reply, or of one event of a stream."""
MOST_STREAMED: Final = 64 * MIB
"""Bytes of all events of a stream."""
_SHOWN: Final = 300
"""Characters of a server's text in an error."""
_FIELD: Final = re.compile(rb"data:|event:|id:|retry:|:")
_DONE: Final = b"[DONE]"


class UnusableReply(Exception):
    """A reply of a server that is cut off, an error, or of another form; the text goes on after "The server"."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again
        """The same request may succeed."""


def short(text: str) -> str:
    """Return the beginning of a server's text, on one line and without secrets."""
    return redact(" ".join(text.split()))[:_SHOWN]  # cut last: half a key would not be recognised


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
