"""Episodes with given calls: the agent's own loop and tool, around a model that follows a plan.

A `Demonstrator` is a backend. It writes the planned calls, one a turn, and then the answer, or leaves the answer to the
model behind it; a teacher writes everything itself. So a demonstration is an ordinary episode with an ordinary trace.

Kept are episodes that the model should repeat: answered right by the recipe's rule or judge, every turn read without a
repair, every call served (or, under `hybrid`, refused by the review), the evidence shown where its boxes are known, and
no crop that adds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, NamedTuple

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
from qzoom_agent.review import OPINIONS
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.training.branches.dataset import Record, sample_of
from qzoom_agent.training.rewards import Accuracy, Coverage, Judge, Redundant, Rollout
from qzoom_agent.training.sft.call_writer import write_answer, write_call
from qzoom_agent.training.sft.sft_recipe import ColdStartRecipe

Dropped = Literal["", "unfinished", "malformed", "wrong", "not served", "no evidence", "redundant"]
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

    def session(self, image: ImageSource) -> "_Demonstration":
        return _Demonstration(self, image, self.model.session(image))


class _Demonstration:
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

    def __call__(self, record: Record) -> Demonstration:
        """Return the episode of one record; BackendError if a teacher cannot be reached."""
        sample, agent = sample_of(record), self._agent
        plan = self._plan(sample)
        if self._reviewed is not None and Random(f"hybrid/{sample.id}").random() < self.recipe.hybrid:
            agent = self._reviewed
            plan = replace(plan, boxes=self._left(agent.look(sample.image, sample.question), sample, plan.boxes))
        self._scripted.plan = plan
        answer = agent.run(sample.image, sample.question)
        if self.recipe.teacher is not None and answer.trace.status == "error":
            raise BackendError(answer.trace.error or "The teacher failed.")  # every other episode would fail as well
        return Demonstration(answer, self._scripted.conversation, self.judge(Rollout(answer.trace, sample)))

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
