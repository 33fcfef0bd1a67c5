"""Episodes with given calls: the agent's own loop and tool, around a model that follows a plan.

A `Demonstrator` is a backend. It writes the planned calls, one a turn, and then the answer, or leaves the answer to the
model behind it; a teacher writes everything itself. So a demonstration is an ordinary episode with an ordinary trace.

Kept are episodes that the model should repeat: answered right by the recipe's rule or judge, every turn read without a
repair, every call served (or, under `hybrid`, refused by the review), the evidence shown where its boxes are known, and
no crop that adds nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final, Literal, NamedTuple

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer, LookResult
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.messages import Message, text
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.interface import Backend, ImageSource, PerceivingSession, Reply, Session
from qzoom_agent.models.server import ServerBackend
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.calls import PADDING, ZOOM
from qzoom_agent.protocols.nano import LOCATION_STEP
from qzoom_agent.review import OPINIONS
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.training.rewards import Accuracy, Coverage, Judge, Redundant, Rollout
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe

LOOK_THOUGHT: Final = "What decides the answer is too small to be sure of here, so I look closer at that part."
ANSWER_THOUGHT: Final = "What I was shown is enough to answer."
_TAGGED: Final = frozenset({"deepeyes", "mini_o3", "visionthink", "adaptvision"})
"""Families that were trained to reason before they act: they get a sentence of reasoning."""
Dropped = Literal["", "no box", "unfinished", "malformed", "wrong", "not served", "no evidence", "redundant"]
"""Reason why an episode is left out; empty for one that is kept."""


@dataclass(frozen=True)
class Plan:
    """Calls and answer of a demonstration."""

    boxes: Sequence[Box] = ()
    """Boxes to zoom to, one call a turn: shares ("unit") of the image."""
    answer: str | None = None
    """None: the model's own."""


class Demonstrator:
    """A backend that follows `plan`, which is set for each episode; it runs one episode at a time."""

    def __init__(self, model: Backend, *, protocol: str) -> None:
        self.model, self.protocol = model, protocol
        self.name, self.defaults, self.perceives = model.name, model.defaults, model.perceives
        self.prompt = getattr(model, "prompt", None)
        self.plan = Plan()
        self.conversation: list[Message] = []
        """The episode's messages, the last reply included."""

    def session(self, image: ImageSource) -> "_PlannedSession":
        return _PlannedSession(self, image, self.model.session(image))


class _PlannedSession:
    def __init__(self, owner: Demonstrator, image: ImageSource, session: Session) -> None:
        self._owner, self._image, self._session = owner, image, session

    def reply(self, messages: Sequence[Message], **how: Any) -> Reply:
        owner, plan = self._owner, self._owner.plan
        turn = sum(message["role"] == "assistant" for message in messages)
        if turn < len(plan.boxes):
            reply = _written(write_call(owner.protocol, plan.boxes[turn], Size(*self._image("coarse").size)))
        elif plan.answer is not None:
            reply = _written(write_answer(owner.protocol, plan.answer))
        else:
            reply = self._session.reply(messages, **how)
        owner.conversation = [*messages, text("assistant", reply.text)]
        return reply

    def look(self, messages: Sequence[Message], **how: Any) -> list[PerceptionRecord]:
        """Return the model's own look."""
        assert isinstance(self._session, PerceivingSession)
        return self._session.look(messages, **how)

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        assert isinstance(self._session, PerceivingSession)
        self._session.place(view, source=source, cells=cells)

    def close(self) -> None:
        self._session.close()


def _written(text: str) -> Reply:
    return Reply(text=text, finish="stop", prompt_tokens=0, cached_tokens=0, new_tokens=0, visual_tokens=0, seconds=0.0)


class Demonstration(NamedTuple):
    """One episode, and the reason if it is left out."""

    answer: Answer
    conversation: list[Message]
    dropped: Dropped


class Demonstrations:
    """Maker of episodes for records.

    `judge` decides about answers that the recipe's rule refuses.

    Raises:
        ConfigError: `boxes: sdrpn`, `needless` or `hybrid` with a base that has no branches.
    """

    def __init__(self, backend: HFBackend, recipe: ColdStartRecipe, *, judge: Judge | None = None) -> None:
        self.recipe = recipe
        self._accuracy = Accuracy(rule=recipe.rule).asking(judge)
        protocol = recipe.protocol or backend.protocol
        config = AgentConfig(
            policy="explicit",
            protocol=protocol,
            budget=recipe.budget,
            generation=recipe.generation,
            perception=recipe.perception,
            oracle_margin=recipe.margin,
            seed=recipe.seed,
        )
        self._policy = CropPolicy(config, backend.defaults)
        model: Backend = backend
        if recipe.teacher is not None:
            # through the student's protocol, over its views: what it writes is in the format to be taught
            model = ServerBackend(**recipe.teacher.model_dump(), protocol=protocol, defaults=backend.defaults)
        self._scripted = Demonstrator(model, protocol=protocol)
        self._agent = Agent(self._scripted, config=config)
        looking = config.replace(**{"perception.gate": "off"}) if recipe.needless else config
        looks = recipe.needless or recipe.boxes == "sdrpn"
        self._looks = Agent(backend, config=looking) if looks else None
        self._reviewed = Agent(self._scripted, config=config.replace(policy="hybrid")) if recipe.hybrid else None

    def __call__(self, sample: Sample) -> Demonstration:
        """Return the episode of one question; BackendError if a teacher cannot be reached."""
        agent = self._agent
        plan = self._plan(sample)
        if self._reviewed is not None and Random(f"hybrid/{sample.id}").random() < self.recipe.hybrid:
            agent = self._reviewed
            plan = replace(plan, boxes=self._left(agent.look(sample.image, sample.question), sample, plan.boxes))
        self._scripted.plan = plan
        answer = agent.run(sample.image, sample.question)
        if self.recipe.teacher is not None and answer.trace.status == "error":
            raise BackendError(answer.trace.error or "The teacher failed.")  # every other episode would fail as well
        # where the evidence lies is not known, so that no call could be written
        unknown = self.recipe.boxes == "oracle" and not self.recipe.needless and sample.known_boxes is None
        dropped = "no box" if unknown else self.judge(Rollout(answer.trace, sample))
        return Demonstration(answer, self._scripted.conversation, dropped)

    def _plan(self, sample: Sample) -> Plan:
        recipe, size = self.recipe, Size(*sample.image.size)
        if recipe.boxes == "teacher":
            return Plan()
        if self._looks is not None and (recipe.boxes == "sdrpn" or not sample.boxes):
            boxes = [Box(*box) for box in self._looks.look(sample.image, sample.question).record.boxes]
        else:
            boxes = [self._policy.around(box, size) for box in sample.boxes]
        unit = [box.to_frame("unit", size) for box in boxes]
        return Plan(unit, sample.answer if recipe.answer == "gold" else None)

    def _left(self, look: LookResult, sample: Sample, boxes: Sequence[Box]) -> list[Box]:
        """Return the planned calls for which `hybrid` has not inserted a crop already."""
        shown = [Box(*box) for box in look.record.boxes] if look.record.fired else []
        if not sample.boxes:
            return [] if shown else list(boxes)
        seen = [any(one.coverage(needle) >= self.recipe.needed for one in shown) for needle in sample.boxes]
        return [box for box, there in zip(boxes, seen, strict=True) if not there]

    def judge(self, episode: Rollout) -> Dropped:
        """Return the reason to leave this episode out, if any."""
        trace = episode.trace
        if trace.status != "answered":
            return "unfinished"
        if not episode.format_ok:
            return "malformed"
        if not self._accuracy.right([episode])[0]:
            return "wrong"
        if any(call.result is None and call.code not in OPINIONS for call in episode.calls):
            return "not served"
        if episode.boxes and (Coverage(max_share=1.0)([episode])[0] or 0.0) < self.recipe.needed:
            return "no evidence"
        if not self.recipe.redundant and any(Redundant()([episode])):
            return "redundant"
        return ""


# -- calls and answers in the format of each model family: `protocol.parse` reads them back without a repair ----------


def write_call(protocol: str, box: Box, shown: Size) -> str:
    """Return a call for a box in shares ("unit") of the first image, which the model sees at `shown` pixels."""
    x1, y1, x2, y2 = box.to_pixel(shown).as_list()
    step = LOCATION_STEP
    mille = [round(1000 * value) for value in (box.x1, box.y1, box.x2, box.y2)]
    pixel = [int(x1), int(y1), min(shown.width, -int(-x2 // 1)), min(shown.height, -int(-y2 // 1))]
    unit = [round(value, 4) for value in (box.x1, box.y1, box.x2, box.y2)]
    if protocol == "nano":
        low = [int(value // step) * step for value in (x1, y1)]
        high = [min(-int(-value // step) * step, side) for value, side in zip((x2, y2), shown, strict=True)]
        return "<zoom>" + "".join(f"<loc_{value}>" for value in (*low, *high)) + "</zoom>"
    if protocol == "plain":
        return "ZOOM: " + ", ".join(map(str, mille))
    if protocol == "qwen3_5":
        return (
            f"<tool_call>\n<function={ZOOM}>\n<parameter=bbox_2d>\n{json.dumps(mille)}\n</parameter>\n"
            "<parameter=img_idx>\n0\n</parameter>\n</function>\n</tool_call>"
        )
    if protocol == "mini_o3":
        call = json.dumps({"bbox_2d": unit, "source": "original_image"})
        return f"<think>{LOOK_THOUGHT}</think>\n<grounding>{call}</grounding>"
    narrow = [_narrowed(low, high) for low, high in ((box.x1, box.x2), (box.y1, box.y2))]
    shares = [round(narrow[axis][end], 4) for end in (0, 1) for axis in (0, 1)]
    calls: dict[str, tuple[str, dict[str, object]]] = {
        "pixel_reasoner": ("crop_image_normalized", {"bbox_2d": shares, "target_image": 1}),
        "visionthink": ("resize_image", {"action": "resize"}),
        "adaptvision": ("request_local_region", {"bbox_2d": pixel}),
        "deepeyes": (ZOOM, {"bbox_2d": pixel}),
    }
    name, arguments = calls.get(protocol, (ZOOM, {"bbox_2d": mille, "img_idx": 0}))
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    if protocol == "pixel_reasoner":
        return f"{LOOK_THOUGHT}\n{call}"
    return f"<think>{LOOK_THOUGHT}</think>\n{call}" if protocol in _TAGGED else call


def write_answer(protocol: str, answer: str) -> str:
    """Return the last turn, with the answer."""
    if protocol == "pixel_reasoner":
        return f"{ANSWER_THOUGHT} \\boxed{{{answer}}}"
    if protocol in _TAGGED:
        return f"<think>{ANSWER_THOUGHT}</think>\n<answer>{answer}</answer>"
    return answer


def _narrowed(low: float, high: float) -> tuple[float, float]:
    """Shrink an interval by as much as the tool will widen it, but never to nothing."""
    middle, half = (low + high) / 2, max(0.01, (high - low) / 2 - PADDING)
    return max(0.0, middle - half), min(1.0, middle + half)
