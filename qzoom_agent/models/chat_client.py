"""Requests to an OpenAI-compatible server: Chat Completions or Responses, whole or streamed.

A request has one deadline, retries and waits included, and a limit of bytes. Redirects are refused, since they would
take the key to another host. Busy servers and broken connections are asked again, after the pause that the server asks
for. Every failure is a `BackendError` of its own words, without the key.

Requests run in one event loop in a thread of its own, because only there a deadline also ends a look-up of a host name,
a handshake or a header that comes byte by byte. Callers may be threads or have a loop themselves.
"""

import asyncio
import json
import logging
import math
import os
import re
import ssl
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from hashlib import sha256
from socket import gaierror
from threading import BoundedSemaphore, Thread
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

import anyio
import httpx

from qzoom_agent.errors import BackendError, ConfigError, hide_secret, redact
from qzoom_agent.models.chat_messages import Api
from qzoom_agent.models.chat_reply import (
    BUSY,
    Completion,
    CompletionReader,
    ReplyReader,
    ResponseReader,
    UnusableReply,
    dig,
    json_values,
    message_of,
    short,
    unpacked,
)
from qzoom_agent.models.connection import Connection
from qzoom_agent.models.interface import TOO_LONG

logger = logging.getLogger(__name__)

_MOST_OF_AN_ERROR: Final = 2**16
_GRACE: Final = 1.0
"""Seconds for the rest of a stream after its last word (the usage), and for the body of an error."""
_LONGEST_PAUSE: Final = 60.0
_LISTING: Final = 3.0
"""Seconds for a server's list of models."""
_TOLD: Final = ("root", "parent", "meta")
"""Fields of that list that tell weights from others of the same name: folder and base of vLLM, sizes of llama.cpp."""
_SECRET_NAME: Final = re.compile(r"key|token|secret|passw|\bsig|auth|cookie", re.IGNORECASE)
_PATHS: Final[dict[Api, str]] = {"chat": "/chat/completions", "responses": "/responses"}
API_NAMES: Final[dict[Api, str]] = {"chat": "Chat Completions", "responses": "Responses"}
_OPTIONAL: Final = ("seed", "stop", "top_k", "presence_penalty", "top_p", "temperature", "stream_options", "store")
"""Fields without which a request is still the same question; the first that a server refuses is left out first."""
_REFUSAL: Final = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|not permitted|not allowed|forbidden|deprecated|cannot both",
    re.IGNORECASE,
)
_OVERLONG: Final = re.compile(
    r"context.?(length|window|size)|maximum (model|prompt|input) length|(prompt|input) is too long"
    r"|input token count.*exceeds|longer than the model",
    re.IGNORECASE,
)
"""Words of servers about a conversation that is too long: vLLM, SGLang, llama.cpp, OpenAI, Anthropic and Google."""


class _Failed(Exception):
    """A request without a usable reply."""

    def __init__(
        self, reason: str, *, again: bool = False, wait: float | None = None, status: int = 0, said: str = ""
    ) -> None:
        super().__init__(reason)
        self.again, self.wait, self.status, self.said = again, wait, status, said
        """Permission to repeat it, the seconds that the server asks to wait, its status and its words."""


class ChatClient:
    """A model behind an OpenAI-compatible server. Any number of threads may ask."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        pause: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
        **options: Any,
    ) -> None:
        """
        Args:
            url: base URL, such as http://localhost:8000/v1. A user and password in it are sent as basic authentication.
            pause: seconds before the first retry, doubled each time; a server may ask for another.
            sleep: waits between attempts, for tests.
            options: of `Connection`.

        Raises:
            ConfigError: the address is none, or another argument is wrong.
        """
        parts = urlsplit(base_url(url))
        user, _, place = parts.netloc.rpartition("@")
        self.options = given = Connection(**options)
        self.api: Api = given.api or "chat"
        path = parts.path.rstrip("/")
        for end in _PATHS.values():
            path = path.removesuffix(end)
        self.address = urlunsplit((parts.scheme, place, path + _PATHS[self.api], "", ""))
        """Address of the requests, without secrets."""
        self._url = urlunsplit((parts.scheme, place, path + _PATHS[self.api], parts.query, ""))
        self._models = urlunsplit((parts.scheme, place, path + "/models", parts.query, ""))
        self._hint = "" if path.endswith("/v1") else f" Many servers answer below /v1: try {parts.scheme}://{place}/v1."
        for name, value in parse_qsl(parts.query):
            if _SECRET_NAME.search(name):
                hide_secret(value)
        self._model, self._pause, self._sleep = model, pause, sleep
        self._key_variable = given.key_variable or "OPENAI_API_KEY"
        self._extra = given.extra_body or {}
        self._headers = _headers(user, given.headers or {})
        self._own_key = None if given.api_key is None else _key(given.api_key, "api_key")
        self._limit = "max_tokens" if self.api == "chat" else "max_output_tokens"
        self._refused_fields = set[str]()
        self._free = BoundedSemaphore(given.concurrency)
        asyncio.run_coroutine_threadsafe(_warm(), _loop()).result()

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        on_text: Callable[[str], None] | None = None,
        attempts: int | None = None,
        **fields: Any,
    ) -> Completion:
        """Return the next turn of a conversation.

        Args:
            messages: the conversation in the form of the API.
            on_text: called with each piece of content as it comes, from another thread; the reply is then streamed.
            attempts: times that the request is sent, if not as often as usual.

        Raises:
            BackendError: there is no usable reply.
            ConfigError: the key cannot be sent.
        """
        if on_text is not None:
            fields |= {"stream": True} | ({"stream_options": {"include_usage": True}} if self.api == "chat" else {})
        given = {"messages" if self.api == "chat" else "input": messages, self._limit: max_tokens}
        body = {"model": self._model, **given, **fields, **self._extra}
        left, tried = attempts or self.options.attempts, 1
        with self._free:
            ends = time.monotonic() + self.options.timeout
            while True:
                for field in self._refused_fields - self._extra.keys():
                    body.pop(field, None)
                reader = (CompletionReader if self.api == "chat" else ResponseReader)(on_text)
                try:
                    return self._ask({key: value for key, value in body.items() if value is not None}, reader, ends)
                except _Failed as failed:
                    if self._adapted(body, failed):
                        continue
                    wait = min(self._pause * 2 ** (tried - 1) if failed.wait is None else failed.wait, _LONGEST_PAUSE)
                    final = tried >= left or reader.spoke or not failed.again
                    if final or time.monotonic() + wait >= ends:
                        asked = f" It was asked {tried} times." if tried > 1 else ""
                        raise BackendError(f"{failed}{asked}") from None
                self._sleep(wait)
                tried += 1

    def _adapted(self, body: dict[str, Any], failed: _Failed) -> bool:
        """Change a request that was refused for one of our fields, this and all later ones; False if it was not."""
        if failed.status not in (400, 422):
            return False
        if "max_completion_tokens" in failed.said and "max_tokens" in body and self._limit != "max_output_tokens":
            self._limit = "max_completion_tokens"
            body[self._limit] = body.pop("max_tokens")
            return True
        named = (name for name in _OPTIONAL if body.get(name) is not None and re.search(rf"\b{name}\b", failed.said))
        field = next(named, None) if _REFUSAL.search(failed.said) else None
        if field is None or field in self._extra:
            return False
        if field not in self._refused_fields:
            logger.warning(
                "The server at %s does not take %s=%s with '%s' (%s). It is left out from now on.",
                *(self.address, field, body[field], self._model, failed.said),
            )
        self._refused_fields.add(field)
        return True

    @cached_property
    def listed(self) -> dict[str, Any]:
        """The model as the server's list of models has it; empty if it is not told within 3 s."""
        coming = asyncio.run_coroutine_threadsafe(self._listed(), _loop())
        try:
            return coming.result(min(self.options.timeout, _LISTING))
        except (TimeoutError, UnusableReply, httpx.HTTPError, OSError):
            return {}
        finally:
            coming.cancel()

    @property
    def owner(self) -> str:
        """Owner of the model in the server's list of models, such as "vllm"; empty where that is not told."""
        return str(self.listed.get("owned_by") or "")

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of what the server tells of the model and keeps at a restart; None where that is only its name."""
        told = {key: self.listed[key] for key in _TOLD if self.listed.get(key)}
        return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16] if told else None

    async def _listed(self) -> dict[str, Any]:
        async with _session() as client, client.stream("GET", self._models, headers=self._sent()) as response:
            async for value in json_values(_body(response)):
                models = dig(value, "data")
                for one in models if isinstance(models, list) else ():
                    if dig(one, "id") == self._model:
                        return dict(one)
        return {}

    def _ask(self, body: dict[str, Any], reader: ReplyReader, ends: float) -> Completion:
        """Send one request and wait for its reply until `ends`."""
        coming = asyncio.run_coroutine_threadsafe(self._send(json.dumps(body).encode(), reader), _loop())
        try:
            coming.result(max(0.0, ends - time.monotonic()))
            return reader.completion()
        except TimeoutError:
            raise _Failed(
                f"The server at {self.address} gave no complete reply within {self.options.timeout:g} s. Raise timeout "
                "(--server-timeout), or ask it for less at once."
            ) from None
        except UnusableReply as error:
            hint = self._hint if "no JSON" in str(error) else ""
            raise _Failed(f"The server at {self.address} {error}.{hint}", again=error.again) from None
        except (httpx.HTTPError, OSError) as error:
            raise _Failed(self._broken(error), again=True) from None
        finally:
            coming.cancel()

    def _sent(self) -> httpx.Headers:
        """Return the headers of a request. Raises ConfigError if the key cannot be sent."""
        key = self._own_key or _key(os.environ.get(self._key_variable, ""), self._key_variable)
        sent = httpx.Headers({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        sent["User-Agent"] = "qzoom-agent"
        if key:
            sent["Authorization"] = f"Bearer {key}"
        sent.update(self._headers)
        return sent

    async def _send(self, body: bytes, reader: ReplyReader) -> None:
        sent = self._sent()
        # the deadline is the caller's; no cookies or connections are kept
        async with (
            _session() as client,
            client.stream("POST", self._url, content=body, headers=sent) as response,
        ):
            if not response.is_success:
                raise await self._refused(response, key="Authorization" in sent)
            try:
                async with asyncio.timeout(None) as rest:
                    async for value in json_values(_body(response)):
                        reader.take(value)
                        if reader.finish is not None and rest.when() is None:
                            rest.reschedule(asyncio.get_running_loop().time() + _GRACE)
            except (TimeoutError, _Failed, UnusableReply, httpx.HTTPError):
                if reader.finish is None:
                    raise

    async def _refused(self, response: httpx.Response, *, key: bool) -> _Failed:
        """Return the error of a reply whose status is none of success."""
        status, said = response.status_code, await _beginning(response)
        try:
            text = message_of(json.loads(said))
        except (ValueError, RecursionError):
            text = short(said.decode("utf-8", "replace"))
        wait = _retry_after(response.headers.get("Retry-After", "")) if status in BUSY else None
        asked = "" if wait is None else f"; it asks to wait {wait:.0f} s"
        where, told = f"The server at {self.address}", f" ({status}{f': {text}' if text else ''}{asked})"
        if 300 <= status < 400:
            to = short(response.headers.get("Location", "another address"))
            reason = f"{where} redirects to {to}{told}. That is not followed, because the key would go there: give the "
            return _Failed(f"{reason}final address.", status=status)
        if status in (401, 403):
            what = "does not accept the key" if key else "wants a key"
            advice = f"Put a valid key into {self._key_variable}."
            if self._own_key or "Authorization" in self._headers:
                advice = "Check api_key, the headers, or the user and password in the address."
            return _Failed(f"{where} {what}{told}. {advice}", status=status)
        if status in (404, 405):
            reason = f"{where} has no {API_NAMES[self.api]} there, or no model '{self._model}'{told}."
            other = " Many servers have Chat Completions alone: --api chat." if self.api == "responses" else ""
            return _Failed(f"{reason} Check the address and the model's name.{self._hint}{other}", status=status)
        if status == 429:
            spent = "insufficient_quota" in said.decode("utf-8", "replace")
            reason = f"{where} takes no more requests now, or a quota is spent{told}. Wait, or ask fewer at once"
            return _Failed(f"{reason} (concurrency, --workers).", again=not spent, wait=wait, status=status)
        if status in BUSY:
            return _Failed(f"{where} failed{told}. See its log, or try later.", again=True, wait=wait, status=status)
        if _OVERLONG.search(text):
            return _Failed(
                f"{where} did not accept the request{told}. The conversation is longer than {TOO_LONG}, or the server "
                "was started with. Ask a shorter question, or lower budget.coarse_tokens, budget.crop_max_tokens, "
                "budget.max_turns or generation.max_new_tokens.",
                status=status,
                said=text,
            )
        return _Failed(
            f"{where} did not accept the request{told}. Check that '{self._model}' takes images and a conversation of "
            "this length; extra_body (--extra-body) changes a field, or leaves it out (null).",
            status=status,
            said=text,
        )

    def _broken(self, error: Exception) -> str:
        """Return the reason of a connection that was not made, or broke."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, gaierror | ssl.SSLError | ConnectionError):
            cause = (
                cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
            )
        cause = cause or error
        where, told = f"The server at {self.address}", short(str(cause) or type(cause).__name__)
        if isinstance(cause, gaierror):
            return f"{where} cannot be found: {told}. Check the name of the host."
        if isinstance(cause, ssl.SSLError):
            return f"{where} cannot be reached over TLS: {told}. Check its certificate; without TLS write http://."
        if isinstance(error, httpx.ConnectError):
            return f"{where} cannot be reached: {told}. Check that it runs, and its address."
        return f"{where} closed the connection before its reply was complete: {told}. See its log."


def base_url(url: str) -> str:
    """Return the address of a server without a slash at its end. Raises ConfigError if it is none."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and bool(httpx.URL(url))
    except (ValueError, httpx.InvalidURL):
        known = False
    if not known:
        raise ConfigError(f"{url!r} is no address of a server. Give one such as http://localhost:8000/v1.")
    return url.rstrip("/")


def _body(response: httpx.Response) -> AsyncIterator[bytes]:
    return unpacked(response.aiter_raw(), response.headers.get("Content-Encoding", ""))


async def _beginning(response: httpx.Response) -> bytearray:
    """Return as much of the body of an error as comes soon, and tells what is wrong."""
    said = bytearray()
    with suppress(TimeoutError, UnusableReply, httpx.HTTPError):
        async with asyncio.timeout(_GRACE):
            async for chunk in _body(response):
                said += chunk
                if len(said) > _MOST_OF_AN_ERROR:
                    break
    return said


def _key(value: str, name: str) -> str:
    """Return a key that a header can hold; the key itself is in no message."""
    value = value.strip()
    hide_secret(value)
    if not (value.isascii() and value.isprintable()):
        for part in value.split():
            hide_secret(part)
        raise ConfigError(f"The key in {name} holds a line break or another character that no key has. Set it anew.")
    return value


def _headers(user: str, given: Mapping[str, str]) -> httpx.Headers:
    """Return the headers of every request: those given, and user and password of the address."""
    found = httpx.Headers()
    if user:
        name, _, password = unquote(user).partition(":")
        basic = b64encode(f"{name}:{password}".encode()).decode()
        for secret in (password, quote(password, safe=""), user.partition(":")[2], basic):
            hide_secret(secret)
        found["Authorization"] = f"Basic {basic}"
    for name, value in given.items():
        if not (isinstance(value, str) and f"{name}{value}".isascii() and f"{name}{value}".isprintable()):
            raise ConfigError(f"The header {name!r} has a value that cannot be sent. Give ASCII text on one line.")
        if _SECRET_NAME.search(name):
            hide_secret(value)
            hide_secret(value.rpartition(" ")[2])
        found[name] = value
    return found


def _retry_after(value: str) -> float | None:
    """Return the seconds that a server asks to wait, given as a number or a date; None if it does not."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all requests, in a thread of its own."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="qzoom-requests", daemon=True).start()
    return loop


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _session() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=None, follow_redirects=False, verify=_certificates())


async def _warm() -> None:
    """Import and read what the first request needs, so that it does not count against its deadline."""
    async with _session():
        await anyio.sleep(0)


def _redacted(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


os.register_at_fork(after_in_child=_loop.cache_clear)  # a thread does not survive a fork
for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_redacted)  # they log addresses, and at level DEBUG what a server says
