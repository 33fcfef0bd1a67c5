"""Limits of what others may ask of an agent: through `qzoom serve`, `qzoom web` and `qzoom mcp`."""

from __future__ import annotations

from typing import Annotated, Final, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from qzoom_agent.config import Config, PolicyName
from qzoom_agent.errors import ConfigError
from qzoom_agent.images import MAX_PIXELS

ServedPolicy = Literal["direct", "explicit", "implicit", "hybrid", "locate", "always"]
"""Policies that may be asked for: those that need neither gold boxes nor a baseline's purpose."""
CEILINGS: Final[dict[str, float]] = {
    "budget.max_turns": 12,
    "budget.max_views": 12,
    "budget.max_visual_tokens": 16_384,
    "budget.max_seconds": 600,
    "budget.coarse_tokens": 4_096,
    "budget.coarse_min_tokens": 4_096,
    "budget.crop_max_tokens": 4_096,
    "budget.crop_min_tokens": 4_096,
    "perception.roi_max_tokens": 4_096,
    "perception.roi_min_tokens": 4_096,
    "generation.max_new_tokens": 4_096,
}
"""Most that may be asked for, by key of the configuration."""
LOCAL: Final = {"127.0.0.1", "::1", "localhost"}
"""Hosts that other machines do not reach."""
MAX_IMAGES: Final = 8
"""Most images of a question, or of a conversation."""
assert set(get_args(ServedPolicy)) < set(get_args(PolicyName))
_SETTABLE: Final = ("budget", "crop", "generation", "perception", "seed", "system")
"""Keys and sections that name no weights, files or code, and no limits of the server."""


class ServeConfig(Config):
    """The limits of a server."""

    prefix = "serve."

    api_key: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] | None = Field(
        default=None, repr=False
    )
    """Key that clients have to send, without the line break that a file of it ends with; None: none."""
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
    allow_urls: bool = False
    """Fetch images from http(s) addresses that clients name."""
    allow: tuple[str, ...] = ()
    """Further keys of the configuration that a request may set, besides policy and budget: "perception.max_regions"."""
    traces: int = Field(default=256, ge=0)
    """Records of the last answers that are kept for GET /traces/ID, without pixels."""

    @model_validator(mode="after")
    def _known_keys(self) -> ServeConfig:
        for key in self.allow:
            limited = next((one for one in CEILINGS if one.startswith(f"{key}.")), None)
            if limited is not None:
                raise ConfigError(
                    f"Requests cannot be allowed to set all of '{key}': some of its keys have a most. Name the keys, "
                    f"such as {limited}."
                )
            if key.partition(".")[0] not in _SETTABLE:
                raise ConfigError(
                    f"Requests cannot be allowed to set '{key}'. Give a key of {', '.join(_SETTABLE)}, such as "
                    "perception.max_regions."
                )
        return self


class WebConfig(Config):
    """The limits of a page."""

    prefix = "web."

    batch: int = Field(default=4, ge=1, le=32)
    """Questions that are answered at a time; a local model computes them together."""
    queue: int = Field(default=32, ge=1)
    """Questions that may wait for a place; more are refused."""
    questions: int = Field(default=50, ge=1)
    """Questions of a conversation, whose crops are kept in memory; the next begins another."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds of a run, after which the model has to answer."""
    patience: float = Field(default=600.0, gt=0)
    """Seconds that a call waits for a visitor's decision."""
    max_bytes: int = Field(default=32_000_000, ge=1)
    """Most bytes of a picture."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Most pixels (width times height) of a picture."""
    visitors: int = Field(default=64, ge=1)
    """Visitors whose conversations are kept in memory, each with its picture; the oldest are forgotten first."""
    choose_model: bool = False
    """Let visitors load other models, and name servers that this machine then asks."""
