"""The longest possible episode, checked before the first step.

A rollout that outgrows the model or the trainer's limit would be cut in the middle of an image. The longest one has
every turn written to its limit, every crop at its largest, every turn between them as long as the protocol makes it.
"""

from typing import Final, NamedTuple

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import ConfigError
from qzoom_agent.policy import LOOK_AGAIN, LOOK_FIRST, OFFER_TOOLS

TURN_TEXT: Final = 160
"""Tokens around a result, a refusal or the last request, where no tokenizer has counted them."""
OPENING_TEXT: Final = 400
"""Tokens of an opening beside its views: system message, tool schema, question."""
QUESTION_TEXT: Final = 100
"""Of those, tokens of a question, where the rest of the opening has been counted."""


_NO_LIMIT: Final = 2**40


class Longest(NamedTuple):
    """The longest episode that the budgets allow, in tokens."""

    prompt: int
    """Opening, coarse view and inserted crops."""
    written: int
    """Tokens that the model writes."""
    crops: int
    """Visual tokens of crops that it asks for."""
    between: int
    """Text of the turns between its own."""

    @property
    def completion(self) -> int:
        return self.written + self.crops + self.between

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __str__(self) -> str:
        parts = f"prompt {self.prompt}, written {self.written}, crops {self.crops}, text between {self.between}"
        return f"{self.total} tokens: {parts}"


def longest(
    config: AgentConfig, views: ViewBudget, *, opening: int = OPENING_TEXT, between: int = TURN_TEXT
) -> Longest:
    """Return the longest episode under a configuration.

    Args:
        config: Of the episodes.
        views: Sizes of the views.
        opening: Text tokens of the opening.
        between: Text tokens of the longest turn between two of the model's own.
    """
    budget, asks = config.budget, config.policy in OFFER_TOOLS
    largest = max(views.crop_max_tokens, config.perception.roi_max_tokens or 0)
    most = (budget.max_visual_tokens or _NO_LIMIT) - views.coarse_min_tokens
    room = min(budget.max_views - 1, most // max(1, views.crop_min_tokens))
    most_looks = min(budget.max_turns, config.perception.max_looks or budget.max_turns)
    looks = most_looks if config.policy in LOOK_AGAIN else int(config.policy in LOOK_FIRST)
    inserted = min(config.perception.max_regions * looks, room)
    crops = min(room - inserted, budget.max_turns * 4) if asks else 0  # a turn may call several times
    turns = budget.max_turns + 1 if asks else 2  # a reply that was cut off is followed by a last one
    return Longest(
        prompt=opening + views.coarse_max_tokens + inserted * largest,
        written=turns * config.generation.max_new_tokens,
        crops=min(crops * largest, most),
        between=(turns - 1 + crops) * between,
    )


def require_room(need: Longest, *, context: int, limit: int | None) -> int:
    """Return the completion length to give the trainer.

    Args:
        need: The longest episode.
        context: Tokens that the model can read.
        limit: The recipe's own completion length.

    Raises:
        ConfigError: The longest episode does not fit.
    """
    advice = (
        "Lower budget.coarse_tokens, budget.max_turns, budget.max_views, budget.crop_max_tokens or "
        "generation.max_new_tokens."
    )
    if need.total > context:
        raise ConfigError(f"The longest episode ({need}) does not fit into the model's context of {context}. {advice}")
    if limit is not None and need.completion > limit:
        raise ConfigError(
            f"The longest episode ({need}) has a completion of {need.completion} tokens, but max_completion_length is "
            f"{limit}. Raise it, leave it out, or: {advice[0].lower()}{advice[1:]}"
        )
    return limit or need.completion
