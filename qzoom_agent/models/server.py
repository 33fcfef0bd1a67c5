"""A backend for a model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API).

The zoom protocol stays text, because chat completions allow no image in a tool's result: the schema is in the prompt
and calls are parsed here. Role "tool" is sent as "user", consecutive turns of one role as one turn, and images as PNG
in data URIs. A stop string that the server cuts off is put back, as the protocols' parsers expect it.

The server gives no hidden states, so policies that look need a local model. A conversation is sent whole each time and
its prefix, which never changes, is left to the server's cache; vLLM also gets a `uuid` of each image, made of its
pixels, and need not hash it again. Any number of threads may ask; at most `concurrency` requests run at once.
"""

import base64
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import tokens
from qzoom_agent.messages import Message, Part, view_ids
from qzoom_agent.models.chat_client import ChatClient
from qzoom_agent.models.chat_reply import Completion
from qzoom_agent.models.interface import ImageSource, OnText, Reply, SamplingParams
from qzoom_agent.protocols.boxes import box_key

_PAUSE: Final = 0.5
"""Seconds before the first retry."""


class ServerBackend:
    """A model that answers over HTTP.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: the server's name for the model.
        protocol: format of zoom calls.
        defaults: visual tokens of its views.
        settings: recommended values of other keys of the configuration, see `Preset.settings`.
        more: of `ChatClient`: key_variable, api_key, headers, extra_body, timeout, concurrency, attempts.

    Raises:
        ConfigError: `url` is no address of a server, or another argument is wrong.
    """

    perceives = False

    def __init__(
        self,
        url: str,
        *,
        model: str,
        protocol: str,
        defaults: ViewBudget,
        settings: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.name, self.protocol, self.defaults = model, protocol, defaults
        self.settings = dict(settings or {})
        self.client = ChatClient(url, model=model, pause=_PAUSE, **more)
        self.workers = self.client.concurrency

    def session(self, image: ImageSource) -> "_ServerSession":
        return _ServerSession(self, image)


class _ServerSession:
    """One conversation, sent whole with each request."""

    def __init__(self, backend: ServerBackend, image: ImageSource) -> None:
        self._backend, self._image = backend, image
        self._encoded: dict[str, dict[str, Any]] = {}

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        began = time.perf_counter()
        fresh = [view for view in dict.fromkeys(view_ids(messages)) if view not in self._encoded]
        found = self._backend.client.complete(
            self._turns(messages),
            max_tokens=settings.max_new_tokens,
            on_text=on_text,
            temperature=settings.temperature,
            top_p=settings.top_p,
            **settings.model_dump(include={"top_k", "presence_penalty"}, exclude_none=True),
            seed=settings.seed,
            stop=list(settings.stop) or None,
        )
        if found.withheld:
            raise BackendError(
                f"The server of '{self._backend.name}' withheld the answer: {found.withheld}. Ask in other words, or "
                "ask another model."
            )
        text = _closed(found.text + _calls(found, self._backend.protocol), settings.stop, found.stop, cut=found.cut)
        if on_text is not None and len(text) > len(found.text):
            on_text(text[len(found.text) :])
        factor = self._backend.defaults.factor
        return Reply(
            text=text,
            finish="length" if found.cut else "stop",
            prompt_tokens=found.prompt_tokens,
            cached_tokens=found.cached_tokens,
            new_tokens=found.new_tokens,
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
            if not parts:
                continue  # an empty reply, which servers refuse to be shown
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
            if self._backend.client.owner == "vllm":  # other servers may refuse a field that they do not know
                self._encoded[view]["uuid"] = hashlib.sha256(png.getvalue()).hexdigest()[:32]
        return self._encoded[view]


def _calls(found: Completion, protocol: str) -> str:
    """Return what a server took out of the text: its tool calls or, where nothing else is left, the thought."""
    written = "".join(f"\n{_call(name, given, protocol)}" for name, given in found.calls)
    if written or found.text.strip() or not found.reasoning:
        return written if found.text else written.lstrip("\n")
    return f"<think>{found.reasoning}{'' if found.cut else '</think>'}"


def _call(name: str, given: str, protocol: str) -> str:
    """Return a tool call as the protocol's model would have written it. Arguments that are no JSON are kept."""
    try:
        arguments = json.loads(given)
    except (ValueError, RecursionError):
        arguments = given
    if protocol == "mini_o3":
        return f"<grounding>{json.dumps(arguments)}</grounding>"
    if protocol == "plain" and isinstance(arguments, dict) and (key := box_key(arguments)):
        return f"ZOOM: {key} {arguments[key]}"
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _closed(text: str, stop: Sequence[str], reason: str | None, *, cut: bool) -> str:
    """Put back the stop string that ended the text: the one the server names (vLLM), or the end of an open tag."""
    if cut or text.endswith(tuple(stop)):
        return text
    if reason is not None and reason in stop:
        return text + reason
    for mark in stop:
        opening = mark.replace("</", "<", 1)
        if mark.startswith("</") and text.rfind(opening) > text.rfind(mark):
            return text + mark
    return text
