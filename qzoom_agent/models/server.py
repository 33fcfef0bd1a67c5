"""A backend for a model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API).

The zoom protocol stays text, because chat completions allow no image in a tool's result: the schema is in the prompt
and calls are parsed here. Role "tool" is sent as "user", consecutive turns of one role as one turn, and images as PNG
in data URIs. A stop string that the server cuts off is put back, as the protocols' parsers expect it.

The server gives no hidden states, so policies that look need a local model. A conversation is sent whole each time and
its prefix is left to the server's cache. Any number of threads may ask; at most `concurrency` requests run at once.
"""

import base64
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from threading import BoundedSemaphore
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.geometry import tokens
from qzoom_agent.messages import Message, Part, view_ids
from qzoom_agent.models.interface import ImageSource, OnText, Reply, SamplingParams

_PAUSE: Final = 0.5
"""Seconds before the first retry; doubled each time."""


class ServerBackend:
    """A model that answers over HTTP.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: the server's name for the model.
        protocol: format of zoom calls.
        defaults: visual tokens of its views.
        key_variable: environment variable with the key; your own server needs none.
        timeout: seconds to wait for one reply.
        concurrency: most requests at once.
        attempts: times that a request is sent before it fails.

    Raises:
        ConfigError: `url` is no address of a server.
    """

    perceives = False

    def __init__(
        self,
        url: str,
        *,
        model: str,
        protocol: str,
        defaults: ViewBudget,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 600.0,
        concurrency: int = 8,
        attempts: int = 3,
    ) -> None:
        self.name, self.protocol, self.defaults = model, protocol, defaults
        self._url = f"{base_url(url)}/chat/completions"
        self._key_variable, self._timeout, self._attempts = key_variable, timeout, attempts
        self._free = BoundedSemaphore(concurrency)

    def session(self, image: ImageSource) -> "_ServerSession":
        return _ServerSession(self, image)

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's answer to a request. Raises BackendError if there is none."""
        try:
            with self._free:
                found: dict[str, Any] = post(
                    self._url,
                    body,
                    key_variable=self._key_variable,
                    timeout=self._timeout,
                    attempts=self._attempts,
                    first_pause=_PAUSE,
                )
            return found
        except NoReply as error:
            raise BackendError(
                f"The server at {self._url} gave no reply: {error}. Check that it runs, its address, and that it "
                f"serves '{self.name}' with images."
            ) from None


def base_url(url: str) -> str:
    """Return the address of a server without a slash at its end. Raises ConfigError if it is none."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"{url!r} is no address of a server. Give one such as http://localhost:8000/v1.")
    return url.rstrip("/")


class _ServerSession:
    """One conversation, sent whole with each request."""

    def __init__(self, backend: ServerBackend, image: ImageSource) -> None:
        self._backend, self._image = backend, image
        self._encoded: dict[str, dict[str, Any]] = {}

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        began = time.perf_counter()
        fresh = [view for view in dict.fromkeys(view_ids(messages)) if view not in self._encoded]
        body = {
            "model": self._backend.name,
            "messages": self._turns(messages),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            **({"stop": list(settings.stop)} if settings.stop else {}),
        }
        found = self._backend.post(body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"].get("content") or ""
            finish = choice.get("finish_reason")
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (LookupError, TypeError, AttributeError):
            raise BackendError(
                f"The server of '{self._backend.name}' returned something that is no chat completion: "
                f"{json.dumps(found)[:200]}"
            ) from None
        text = _closed(str(text), settings.stop, choice.get("stop_reason"), cut=finish == "length")
        if on_text is not None and text:
            on_text(text)
        factor = self._backend.defaults.factor
        return Reply(
            text=text,
            finish="length" if finish == "length" else "stop",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            cached_tokens=int(cached or 0),
            new_tokens=int(usage.get("completion_tokens") or 0),
            visual_tokens=sum(tokens(self._image(view).size, factor) for view in fresh),
            seconds=time.perf_counter() - began,
        )

    def close(self) -> None:
        self._encoded.clear()

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for message in messages:
            role = "user" if message["role"] == "tool" else message["role"]
            parts = [self._part(part) for part in message["content"]]
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += parts
            else:
                turns.append({"role": role, "content": parts})
        return turns

    def _part(self, part: Part) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        view = part["view"]
        if view not in self._encoded:
            png = io.BytesIO()
            self._image(view).save(png, format="PNG", compress_level=1)
            data = base64.b64encode(png.getvalue()).decode("ascii")
            self._encoded[view] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        return self._encoded[view]


def _closed(text: str, stop: Sequence[str], reason: Any, *, cut: bool) -> str:
    """Put back the stop string that ended the text: the one the server names (vLLM), or the end of an open tag."""
    if cut or text.endswith(tuple(stop)):
        return text
    if isinstance(reason, str) and reason in stop:
        return text + reason
    for mark in stop:
        opening = mark.replace("</", "<", 1)
        if mark.startswith("</") and text.rfind(opening) > text.rfind(mark):
            return text + mark
    return text


_BUSY: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""


class NoReply(Exception):
    """Error of a request that got no JSON in reply; callers add what to do about it."""


def post(
    url: str,
    body: dict[str, Any],
    *,
    key_variable: str,
    timeout: float,
    attempts: int,
    first_pause: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Send a JSON request and return the JSON answer; retry while that may help.

    Args:
        url: address.
        body: of the request.
        key_variable: environment variable with the key; if it is not set, no key is sent.
        timeout: seconds to wait for one reply.
        attempts: times that the request is sent.
        first_pause: seconds before the first retry; doubled each time.
        sleep: waits, for tests.

    Raises:
        NoReply: every attempt failed, or one with an error that will not pass.
    """
    key = os.environ.get(key_variable, "").strip()  # a line break would be refused with an error that shows the key
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = Request(url, json.dumps(body).encode(), headers)
    for attempt in range(attempts):
        if attempt:
            sleep(first_pause * 2 ** (attempt - 1))
        try:
            with urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except HTTPError as error:
            reason = f"{error} {_said(error)}".strip()
            if error.code not in _BUSY:
                break
        except (OSError, HTTPException, ValueError) as error:
            reason = str(error)
    raise NoReply(reason)


def _said(error: HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return ""
