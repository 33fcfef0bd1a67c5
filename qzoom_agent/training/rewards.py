"""Rewards: what a finished episode is worth to training.

A reward is a pydantic model of its settings that is called on a batch of rollouts:

    CropPrice(cost=0.2)(rollouts)             # one number or None for each rollout
    {name: crop-price, cost: 0.2}             # the same in a recipe

It reads the recorded episode alone, and the evaluation's scorers decide whether an answer is right. A rollout for which
every reward is None has no advantage and is not learned from. Rewards of published projects give what the published
code gives. Lists of rewards in recipes, and rewards from outside this package, are in `reward_list`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, PrivateAttr

from qzoom_agent.config import AgentConfig, Config
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.redundancy import reasons
from qzoom_agent.evaluation.scorers import anls, chartqa, choice, ocrbench, open_answer, vqa
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.tasks.needle.tasks import exact
from qzoom_agent.evaluation.tasks.task import Score, Scorer
from qzoom_agent.geometry import Box
from qzoom_agent.review import OPINIONS, ReviewContext, hybrid_rule, refused_on_opinion, suffices
from qzoom_agent.trace import CallRecord, Trace
from qzoom_agent.views import View, original_id
from qzoom_agent.zoom.zoom import ZoomPlan

Values = list[float | None]
Rule = Literal["exact", "open", "choice", "anls", "chartqa", "vqa", "ocr"]
"""One of the evaluation's scorers: `exact` takes nothing but the answer, `open` finds it in a longer reply."""
Unit = Literal["call", "crop", "token", "refused"]
"""Unit of zooming: readable calls, refused and failed ones too; crops shown because the model asked; their
visual tokens as a multiple of the coarse view's; calls that the policy's review refused."""
Judge = Callable[[str, str, str], bool]
"""Decides whether an answer is right, given the question, the answer and the gold answer; asked from many threads."""
_AT_ONCE: Final = 16
"""Answers that a judge is asked about at the same time."""


@dataclass(frozen=True)
class Rollout:
    """One finished episode, and its question."""

    trace: Trace
    """Record of the episode."""
    sample: Sample
    """Rollouts whose samples have the same `id` are one group; `boxes` are in pixels of the original."""

    @property
    def answer(self) -> str:
        """The gold answer."""
        return self.sample.answer

    @property
    def answers(self) -> tuple[str, ...]:
        """All accepted answers."""
        return self.sample.answers or (self.sample.answer,)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of the answer; empty where unknown or where the coarse view suffices."""
        return self.sample.boxes

    @property
    def options(self) -> tuple[str, ...]:
        """The texts of a multiple choice in the order shown."""
        return self.sample.options

    @property
    def truncated(self) -> bool:
        """True if a limit of tokens or turns ended it before it could answer."""
        cut = bool(self.trace.turns) and self.trace.turns[-1].finish == "length"
        return cut or (self.trace.status == "budget" and self.trace.answer is None)

    @property
    def format_ok(self) -> bool:
        """True if every turn was read without a problem or a repair, and the last one is an answer."""
        clean = not any(turn.problems or turn.repairs for turn in self.trace.turns)
        return clean and bool(self.trace.turns) and self.trace.turns[-1].answer is not None

    @property
    def calls(self) -> list[CallRecord]:
        """The calls that could be read, whatever became of them."""
        return [call for turn in self.trace.turns for call in turn.calls]

    @property
    def crops(self) -> list[View]:
        """The crops that the model asked for and was shown."""
        asked = {call.result for call in self.calls if call.result is not None and call.arguments is None}
        return [view for view in self.trace.views if view.id in asked]


class Reward(Config, ABC):
    """A reward: its fields are the keys of an entry in a recipe."""

    name: str
    """Name in recipes and in the log."""
    weight: float = 1.0
    """Factor of its values in the sum; 0 only logs it."""
    scales: ClassVar[tuple[str, ...]] = ()
    """Settings that all values are proportional to, so that only `weight` is left of them if values are normalised."""

    @property
    def needs_look(self) -> bool:
        """True if it reads what gate and SD-RPN saw, so that they have to look whatever the policy is."""
        return False

    @abstractmethod
    def __call__(self, rollouts: Sequence[Rollout], accuracy: Accuracy | None = None) -> Values:
        """Return one value for each rollout, in order; all rollouts of a group have to be among them.

        `accuracy` decides which answers are right; None: the default `Accuracy()`.
        """


class GroupReward(Reward):
    """A reward that values the rollouts of a question together (`of_group`) or each by itself (`of_one`)."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.prefix = f"{cls.model_fields['name'].default}."  # for messages

    def __call__(self, rollouts: Sequence[Rollout], accuracy: Accuracy | None = None) -> Values:
        right = (accuracy or Accuracy()).right(rollouts)
        groups: dict[str, list[int]] = {}
        for at, one in enumerate(rollouts):
            groups.setdefault(one.sample.id, []).append(at)
        values: Values = [None] * len(rollouts)
        for members in groups.values():
            found = self.of_group([rollouts[at] for at in members], [right[at] for at in members])
            for at, value in zip(members, found, strict=True):
                values[at] = value
        return values

    def of_group(self, group: Sequence[Rollout], right: Sequence[bool]) -> Sequence[float | None]:
        """Return the values of all rollouts of one question; `right` says which answers are."""
        return [self.of_one(one, good) for one, good in zip(group, right, strict=True)]

    def of_one(self, one: Rollout, right: bool) -> float | None:
        """Return the value of a rollout by itself; None here, for rewards that compare rollouts in `of_group`."""
        return None


def exact_any(text: str | None, question: Sample) -> Score:
    """Score an answer as the needle tasks do, against every accepted one."""
    golds = question.answers or (question.answer,)
    return max((exact(text, replace(question, answer=gold)) for gold in golds), key=lambda score: score.value)


RULES: Final[Mapping[Rule, Scorer]] = MappingProxyType(
    {
        "exact": exact_any,
        "open": open_answer.rule,
        "choice": choice.clean,
        "anls": anls.clean,
        "chartqa": chartqa.clean,
        "vqa": vqa.clean,
        "ocr": ocrbench.clean,
    }
)


class Accuracy(Reward):
    """The evaluation's score of the answer, 0 to 1; 0 for no answer.

    The rule comes first. Answers that it refuses are put to the judge, if there is one, all of a batch at once: as in
    the evaluation, beside each accepted answer until one fits, and never for a multiple choice.
    """

    prefix = "accuracy."
    name: Literal["accuracy"] = "accuracy"
    rule: Rule = "exact"
    """Finds the answer in a reply."""
    judged: bool = False
    """Put answers that the rule refuses to the recipe's judge."""
    max_chars: int | None = Field(default=None, gt=0)
    """Answers of this many characters are wrong unread (DeepEyes: 1,000, against answers that list everything)."""
    failed_is_wrong: bool = False
    """Answers whose last call gave no crop are wrong (Pixel-Reasoner)."""
    _judge: Judge | None = PrivateAttr(default=None)

    def asking(self, judge: Judge | None) -> Accuracy:
        """Return the same reward with a judge for answers that the rule refuses."""
        copy = self.model_copy()
        copy._judge = judge
        return copy

    def __call__(self, rollouts: Sequence[Rollout], accuracy: Accuracy | None = None) -> Values:
        return [*self.scores(rollouts)]

    def right(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Return True for each answer that is worth more than half, where a rule gives shares."""
        return [score > 0.5 for score in self.scores(rollouts)]

    def scores(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the score of each answer."""
        texts = [self._text(one) for one in rollouts]
        samples = [replace(one.sample, answers=one.answers) for one in rollouts]
        found = [RULES[self.rule](text, sample).value for text, sample in zip(texts, samples, strict=True)]
        if self._judge is not None:
            refused = [at for at, score in enumerate(found) if score <= 0.5 and texts[at] and not samples[at].options]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                verdicts = pool.map(self._verdict, [rollouts[at] for at in refused])
            for at, verdict in zip(refused, verdicts, strict=True):
                found[at] = max(found[at], float(verdict))
        return found

    def _text(self, one: Rollout) -> str | None:
        """Return the answer that counts; None if there is none."""
        text, calls = one.trace.answer, one.calls
        if text is None or one.trace.status == "error" or (self.max_chars is not None and len(text) >= self.max_chars):
            return None
        return None if self.failed_is_wrong and calls and calls[-1].result is None else text

    def _verdict(self, one: Rollout) -> bool:
        """Ask about the final answer beside the accepted ones, one after another as the evaluation does."""
        assert self._judge is not None
        judge, asked, said = self._judge, one.trace.question, final_answer(one.trace.answer or "")
        return said is not None and any(judge(asked, said, gold) for gold in one.answers)


class Format(GroupReward):
    """1 or 0 as a `bonus`, 0 or -1 as a `penalty` (DeepEyes), for episodes whose every turn could be read or not."""

    name: Literal["format"] = "format"
    style: Literal["bonus", "penalty"] = "bonus"
    max_chars: int | None = Field(default=None, gt=0)
    """Answers of this many characters are malformed."""

    def of_one(self, one: Rollout, right: bool) -> float:
        long = self.max_chars is not None and len(one.trace.answer or "") >= self.max_chars
        return float(one.format_ok and not long) - (self.style == "penalty")


class ToolBonus(GroupReward):
    """1 if the answer is right and a crop that the model asked for was shown, else 0.

    DeepEyes (arXiv 2505.14362) as coded: 0.8 accuracy + 0.2 format + 1.2 of this. It makes a model zoom, needed or not.
    """

    name: Literal["tool-bonus"] = "tool-bonus"

    def of_one(self, one: Rollout, right: bool) -> float:
        return float(right and bool(one.crops))


class Coverage(GroupReward):
    """Share of the worst-covered gold box that the crops show, 0 to 1; None where no box is known."""

    name: Literal["coverage"] = "coverage"
    max_share: float = Field(default=0.25, gt=0, le=1)
    """Crops that are a larger share of the image count for nothing: the whole image covers every box."""

    def of_one(self, one: Rollout, right: bool) -> float | None:
        whole = {view.id: view.size.area for view in one.trace.views if view.kind == "original"}
        fine = [crop for crop in _crops_of(one.trace) if crop.region.area <= self.max_share * whole[crop.origin]]
        return min((max((crop.coverage(box) for crop in fine), default=0.0) for box in one.boxes), default=None)


class FirstCrop(GroupReward):
    """1 if the first crop shows at least `needed` of each gold box, else 0; None where no box is known.

    The box reward of AdaptVision (weight 0.1), whose judge is a language model that sees the crop; here gold boxes
    decide.
    """

    name: Literal["first-crop"] = "first-crop"
    needed: float = Field(default=0.95, gt=0, le=1)
    only_right: bool = False
    """Give wrong answers 0 (its `acc_condition`)."""

    def of_one(self, one: Rollout, right: bool) -> float | None:
        shown = one.crops[:1] if right or not self.only_right else []
        shows = [all(crop.coverage(box) >= self.needed for box in one.boxes) for crop in shown]
        return float(any(shows)) if one.boxes else None


class Agreement(GroupReward):
    """Agreement of the crops with what gate and SD-RPN saw in the coarse view, 0 to 1; None without a look.

    Crops that the policy inserted count: where they show what was seen, there is nothing to call for. Where the look
    says that the coarse view suffices, 1 without a crop and 0 with one.
    """

    name: Literal["agreement"] = "agreement"
    measure: Literal["heat", "iou"] = "heat"
    """`heat`: share of the map inside the crops, less the share that crops of this size hold anywhere. `iou`: overlap
    of the crops with the proposed boxes, mean over the crops. Of several images, the mean over their maps."""

    @property
    def needs_look(self) -> bool:
        return True

    def of_one(self, one: Rollout, right: bool) -> float | None:
        seen, crops = one.trace.perception, _crops_of(one.trace)
        if seen is None:
            return None
        if all(suffices(part, 1.0, map_decides=_map_decides(one.trace)) for part in seen.every):
            return float(not crops)
        if not crops:
            return 0.0
        if self.measure == "iou":
            proposed = [Box(*box, view=original_id(part.image)) for part in seen.every for box in part.boxes]
            found = [[crop.region.iou(box) for box in proposed if box.view == crop.origin] for crop in crops]
            return sum(max(overlaps, default=0.0) for overlaps in found) / len(crops)
        gains = []
        for part in seen.every:
            whole = next(view.region for view in one.trace.views if view.id == original_id(part.image))
            own = [crop.region for crop in crops if crop.origin == whole.view]
            extent = whole if part.extent is None else Box(*part.extent, view=whole.view)
            gains += [gain] if (gain := heat_gain(part.heat, own, whole, extent)) is not None else []
        return sum(gains) / len(gains) if gains else None


def _crops_of(trace: Trace) -> list[View]:
    """Return all crops, whoever asked for them."""
    return [view for view in trace.views if view.kind == "crop"]


def _map_decides(trace: Trace) -> bool:
    """Return True if a map without a region means that the coarse view suffices."""
    return AgentConfig().replace(**trace.config).perception.gate == "statistics"


def heat_gain(heat: Sequence[Sequence[float]], crops: Sequence[Box], image: Box, extent: Box) -> float | None:
    """Return the share of the map inside the union of `crops`, less its share of the area, 0 to 1; None without a map.

    Args:
        heat: Rows of cells that cover `extent`. A cell counts by its part in the crop that covers it best.
        crops: In pixels of the original, as `image` and `extent` are.
        image: The whole original.
        extent: The area of the map: larger than the image where the model was shown it padded.
    """
    if (total := sum(map(sum, heat))) <= 0:
        return None
    width, height = extent.width / len(heat[0]), extent.height / len(heat)
    mass = area = 0.0
    for row, values in enumerate(heat):
        for column, value in enumerate(values):
            x, y = extent.x1 + column * width, extent.y1 + row * height
            cell = Box(x, y, x + width, y + height, view=image.view)
            inside = max((crop.coverage(cell) for crop in crops), default=0.0)
            mass, area = mass + inside * value / total, area + inside * cell.area / image.area
    return max(0.0, mass - area)


class Redundant(GroupReward):
    """Minus the number of crops that added nothing.

    Counted are the model's crops that the evaluation finds redundant from what is known of the question (where nothing
    is, those that repeat a view), and its calls that the policy's review refused, except for a spent budget and a last
    turn.
    """

    name: Literal["redundant"] = "redundant"
    most: int = Field(default=4, gt=0)
    """Further ones are not counted."""
    opinions: bool = False
    """Count crops that the branches speak against as well, where the policy has no review that refuses them."""

    @property
    def needs_look(self) -> bool:
        return self.opinions

    def of_one(self, one: Rollout, right: bool) -> float:
        own = {view.id for view in one.crops}
        found = reasons(one.trace.views, one.boxes, coarse_suffices=one.sample.coarse_suffices)
        against = unwanted(one.trace) if self.opinions else set()
        count = sum(reason is not None or name in against for name, reason in found if name in own)
        count += refused_by_review(one)
        return 0.0 - min(self.most, count)


def unwanted(trace: Trace) -> set[str]:
    """Return the ids of served crops that gate or SD-RPN would have had refused; empty without a look.

    Each call is put to the review of the hybrid policy as if it was the first to be refused, after which a model may
    insist.
    """
    look = trace.perception
    if look is None:
        return set()
    asked = {call.result for turn in trace.turns for call in turn.calls}
    views = {view.id: view for view in trace.views}
    shown = [view for view in trace.views if view.kind != "original" and view.id not in asked]
    found: set[str] = set()
    for at, turn in enumerate(trace.turns):
        before = ReviewContext(
            look=look,
            refused_turns=refused_on_opinion([earlier.calls for earlier in trace.turns[:at]]),
            crops_read=sum(view.kind == "crop" for view in shown),
            image=trace.views[0].size,
            replan=lambda box: ZoomPlan("original", error="It is judged, not cut."),
            name=str,
            write=str,
            config=AgentConfig().replace(**trace.config).review,
            map_decides=_map_decides(trace),
        )
        for crop in (views[call.result] for call in turn.calls if call.result is not None):
            cut = crop.extent if crop.source else None
            plan = ZoomPlan(crop.origin, box=crop.region, size=crop.size, tokens=crop.tokens, cut=cut)
            context = replace(before, look=look.of(crop.image), image=views[crop.origin].size)
            decision = hybrid_rule(plan, shown, context)
            if decision.code in OPINIONS and decision.plan is None:
                found.add(crop.id)
            shown.append(crop)
    return found


# --- what zooming costs ----------------------------------------------------------------------------------------------
# All but `ChainOfFocus` are added to an accuracy of 0 or 1. To zoom is to make a readable call, whether served or not.


class CropPrice(GroupReward):
    """A constant price: `cost` for every unit of zooming but the first `free`."""

    scales = ("cost",)
    name: Literal["crop-price"] = "crop-price"
    cost: float = Field(default=0.1, ge=0)
    per: Unit = "crop"
    free: float = Field(default=0.0, ge=0)
    only_right: bool = False
    """Charge right answers only, so that a wrong one is not made worse by having looked."""

    def of_one(self, one: Rollout, right: bool) -> float:
        pays = right or not self.only_right
        return -self.cost * max(0.0, spent(one, self.per) - self.free) if pays else 0.0


def spent(one: Rollout, per: Unit) -> float:
    """Return how much zooming a rollout took."""
    if per == "call":
        return float(len(one.calls))
    if per == "crop":
        return float(len(one.crops))
    if per == "refused":
        return float(refused_by_review(one))
    coarse = sum(view.tokens for view in one.trace.views if view.kind == "coarse")
    return sum(view.tokens for view in one.crops) / max(1, coarse)


def refused_by_review(one: Rollout) -> int:
    """Return the number of calls that were refused for what they show, not for a spent budget or a last turn."""
    return sum(call.decision == "refused" and call.code not in ("", "budget", "last_turn") for call in one.calls)


class CropArea(GroupReward):
    """Minus the share of the image that the first box asks for, over `free_share` (AdaptVision, arXiv 2512.03794).

    As coded there, with weight 0.2: the box as written, not as served; one that cannot be read or whose corners are
    swapped costs nothing.
    """

    name: Literal["crop-area"] = "crop-area"
    free_share: float = Field(default=0.0, ge=0, lt=1)
    only_right: bool = False
    """Charge right answers only (its `acc_condition`)."""

    def of_one(self, one: Rollout, right: bool) -> float:
        return -max(0.0, asked_share(one) - self.free_share) if right or not self.only_right else 0.0


def asked_share(one: Rollout) -> float:
    """Return the share of the image that the first readable call asks for, 0 to 1; 0 without one or without extent."""
    call = next((call for call in one.calls if call.arguments is None), None)
    view = one.trace.view(call.view) if call is not None else None
    if call is None or call.box is None or view is None or view.kind == "original":
        return 0.0
    box = Box(*call.box, frame=call.frame, view=view.id)
    if not box.finite:
        return 0.0
    image = one.trace.view(view.origin)
    assert image is not None, "a trace has the original of each view"
    whole = view.region.area / image.region.area
    pixel = box.to_pixel(view.size, view.cell)
    width, height = min(max(0.0, pixel.width), view.width), min(max(0.0, pixel.height), view.height)
    return whole * width * height / view.size.area


class ChainOfFocus(GroupReward):
    """Ranks within a group; takes the place of accuracy (Chain-of-Focus, arXiv 2505.15436, as coded).

    | in the group | direct, right | zoomed, right | zoomed, wrong | direct, wrong |
    |---|---|---|---|---|
    | a direct answer is right | 1 | 0.8 | 0.5 | 0 |
    | none is | - | 1 | 0.5 | 0 |
    """

    name: Literal["chain-of-focus"] = "chain-of-focus"

    def of_group(self, group: Sequence[Rollout], right: Sequence[bool]) -> list[float]:
        ranked = list(zip(group, right, strict=True))
        easy = any(good and not one.calls for one, good in ranked)
        zoomed = {True: 0.8 if easy else 1.0, False: 0.5}
        return [zoomed[good] if one.calls else float(good) for one, good in ranked]


class VisionThinkPrice(GroupReward):
    """Minus `cost` for a right answer that zoomed; a direct one pays too where those are too rare to be more than luck.

    VisionThink (arXiv 2507.13348) as coded: 1 accuracy + 0.5 format + 1 of this. As in its code, the price of zooming
    stays where direct answers are rare; the paper drops it.
    """

    scales = ("cost", "direct_cost")
    name: Literal["visionthink-price"] = "visionthink-price"
    cost: float = Field(default=0.1, ge=0)
    direct_cost: float = Field(default=0.1, ge=0)
    rare: float = Field(default=0.2, ge=0, le=1)
    """Share of direct among right answers of a group below which they count as luck."""

    def of_group(self, group: Sequence[Rollout], right: Sequence[bool]) -> list[float]:
        direct = sum(good and not one.calls for one, good in zip(group, right, strict=True))
        # the published code's guard against division by zero also decides: one in five right ones is below 0.2
        luck = 0 < direct / (sum(right) + 1e-4) < self.rare
        price = {True: -self.cost, False: -self.direct_cost if luck else 0.0}
        return [price[bool(one.calls)] if good else 0.0 for one, good in zip(group, right, strict=True)]


class CropsAmongRight(GroupReward):
    """`cost` for every unit of zooming saved against the other right answers of the group; 0 for wrong answers.

    The second channel of HDPO (Metis, arXiv 2604.08545). It takes at most `cost` times `most` from a right answer; keep
    that below what accuracy is worth. A group with fewer than two right answers learns nothing from it.
    """

    scales = ("cost",)
    name: Literal["crops-among-right"] = "crops-among-right"
    cost: float = Field(default=0.1, ge=0)
    per: Unit = "crop"
    most: float = Field(default=4.0, gt=0)
    """Largest saving or excess that counts."""

    def of_group(self, group: Sequence[Rollout], right: Sequence[bool]) -> list[float]:
        took = [spent(one, self.per) if good else None for one, good in zip(group, right, strict=True)]
        mean = sum(own for own in took if own is not None) / max(1, sum(right))
        return [0.0 if own is None else self.cost * min(max(mean - own, -self.most), self.most) for own in took]


class Curiosity(GroupReward):
    """A bonus for calling while less than `rate` of the group calls, and a price on every call after the first.

    Pixel-Reasoner (arXiv 2505.15966): `bonus` times the missing share of callers, minus `repeat` a further call. It
    helps a call rate that has collapsed; beside `ToolBonus` it pays twice.
    """

    scales = ("bonus", "repeat")
    name: Literal["curiosity"] = "curiosity"
    rate: float = Field(default=0.3, ge=0, le=1)
    bonus: float = Field(default=0.5, ge=0)
    repeat: float = Field(default=0.05, ge=0)

    def of_group(self, group: Sequence[Rollout], right: Sequence[bool]) -> list[float]:
        calls = [len(one.calls) for one in group]
        missing = max(0.0, self.rate - sum(map(bool, calls)) / len(calls))
        return [self.bonus * missing - self.repeat * (count - 1) if count else 0.0 for count in calls]
