"""Episodes of the agent as rollouts: many at a time, on one model.

A rollout is `Agent.run`, with the graph, protocol, policy, zoom tool and trace of inference. Only the backend differs:
the requests of a `RolloutBackend` wait until every running episode has made one. The thread that called `play` then
serves all of them, so the model runs in that thread alone, in batches, under the context that the trainer holds
(autocast, gathered weights).

Views are encoded once, whichever episodes show them. The trainer needs exact ids: a rollout keeps, for each turn, the
prompt and the sampled ids, and `tokens_of` makes one sequence of them in which only sampled tokens are learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.config import AgentConfig
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.messages import view_ids
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_generation import GeneratedTurn, GenerationRequest
from qzoom_agent.models.hf_session import EncodedView, HFSession, encode_views
from qzoom_agent.models.interface import ImageSource
from qzoom_agent.models.prompts import Prompt
from qzoom_agent.models.scheduler import QueuedSession, Request, RequestQueue, prepared
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.trace import PerceptionRecord
from qzoom_agent.training.rewards import Rollout

Writer = Callable[[Sequence[GenerationRequest]], list[GeneratedTurn]]
"""Generates one turn for each request."""


class RecordedTurn(NamedTuple):
    """One turn: the prompt that the model was given, and the turn as sampled."""

    prompt: Prompt
    written: GeneratedTurn
    positions: Tensor
    """Of the prompt, see `Prepared`."""


@dataclass
class Tokens:
    """One rollout as a sequence to learn from."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    """Of the completion: 1 for sampled tokens, 0 for context."""
    logps: list[float]
    """Of the completion: log-probabilities as sampled; 0 for context."""
    images: list[Image.Image]
    """The views in the order of their visual tokens, exactly as shown."""
    positions: Tensor
    """(3, tokens) of prompt and completion; fractions where crops have the positions of their place."""
    rewritten: int = 0
    """Sampled ids that a later prompt changed."""


def tokens_of(turns: Sequence[RecordedTurn], image: ImageSource, *, end: int) -> Tokens:
    """Join the turns of one episode into one sequence.

    A later prompt should begin with the earlier one and its sampled ids. Where it does not (the template rewrote the
    turn, a stop string cut a token), the later prompt stands, as the model read it, and the difference is not learned.

    Args:
        end: Id that ends a turn; it follows, unlearned, a last turn that a stop string ended.

    Raises:
        ConfigError: The chat template rewrites the opening of a conversation.
    """
    first = list(turns[0].prompt.ids)
    whole, mask, logps = list(first), [0] * len(first), [0.0] * len(first)
    rewritten = 0
    for one in turns:
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
        whole = [*given, *one.written.ids]
        mask = mask[:same] + [0] * added + [1] * len(one.written.ids)
        logps = [*logps[:same], *[0.0] * added, *one.written.logps]
    if turns[-1].written.finish == "stop" and whole[-1] != end:
        whole, mask, logps = [*whole, end], [*mask, 0], [*logps, 0.0]
    images = [image(span.view) for span in turns[-1].prompt.spans]
    start, known = len(first), turns[-1].positions[..., 0, :]
    after = int(known.max()) + 1 + torch.arange(len(whole) - known.shape[-1], device=known.device)
    positions = torch.cat((known, after.to(known).expand(*known.shape[:-1], -1)), dim=-1)
    return Tokens(first, whole[start:], mask[start:], logps[start:], images, positions, rewritten)


class RolloutBackend:
    """The backend of one episode."""

    def __init__(self, scheduler: "RolloutScheduler", index: int) -> None:
        self._scheduler, self._index = scheduler, index
        trained = scheduler.backend
        self.name, self.protocol, self.defaults = trained.name, trained.protocol, trained.defaults
        self.prompt = trained.prompt
        self.perceives = scheduler.looker is not None and scheduler.looker.perceives
        self.turns: list[RecordedTurn] = []
        self.image: ImageSource | None = None

    def session(self, image: ImageSource) -> QueuedSession:
        self.image = image
        scheduler = self._scheduler
        model = HFSession(scheduler.backend, image, pool=scheduler.encoded, encodes=scheduler.encode)
        return QueuedSession(scheduler.queue, model, owner=self, order=self._index)


class RolloutScheduler:
    """Serves the requests of episodes that run side by side."""

    def __init__(
        self, backend: HFBackend, write: Writer, *, looker: HFBackend | None = None, encode: bool = True
    ) -> None:
        """
        Args:
            backend: The model that is trained.
            write: Generates the turns of a batch, such as `BatchEngine.generate`.
            looker: Model whose branches look (the trained model or a frozen copy); None: no episode looks.
            encode: `write` needs the views encoded.
        """
        self.backend, self.write, self.looker, self.encode = backend, write, looker, encode
        self.encoded: dict[str, EncodedView] = {}
        """Encoded views by digest."""
        self.queue = RequestQueue(self._serve)
        self._looks: dict[Any, list[PerceptionRecord]] = {}

    def forget(self) -> None:
        """Drop encoded views and looks, because the weights are about to change."""
        self.encoded.clear()
        self._looks.clear()

    @torch.no_grad()
    def _serve(self, batch: list[Request]) -> None:
        if batch[0].options is None:
            self._reply(batch)
            return
        for request in batch:
            request.result.set_result(self._look(request))

    def _look(self, request: Request) -> list[PerceptionRecord]:
        assert request.options is not None and self.looker is not None
        # episodes of one question look at the same prompt: computed once
        prompt = request.session.prepare(request.messages).prompt
        how = {"map_always": request.map_always, "further": request.further}
        key = request.session.key(prompt), request.options.model_dump_json(), *how.values()
        if key not in self._looks:
            session = self.looker.session(request.session.image)
            for view, (source, cells) in request.session.places.items():
                session.place(view, source=source, cells=cells)
            self._looks[key] = session.look(request.messages, options=request.options, **how)
            session.close()
        return self._looks[key]

    def _reply(self, batch: Sequence[Request]) -> None:
        began = perf_counter()
        if self.encode:  # together, the views that no episode has shown yet
            new: dict[str, Image.Image] = {}
            for one in batch:
                for view in view_ids(one.messages):
                    if view not in one.session.known and (digest := one.session.digest(view)) not in self.encoded:
                        new[digest] = one.session.image(view)
            self.encoded.update(encode_views(self.backend, new))
        ready = prepared(batch)
        turns = self.write([request for _, request in ready])
        seconds = (perf_counter() - began) / max(1, len(ready))
        for (one, request), turn in zip(ready, turns, strict=True):
            reply = request.record(turn, seconds=seconds)
            one.owner.turns.append(RecordedTurn(request.ready.prompt, turn, request.ready.positions))
            one.result.set_result(reply)


class FinishedRollout(NamedTuple):
    """A finished rollout."""

    rollout: Rollout
    answer: Answer
    tokens: Tokens


def play(
    scheduler: RolloutScheduler, samples: Sequence[Sample], config: AgentConfig, seeds: Sequence[int]
) -> list[FinishedRollout]:
    """Run one episode for each sample and seed, side by side. Samples with the same id are one group.

    Where the policy does not look and the scheduler has a looker, it looks for the trace alone. Raises ConfigError for
    an episode that ended before the model was asked anything.
    """

    def episode(index: int) -> tuple[Answer, RolloutBackend]:
        sample, backend = samples[index], RolloutBackend(scheduler, index)
        agent = Agent(backend, config=config)
        seen = None
        if scheduler.looker is not None and agent.config.policy not in LOOK_FIRST:
            seen = agent.look(sample.image, sample.question).record
        answer = agent.run(sample.image, sample.question, boxes=sample.boxes, seed=seeds[index])
        answer.trace.perception = answer.trace.perception or seen
        return answer, backend

    finished = []
    done = scheduler.queue.run([partial(episode, index) for index in range(len(samples))])
    for sample, (answer, backend) in zip(samples, done, strict=True):
        if not backend.turns or backend.image is None:
            raise ConfigError(
                f"The episode of row '{sample.id}' ended before the model was asked anything: "
                f"{(answer.trace.error or answer.trace.status).rstrip('.')}. Its question: {sample.question[:60]!r}... "
                "Leave the row out, shorten its question, or lower the recipe's budgets."
            )
        tokens = tokens_of(backend.turns, backend.image, end=scheduler.backend.turn_end)
        finished.append(FinishedRollout(Rollout(answer.trace, sample), answer, tokens))
    return finished
