"""Settings of the server, and what a request may change."""

from __future__ import annotations

from typing import Final

from pydantic import Field, model_validator

from qzoom_agent.config import AgentConfig, Config
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.images import MAX_PIXELS
from qzoom_agent.integrations.limits import CEILINGS, MAX_IMAGES


class ServeConfig(Config):
    """The limits of a server."""

    prefix = "serve."

    api_key: str | None = Field(default=None, repr=False)
    """Key that clients have to send; None: none."""
    batch: int = Field(default=8, ge=1, le=1024)
    """Requests that are answered at a time; a local model computes them together."""
    queue: int = Field(default=32, ge=0)
    """Requests that may wait for a place; more are refused with status 429."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds from the arrival of a request to its answer."""
    read_timeout: float = Field(default=30.0, gt=0)
    """Seconds for a client to send the whole body of a request."""
    max_bytes: int = Field(default=32_000_000, ge=1)
    """Most bytes of the body of a request."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Most pixels (width times height) of the images of a request together."""
    max_images: int = Field(default=MAX_IMAGES, ge=1)
    """Most images of a conversation."""
    allow_urls: bool = False
    """Fetch images from http(s) addresses that clients name."""
    allow: tuple[str, ...] = ()
    """Further keys of the configuration that a request may set, such as "perception.max_regions"."""
    ceilings: dict[str, float] = CEILINGS
    """Most that a request may ask for, by key of the configuration."""
    traces: int = Field(default=256, ge=0)
    """Records of the last answers that are kept for GET /traces/ID, without pixels."""

    @model_validator(mode="after")
    def _known_keys(self) -> ServeConfig:
        for key in self.allow:
            section = key.partition(".")[0]
            if section not in AgentConfig.model_fields or section in _NEVER:
                raise ConfigError(
                    f"Requests cannot be allowed to set '{key}': it is no key of the configuration, or one that names "
                    "weights, files or code. Give one such as perception.max_regions."
                )
        return self


_NEVER: Final = {"model", "protocol", "prompt", "perceiver", "tool", "tools", "max_pixels", "review"}
"""Keys that name weights, files or code, or limits of the server."""


class RequestError(QzoomError):
    """A request that cannot be answered, with its HTTP status and OpenAI's code and type of the error."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def type(self) -> str:
        """OpenAI's type of the error."""
        known = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return known.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
