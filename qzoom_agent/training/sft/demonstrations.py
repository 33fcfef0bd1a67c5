"""Episodes with given calls: the agent's own loop and tool, around a model that follows a plan.

A `Demonstrator` is a backend. It writes the planned calls, one a turn, and then the answer, or leaves the answer to the
model behind it; a teacher writes everything itself. So a demonstration is an ordinary episode with an ordinary trace.

Kept are episodes that the model should repeat: answered right by the recipe's rule or judge, every turn read without a
repair, every call served (or, under `hybrid`, refused by the review), the evidence shown where its boxes are known, and
no crop that adds nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NamedTuple

from qzoom_agent.agent import Agent, Answer, LookResult
from qzoom_agent.config import AgentConfig, PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.messages import Message, text
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.interface import Backend, ImageSource, PerceivingSession, Reply, SamplingParams, Session
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
        self.plan = Plan()
        self.conversation: list[Message] = []
        """The episode's messages, the last reply included."""

    def session(self, image: ImageSource) -> "_Demonstration":
        return _Demonstration(self, image, self.model.session(image))


class _Demonstration:
    def __init__(self, owner: Demonstrator, image: ImageSource, session: Session) -> None:
        self._owner, self._image, self._session = owner, image, session

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        owner, plan = self._owner, self._owner.plan
        turn = sum(message["role"] == "assistant" for message in messages)
        said: str | None = None
        if turn < len(plan.boxes):
            said = write_call(owner.protocol, plan.boxes[turn], Size(*self._image("coarse").size))
        elif plan.answer is not None:
            said = write_answer(owner.protocol, plan.answer)
        if said is None:
            reply = self._session.reply(messages, settings=settings, stop=stop, on_text=on_text)
        else:
            reply = Reply(
                text=said, finish="stop", prompt_tokens=0, cached_tokens=0, new_tokens=0, visual_tokens=0, seconds=0.0
            )
        owner.conversation = [*messages, text("assistant", reply.text)]
        return reply

    def look(
        self, messages: Sequence[Message], *, options: PerceptionConfig, map_always: bool = False
    ) -> list[PerceptionRecord]:
        """Return the model's own look."""
        assert isinstance(self._session, PerceivingSession)
        return self._session.look(messages, options=options, map_always=map_always)

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        assert isinstance(self._session, PerceivingSession)
        self._session.place(view, source=source, cells=cells)

    def close(self) -> None:
        self._session.close()


class Demonstration(NamedTuple):
    """One episode, and the reason if it is left out."""

    answer: Answer
    conversation: list[Message]
    dropped: Dropped


class Demonstrations:
    """Maker of episodes for records.

    Args:
        backend: The base.
        recipe: Says where calls and answers come from.
        judge: Decides about answers that the recipe's rule refuses.

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
            model = ServerBackend(
                recipe.teacher.url,
                model=recipe.teacher.model,
                protocol=protocol,
                defaults=backend.defaults,
                key_variable=recipe.teacher.key_variable,
                timeout=recipe.teacher.timeout,
            )
        self._scripted = Demonstrator(model, protocol=protocol)
        self._agent = Agent(self._scripted, config=config)
        self._looks = Agent(backend, config=config) if recipe.boxes == "sdrpn" else None
        ungated = config.replace(**{"perception.gate": "off"})
        self._needless = Agent(backend, config=ungated) if recipe.needless else None
        hybrid = config.replace(policy="hybrid")
        self._reviewed = Agent(self._scripted, config=hybrid) if recipe.hybrid else None

    def __call__(self, record: Record) -> Demonstration:
        """Return the episode of one record; BackendError if a teacher cannot be reached."""
        plan, agent = self._plan(record), self._agent
        if self._reviewed is not None and Random(f"hybrid/{record['id']}").random() < self.recipe.hybrid:
            agent = self._reviewed
            plan = replace(plan, boxes=self._left(agent.look(record["image"], record["question"]), record, plan.boxes))
        self._scripted.plan = plan
        answer = agent.run(record["image"], record["question"])
        if self.recipe.teacher is not None and answer.trace.status == "error":
            raise BackendError(answer.trace.error or "The teacher failed.")  # every other episode would fail as well
        return Demonstration(answer, self._scripted.conversation, self.judge(Rollout(answer.trace, sample_of(record))))

    def _plan(self, record: Record) -> Plan:
        recipe, size = self.recipe, Size(*record["image"].size)
        if recipe.boxes == "teacher":
            return Plan()
        looks = self._needless if self._looks is None and not record["boxes"] else self._looks
        if looks is not None:
            seen = looks.look(record["image"], record["question"]).record
            boxes = [Box(*box) for box in seen.boxes]
        else:
            boxes = [self._policy.around(box, size) for box in sample_of(record).boxes]
        unit = [box.to_frame("unit", size) for box in boxes]
        return Plan(unit, record["answer"] if recipe.answer == "gold" else None)

    def _left(self, look: LookResult, record: Record, boxes: Sequence[Box]) -> list[Box]:
        """Return the planned calls for which `hybrid` has not inserted a crop already."""
        shown = [Box(*box) for box in look.record.boxes] if look.record.fired else []
        gold = sample_of(record).boxes
        if not gold:
            return [] if shown else list(boxes)
        return [
            box
            for box, needle in zip(boxes, gold, strict=True)
            if all(one.coverage(needle) < self.recipe.needed for one in shown)
        ]

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
