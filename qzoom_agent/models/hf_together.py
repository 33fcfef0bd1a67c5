"""Episodes side by side on one device: what their threads ask for at about the same time is computed as one batch.

    agent = Agent(Together(HFBackend.load("nano"), 8))
    agent.batch(pairs, workers=8)

An episode does not know of it: its session waits at a table until everybody who is under way has asked for something,
or nobody has for a moment (`linger`); then one of the waiting threads computes all looks as one batch and all replies
as another (`hf_batch.Batch`), in which every row takes its own route. Answers are those of single sessions; what
differs is the work of later turns, whose text is computed anew (encoded views are not).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from threading import Condition
from time import monotonic
from typing import Any

from qzoom_agent.config import PerceptionConfig, ViewBudget
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import Batch
from qzoom_agent.models.interface import ImageSource, Reply, SamplingParams, Session, Sight

LINGER = 0.03
"""Seconds that a batch waits for the next request before it begins without: a fraction of what a batch takes."""


@dataclass(eq=False)
class _Request:
    """What one session asks for."""

    member: "_Member"
    messages: Sequence[Message]
    how: tuple[Any, ...]
    """The same in all of a batch: (options, map_always) of a look, (settings without seed, stop) of a reply."""
    seed: int | None = None
    """Of a reply; None for a look."""
    result: Any = None
    error: Exception | None = None
    done: bool = field(default=False)


class Together:
    """A backend whose sessions are computed in batches of up to `size`. Meant for as many threads."""

    def __init__(self, backend: HFBackend, size: int, *, linger: float = LINGER) -> None:
        """Raises BackendError for an attention kernel that takes no mask for each row."""
        Batch(backend, [])
        self.backend = backend
        self.size = size
        self.linger = linger
        self._waiting: list[_Request] = []
        self._arrived = 0.0
        self._busy = False
        self._changed = Condition()

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def protocol(self) -> str:
        return self.backend.protocol

    @property
    def perceives(self) -> bool:
        return self.backend.perceives

    @property
    def defaults(self) -> ViewBudget:
        return self.backend.defaults

    @property
    def placement(self) -> str:
        return f"{self.backend.placement}; batches of {self.size}"

    def session(self, image: ImageSource) -> Session:
        return _Member(self, image)

    def ask(self, request: _Request) -> Any:
        """The request's result, once a batch with it is computed, perhaps by this thread."""
        with self._changed:
            self._waiting.append(request)
            self._arrived = monotonic()
            self._changed.notify_all()
        while batch := self._next_batch(request):
            try:
                for group in _alike(batch):
                    _compute(self.backend, group)
            finally:
                with self._changed:
                    self._busy = False
                    for one in batch:
                        one.done = True
                    self._changed.notify_all()
        if request.error is not None:
            raise request.error
        return request.result

    def _next_batch(self, request: _Request) -> list[_Request]:
        """Wait until a batch has to be computed by this thread, and give it; empty once `request` is done."""
        with self._changed:
            while not request.done and (self._busy or not self._complete()):
                self._changed.wait(self.linger)
            if request.done:
                return []
            batch, self._waiting = self._waiting[: self.size], self._waiting[self.size :]
            self._busy = True
            return batch

    def _complete(self) -> bool:
        return len(self._waiting) >= self.size or monotonic() - self._arrived >= self.linger


class _Member:
    """One conversation; `PerceivingSession` if the model has branches."""

    def __init__(self, table: Together, image: ImageSource) -> None:
        self.table = table
        self.session = table.backend.session(image)
        self.looked: tuple[Batch, int] | None = None
        """The batch that holds the coarse pass, and this conversation's row in it."""

    def look(self, messages: Sequence[Message], *, options: PerceptionConfig, map_always: bool = False) -> list[Sight]:
        found: list[Sight] = self.table.ask(_Request(self, messages, (options, map_always)))
        return found

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        self.session.place(view, source=source, cells=cells)

    def reply(
        self,
        messages: Sequence[Message],
        *,
        settings: SamplingParams,
        stop: tuple[str, ...] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        how = (settings.model_copy(update={"seed": 0}), stop)
        reply: Reply = self.table.ask(_Request(self, messages, how, seed=settings.seed))
        if on_text is not None:
            on_text(reply.text)
        return reply

    def close(self) -> None:
        self.session.close()
        self.looked = None


def _alike(requests: Iterable[_Request]) -> Iterator[list[_Request]]:
    """The requests that one batch can compute: the same kind, settings, and coarse pass to go on from."""

    def kind(request: _Request) -> tuple[bool, int, str]:
        batch = request.member.looked[0] if request.seed is not None and request.member.looked else None
        return request.seed is not None, id(batch), repr(request.how)

    for _, group in groupby(sorted(requests, key=kind), kind):
        yield list(group)


def _compute(backend: HFBackend, group: list[_Request]) -> None:
    """Fill in the results; whatever goes wrong is the error of every request in the group."""
    first = group[0]
    messages = [one.messages for one in group]
    sessions = [one.member.session for one in group]
    try:
        results: Sequence[Any]
        if first.seed is None:
            batch = Batch(backend, sessions)
            options, map_always = first.how
            results = batch.look(messages, options=options, map_always=map_always)
            for row, one in enumerate(group):
                one.member.looked = batch, row
        else:
            settings, stop = first.how
            looked = [one.member.looked for one in group]
            batch = looked[0][0] if looked[0] else Batch(backend, sessions)
            rows = [each[1] for each in looked if each] or None
            seeds = [one.seed or 0 for one in group]
            results = batch.reply(messages, settings=settings, stop=stop, rows=rows, seeds=seeds)
            for one in group:
                one.member.looked = None
        for one, result in zip(group, results, strict=True):
            one.result = result
    except Exception as error:
        told = error if isinstance(error, BackendError) else BackendError(f"{type(error).__name__}: {error}")
        for one in group:
            one.error = told


def together(backend: Any, size: int) -> Together:
    """The backend, computing in batches. BackendError for one that cannot."""
    if not isinstance(backend, HFBackend):
        raise BackendError(f"The model '{backend.name}' does not run on a device here, so there is nothing to batch.")
    return Together(backend, size)
