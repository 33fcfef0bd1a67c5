"""Options of the requests to an OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue

from qzoom_agent.config import Config
from qzoom_agent.models.chat_messages import Api


class Connection(Config):
    """The requests to an OpenAI-compatible server: keyword arguments of `Agent.from_server`."""

    api: Api | None = None
    """API of the server: Chat Completions ("chat") or Responses. None: responses at OpenAI, else chat."""
    key_variable: str | None = None
    """Environment variable with the key; your own server needs none. None: ANTHROPIC_API_KEY and GEMINI_API_KEY at the
    addresses of these APIs, else OPENAI_API_KEY."""
    api_key: str | None = Field(default=None, repr=False)
    """The key itself, instead of the variable's. It is never stored or shown."""
    headers: dict[str, Any] | None = Field(default=None, repr=False)
    """Further headers of each request, such as {"api-key": "..."}."""
    extra_body: dict[str, JsonValue] | None = None
    """Further fields of each request, such as {"top_k": 20}, or other values of ours; None leaves out a field that this
    server does not take, such as {"seed": None}."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for one reply of the server, with all retries."""
    concurrency: int = Field(default=8, ge=1)
    """Most requests at a time."""
    attempts: int = Field(default=3, ge=1)
    """Times that a request is sent before it fails."""
