"""A backend for a model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API).

The zoom protocol stays text: the model is asked in its own format, with the schema in the prompt, and we read its calls
ourselves, because chat completions know no image in a tool's answer. So role "tool" is sent as "user", turns of one
role that follow each other are sent as one (templates refuse them otherwise), and images go as PNG in data URIs.
A server cuts the stop string off what it returns; it is put back, as the protocols' parsers expect.

Hidden states stay on the server: no branches, so policies that look need a local model. A conversation is sent whole
each time; that its prefix is computed once is left to the server's prefix cache (`Reply.cached_tokens` says what it
reports). Any number of threads may ask; at most `concurrency` requests are under way.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from threading import BoundedSemaphore
from typing import Any, Final
from urllib.parse import urlsplit

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.geometry import tokens
from qzoom_agent.messages import Message, Part, view_ids
from qzoom_agent.models.interface import ImageSource, Reply, SamplingParams
from qzoom_agent.models.posting import NoReply, post

_PAUSE: Final = 0.5
"""Seconds before the first repetition; doubled each time."""


class ServerBackend:
    """A model that answers over HTTP.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: what the server calls the model.
        protocol: how the model writes a zoom call.
        defaults: visual tokens of its views.
        key_variable: environment variable with the key; servers of your own need none.
        timeout: seconds to wait for one reply.
        concurrency: requests under way at once.
        attempts: how often a request is sent before its failure counts.

    Raises ConfigError for a `url` that is none.
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
        """The server's answer to a request. Raises BackendError when there is none."""
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
    """The address of a server, without a slash at its end. ConfigError if it is none."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"{url!r} is no address of a server. Give it as http://localhost:8000/v1.")
    return url.rstrip("/")


class _ServerSession:
    """One conversation. The server holds nothing that we rely on."""

    def __init__(self, backend: ServerBackend, image: ImageSource) -> None:
        self._backend, self._image = backend, image
        self._encoded: dict[str, dict[str, Any]] = {}

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        began = time.perf_counter()
        fresh = [view for view in dict.fromkeys(view_ids(messages)) if view not in self._encoded]
        body = {
            "model": self._backend.name,
            "messages": self._turns(messages),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            **({"stop": list(stop)} if stop else {}),
        }
        found = self._backend.post(body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"].get("content") or ""
            finish = choice.get("finish_reason")
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (LookupError, TypeError, AttributeError):
            raise BackendError(
                f"The server of '{self._backend.name}' answered with something that is no chat completion: "
                f"{json.dumps(found)[:200]}"
            ) from None
        text = _closed(str(text), stop, choice.get("stop_reason"), cut=finish == "length")
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
    """The text with the stop string that ended it: what the server names (vLLM), or the close of a tag left open."""
    if cut or text.endswith(tuple(stop)):
        return text
    if isinstance(reason, str) and reason in stop:
        return text + reason
    for mark in stop:
        opening = mark.replace("</", "<", 1)
        if mark.startswith("</") and text.rfind(opening) > text.rfind(mark):
            return text + mark
    return text
