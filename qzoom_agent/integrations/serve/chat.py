"""Chat Completions: the requests that are read and the replies that are written.

A request holds an ordinary conversation with one or several images. Its last user message is the question; what was
said before is put in front of it. The reply is the final answer, with boxes and cost under the key `qzoom`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from qzoom_agent.answer import Answer
from qzoom_agent.config import MAX_SEED
from qzoom_agent.integrations.limits import CEILINGS, MAX_IMAGES, ServeConfig, ServedPolicy
from qzoom_agent.integrations.serve.episodes import Question
from qzoom_agent.integrations.serve.errors import RequestError
from qzoom_agent.policy import drafts


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Part):
    """An image."""

    url: str
    """A data URI of the encoded file; an http(s) address where the server allows it."""
    detail: str | None = None
    """Read and ignored: budgets are set under `qzoom`."""


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(_Part):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None


class StreamOptions(_Part):
    """Options of a stream."""

    include_usage: bool = False
    """Send the token counts in a last chunk."""


class ResponseFormat(_Part):
    """The form of the answer: text alone."""

    type: Literal["text"] = "text"


class Budget(_Part, extra="forbid"):
    """Limits of the request; see `budget` of the configuration. The server has a most for each."""

    max_turns: int | None = Field(default=None, ge=1)
    max_views: int | None = Field(default=None, ge=1)
    max_visual_tokens: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    coarse_tokens: int | None = Field(default=None, ge=1)
    crop_max_tokens: int | None = Field(default=None, ge=1)


class Options(_Part, extra="forbid"):
    """The agent's own options."""

    policy: ServedPolicy | None = None
    """Rule that decides which crops the model sees."""
    budget: Budget | None = None
    settings: dict[str, JsonValue] = {}
    """Further keys of the configuration that the server allows."""


class ChatRequest(_Part):
    """A request. Fields of OpenAI that are not listed are ignored."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one turn of the model."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Instead of `max_tokens`."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: str | list[str] | None = None
    """Texts before which the answer ends."""
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    """None: the agent has its own."""
    response_format: ResponseFormat | None = None
    qzoom: Options | None = None

    def changes(self, server: ServeConfig) -> dict[str, Any]:
        """Return what the request changes of the configuration, by dotted key. RequestError if it may not."""
        options = self.qzoom or Options()
        asked: dict[str, Any] = {
            "policy": options.policy,
            "generation.max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "generation.temperature": self.temperature,
            "generation.top_p": self.top_p,
            **{f"budget.{key}": value for key, value in (options.budget or Budget()).model_dump().items()},
        }
        asked = {key: value for key, value in asked.items() if value is not None}
        for key, value in options.settings.items():
            if key not in server.allow:
                allowed = ", ".join(server.allow) or "none"
                raise RequestError(
                    f"This server does not let requests set '{key[:80]}'. It allows: {allowed}.", param="qzoom"
                )
            asked[key] = value
        for key, most in CEILINGS.items():
            wanted = _number(asked.get(key))
            if wanted is None or wanted <= most:
                continue
            if key == "generation.max_new_tokens":
                asked[key] = int(most)  # clients ask for more than they need
            else:
                raise RequestError(
                    f"{key} may be at most {most:g} on this server; got {wanted:g}. Lower it.", param="qzoom"
                )
        return asked


def _number(value: object) -> float | None:
    """Return a setting as the configuration reads it, where it is a number."""
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except OverflowError:  # a whole number of over 308 digits
        return math.inf
    except ValueError:
        return None


def read_question(messages: Sequence[ChatMessage], *, allow_urls: bool) -> Question:
    """Return the images and the question of a conversation. Raises RequestError if it lacks one or has too many."""
    images, said = [], []
    for message in messages:
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        texts = [part.text for part in parts or [] if isinstance(part, TextPart)]
        images += [part.image_url.url for part in parts or [] if isinstance(part, ImagePart)]
        said.append((message.role, "\n".join(texts).strip()))
    if not 1 <= len(images) <= MAX_IMAGES:
        raise RequestError(
            f"A conversation is about 1 to {MAX_IMAGES} images; this one has {len(images)}. Send each as a part of "
            "type image_url.",
            param="messages",
        )
    kinds = ("data:", "http://", "https://") if allow_urls else ("data:",)
    for image in images:
        if not image[:8].lower().startswith(kinds):
            told = "a data URI or an address" if allow_urls else "a data URI; this server fetches no addresses"
            raise RequestError(f"An image is {told}. Got {image[:60]!r}.", param="messages")
    role, last = said.pop()
    if role != "user" or not last:
        raise RequestError("The last message is the user's question. Put a text into it.", param="messages")
    rules = [text for role, text in said if role in ("system", "developer") and text]
    names = {"user": "User", "assistant": "Assistant"}
    earlier = [f"{names[role]}: {text}" for role, text in said if role in names and text]
    if earlier:
        rules.append("\n".join(["The conversation so far:", *earlier]))
    return Question(images, "\n\n".join([*rules, last]))


class Reply:
    """One reply in OpenAI's form, whole or in chunks."""

    def __init__(self, request: ChatRequest, *, id: str) -> None:
        self._request, self._id, self._created = request, id, int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the reply of a request that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text_until(self._request.stop), "refusal": None},
            "logprobs": None,
            "finish_reason": _finish(answer),
        }
        return {**self._head("chat.completion", [choice]), "usage": usage_of(answer), "qzoom": summary_of(answer)}

    def chunk(self, delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> dict[str, Any]:
        """Return a chunk of a streamed reply."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk", [choice]), **more}

    def last_chunks(self, answer: Answer) -> list[dict[str, Any]]:
        """Return the chunks of the answer, and of the token counts where the request asks for them."""
        chunks = [
            self.chunk({"content": answer.text_until(self._request.stop)}),
            self.chunk({}, finish=_finish(answer), qzoom=summary_of(answer)),
        ]
        if self._request.stream_options and self._request.stream_options.include_usage:
            chunks.append({**self._head("chat.completion.chunk", []), "usage": usage_of(answer)})
        return chunks

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }


def _finish(answer: Answer) -> str:
    turns = answer.trace.turns
    return "length" if turns and turns[-1].finish == "length" else "stop"


def usage_of(answer: Answer) -> dict[str, Any]:
    """Return the token counts of all turns together, as OpenAI names them."""
    prompt, written = answer.usage.prompt_tokens, answer.usage.written_tokens
    looked = _looked_turn(answer)
    cached = sum(turn.cached_tokens for turn in answer.trace.turns if turn.index != looked)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _looked_turn(answer: Answer) -> int | None:
    """Return the turn that found in the cache what a look of the model itself had computed; None if there was none."""
    look = answer.trace.perception
    if look is None or look.perceiver:
        return None
    settings = answer.trace.config.get("perception")
    gate = str(settings.get("gate")) if isinstance(settings, dict) else ""
    if not look.heat and (look.score is None or gate != "learned"):
        return None
    return int(drafts(answer.trace.policy, gate))  # a first answer comes before the look


def summary_of(answer: Answer) -> dict[str, Any]:
    """Return what the agent did: status, boxes and cost."""
    trace, usage = answer.trace, answer.usage
    sizes, look = [[view.width, view.height] for view in trace.views if view.kind == "original"], trace.perception
    return {
        "trace": trace.id,
        "status": answer.status,
        "policy": trace.policy,
        "boxes": [list(box) for box in answer.boxes],
        "box_images": [number for number, _ in answer.evidence],
        "image_size": sizes[0] if sizes else None,
        "image_sizes": sizes,
        "gate": None if look is None else {"score": look.score, "threshold": look.threshold, "fired": look.fired},
        "visual_tokens": usage.visual_tokens,
        "coarse_tokens": usage.coarse_tokens,
        "crop_tokens": usage.crop_tokens,
        "calls": usage.requested,
        "refused": usage.refused + usage.failed,
        "turns": len(trace.turns),
        "seconds": round(usage.seconds.total, 4),
    }
