"""A backend for a model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API).

Zoom calls are text, with the schema in the prompt, or native: the server gets the schema and returns calls, which are
written into the turn's text for the protocol's parser, and kept as items that are sent again as they came. Images are
PNG in data URIs. A stop string that the server cuts off is put back, as the protocols' parsers expect it.

Of several servers of one model (`ServerPool`), each has a share of the conversations. A turn that one fails goes to
another, which a conversation loses nothing by, and a server that failed where another did not is asked last for half a
minute.

The server gives no hidden states, so policies that look need a local model. A conversation is sent whole each time and
its prefix, which never changes, is left to the server's cache; vLLM also gets a `uuid` of each image, made of its
pixels, and need not hash it again. Any number of threads may ask; at most `concurrency` requests run at once.
"""

import base64
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Final

from qzoom_agent.config import ViewBudget
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import tokens
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.chat_client import API_NAMES, ChatClient
from qzoom_agent.models.chat_messages import chat_messages, response_items, schemas
from qzoom_agent.models.chat_reply import Completion
from qzoom_agent.models.interface import ImageSource, OnText, Reply, SamplingParams, Session
from qzoom_agent.protocols.boxes import box_key
from qzoom_agent.protocols.parsing import own_turn
from qzoom_agent.zoom.image_zoom import png

logger = logging.getLogger(__name__)

_PAUSE: Final = 0.5
"""Seconds before the first retry."""
_WHOLE_PROMPT: Final = ("vllm", "sglang")
"""Owners whose servers count a prompt with what they had cached of it, and images by their visual tokens."""
_REST: Final = 30.0
"""Seconds for which a server that failed is asked last."""


class ServerBackend:
    """A model that answers over HTTP.

    Args:
        url: base URL, such as http://localhost:8000/v1.
        model: the server's name for the model.
        protocol: format of zoom calls.
        defaults: visual tokens of its views.
        settings: recommended values of other keys of the configuration, see `Preset.settings`.
        options: of `Connection`.

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
        **options: Any,
    ) -> None:
        self.name, self.protocol, self.defaults = model, protocol, defaults
        self.settings = dict(settings or {})
        self.client = ChatClient(url, model=model, pause=_PAUSE, **options)
        self.api = self.client.api
        self.placement = f"{API_NAMES[self.api]} of a server"
        """Place where the model runs, for the record."""
        self.workers = self.client.options.concurrency
        self._warned = False

    def check_size(self, found: Completion, visual_tokens: int) -> None:
        """Warn once if the server has read fewer tokens than the views of its prompt have."""
        read = found.prompt_tokens
        if self._warned or not 0 < read < visual_tokens or self.client.owner not in _WHOLE_PROMPT:
            return
        self._warned = True
        logger.warning(
            "The server at %s has read %d tokens, and the views that it was sent have %d visual tokens of %d px. It "
            "shrinks images, or '%s' has larger visual tokens: usage.visual_tokens is too high, and boxes in pixels "
            "may be off. Lower budget.coarse_tokens and budget.crop_max_tokens, or raise max_pixels of the server's "
            "image processor (vLLM: --mm-processor-kwargs).",
            *(self.client.address, read, visual_tokens, self.defaults.factor, self.name),
        )

    def session(self, image: ImageSource) -> "_ServerSession":
        return _ServerSession(self, image)


class _ServerSession:
    """One conversation, sent whole with each request."""

    def __init__(self, backend: ServerBackend, image: ImageSource) -> None:
        self._backend, self._image = backend, image
        self._encoded: dict[str, dict[str, Any]] = {}
        self._tokens: dict[str, int] = {}

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        began = time.perf_counter()
        shown = list(dict.fromkeys(view_ids(messages)))
        fresh = [view for view in shown if view not in self._encoded]
        factor = self._backend.defaults.factor
        self._tokens |= {view: tokens(self._image(view).size, factor) for view in fresh}
        write = chat_messages if self._backend.api == "chat" else response_items
        found = self._backend.client.complete(
            write(messages, self._encode), max_tokens=settings.max_new_tokens, on_text=on_text, **self._fields(settings)
        )
        items = _named(found, turn=len(messages)) if settings.tools else []
        calls = [item for item in items if item["type"] == "function_call"]
        calls = calls or [{**call, "call_id": ""} for call in found.calls]
        # a mark of the next turn in the text does not end the calls, which the server has read
        said = own_turn(found.text) if calls else found.text
        written = _written(found, calls, self._backend.protocol)
        text = _closed(said + written, settings.stop, found.stop, cut=found.cut)
        if on_text is not None and len(text) > len(said):
            on_text(text[len(said) :])
        self._backend.check_size(found, sum(self._tokens[view] for view in shown))
        return Reply(
            text=text,
            finish="length" if found.cut else "stop",
            withheld=found.withheld,
            items=items,
            prompt_tokens=found.prompt_tokens,
            cached_tokens=found.cached_tokens,
            new_tokens=found.new_tokens,
            visual_tokens=sum(self._tokens[view] for view in fresh),
            seconds=time.perf_counter() - began,
            logprobs=list(found.logprobs),
        )

    def close(self) -> None:
        self._encoded.clear()

    def _fields(self, settings: SamplingParams) -> dict[str, Any]:
        """Return the fields of a request beside the conversation and its limit."""
        api = self._backend.api
        fields: dict[str, Any] = {"temperature": settings.temperature}
        if settings.temperature:  # some take one of the two
            fields["top_p"] = settings.top_p
        if settings.tools:
            fields["tools"] = schemas(settings.tools, api)
            if not settings.may_call:  # without the tools the prompt would begin in another way
                fields["tool_choice"] = "none"
        if api == "responses":
            fields["store"] = False
        if settings.logprobs:
            fields |= {"logprobs": True} if api == "chat" else {"include": ["message.output_text.logprobs"]}
        if api == "chat" or self._backend.client.owner == "vllm":  # Responses has none of them by its own definition
            fields |= settings.model_dump(include={"top_k", "presence_penalty", "seed"}, exclude_none=True)
            fields["stop"] = list(settings.stop) or None
        return fields

    def _encode(self, view: str) -> dict[str, Any]:
        if view not in self._encoded:
            data = png(self._image(view))
            url = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
            self._encoded[view] = {"type": "image_url", "image_url": {"url": url}}
            if self._backend.client.owner == "vllm":  # other servers may refuse a field that they do not know
                self._encoded[view]["uuid"] = hashlib.sha256(data).hexdigest()[:32]
        return self._encoded[view]


def _named(found: Completion, *, turn: int) -> list[dict[str, Any]]:
    """Return the items of a turn, each call with an id of its own; those of the server, if they are."""
    taken, items = set[str](), [dict(item) for item in found.items]
    for index, call in enumerate(item for item in items if item["type"] == "function_call"):
        if not call["call_id"] or call["call_id"] in taken:
            call["call_id"] = f"call{turn % 1000:03}{index % 100:02}"  # nine letters and digits, as Mistral wants
        taken.add(call["call_id"])
    return items


def _written(found: Completion, calls: Sequence[dict[str, Any]], protocol: str) -> str:
    """Return what a server took out of the text: its tool calls or, where nothing else is left, the thought."""
    written = "".join(f"\n{_call(call, protocol)}" for call in calls)
    if written or found.text.strip() or not found.reasoning:
        return written if found.text else written.lstrip("\n")
    return f"<think>{found.reasoning}{'' if found.cut else '</think>'}"


def _call(call: dict[str, Any], protocol: str) -> str:
    """Return a tool call as the protocol's model would have written it. Arguments that are no JSON are kept."""
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        arguments = call["arguments"]
    written = {"name": call["name"], "arguments": arguments}
    if call["call_id"]:
        written["id"] = call["call_id"]
    elif protocol == "mini_o3":
        return f"<grounding>{json.dumps(arguments)}</grounding>"
    elif protocol == "plain" and isinstance(arguments, dict) and (key := box_key(arguments)):
        return f"ZOOM: {key} {arguments[key]}"
    # no tag or mark in an argument is one of the turn
    quoted = json.dumps(written).replace("<", "\\u003c")
    return f"<tool_call>\n{quoted}\n</tool_call>"


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


# -- several servers ---------------------------------------------------------------------------------------------------


class ServerPool:
    """A model behind several servers."""

    perceives = False

    def __init__(self, servers: Sequence[ServerBackend]) -> None:
        """`servers` are asked for the same model in the same form; at least one."""
        first = servers[0]
        self.name, self.protocol, self.defaults = first.name, first.protocol, first.defaults
        self.settings, self.api, self.client = first.settings, first.api, first.client
        self.placement = f"{first.placement}, one of {len(servers)}"
        self.workers = sum(one.workers for one in servers)
        self._servers = list(servers)
        self._open = [0] * len(servers)
        self._rests = [0.0] * len(servers)
        self._lock = Lock()

    def session(self, image: ImageSource) -> Session:
        with self._lock:
            place = self._order()[0]
            self._open[place] += 1
        return _PooledSession(self, image, place)

    def _order(self, first: int | None = None) -> list[int]:
        """Return the places of the servers, best first: those that work, then those with the fewest conversations."""
        now = time.monotonic()
        return sorted(range(len(self._servers)), key=lambda at: (self._rests[at] > now, at != first, self._open[at]))

    def _moved(self, old: int, new: int | None, failed: Sequence[int] = ()) -> None:
        """Count a conversation at another server, or as closed."""
        with self._lock:
            self._open[old] -= 1
            if new is not None:
                self._open[new] += 1
            for at in failed:
                self._rests[at] = time.monotonic() + _REST


class _PooledSession:
    """One conversation, at one server as long as that works."""

    def __init__(self, pool: ServerPool, image: ImageSource, place: int) -> None:
        self._pool, self._image, self._place = pool, image, place
        self._sessions: dict[int, Session] = {}
        self._counted = True

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        pool, failed, said = self._pool, list[int](), False

        def hear(piece: str) -> None:
            nonlocal said
            said = True
            if on_text is not None:
                on_text(piece)

        fault: BackendError | None = None
        for place in pool._order(self._place):
            session = self._sessions.setdefault(place, pool._servers[place].session(self._image))
            try:
                reply = session.reply(messages, settings=settings, on_text=None if on_text is None else hear)
            except BackendError as error:
                if said:
                    raise  # the listener cannot unhear the beginning
                fault = fault or error
                failed.append(place)
                continue
            if failed:  # not the fault of the request
                pool._moved(self._place, place, failed)
                self._place = place
            return reply
        assert fault is not None
        raise fault

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions = {}
        if self._counted:
            self._pool._moved(self._place, None)
        self._counted = False
