"""What a visitor of the page may change of a run."""

from __future__ import annotations

from typing import Any, Final, get_args

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations.limits import CEILINGS, ServedPolicy, WebConfig
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
        zooms: Most crops.
        visual: Most visual tokens of all views; 0: no limit.
        coarse: Most visual tokens of the coarse view; 0: the model's own.
    """
    asked = {"budget.max_views": zooms + 1, "budget.max_visual_tokens": visual, "budget.coarse_tokens": coarse}
    within = {key: min(value, int(CEILINGS[key])) for key, value in asked.items() if value}
    return {"policy": policy, "budget.max_seconds": config.timeout, **within}
