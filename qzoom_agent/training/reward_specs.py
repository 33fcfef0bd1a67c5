"""Rewards as a recipe writes them: a list of names with weights and settings.

    rewards:
      - {name: accuracy, weight: 0.8, max_chars: 1000}
      - {name: format, weight: 0.2, style: penalty}
      - {name: tool-bonus, weight: 1.2}

Each becomes one reward that is logged by itself. Rewards that ask whether an answer is right ask the recipe's own
`accuracy`, whatever its weight; weight 0 only logs. `PUBLISHED` has the lists that reproduce published code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from qzoom_agent.errors import ConfigError
from qzoom_agent.training.rewards import (
    RULES,
    Accuracy,
    Agreement,
    Coverage,
    Format,
    Judge,
    Redundant,
    Reward,
    ToolBonus,
    UnlessTruncated,
)
from qzoom_agent.training.tool_cost_rewards import (
    ChainOfFocus,
    CropArea,
    CropPrice,
    CropsAmongRight,
    Curiosity,
    FirstCrop,
    VisionThinkPrice,
)

Unit = Literal["call", "crop", "token"]
Rule = Literal["exact", "open", "choice", "anls", "chartqa", "vqa", "ocr"]
"""One of the evaluation's scorers: `exact` takes nothing but the answer, `open` finds it in a longer reply."""


class Spec(BaseModel, ABC):
    """What every entry has."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    weight: float = 1.0
    """Times the reward's own value; 0 only logs it."""

    @property
    def looks(self) -> bool:
        """Whether it compares an episode with what gate and SD-RPN see: somebody has to look, whatever the policy."""
        return False

    @abstractmethod
    def reward(self, accuracy: Accuracy) -> Reward:
        """The reward, with the recipe's rule for right answers."""


class AccuracySpec(Spec):
    """What the evaluation gives the answer, 0 to 1."""

    name: Literal["accuracy"] = "accuracy"
    rule: Rule = "exact"
    """What finds the answer in a reply."""
    judged: bool = False
    """Put answers that the rule refuses to the recipe's judge."""
    max_chars: int | None = Field(default=None, gt=0)
    """Answers of this many characters are wrong."""
    failed_is_wrong: bool = False
    """So are answers whose last call gave no crop (Pixel-Reasoner)."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return accuracy


class FormatSpec(Spec):
    """Whether every turn could be read."""

    name: Literal["format"] = "format"
    style: Literal["bonus", "penalty"] = "bonus"
    """1 or 0, or 0 or -1."""
    max_chars: int | None = Field(default=None, gt=0)
    """Answers of this many characters are malformed."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return Format(self.style, self.max_chars)


class ToolBonusSpec(Spec):
    """1 for a right answer after a crop (DeepEyes)."""

    name: Literal["tool-bonus"] = "tool-bonus"

    def reward(self, accuracy: Accuracy) -> Reward:
        return ToolBonus(accuracy)


class CoverageSpec(Spec):
    """Share of the evidence that the crops show, where boxes are known."""

    name: Literal["coverage"] = "coverage"
    max_share: float = Field(default=0.25, gt=0, le=1)
    """Larger crops, as a share of the image, count for nothing."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return Coverage(self.max_share)


class AgreementSpec(Spec):
    """How far crops agree with gate and SD-RPN."""

    name: Literal["agreement"] = "agreement"
    measure: Literal["heat", "iou"] = "heat"
    """By the map, or by the proposed boxes."""

    @property
    def looks(self) -> bool:
        return True

    def reward(self, accuracy: Accuracy) -> Reward:
        return Agreement(self.measure)


class RedundantSpec(Spec):
    """Minus the crops that add nothing."""

    name: Literal["redundant"] = "redundant"
    most: int = Field(default=4, gt=0)
    """Further ones are not counted."""
    opinions: bool = False
    """Count those that gate or SD-RPN speak against as well, where the policy has no review that refuses them."""

    @property
    def looks(self) -> bool:
        return self.opinions

    def reward(self, accuracy: Accuracy) -> Reward:
        return Redundant(self.most, self.opinions)


class CropPriceSpec(Spec):
    """A constant price."""

    name: Literal["crop-price"] = "crop-price"
    cost: float = Field(default=0.1, ge=0)
    per: Unit = "crop"
    free: float = Field(default=0.0, ge=0)
    """Of these units, how many cost nothing."""
    only_right: bool = False
    """Charge right answers only."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return CropPrice(self.cost, self.per, self.free, self.only_right, accuracy)


class ChainOfFocusSpec(Spec):
    """Ranks within a group, in place of accuracy."""

    name: Literal["chain-of-focus"] = "chain-of-focus"

    def reward(self, accuracy: Accuracy) -> Reward:
        return ChainOfFocus(accuracy)


class VisionThinkSpec(Spec):
    """A price that turns over where direct right answers are rare."""

    name: Literal["visionthink-price"] = "visionthink-price"
    cost: float = Field(default=0.1, ge=0)
    direct_cost: float = Field(default=0.1, ge=0)
    rare: float = Field(default=0.2, ge=0, le=1)
    """Share of direct among right answers below which they count as luck."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return VisionThinkPrice(self.cost, self.direct_cost, self.rare, accuracy)


class CropAreaSpec(Spec):
    """Minus the share of the image asked for (AdaptVision)."""

    name: Literal["crop-area"] = "crop-area"
    free_share: float = Field(default=0.0, ge=0, lt=1)
    only_right: bool = False

    def reward(self, accuracy: Accuracy) -> Reward:
        return CropArea(self.free_share, self.only_right, accuracy)


class FirstCropSpec(Spec):
    """1 if the first crop shows the evidence (AdaptVision's box reward, by gold boxes)."""

    name: Literal["first-crop"] = "first-crop"
    needed: float = Field(default=0.95, gt=0, le=1)
    """Share of each gold box."""
    only_right: bool = False

    def reward(self, accuracy: Accuracy) -> Reward:
        return FirstCrop(self.needed, self.only_right, accuracy)


class CropsAmongRightSpec(Spec):
    """Crops saved against the other right answers of the group (HDPO)."""

    name: Literal["crops-among-right"] = "crops-among-right"
    cost: float = Field(default=0.1, ge=0)
    per: Unit = "crop"
    most: float = Field(default=4.0, gt=0)
    """Largest saving that counts."""

    def reward(self, accuracy: Accuracy) -> Reward:
        return CropsAmongRight(self.cost, self.per, self.most, accuracy)


class CuriositySpec(Spec):
    """A bonus for calls while they are rare (Pixel-Reasoner)."""

    name: Literal["curiosity"] = "curiosity"
    rate: float = Field(default=0.3, ge=0, le=1)
    bonus: float = Field(default=0.5, ge=0)
    repeat: float = Field(default=0.05, ge=0)

    def reward(self, accuracy: Accuracy) -> Reward:
        return Curiosity(self.rate, self.bonus, self.repeat)


RewardSpec = Annotated[
    AccuracySpec
    | FormatSpec
    | ToolBonusSpec
    | CoverageSpec
    | AgreementSpec
    | RedundantSpec
    | CropPriceSpec
    | ChainOfFocusSpec
    | VisionThinkSpec
    | CropAreaSpec
    | FirstCropSpec
    | CropsAmongRightSpec
    | CuriositySpec,
    Field(discriminator="name"),
]
"""One entry of a recipe's `rewards`."""
SPECS: TypeAdapter[list[RewardSpec]] = TypeAdapter(list[RewardSpec])


class NamedReward(NamedTuple):
    """A reward as the trainer wants it."""

    name: str
    weight: float
    reward: Reward


def build(specs: Sequence[RewardSpec], *, judge: Judge | None = None, mask_truncated: bool = True) -> list[NamedReward]:
    """The rewards of a recipe, in its order.

    mask_truncated: rollouts that ran out of their budget get None from every reward, so that they are not learned from.
    Raises ConfigError for a name that comes twice, none at all, and `judged` without a judge.
    """
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ConfigError(
            f"A recipe's rewards are a list of different names; got {', '.join(names) or 'none'}. "
            "Name at least one, and each once."
        )
    accuracy = accuracy_of(specs, judge=judge)
    rewards = [(spec, spec.reward(accuracy)) for spec in specs]
    return [
        NamedReward(spec.name, spec.weight, UnlessTruncated(reward) if mask_truncated else reward)
        for spec, reward in rewards
    ]


def accuracy_of(specs: Sequence[RewardSpec], *, judge: Judge | None = None) -> Accuracy:
    """What a recipe calls right, whether that is rewarded by itself or not.

    Raises ConfigError for `judged` without a judge.
    """
    chosen = next((spec for spec in specs if isinstance(spec, AccuracySpec)), AccuracySpec())
    if chosen.judged and judge is None:
        raise ConfigError(
            "The reward 'accuracy' is `judged: true`, but no judge is given. Name a server, or judge by rule."
        )
    return Accuracy(RULES[chosen.rule], judge if chosen.judged else None, chosen.max_chars, chosen.failed_is_wrong)


def read_specs(entries: Sequence[Mapping[str, Any]]) -> list[RewardSpec]:
    """Entries as a YAML file holds them. Raises pydantic's ValidationError."""
    return SPECS.validate_python(list(entries))


PUBLISHED: Final[Mapping[str, list[RewardSpec]]] = MappingProxyType(
    {
        "deepeyes": [
            AccuracySpec(weight=0.8, max_chars=1000),
            FormatSpec(weight=0.2, style="penalty", max_chars=1000),
            ToolBonusSpec(weight=1.2),
        ],
        "mini-o3": [AccuracySpec(rule="open")],
        "chain-of-focus": [ChainOfFocusSpec()],
        "visionthink": [AccuracySpec(rule="open"), FormatSpec(weight=0.5), VisionThinkSpec()],
        "adaptvision": [
            AccuracySpec(rule="open"),
            FormatSpec(weight=0.5),
            VisionThinkSpec(),
            FirstCropSpec(weight=0.1),
            CropAreaSpec(weight=0.2),
        ],
        "pixel-reasoner": [AccuracySpec(rule="open", failed_is_wrong=True), CuriositySpec()],
    }
)
"""Rewards as published code adds them up, by project. Where that asks a judge what is right, here a rule says it: write
the list out, with `judged: true`, to ask one. Where it asks one about the box (adaptvision), gold boxes say it here; of
rows without them nobody does."""
