"""The `rewards` of a recipe: rewards of this package and of yours, with weights and settings.

    rewards:
      - {name: accuracy, weight: 0.8, max_chars: 1000}
      - {name: "my_rewards:short_answer", weight: 0.2, limit: 20}     # def short_answer(rollouts, limit): ...

Rewards that ask whether an answer is right ask the recipe's own `accuracy`, whatever its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from inspect import Parameter, iscoroutine, signature
from math import isfinite
from types import MappingProxyType
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import awaited, calling, find, reference
from qzoom_agent.training.rewards import (
    Accuracy,
    ChainOfFocus,
    CropArea,
    Curiosity,
    FirstCrop,
    Format,
    GroupReward,
    Judge,
    Reward,
    Rollout,
    ToolBonus,
    Values,
    VisionThinkPrice,
)

_KINDS: Final[list[type[Reward]]] = [Accuracy, *GroupReward.__subclasses__()]
BUILT_IN: Final = {kind.model_fields["name"].default: kind for kind in _KINDS}
"""The rewards of this package by name."""
_VISIONTHINK: Final = [Accuracy(rule="open"), Format(weight=0.5), VisionThinkPrice()]
PUBLISHED: Final[Mapping[str, list[Reward]]] = MappingProxyType(
    {
        "deepeyes": [
            Accuracy(weight=0.8, max_chars=1000),
            Format(weight=0.2, style="penalty", max_chars=1000),
            ToolBonus(weight=1.2),
        ],
        "mini-o3": [Accuracy(rule="open")],
        "chain-of-focus": [ChainOfFocus()],
        "visionthink": _VISIONTHINK,
        "adaptvision": [*_VISIONTHINK, FirstCrop(weight=0.1), CropArea(weight=0.2)],
        "pixel-reasoner": [Accuracy(rule="open", failed_is_wrong=True), Curiosity()],
    }
)
"""Rewards as published code adds them up, by project. Where that asks a judge whether an answer is right, a rule
decides here: write the list out, with `judged: true`, to ask one. Where it asks one about the box (adaptvision), gold
boxes decide; rows without them get no such reward."""


def columns(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Return the inputs that a custom reward may name as parameters, each a list over the rollouts."""
    return {
        "rollouts": list(rollouts),
        "prompts": [[{"role": "user", "content": one.trace.question}] for one in rollouts],
        "completions": [[{"role": "assistant", "content": turn.text} for turn in one.trace.turns] for one in rollouts],
        "question": [one.trace.question for one in rollouts],
        "reply": [one.trace.answer for one in rollouts],
        "answer": [one.answer for one in rollouts],
        "answers": [one.answers for one in rollouts],
        "boxes": [one.boxes for one in rollouts],
        "options": [one.options for one in rollouts],
    }


class CustomReward(Reward, extra="allow"):
    """A reward from outside this package: a function of rollouts, or of completions as TRL calls reward functions.

    `name` is the function itself, `module:function`, or an entry point in the group `qzoom_agent.rewards`; further keys
    are settings, passed to it as keyword arguments. Its parameters say what it reads: `rollouts` (a list of `Rollout`),
    `completions` (each a list of messages), and any other of `columns`. It returns a number or None for each rollout. A
    function that reads what gate and SD-RPN saw has an attribute `needs_look = True`.
    """

    prefix = "reward."
    function: Callable[..., Any] = Field(exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _find(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        name = given["name"]
        if callable(name):
            return {**given, "name": reference(name), "function": name}
        function = find(str(name), kind="reward", known=BUILT_IN)
        if not callable(function):
            raise ConfigError(f"The reward '{name}' is a {type(function).__name__}, not a function. Name a function.")
        return {**given, "function": function}

    @model_validator(mode="after")
    def _fits(self) -> CustomReward:
        wanted, inputs, settings = signature(self.function).parameters, columns([]), self.model_extra or {}
        problem = ""
        if not {"rollouts", "completions"} & wanted.keys():
            problem = "it has no parameter `rollouts` or `completions`"
        elif unknown := sorted(settings.keys() - (wanted.keys() - inputs.keys())):
            problem = f"it has no setting {', '.join(unknown)}"
        else:
            try:
                signature(self.function).bind(**self._arguments(inputs))
            except TypeError as error:
                problem = f"{error} (it is neither set in the recipe nor an input)"
        if problem:
            raise ConfigError(
                f"The reward '{self.name}', which takes {signature(self.function)}, cannot be used: {problem}. Write "
                f"it as f(rollouts, ...) or, as for TRL, f(completions, **columns). Inputs: {', '.join(inputs)}."
            )
        return self

    @property
    def needs_look(self) -> bool:
        return bool(getattr(self.function, "needs_look", False))

    def __call__(self, rollouts: Sequence[Rollout], accuracy: Accuracy | None = None) -> Values:
        with calling(self.name, kind="reward"):
            found = self.function(**self._arguments(columns(rollouts)))
            if iscoroutine(found):  # TRL takes such functions as well
                found = awaited(found)
        try:
            ordered = () if isinstance(found, Mapping | Set) else found  # their items are keys, or in any order
            values = [None if value is None else float(value + 0.0) for value in ordered]  # text has no sum
        except (TypeError, ValueError):
            values = []
        if len(values) != len(rollouts) or not all(value is None or isfinite(value) for value in values):
            raise ConfigError(
                f"The reward '{self.name}' returned {found!r:.80} for {len(rollouts)} rollouts. Return a list with a "
                "finite number or None for each of them, in order."
            )
        return values

    def _arguments(self, inputs: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Return the settings, and the inputs that the function has a parameter for (all, with `**columns`)."""
        wanted = signature(self.function).parameters
        takes_all = any(one.kind is Parameter.VAR_KEYWORD for one in wanted.values())
        given = {name: value for name, value in inputs.items() if takes_all or name in wanted}
        return given | (self.model_extra or {})


def read_reward(entry: Any) -> Reward:
    """Return the reward of one entry: a mapping with its `name`, a function, or a reward already.

    Raises:
        ConfigError: There is no such reward, or it does not take these settings.
    """
    if isinstance(entry, Reward):
        return entry
    given = {"name": entry} if callable(entry) else entry
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError(f"A reward is written {{name: ..., weight: ..., SETTING: ...}}; got {entry!r}.")
    named = given["name"]
    return (BUILT_IN.get(named, CustomReward) if isinstance(named, str) else CustomReward).model_validate(given)


RewardEntry = Annotated[SerializeAsAny[Reward], BeforeValidator(read_reward)]
"""One entry of a recipe's `rewards`."""


class NamedReward(NamedTuple):
    """A reward of a recipe with all that it needs: called on rollouts; with `masks=False` it leaves none out."""

    name: str
    weight: float
    reward: Callable[..., Values]


def build(rewards: Iterable[Reward], *, judge: Judge | None = None, mask_truncated: bool = True) -> list[NamedReward]:
    """Return the rewards of a recipe, in order, each with the recipe's own rule for right answers.

    Args:
        rewards: Of different names.
        judge: Asked by an `accuracy` that is `judged`.
        mask_truncated: Give rollouts that ran out of their budget None from every reward, so that they are not learned
            from (Mini-o3, arXiv 2509.07969), and keep them from being compared with.

    Raises:
        ConfigError: A name comes twice, none has a weight, or `judged` has no judge.
    """
    rewards = list(rewards)
    names = [one.name for one in rewards]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(
            f"A recipe's rewards are a list of different names; got {', '.join(names) or 'none'}. "
            "Name at least one, and each once."
        )
    if not any(one.weight for one in rewards):
        raise ConfigError(f"All rewards ({', '.join(names)}) have weight 0, so nothing is learned. Give one a weight.")
    accuracy = accuracy_of(rewards, judge=judge)

    def values(rollouts: Sequence[Rollout], *, reward: Reward, masks: bool = True) -> Values:
        kept = [at for at, one in enumerate(rollouts) if not (masks and mask_truncated and one.truncated)]
        found: Values = [None] * len(rollouts)
        for at, value in zip(kept, reward([rollouts[at] for at in kept], accuracy) if kept else (), strict=True):
            found[at] = value
        return found

    bound = [accuracy if isinstance(one, Accuracy) else one for one in rewards]
    return [NamedReward(one.name, one.weight, partial(values, reward=one)) for one in bound]


def accuracy_of(rewards: Iterable[Reward], *, judge: Judge | None = None) -> Accuracy:
    """Return what a recipe calls right, rewarded by itself or not; ConfigError if it is `judged` without a judge."""
    chosen = next((one for one in rewards if isinstance(one, Accuracy)), Accuracy())
    if chosen.judged and judge is None:
        raise ConfigError(
            "The reward 'accuracy' is `judged: true`, but no judge is given. Name a server, or judge by rule."
        )
    return chosen.asking(judge if chosen.judged else None)
