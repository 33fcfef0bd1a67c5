"""Settings of the page, and what a visitor may change of a run."""

from __future__ import annotations

from typing import Any, Final, get_args

from pydantic import Field

from qzoom_agent.agent import Agent
from qzoom_agent.config import Config
from qzoom_agent.errors import ConfigError
from qzoom_agent.images import MAX_PIXELS
from qzoom_agent.integrations.limits import CEILINGS, ServedPolicy
from qzoom_agent.policy import LOOK_FIRST

_POLICIES: Final = {
    "direct": "no crops",
    "implicit": "crops that the branches propose",
    "explicit": "crops that the model asks for",
    "hybrid": "both, and each request is reviewed",
    "locate": "the box that the model names first",
    "always": "proposed crops, without asking the gate",
}
"""Each policy that a visitor may choose, in a few words."""
assert set(_POLICIES) == set(get_args(ServedPolicy))


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


def policies(agent: Agent) -> list[tuple[str, str]]:
    """Return the policies that an agent can run, each as a label and its name.

    Raises:
        ConfigError: The agent's own policy is none that a visitor may choose.
    """
    if agent.config.policy not in _POLICIES:
        raise ConfigError(
            f"The policy '{agent.config.policy}' is for measurements, and no page has known boxes. Choose another: "
            f"{', '.join(_POLICIES)}."
        )
    return [
        (f"{name}: {words}", name) for name, words in _POLICIES.items() if agent.perceives or name not in LOOK_FIRST
    ]


def changes(config: WebConfig, *, policy: str, zooms: int, visual: int, coarse: int) -> dict[str, Any]:
    """Return what a visitor changes of the configuration, by dotted key, within the limits.

    Args:
        config: Limits of the page.
        policy: Name of the policy.
        zooms: Most crops.
        visual: Most visual tokens of all views; 0: no limit.
        coarse: Most visual tokens of the coarse view; 0: the model's own.
    """
    asked = {"budget.max_views": zooms + 1, "budget.max_visual_tokens": visual, "budget.coarse_tokens": coarse}
    within = {key: min(value, int(CEILINGS[key])) for key, value in asked.items() if value}
    return {"policy": policy, "budget.max_seconds": config.timeout, **within}
