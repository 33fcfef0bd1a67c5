"""A layer around the application that checks a request before its body is kept: key, size, and time to arrive."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from qzoom_agent.integrations.limits import ServeConfig
from qzoom_agent.integrations.serve.errors import RequestError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
_OPEN: Final = ("/health",)
"""Paths that need no key."""
_DROPPED: Final = 4
"""Bodies of up to so many times the limit are read to their end before they are refused."""


class Guard:
    """An ASGI application that refuses requests of a stranger, too large ones, and those that never end."""

    def __init__(self, app: Application, config: ServeConfig, *, refuse: Callable[[RequestError], Application]) -> None:
        """`refuse` returns the application that answers with an error."""
        self._app, self._config, self._refuse = app, config, refuse
        self._reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            body = await self._body(headers.get(b"content-length", b""), receive)
        except RequestError as error:
            await self._refuse(error)(scope, receive, send)
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message: Message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self._app(scope, replay, send)

    def _check_key(self, path: str, given: bytes) -> None:
        key = self._config.api_key
        if key is None or path in _OPEN:
            return
        scheme, _, sent = given.partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(sent.strip(), key.encode()):
            raise RequestError(
                "The key is missing or wrong. Send it as 'Authorization: Bearer KEY' (api_key of the client).",
                status=401,
                code="invalid_api_key",
            )

    async def _body(self, length: bytes, receive: Receive) -> bytes | None:
        """Return the whole body; None if the client left. Raises RequestError."""
        most, body, size = self._config.max_bytes, bytearray(), int(length) if length.isdigit() else 0
        if self._reading >= self._config.batch + self._config.queue + 16:
            raise RequestError("Too many requests are being sent. Ask again later.", status=429, code="queue_full")
        self._reading += 1
        try:
            async with asyncio.timeout(self._config.read_timeout):
                ended, read = False, 0
                # A little more is read and dropped, because a client that still sends may not see the error.
                while not ended and max(size, read) <= _DROPPED * most:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    read += len(message.get("body", b""))
                    if max(size, read) <= most:
                        body += message.get("body", b"")
                    ended = not message.get("more_body", False)
        except TimeoutError:
            raise RequestError(
                f"The body did not arrive within {self._config.read_timeout:g} s.", status=408, code="timeout"
            ) from None
        finally:
            self._reading -= 1
        if max(size, read) > most:
            raise RequestError(
                f"The body of a request may have at most {most} bytes. Send a smaller image.",
                status=413,
                code="too_large",
            )
        return bytes(body)
