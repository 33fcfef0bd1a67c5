"""Limits of what others may ask of an agent: through `qzoom serve`, `qzoom web` and `qzoom mcp`."""

from __future__ import annotations

from typing import Final, Literal, get_args

from qzoom_agent.config import PolicyName

ServedPolicy = Literal["direct", "explicit", "implicit", "hybrid", "locate", "always"]
"""Policies that may be asked for: those that need neither gold boxes nor a baseline's purpose."""
CEILINGS: Final[dict[str, float]] = {
    "budget.max_turns": 12,
    "budget.max_views": 12,
    "budget.max_visual_tokens": 16_384,
    "budget.max_seconds": 600,
    "budget.coarse_tokens": 4_096,
    "budget.crop_max_tokens": 4_096,
    "generation.max_new_tokens": 4_096,
}
"""Most that may be asked for, by key of the configuration."""
MAX_IMAGES: Final = 8
"""Most images of a question."""
assert set(get_args(ServedPolicy)) < set(get_args(PolicyName))
