"""What a crop costs: rewards that make a model zoom where it helps and nowhere else.

Six ways, because papers disagree and none wins everywhere: a constant price, ranks within the group (Chain-of-Focus), a
price that turns over when direct answers are too rare (VisionThink), the area of the crop (AdaptVision), a price among
right answers only (HDPO), and a bonus for calls while they are rare (Pixel-Reasoner). Published ones give what their
published code gives, which is not always what the paper says; the differences are named.

All but `ChainOfFocus` are added to an accuracy of 0 or 1 and are 0 for a direct wrong answer. "Zoomed" means that a
readable call was made, served or not, as the published code counts by the text of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from qzoom_agent.geometry import Box
from qzoom_agent.training.rewards import BY_RULE, Accuracy, Rollout, by_group

_NO_DIVISION_BY_ZERO: Final = 1e-4
"""As in the published code of VisionThink, where it also decides: one direct answer in five right ones is below 0.2."""


@dataclass(frozen=True)
class CropPrice:
    """A constant price: `cost` for every crop, call or coarse view's worth of crop tokens, but for the first `free`.

    per "call": readable calls, the refused and failed ones too. per "crop": crops shown because the model asked. per
    "token": their visual tokens as a multiple of the coarse view's.
    """

    cost: float = 0.1
    per: Literal["call", "crop", "token"] = "crop"
    free: float = 0.0
    only_right: bool = False
    """Charge right answers only, so that a wrong one is not made worse by having looked."""
    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch) if self.only_right else [True] * len(batch)
        return [
            -self.cost * max(0.0, spent(one, self.per) - self.free) if charged else 0.0
            for one, charged in zip(batch, right, strict=True)
        ]


def spent(one: Rollout, per: Literal["call", "crop", "token"]) -> float:
    """How much zooming a rollout took."""
    if per == "call":
        return float(len(one.calls))
    if per == "crop":
        return float(len(one.crops))
    coarse = sum(view.tokens for view in one.trace.views if view.kind == "coarse")
    return sum(view.tokens for view in one.crops) / max(1, coarse)


@dataclass(frozen=True)
class ChainOfFocus:
    """Ranks within a group; takes the place of accuracy (Chain-of-Focus, arXiv 2505.15436, as coded).

    | in the group | direct, right | zoomed, right | zoomed, wrong | direct, wrong |
    |---|---|---|---|---|
    | a direct answer is right | 1 | 0.8 | 0.5 | 0 |
    | none is | - | 1 | 0.5 | 0 |
    """

    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch)
        values: list[float | None] = [None] * len(batch)
        for members in by_group(batch).values():
            easy = any(right[at] and not batch[at].calls for at in members)
            for at in members:
                if not batch[at].calls:
                    values[at] = float(right[at])
                elif right[at]:
                    values[at] = 0.8 if easy else 1.0
                else:
                    values[at] = 0.5
        return values


@dataclass(frozen=True)
class VisionThinkPrice:
    """0.1 off a right answer that zoomed; off a direct one too where those are too rare to be more than luck.

    VisionThink (arXiv 2507.13348) as coded: 1 accuracy + 0.5 format + 1 of this. A group whose right answers are direct
    in some but in less than `rare` of the cases loses `direct_cost` for the direct ones. As in its code, the price of
    zooming stays then, where the paper drops it.
    """

    cost: float = 0.1
    direct_cost: float = 0.1
    rare: float = 0.2
    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch)
        values: list[float | None] = [0.0] * len(batch)
        for members in by_group(batch).values():
            good = [at for at in members if right[at]]
            direct = [at for at in good if not batch[at].calls]
            luck = 0 < len(direct) / (len(good) + _NO_DIVISION_BY_ZERO) < self.rare
            for at in good:
                if batch[at].calls:
                    values[at] = -self.cost
                elif luck:
                    values[at] = -self.direct_cost
        return values


@dataclass(frozen=True)
class CropArea:
    """Minus the share of the image that the first box asks for, over `free_share` (AdaptVision, arXiv 2512.03794).

    As coded there, with weight 0.2: the box as written, not as served; one that cannot be read or whose corners are
    swapped costs nothing. `only_right` forgives wrong answers (its `acc_condition`).
    """

    free_share: float = 0.0
    only_right: bool = False
    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch) if self.only_right else [True] * len(batch)
        return [
            -max(0.0, asked_share(one) - self.free_share) if charged else 0.0
            for one, charged in zip(batch, right, strict=True)
        ]


@dataclass(frozen=True)
class FirstCrop:
    """1 if the first crop shows the evidence, at least `needed` of each gold box, else 0; None where no box is known.

    The box reward of AdaptVision (weight 0.1), whose judge is a language model that sees the crop; where boxes are
    known, nobody has to be asked. `only_right` gives wrong answers 0 (its `acc_condition`).
    """

    needed: float = 0.95
    only_right: bool = False
    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch) if self.only_right else [True] * len(batch)
        values: list[float | None] = []
        for one, counts in zip(batch, right, strict=True):
            crop = one.crops[0].region if one.crops else None
            shows = crop is not None and all(crop.coverage(box) >= self.needed for box in one.boxes)
            values.append(float(counts and shows) if one.boxes else None)
        return values


def asked_share(one: Rollout) -> float:
    """Share of the image that the first readable call asks for, 0 to 1; 0 if there is none or it has no extent."""
    call = one.calls[0] if one.calls else None
    view = one.trace.view(call.view) if call is not None else None
    if call is None or call.box is None or view is None or view.kind == "original":
        return 0.0
    box = Box(*call.box, frame=call.frame, view=view.id)
    if not box.finite:
        return 0.0
    whole = view.region.area / one.trace.views[0].region.area
    pixel = box.to_pixel(view.size, view.cell)
    width, height = min(max(0.0, pixel.width), view.width), min(max(0.0, pixel.height), view.height)
    return whole * width * height / view.size.area


@dataclass(frozen=True)
class CropsAmongRight:
    """How many crops fewer than the other right answers of its group took, times `cost`; 0 for wrong answers.

    The second channel of HDPO (Metis, arXiv 2604.08545): efficiency is compared among right answers alone. It sums to 0
    over them, so it can make no wrong answer look better than a right one and no group better than another; a group
    with fewer than two right answers learns nothing from it. At most `cost` times `most` either way.
    """

    cost: float = 0.1
    per: Literal["call", "crop", "token"] = "crop"
    most: float = 4.0
    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        right = self.accuracy.right(batch)
        values: list[float | None] = [0.0] * len(batch)
        for members in by_group(batch).values():
            took = {at: spent(batch[at], self.per) for at in members if right[at]}
            for at, own in took.items():
                saved = sum(took.values()) / len(took) - own
                values[at] = self.cost * min(max(saved, -self.most), self.most)
        return values


@dataclass(frozen=True)
class Curiosity:
    """A bonus for calling while less than `rate` of the group calls, and a price on every call after the first.

    Pixel-Reasoner (arXiv 2505.15966): `bonus` times the missing share of callers, minus `repeat` a further call. A cure
    for a call rate that has collapsed; beside `ToolBonus` it pays twice.
    """

    rate: float = 0.3
    bonus: float = 0.5
    repeat: float = 0.05

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        values: list[float | None] = [0.0] * len(batch)
        for members in by_group(batch).values():
            missing = max(0.0, self.rate - sum(bool(batch[at].calls) for at in members) / len(members))
            for at in members:
                calls = len(batch[at].calls)
                if calls:
                    values[at] = self.bonus * missing - self.repeat * (calls - 1)
        return values
