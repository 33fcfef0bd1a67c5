"""Episodes of the agent as rollouts: many at a time, with one model among them.

A rollout is `Agent.run`: the same graph, protocol, policy, zoom tool and trace as at inference. Only the backend
differs: each episode uses a `RolloutBackend`, whose requests wait until every running episode has made one. Then the
thread that called `RolloutScheduler.run` serves all of them at once, so the model runs in that thread alone, in
batches, under whatever context the trainer holds (autocast, gathered weights).

What the trainer needs beside the trace are the very ids. A seat keeps, for each turn, the whole prompt and what was
sampled; `tokens_of` makes one sequence of them in which what the model sampled is marked, and everything else (results
of the tool, what the template writes between turns, what it rewrote) is context that is not learned.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

import torch
from PIL import Image

from qzoom_agent.agent import Agent, Answer
from qzoom_agent.config import AgentConfig, PerceptionConfig, ViewBudget
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import Message, view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_session import EncodedView, Prepared
from qzoom_agent.models.interface import ImageSource, Reply, SamplingParams, Sight
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.perception.layout import Cells
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.trace import Trace
from qzoom_agent.training.grpo.checks import PLACED
from qzoom_agent.training.grpo.engine import GeneratedTurn, GenerationRequest, SharedSession, encode_together
from qzoom_agent.training.rewards import Rollout, well_formed

Writer = Callable[[Sequence[GenerationRequest]], list[GeneratedTurn]]
"""Writes one turn for each wish."""


class RecordedTurn(NamedTuple):
    """One turn as the model was given it and wrote it."""

    prompt: Prompt
    written: GeneratedTurn


@dataclass
class Tokens:
    """One rollout as the trainer learns from it."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    """Of the completion: 1 for what the model sampled."""
    logps: list[float]
    """Of the completion: as sampled; 0 where nothing was."""
    images: list[Image.Image]
    """The views in the order of their visual tokens, exactly as shown."""
    rewritten: int = 0
    """Sampled ids that a later turn did not find as they were."""


def tokens_of(said: Sequence[RecordedTurn], image: ImageSource, *, end: int) -> Tokens:
    """The turns of one episode as one sequence.

    A later prompt should begin with the earlier one and what was written. Where it does not (the template rewrote the
    turn, a stop string cut a token), the later prompt stands, as the model read it, and what differs is not learned.

    Args:
        end: the id that ends a turn; stands, unlearned, behind a last turn that a stop string ended.
    """
    first = list(said[0].prompt.ids)
    whole, mask, logps = list(first), [0] * len(first), [0.0] * len(first)
    rewritten = 0
    for one in said:
        given = list(one.prompt.ids)
        pairs = zip(whole, given, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(given)))
        if same < len(first):
            raise ConfigError(
                "The chat template writes the opening of a conversation differently once an answer follows, so its "
                "turns are not one sequence that can be trained on. Give the model a template that only ever adds."
            )
        rewritten += sum(mask[same:])
        added = len(given) - same
        whole, mask, logps = given, mask[:same] + [0] * added, logps[:same] + [0.0] * added
        whole = [*whole, *one.written.ids]
        mask += [1] * len(one.written.ids)
        logps += one.written.logps
    last = said[-1].written
    if last.finish == "stop" and whole[-1] != end:
        whole, mask, logps = [*whole, end], [*mask, 0], [*logps, 0.0]
    images = [image(span.view) for span in said[-1].prompt.spans]
    return Tokens(first, whole[len(first) :], mask[len(first) :], logps[len(first) :], images, rewritten)


class RolloutBackend:
    """The backend and the session of one episode."""

    def __init__(self, crew: "RolloutScheduler", index: int) -> None:
        self._crew = crew
        self.index = index
        self.name = crew.backend.name
        self.protocol = crew.backend.protocol
        self.perceives = crew.looker is not None and crew.looker.perceives
        self.defaults: ViewBudget = crew.backend.defaults
        self.said: list[RecordedTurn] = []
        self.image: ImageSource | None = None
        self.model: SharedSession | None = None

    def session(self, image: ImageSource) -> "RolloutBackend":
        self.image = image
        self.model = SharedSession(self._crew.backend, image, self._crew.seen, encode=self._crew.encode)
        return self

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        reply: Reply = self._crew.ask(PendingRequest(self, list(messages), settings=settings, stop=stop))
        return reply

    def look(self, messages: Sequence[Message], *, options: PerceptionConfig, map_always: bool = False) -> list[Sight]:
        sights: list[Sight] = self._crew.ask(
            PendingRequest(self, list(messages), options=options, map_always=map_always)
        )
        return sights

    def place(self, view: str, *, source: str, cells: Cells) -> None:
        raise ConfigError(PLACED)

    def close(self) -> None:
        if self.model is not None:
            self.model.close()


@dataclass
class PendingRequest:
    """What an episode waits for: a reply, or (with `options`) a look."""

    seat: RolloutBackend
    messages: list[Message]
    settings: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    options: PerceptionConfig | None = None
    map_always: bool = False
    result: "Future[Any]" = field(default_factory=Future)


class RolloutScheduler:
    """Runs episodes side by side. See the module's note."""

    def __init__(
        self, backend: HFBackend, write: Writer, *, looker: HFBackend | None = None, encode: bool = True
    ) -> None:
        """
        Args:
            write: writes the turns of a batch.
            looker: whose branches look (the trained model or a frozen copy); None: nobody's.
            encode: whether `write` needs the views encoded.
        """
        self.backend = backend
        self.write = write
        self.encode = encode
        self.looker = looker
        self.seen: dict[str, EncodedView] = {}
        """Encoded views by digest."""
        self._sights: dict[Any, list[Sight]] = {}
        self._queue: SimpleQueue[PendingRequest | None] = SimpleQueue()
        self._broken: BaseException | None = None

    def run(self, episodes: Sequence[Callable[[RolloutBackend], Answer]]) -> list[tuple[Answer, RolloutBackend]]:
        """The answers of all episodes, in order, with the seats they sat on. Whatever the model raises is raised."""
        seats = [RolloutBackend(self, index) for index in range(len(episodes))]
        self._broken = None
        with ThreadPoolExecutor(len(episodes)) as pool:
            running = [pool.submit(self._sit, episode, seat) for episode, seat in zip(episodes, seats, strict=True)]
            left, waiting = len(running), list[PendingRequest]()
            while left:
                asked = self._queue.get()
                if asked is None:
                    left -= 1
                else:
                    waiting.append(asked)
                if waiting and len(waiting) == left:
                    waiting = self._serve(waiting)
        if self._broken is not None:
            raise self._broken
        return [(one.result(), seat) for one, seat in zip(running, seats, strict=True)]

    def forget(self) -> None:
        """Forget what was encoded and seen: the weights are about to change."""
        self.seen.clear()
        self._sights.clear()

    def ask(self, asked: PendingRequest) -> Any:
        """Wait for what an episode asks. Called from the episode's thread."""
        if self._broken is not None:
            raise self._broken
        self._queue.put(asked)
        return asked.result.result()

    def _sit(self, episode: Callable[[RolloutBackend], Answer], seat: RolloutBackend) -> Answer:
        try:
            return episode(seat)
        finally:
            self._queue.put(None)

    def _serve(self, waiting: Sequence[PendingRequest]) -> list[PendingRequest]:
        """Serve looks first; replies once nobody waits for a look. Returns who still waits."""
        ordered = sorted(waiting, key=lambda asked: asked.seat.index)  # not by who came first
        looks = [asked for asked in ordered if asked.options is not None]
        try:
            with torch.no_grad():
                for asked in looks:
                    asked.result.set_result(self._look(asked))
                if looks:
                    return [asked for asked in ordered if asked.options is None]
                self._reply(ordered)
        except BaseException as error:
            self._broken = error
            for asked in ordered:
                if not asked.result.done():
                    asked.result.set_exception(error)
        return []

    def _look(self, asked: PendingRequest) -> list[Sight]:
        assert asked.options is not None and self.looker is not None and asked.seat.image is not None
        model = asked.seat.model
        assert model is not None
        key = (model.key(model.prepare(asked.messages).prompt), asked.options.model_dump_json(), asked.map_always)
        if key not in self._sights:
            session = self.looker.session(asked.seat.image)
            self._sights[key] = session.look(asked.messages, options=asked.options, map_always=asked.map_always)
            session.close()
        return self._sights[key]

    def _reply(self, asked: Sequence[PendingRequest]) -> None:
        began = perf_counter()
        if self.encode:
            self._see(asked)
        ready = [self._ready(one) for one in asked]
        wishes = [
            GenerationRequest(one.seat.model, prepared[0], one.settings, one.stop)
            for one, prepared in zip(asked, ready, strict=True)
            if one.seat.model is not None and prepared is not None
        ]
        written = iter(self.write(wishes))
        seconds = (perf_counter() - began) / max(1, len(wishes))
        for one, prepared in zip(asked, ready, strict=True):
            if prepared is not None:
                self._tell(one, *prepared, next(written), seconds)

    def _see(self, asked: Sequence[PendingRequest]) -> None:
        """Encode the views that nobody has shown yet, together."""
        new: dict[str, Image.Image] = {}
        for one in asked:
            model = one.seat.model
            assert model is not None
            for view in view_ids(one.messages):
                if view not in model.known and model.name(view) not in self.seen:
                    new[model.name(view)] = model.pixels(view)
        self.seen.update(encode_together(self.backend, new))

    def _ready(self, asked: PendingRequest) -> tuple[Prepared, int] | None:
        """The prompt and the visual tokens new in it; None after telling an episode that it cannot go on."""
        model = asked.seat.model
        assert model is not None
        known = set(view_ids(asked.messages)) & model.known
        try:
            prepared = model.prepare(asked.messages)
        except Exception as error:
            asked.result.set_exception(error)
            return None
        new = (span for span in prepared.prompt.spans if span.view not in known)
        return prepared, sum(span.stop - span.start for span in new)

    def _tell(
        self, asked: PendingRequest, ready: Prepared, visual: int, written: GeneratedTurn, seconds: float
    ) -> None:
        seat = asked.seat
        assert seat.model is not None
        ids = written.ids[:-1] if written.ids and written.ids[-1] in self.backend.end_ids else written.ids
        seat.model.remember(ready, ids, written.text)
        seat.said.append(RecordedTurn(ready.prompt, written))
        asked.result.set_result(
            Reply(
                text=written.text,
                finish=written.finish,
                prompt_tokens=len(ready.prompt.ids),
                cached_tokens=written.cached,
                new_tokens=len(written.ids),
                visual_tokens=visual,
                seconds=seconds,
            )
        )


class FinishedRollout(NamedTuple):
    """A finished rollout."""

    rollout: Rollout
    answer: Answer
    tokens: Tokens


def play(
    crew: RolloutScheduler, samples: Sequence[Sample], config: AgentConfig, seeds: Sequence[int]
) -> list[FinishedRollout]:
    """One episode for each sample and seed. Samples with the same id are one group.

    Where the policy does not look, a crew with a looker looks for the record alone.
    """

    def episode(sample: Sample, seed: int) -> Callable[[RolloutBackend], Answer]:
        def run(seat: RolloutBackend) -> Answer:
            agent = Agent(seat, config=config)
            seen = None
            if crew.looker is not None and agent.config.policy not in LOOK_FIRST:
                seen = agent.look(sample.image, sample.question).record
            answer = agent.run(sample.image, sample.question, boxes=sample.boxes, seed=seed)
            answer.trace.perception = answer.trace.perception or seen
            return answer

        return run

    done = crew.run([episode(sample, seed) for sample, seed in zip(samples, seeds, strict=True)])
    end = int(crew.backend.processor.tokenizer.eos_token_id)
    return [
        FinishedRollout(rollout_of(answer.trace, sample), answer, _tokens(seat, answer, sample, end))
        for sample, (answer, seat) in zip(samples, done, strict=True)
    ]


def rollout_of(trace: Trace, sample: Sample) -> Rollout:
    """An episode as the rewards see it."""
    cut = bool(trace.turns) and trace.turns[-1].finish == "length"
    return Rollout(
        trace=trace,
        answer=sample.answer,
        answers=sample.answers,
        boxes=sample.boxes,
        coarse_suffices=sample.coarse_suffices,
        group=sample.id,
        truncated=cut or (trace.status == "budget" and trace.answer is None),
        format_ok=well_formed(trace),
        options=sample.options,
    )


def _tokens(seat: RolloutBackend, answer: Answer, sample: Sample, end: int) -> Tokens:
    if not seat.said or seat.image is None:
        raise ConfigError(
            f"The episode of row '{sample.id}' ended before the model was asked anything: "
            f"{(answer.trace.error or answer.trace.status).rstrip('.')}. Its question: {sample.question[:60]!r}... "
            "Leave the row out, shorten its question, or lower the recipe's budgets."
        )
    return tokens_of(seat.said, seat.image, end=end)
