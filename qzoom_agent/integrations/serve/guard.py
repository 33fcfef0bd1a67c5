"""Checks of a request before its body is kept: key, page that sends it, size, and time to arrive."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.authentication import AuthenticationBackend, AuthenticationError
from starlette.requests import HTTPConnection
from starlette.responses import Response

from qzoom_agent.integrations.limits import LOCAL, ServeConfig
from qzoom_agent.integrations.serve.errors import RequestError

_DROPPED: Final = 4
"""Bodies of up to so many times the limit are read to their end before they are refused."""


class KeyCheck(AuthenticationBackend):  # type: ignore[misc,unused-ignore]
    """The check of the key that clients have to send."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def authenticate(self, conn: HTTPConnection) -> None:
        """Raise AuthenticationError for a stranger, whom only /health answers."""
        scheme, _, sent = conn.headers.get("authorization", "").partition(" ")
        right = secrets.compare_digest(sent.strip().encode("latin-1"), self._key.encode())
        if conn.scope["path"] != "/health" and not (scheme.lower() == "bearer" and right):
            raise AuthenticationError


def require_no_page(request: Request) -> None:
    """Raise RequestError for a request of a web page from elsewhere, where no key keeps it out.

    The browser of whoever runs the server reaches it, and a page can make its own name that of this machine (DNS
    rebinding): the browser then takes the server for the page's own.
    """
    config: ServeConfig = request.app.state.config
    try:
        origin = urlsplit(request.headers.get("origin", ""))
        foreign = origin.scheme in ("http", "https") and origin.hostname not in LOCAL
    except ValueError:
        foreign = True
    if foreign and config.api_key is None:
        raise RequestError(
            "A web page from elsewhere sent this request (header Origin), and the server has no key that tells friend "
            "from stranger. Start it with --api-key KEY, and let the page send the key.",
            status=403,
            code="foreign_page",
        )


class _LimitedRequest(Request):  # type: ignore[misc,unused-ignore]
    """A request whose body may be neither too large nor too slow."""

    _read: bytes | None = None

    async def body(self) -> bytes:
        """Return the whole body. Raises RequestError."""
        if self._read is not None:
            return self._read
        config: ServeConfig = self.app.state.config
        length = self.headers.get("content-length", "")
        most, body, size = config.max_bytes, bytearray(), int(length) if length.isdecimal() else 0
        readers: asyncio.Semaphore = self.app.state.readers
        if readers.locked():
            raise RequestError("Too many requests are being sent. Ask again later.", status=429, code="queue_full")
        try:
            async with readers, asyncio.timeout(config.read_timeout):
                read = 0
                # A little more is read and dropped, because a client that still sends may not see the error.
                async for chunk in self.stream():
                    read += len(chunk)
                    if max(size, read) > _DROPPED * most:
                        break
                    if max(size, read) <= most:
                        body += chunk
        except TimeoutError:
            raise RequestError(
                f"The body did not arrive within {config.read_timeout:g} s.", status=408, code="timeout"
            ) from None
        if max(size, read) > most:
            raise RequestError(
                f"The body of a request may have at most {most} bytes. Send a smaller image.",
                status=413,
                code="too_large",
            )
        self._read = bytes(body)
        return self._read


class LimitedRoute(APIRoute):  # type: ignore[misc,unused-ignore]
    """A path whose requests are read within the limits of `app.state.config`, by `app.state.readers` at once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle: Any = super().get_route_handler()

        async def limited(request: Request) -> Response:
            require_no_page(request)
            response: Response = await handle(_LimitedRequest(request.scope, request.receive))
            return response

        return limited
