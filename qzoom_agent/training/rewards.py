"""Rewards: what an episode is worth to training, computed from its trace and from nothing else.

A reward is a pure function of a batch of rollouts, `rewards(batch) -> one number or None for each`. It never runs a
model or reads pixels, so the same object scores a rollout of the trainer, a trace on disk and a table typed in a test.
Whether an answer is right is decided by the scorers of the evaluation, never by a second rule.

None means "says nothing about this rollout": a row for which every reward is None has no advantage at all, which is how
rollouts that ran out of turns are left out (`unless_truncated`) instead of being taught as wrong (Mini-o3, arXiv
2509.07969). Rewards that compare the rollouts of one question are in `evals.prices`; names for recipes in
`evals.reward_specs`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import PIL.Image

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.redundancy import reasons
from qzoom_agent.evaluation.scorers import anls, chartqa, choice, ocrbench, open_answer, vqa
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.tasks.needle.tasks import exact
from qzoom_agent.evaluation.tasks.task import Score, Scorer
from qzoom_agent.geometry import Box
from qzoom_agent.trace import CallRecord, Trace
from qzoom_agent.training.branch_disagreement import unwanted
from qzoom_agent.views import View


@dataclass(frozen=True)
class Rollout:
    """One finished episode, and what is known about its question."""

    trace: Trace
    answer: str
    """The gold answer."""
    answers: tuple[str, ...] = ()
    """All accepted answers; empty: `answer` alone."""
    boxes: tuple[Box, ...] = ()
    """Where the answer is, in pixels of the original; empty where nobody knows or where the coarse view suffices."""
    coarse_suffices: bool | None = None
    """Whether the coarse view holds the answer; None where nobody knows."""
    group: str = ""
    """Rollouts of one group answer the same question."""
    truncated: bool = False
    """It was stopped by a budget and had no chance to answer."""
    format_ok: bool = True
    """See `well_formed`."""
    options: tuple[str, ...] = ()
    """Texts of a multiple choice in the order shown."""

    @property
    def calls(self) -> list[CallRecord]:
        """The calls that could be read, whatever became of them."""
        return [call for turn in self.trace.turns for call in turn.calls]

    @property
    def crops(self) -> list[View]:
        """The crops that the model asked for and was shown."""
        asked = {call.result for call in self.calls if call.result is not None}
        return [view for view in self.trace.views if view.id in asked]


def well_formed(trace: Trace) -> bool:
    """Whether every turn was read without a problem or a repair, and the last one is an answer."""
    clean = not any(turn.problems or turn.repairs for turn in trace.turns)
    return clean and bool(trace.turns) and trace.turns[-1].answer is not None


Reward = Callable[[Sequence[Rollout]], list[float | None]]
Judge = Callable[[str, str, str], Awaitable[bool]]
"""Whether an answer is right: question, answer, gold answer."""

_NO_IMAGE: Final = PIL.Image.new("RGB", (1, 1))


def exact_any(text: str | None, question: Sample) -> Score:
    """The scorer of the needle tasks, with every accepted answer."""
    golds = question.answers or (question.answer,)
    return max((exact(text, replace(question, answer=gold)) for gold in golds), key=lambda score: score.value)


RULES: Final[Mapping[str, Scorer]] = MappingProxyType(
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
"""The scorers of the evaluation by name."""


@dataclass(frozen=True)
class Accuracy:
    """What the evaluation's own scorer gives the answer, 0 to 1; 0 for none.

    Rules come first; only an answer that no rule accepts is put to `judge`, all of a batch at once. As in the
    evaluation (`scoring.judge.judged`) it stands beside each accepted one until one fits, and a multiple choice is put
    to nobody. Answers of `max_chars` characters or more are wrong without being read (DeepEyes: 1,000, against answers
    that list everything).
    """

    rule: Scorer = exact_any
    judge: Judge | None = None
    max_chars: int | None = None
    failed_is_wrong: bool = False
    """An answer whose last call gave no crop is wrong (Pixel-Reasoner)."""

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        return [*self.scores(batch)]

    def right(self, batch: Sequence[Rollout]) -> list[bool]:
        """Whether each answer is right: worth more than half, where a rule gives shares."""
        return [score > 0.5 for score in self.scores(batch)]

    def scores(self, batch: Sequence[Rollout]) -> list[float]:
        """What each answer is worth."""
        said = [self._said(one) for one in batch]
        found = [self.rule(text, _question(one)).value for text, one in zip(said, batch, strict=True)]
        if self.judge is None:
            return found
        open_at = [at for at, score in enumerate(found) if score <= 0.5 and said[at] and not batch[at].options]
        verdicts = _together(self._ask(self.judge, batch[at]) for at in open_at)
        for at, verdict in zip(open_at, verdicts, strict=True):
            found[at] = max(found[at], float(verdict))
        return found

    async def _ask(self, judge: Judge, one: Rollout) -> bool:
        """Whether the final answer is one of the accepted ones, asked one after another as the evaluation does."""
        said = final_answer(one.trace.answer or "")
        if said is None:
            return False
        for gold in one.answers or (one.answer,):
            if await judge(one.trace.question, said, gold):
                return True
        return False

    def _said(self, one: Rollout) -> str | None:
        """The answer that counts; None if there is none."""
        text, calls = one.trace.answer, one.calls
        if text is None or one.trace.status == "error" or (self.max_chars is not None and len(text) >= self.max_chars):
            return None
        return None if self.failed_is_wrong and calls and calls[-1].result is None else text


BY_RULE: Final = Accuracy()
"""Right by the rule of the evaluation."""


def _question(one: Rollout) -> Sample:
    """What a scorer needs of the question; no scorer looks at the image."""
    return Sample(
        id=one.group,
        task="",
        kind="",
        image=_NO_IMAGE,
        question=one.trace.question,
        answer=one.answer,
        boxes=one.boxes,
        coarse_suffices=one.coarse_suffices,
        answers=one.answers or (one.answer,),
        options=one.options,
    )


def _together(asked: Iterable[Awaitable[bool]]) -> list[bool]:
    """The results of all, awaited at once; from any thread, whether it has an event loop or not."""

    async def gather() -> list[bool]:
        return list(await asyncio.gather(*asked))

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, gather()).result()


def awaited(verdict: Callable[[str, str, str], bool]) -> Judge:
    """A judge that blocks while it asks its server, as one that can be asked many times at once."""

    async def judge(question: str, answer: str, gold: str) -> bool:
        return await asyncio.to_thread(verdict, question, answer, gold)

    return judge


@dataclass(frozen=True)
class Format:
    """Whether every turn could be read: 1 or 0 as a `bonus`, 0 or -1 as a `penalty` (DeepEyes).

    An answer of `max_chars` characters or more is malformed as well.
    """

    style: Literal["bonus", "penalty"] = "bonus"
    max_chars: int | None = None

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        worst = -1.0 if self.style == "penalty" else 0.0
        return [worst + self._good(one) for one in batch]

    def _good(self, one: Rollout) -> bool:
        text = one.trace.answer
        return one.format_ok and not (text is not None and self.max_chars is not None and len(text) >= self.max_chars)


@dataclass(frozen=True)
class ToolBonus:
    """1 if the answer is right and a crop that the model asked for was shown, else 0.

    DeepEyes (arXiv 2505.14362) as coded: 0.8 accuracy + 0.2 format + 1.2 of this. It makes a model zoom, needed or not.
    """

    accuracy: Accuracy = BY_RULE

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        return [float(right and bool(one.crops)) for one, right in zip(batch, self.accuracy.right(batch), strict=True)]


@dataclass(frozen=True)
class Coverage:
    """Share of the evidence that the crops show, 0 to 1, of the worst-covered gold box; None where no box is known.

    A crop larger than `max_share` of the image counts for nothing: the whole image covers every box.
    """

    max_share: float = 0.25

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        return [self._covered(one) for one in batch]

    def _covered(self, one: Rollout) -> float | None:
        image = one.trace.views[0].size.area if one.trace.views else 0
        crops = [view.region for view in one.trace.views if view.kind == "crop"]
        fine = [crop for crop in crops if crop.area <= self.max_share * image]
        best = [max((crop.coverage(box) for crop in fine), default=0.0) for box in one.boxes]
        return min(best, default=None)


@dataclass(frozen=True)
class Agreement:
    """How far the crops agree with what gate and SD-RPN saw in the coarse view; needs no gold box.

    Crops that the policy inserted count: where they show what was seen, there is nothing to call for. `heat`: share of
    the map inside the crops, less the share that crops of this size hold anywhere (a crop of the whole image is worth
    0). `iou`: overlap of the crops with the proposed boxes, mean over the crops. Where the gate says that the coarse
    view suffices, 1 without a crop and 0 with one. None for an episode without a look.
    """

    measure: Literal["heat", "iou"] = "heat"

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        return [self._agrees(one) for one in batch]

    def _agrees(self, one: Rollout) -> float | None:
        seen = one.trace.perception
        if seen is None:
            return None
        crops = [view.region for view in one.trace.views if view.kind == "crop"]
        if seen.fired is False or (seen.fired is None and not seen.boxes and not seen.heat):
            return float(not crops)
        if not crops:
            return 0.0
        if self.measure == "iou":
            proposed = [Box(*box) for box in seen.boxes]
            return sum(max((crop.iou(box) for box in proposed), default=0.0) for crop in crops) / len(crops)
        return heat_gain(seen.heat, crops, one.trace.views[0].region)


def heat_gain(heat: Sequence[Sequence[float]], crops: Sequence[Box], image: Box) -> float | None:
    """Share of the map inside the union of `crops`, less its share of the area, 0 to 1; None without a map.

    `heat` has rows of cells that cover `image`; crops and image are in original pixels. A cell counts by the part
    of it that lies in the crop that covers it best.
    """
    rows, columns = len(heat), len(heat[0]) if heat else 0
    total = sum(map(sum, heat))
    if total <= 0:
        return None
    width, height = image.width / columns, image.height / rows
    mass = area = 0.0
    for row in range(rows):
        for column in range(columns):
            cell = Box(column * width, row * height, (column + 1) * width, (row + 1) * height)
            inside = max(crop.coverage(cell) for crop in crops)
            mass += inside * heat[row][column] / total
            area += inside / (rows * columns)
    return max(0.0, mass - area)


@dataclass(frozen=True)
class Redundant:
    """Minus the number of crops that added nothing, at most `most`, whoever judges that.

    Counted are the model's crops that `evals.redundancy` finds redundant from what is known of the question (where
    nothing is, those that repeat a view), and its calls that the policy's review refused, but for a spent budget
    and a last turn.
    """

    most: int = 4
    opinions: bool = False
    """Count crops that gate or SD-RPN spoke against as well, in episodes that nobody reviewed (`evals.opinions`)."""

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        return [0.0 - min(self.most, self._count(one)) for one in batch]

    def _count(self, one: Rollout) -> int:
        own = {view.id for view in one.crops}
        found = reasons(one.trace.views, one.boxes, coarse_suffices=one.coarse_suffices)
        against = unwanted(one.trace) if self.opinions else set()
        refused = sum(call.decision == "refused" and call.code not in ("", "budget", "last_turn") for call in one.calls)
        return sum(reason is not None or name in against for name, reason in found if name in own) + refused


@dataclass(frozen=True)
class UnlessTruncated:
    """Another reward, which does not see the rollouts that ran out of their budget; those get None."""

    reward: Reward

    def __call__(self, batch: Sequence[Rollout]) -> list[float | None]:
        kept = [at for at, one in enumerate(batch) if not one.truncated]
        values: list[float | None] = [None] * len(batch)
        for at, value in zip(kept, self.reward([batch[at] for at in kept]), strict=True):
            values[at] = value
        return values


def by_group(batch: Sequence[Rollout]) -> dict[str, list[int]]:
    """Indices of the rollouts of each group, in order."""
    groups: dict[str, list[int]] = {}
    for at, one in enumerate(batch):
        groups.setdefault(one.group, []).append(at)
    return groups
