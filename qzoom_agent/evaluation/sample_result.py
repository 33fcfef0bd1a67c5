"""One sample, answered once: what was asked, what came back, what it is worth and what it cost.

A `SampleResult` is one line of a run folder's `samples.jsonl`. It holds everything that scoring, statistics and
reports need, so that none of them has to load the task or the model again. Its `key` is a hash of all that decides
the answer: the sample (image included), the question as asked, the configuration, the weights, the seed. Two rows of
one key are the same experiment, whenever and wherever they were run.

Gold boxes reach the agent under the policies `oracle` and `random` only, the latter for their sizes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import PIL.Image
from pydantic import AfterValidator, AliasChoices, BaseModel, Field, JsonValue, computed_field

from qzoom_agent.config import AgentConfig, PolicyName
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.redundancy import INSIDE, Redundancy, count
from qzoom_agent.evaluation.tasks.task import CustomScorer, Score, Scorer, apply, rule_version
from qzoom_agent.geometry import Box
from qzoom_agent.images import digest, load_image, upright_size
from qzoom_agent.trace import Count, Quad, Text, Trace, Usage
from qzoom_agent.views import ViewStore, original_id

Cause = Literal["failed", "never looked", "looked elsewhere", "saw and misread", "looked, place unknown"]
TAKE_GOLD: frozenset[PolicyName] = frozenset({"oracle", "random"})
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]
"""A share of an area, whose rounding may go over 1."""
_TOLD = ("kind", "cluster", "gold", "options", "meta", "box_images")
"""Fields that a task can correct without another answer."""


def _in_time(usage: Usage) -> Usage:
    for name, seconds in usage.seconds:
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds.{name}: Input should be a finite number that is not negative")
    return usage


class AnswerLike(Protocol):
    """The result of an agent, such as `qzoom_agent.answer.Answer`."""

    @property
    def text(self) -> str | None: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def store(self) -> ViewStore: ...


class AgentLike(Protocol):
    """Anything that can be evaluated: `qzoom_agent.agent.Agent`, or what else answers a question about an image."""

    @property
    def config(self) -> AgentConfig: ...

    def run(
        self, image: PIL.Image.Image, question: str, *, boxes: Sequence[Box] | None = None, seed: int | None = None
    ) -> AnswerLike:
        """Answer a question; of one about several images, `image` is a list of them."""


class SampleResult(BaseModel, frozen=True, use_attribute_docstrings=True):
    """One sample, answered once. See the module's note."""

    key: str = Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")
    task: str = Field(validation_alias=AliasChoices("task", "suite"))
    index: int
    """Place of the sample in its task."""
    repeat: int = 0
    id: Text
    kind: Text
    cluster: Text
    """Samples of one cluster are not independent; the sample's own id where it stands alone."""
    seed: int
    """The episode's."""
    row: str = ""
    """Digest of the row of the table that it was read from, in runs that tell by it whether to ask again."""
    image: str = Field(pattern=r"^[A-Za-z0-9_-]{0,128}$")
    """Digest of the sample's image; empty if it could not be read."""
    other_images: list[str] = Field(default_factory=list)
    """Digests of its further images; empty in rows of older releases, which did not write them."""
    size: tuple[int, int]
    """Its width and height in pixels."""
    question: Text
    gold: list[Text]
    """All accepted answers, the first is shown."""
    options: list[Text] = Field(default_factory=list)
    meta: dict[str, JsonValue] = Field(default_factory=dict)
    boxes: list[Quad] = Field(default_factory=list)
    """Boxes of the answer, in pixels of their image; empty if unknown or if no crop is needed."""
    box_images: list[int] = Field(default_factory=list)
    """The image of each, counted from 0; empty where the question has one image."""
    coarse_suffices: bool | None = None

    answer: str | None = None
    status: str
    """The trace's status; "error" also when the agent raised."""
    error: Text | None = None
    scores: dict[str, Score] = Field(default_factory=dict)
    """By scorer, the task's default first."""
    rules: dict[str, str] = Field(default_factory=dict)
    """Version of each scorer (`rule_version`); empty in rows of older releases, which did not write it."""

    answer_probability: float | None = None
    """Probability of the answer's least likely token, not calibrated; None without log-probabilities."""
    confidence: float | None = None
    """Calibrated probability that the answer is right; None without a calibration."""
    usage: Annotated[Usage, AfterValidator(_in_time)] = Field(default_factory=Usage)
    token_layers: Amount = 0.0
    """Prefill work: tokens times decoder layers, of the coarse pass and of all turns."""
    turns: Count = 0
    zooms: Count = 0
    """Crops shown, whoever asked for them."""
    crops: list[Quad] = Field(default_factory=list)
    """Their boxes, in pixels of their image."""
    crop_images: list[int] = Field(default_factory=list)
    """The image of each, counted from 0; empty where the question has one image."""
    unread: Count = 0
    """Attempts to call the zoom tool that could not be read."""
    gate: float | None = None
    """The gate's score; None where there was no gate."""
    fired: bool | None = None
    """The gate asked for more detail."""
    looks: Count = 0
    """Looks of the branches."""
    proposed: Count = 0
    """Boxes that they proposed."""
    recall: Share | None = None
    """Share of the needle inside the best crop, of the worst-covered needle; None without needles."""
    iou: Share | None = None
    """Intersection over union of needle and best crop, the mean over needles; None without needles."""
    redundancy: Redundancy | None = None
    """The crops and how many of them added nothing (`redundancy`); None if it is unknown what was needed."""
    elapsed: Amount = 0.0
    """Seconds since the process that asked had finished its last sample, whatever ran side by side: they add up to the
    time of the run."""
    peak_memory: dict[str, int] = {}
    """Most bytes that the process that asked had held by then: "host", and "device" where there is an accelerator."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def visual_tokens(self) -> int:
        return self.usage.visual_tokens

    @property
    def calls(self) -> int:
        """Attempts to call the zoom tool, the unreadable ones counted."""
        return self.usage.requested + self.unread

    @property
    def failed_calls(self) -> int:
        return self.usage.failed + self.unread

    @property
    def cause(self) -> Cause:
        """Reason that the answer is wrong, if it is, as far as the crops tell.

        A needle that the coarse view shows, or of which a crop holds 95 %, was seen and misread.
        """
        if self.status == "error":
            return "failed"
        if self.coarse_suffices or (self.recall is not None and self.recall >= INSIDE):
            return "saw and misread"
        if not self.zooms:
            return "never looked"
        return "looked, place unknown" if self.recall is None else "looked elsewhere"

    def value(self, scorer: str) -> float:
        """Return the worth of the answer, 0 to 1. A failed sample is worth 0."""
        return self.scores[scorer].value if scorer in self.scores else 0.0

    def sample(self) -> Sample:
        """Return the sample as scorers want it. Its image is not kept: a pixel stands for it."""
        return Sample(
            id=self.id,
            task=self.task,
            kind=self.kind,
            image=PIL.Image.new("RGB", (1, 1)),
            question=self.question,
            answer=self.gold[0],
            boxes=tuple(Box(*box, view=original_id(number)) for number, box in placed(self.boxes, self.box_images)),
            coarse_suffices=self.coarse_suffices,
            answers=tuple(self.gold),
            options=tuple(self.options),
            cluster=self.cluster,
            meta=self.meta,
        )

    def rescored(self, scorers: Mapping[str, Scorer | CustomScorer]) -> SampleResult:
        """Return the same answer, scored by these; the scores of other scorers are kept."""
        now = scored(self.answer, self.status, self.sample(), scorers)
        kept = {name: {key: one for key, one in getattr(self, name).items() if key not in now[name]} for name in now}
        return self.model_copy(update={name: now[name] | kept[name] for name in now})

    def under(self, about: Mapping[str, Any], scorers: Mapping[str, Scorer | CustomScorer]) -> SampleResult | None:
        """Return the row with what the task says of the sample now (`asked`), scored by it.

        None if its boxes are other ones, which what was measured of the crops depends on.
        """
        now = SampleResult.model_validate({**about, "status": self.status})
        if (now.boxes, now.coarse_suffices) != (self.boxes, self.coarse_suffices):
            return None
        told = {name: getattr(now, name) for name in _TOLD}
        if all(getattr(self, name) == value for name, value in told.items()):
            return self.completed(scorers)
        # scores of other scorers are of other answers
        return self.model_copy(update={**told, "scores": {}, "rules": {}}).rescored(scorers)

    def completed(self, scorers: Mapping[str, Scorer | CustomScorer]) -> SampleResult:
        """Return the row with a score of every scorer as it is now; those of other scorers are kept."""
        versions = {name: rule_version(one) for name, one in scorers.items()}
        if all(
            name in self.scores and version and self.rules.get(name) == version for name, version in versions.items()
        ):
            return self
        return self.rescored(scorers)


def scored(
    answer: str | None, status: str, sample: Sample, scorers: Mapping[str, Scorer | CustomScorer]
) -> dict[str, Any]:
    """Return the fields of a row that hold the worth of an answer by every scorer, and the scorers' versions.

    A failed episode has no answer, whatever it wrote before.
    """
    said = None if status == "error" else answer
    return {
        "scores": {name: apply(scorer, said, sample) for name, scorer in scorers.items()},
        "rules": {name: rule_version(scorer) for name, scorer in scorers.items()},
    }


def episode_seed(seed: int, sample_id: str, repeat: int = 0) -> int:
    """Return the agent's seed for one sample: 31 bits of a hash, the same whatever is run before or beside it."""
    name = f"{seed}/{sample_id}" + (f"/{repeat}" if repeat else "")
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:4]) >> 1


def image_digest(image: PIL.Image.Image) -> str:
    """Return the digest of an image of a sample as an agent sees it: that of its trace's original."""
    seen = image.mode == "RGB" and not image.getexif()  # which may turn it
    return digest(image if seen else load_image(image, max_pixels=max(1, image.width * image.height)))


def asked(
    sample: Sample, *, image: str, index: int, repeat: int, seed: int, config: AgentConfig, weights: str | None
) -> dict[str, Any]:
    """Return the part of a row that does not depend on the answer.

    `image` is the `image_digest`, `seed` the run's, `weights` says which they are.
    """
    boxes = [box.as_list() for box in sample.boxes]
    numbers = {original_id(number): number for number in range(len(sample.images))}
    others = [image_digest(one) for one in sample.others]
    episode = episode_seed(seed, sample.id, repeat)
    decides: list[Any] = [
        sample.task,
        sample.id,
        image,
        sample.question,
        boxes if config.policy in TAKE_GOLD and sample.known_boxes is not None else None,
        config.model_dump(mode="json"),
        weights,
        episode,
        repeat,
    ]
    if others:
        decides += [others, [box.view for box in sample.boxes]]
    return {
        "key": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24],
        "task": sample.task,
        "index": index,
        "repeat": repeat,
        "id": sample.id,
        "kind": sample.kind,
        "cluster": sample.cluster or sample.id,
        "seed": episode,
        "image": image,
        "other_images": others,
        "size": upright_size(sample.image),
        "question": sample.question,
        "gold": list(sample.answers or (sample.answer,)),
        "options": list(sample.options),
        "meta": dict(sample.meta),
        "boxes": boxes,
        "box_images": [numbers.get(box.view, 0) for box in sample.boxes] if sample.others else [],
        "coarse_suffices": sample.coarse_suffices,
    }


def placed(boxes: Sequence[Quad], images: Sequence[int]) -> list[tuple[int, Quad]]:
    """Return the number of the image of each box, and the box; without `images` all are of the first."""
    return list(zip(images or [0] * len(boxes), boxes, strict=False))


def measured(answer: AnswerLike, sample: Sample) -> dict[str, object]:
    """Return the part of a row that the episode's trace tells."""
    boxes, suffices = sample.boxes, sample.coarse_suffices
    trace = answer.trace
    look = trace.perception
    crops = [view for view in trace.views if view.kind == "crop"]
    overlaps = [max((crop.region.iou(box) for crop in crops if crop.origin == box.view), default=0.0) for box in boxes]
    covers = [max((crop.coverage(box) for crop in crops), default=0.0) for box in boxes]
    return {
        "answer": answer.text,
        "status": trace.status,
        "error": trace.error,
        "answer_probability": trace.answer_probability,
        "confidence": trace.confidence,
        "usage": trace.usage,
        "token_layers": trace.token_layers,
        "turns": len(trace.turns),
        "zooms": len(crops),
        "crops": [view.box for view in crops],
        "crop_images": [view.image for view in crops] if sample.others else [],
        "unread": sum(len(turn.problems) for turn in trace.turns),
        "gate": look.score if look else None,
        "fired": look.fired if look else None,
        "looks": len(trace.looks),
        "proposed": sum(len(one.boxes) for each in trace.looks for one in each.every),
        "recall": min(covers, default=None),
        "iou": sum(overlaps) / len(overlaps) if overlaps else None,
        "redundancy": count(answer.store.shown, boxes, coarse_suffices=suffices) if boxes or suffices else None,
    }
