"""Requests of many threads, computed together: what their episodes ask for at about the same time is one batch.

    agent = Agent(BatchedBackend(HFBackend.load("nano"), 8))
    agent.batch(pairs, workers=8)

`RequestQueue` collects the looks and replies that threads wait for and hands them to a function a batch at a time;
evaluation and GRPO rollouts share it. `BatchedBackend` is a backend whose sessions use it: its answers are those of
single sessions.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic, perf_counter, thread_time
from typing import Any, Final, TypeVar, Unpack, cast

import torch

from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import BackendError
from qzoom_agent.messages import Message
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.hf_batch import BatchEngine
from qzoom_agent.models.hf_generation import GenerationRequest, TextListener
from qzoom_agent.models.hf_session import HFSession, encode_read
from qzoom_agent.models.interface import ImageSource, LookOptions, OnText, Reply, SamplingParams
from qzoom_agent.trace import PerceptionRecord

T = TypeVar("T")
LINGER: Final = 0.03
"""Seconds that a batch waits for the next request before it begins without it: a fraction of a batch's own time."""


@dataclass(eq=False)
class Request:
    """A reply that a thread waits for or, with `options`, a look."""

    session: HFSession
    """The conversation that asks."""
    messages: Sequence[Message]
    settings: SamplingParams = field(default_factory=SamplingParams)
    options: PerceptionConfig | None = None
    map_always: bool = False
    further: bool = False
    on_text: OnText | None = None
    """Receives the reply's text as it is written, from the thread that computes."""
    owner: Any = None
    """Whatever else `serve` has to know about the conversation."""
    seconds: float = 0.0
    """Time spent on it alone, before its batch."""
    order: int = 0
    """Place in its batch, so that a batch does not depend on which thread came first."""
    result: Future[Any] = field(default_factory=Future)


class RequestQueue:
    """Collects requests and has them served a batch at a time: looks first, so that lookers join the others' replies.

    A request is served in one of two ways. Threads of any number call `ask`, and one of those that wait computes, as
    soon as `size` requests have come or none has for `linger` seconds. Or `run` starts a known number of jobs, and the
    calling thread computes whenever every job that still runs waits for something.
    """

    def __init__(self, serve: Callable[[list[Request]], None], *, size: int = 1, linger: float = LINGER) -> None:
        """
        Args:
            serve: sets the result of every request of a batch; what it raises is the error of those left without one.
            size: most requests of a batch, in the first way.
            linger: seconds without a new request after which a batch is not waited for any longer.
        """
        self._serve = serve
        self._size = size
        self._linger = linger
        self.callers: Callable[[], int] | None = None
        """Returns the number of threads that may ask now, where that is known: a batch with a request of each is
        complete. None: it is not known."""
        self._waiting: list[Request] = []
        self._arrived = 0.0
        self._coming = 0
        """Callers that prepare a request."""
        self._busy = False
        self._running: int | None = None
        """Jobs that have not ended yet, while `run` is under way."""
        self._failure: BaseException | None = None
        self._changed = Condition()

    def ask(self, request: Request, *, prepare: Callable[[Request], None] | None = None) -> Any:
        """Wait for the result of a request, and perhaps compute the batch that it is in.

        `prepare` is called first, in this thread, while others compute; a batch waits for it.
        """
        if prepare is not None:
            with self._coming_one():
                prepare(request)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._waiting.append(request)
            self._arrived = monotonic()
            self._changed.notify_all()
            alone = self._running is None
        if alone:
            self._compute_until(request.result.done)
        return request.result.result()

    @contextmanager
    def _coming_one(self) -> Iterator[None]:
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._arrived = monotonic()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run jobs side by side, each in its own thread, and serve what they ask for from this one.

        Raises the error of `serve`, if any, once every job has ended; else that of the first job that failed.
        """
        self._running, self._failure = len(jobs), None
        try:
            with ThreadPoolExecutor(len(jobs)) as pool:
                started = [pool.submit(self._run_job, job) for job in jobs]
                self._compute_until(lambda: self._running == 0)
            if self._failure is not None:
                raise self._failure
        finally:
            self._running = self._failure = None
        return [one.result() for one in started]

    def _run_job(self, job: Callable[[], T]) -> T:
        try:
            return job()
        finally:
            with self._changed:
                assert self._running is not None
                self._running -= 1
                self._changed.notify_all()

    def _compute_until(self, done: Callable[[], bool]) -> None:
        """Serve batches from this thread, as they become complete and no other thread serves one, until `done`."""
        while True:
            with self._changed:
                while not done() and (self._busy or not self._complete()):
                    self._changed.wait(self._linger)
                if done():
                    return
                self._busy = True
                batch = self._next_batch()
            try:
                self._serve(batch)
            except BaseException as error:  # the error of every request that is left without a result
                for one in batch:
                    if not one.result.done():
                        one.result.set_exception(error)
                if self._running is not None:
                    self._failure = self._failure or error
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _complete(self) -> bool:
        if self._running is not None:
            return len(self._waiting) == self._running
        late = not self._coming and monotonic() - self._arrived >= self._linger
        most = self._size if self.callers is None else min(self._size, self.callers())
        return bool(self._waiting) and (late or len(self._waiting) >= most)

    def _next_batch(self) -> list[Request]:
        """Remove the next batch from the queue."""
        looks = [one for one in self._waiting if one.options is not None]
        batch = (looks or self._waiting)[: None if self._running is not None else self._size]
        self._waiting = [one for one in self._waiting if one not in batch]
        return sorted(batch, key=lambda one: one.order)


class QueuedSession:
    """A session whose looks and replies wait in a queue to be computed with those of others."""

    def __init__(
        self,
        queue: RequestQueue,
        session: HFSession,
        *,
        owner: Any = None,
        order: int = 0,
        prepare: Callable[[Request], None] | None = None,
    ) -> None:
        """`owner` and `order` are those of the session's requests; `prepare` is as for `RequestQueue.ask`."""
        self._queue, self._session, self._owner, self._order = queue, session, owner, order
        self._prepare = prepare

    def look(self, messages: Sequence[Message], **how: Unpack[LookOptions]) -> list[PerceptionRecord]:
        return cast(list[PerceptionRecord], self._ask(messages, **how))

    def place(self, view: str, *, source: str, cells: tuple[float, float, float, float]) -> None:
        self._session.place(view, source=source, cells=cells)

    def show_part(self, view: str, *, kept: Sequence[str]) -> None:
        self._session.show_part(view, kept=kept)

    def reply(self, messages: Sequence[Message], *, settings: SamplingParams, on_text: OnText | None = None) -> Reply:
        listener = None if on_text is None else TextListener(on_text)
        reply: Reply = self._ask(messages, settings=settings, on_text=listener)
        if listener is not None and listener.failure is not None:
            raise listener.failure
        return reply

    def close(self) -> None:
        self._session.close()

    def _ask(self, messages: Sequence[Message], **how: Any) -> Any:
        request = Request(self._session, messages, owner=self._owner, order=self._order, **how)
        return self._queue.ask(request, prepare=self._prepare)


class BatchedBackend:
    """A backend whose sessions are computed in batches of up to `size`. Meant for as many threads."""

    def __init__(self, backend: HFBackend, size: int, *, linger: float = LINGER) -> None:
        """Raises BackendError for an attention kernel that takes no mask for each row."""
        self.name, self.protocol = backend.name, backend.protocol
        self.perceives, self.defaults, self.settings = backend.perceives, backend.defaults, backend.settings
        self.prompt, self.calibration = backend.prompt, backend.calibration
        self.gives_logprobs = backend.gives_logprobs
        self.view_tokens, self.takes_sparse_crops = backend.view_tokens, backend.takes_sparse_crops
        self.placement = f"{backend.placement}; batches of {size}"
        self.backend = backend
        self.engine = BatchEngine(backend)
        self.queue = RequestQueue(self._serve, size=size, linger=linger)

    def session(self, image: ImageSource) -> QueuedSession:
        return QueuedSession(self.queue, self.backend.session(image), prepare=self._read_views)

    @torch.no_grad()
    def _read_views(self, request: Request) -> None:
        """Read new views in the caller's thread. A CPU encodes them there, too: its cores work side by side."""
        began = thread_time()  # of this thread alone: many read side by side, and wait for each other
        request.session.read_views(request.messages)
        if self.backend.model.device.type == "cpu":
            encode_read([request.session])
        request.seconds = thread_time() - began

    @torch.no_grad()
    def _serve(self, batch: list[Request]) -> None:
        """Compute requests; those with the same settings (seeds apart) together."""
        began = perf_counter()
        encode_read([one.session for one in batch])
        groups: dict[str, list[tuple[Request, GenerationRequest]]] = {}
        every = prepared(batch)
        share = (perf_counter() - began) / len(batch)
        for one, ready in every:
            alike = one.settings.model_copy(update={"seed": 0})
            groups.setdefault(repr((one.options, one.map_always, one.further, alike)), []).append((one, ready))
        for group in groups.values():
            asked, first = [one for one, _ in group], group[0][0]
            try:
                results: Sequence[Any]
                if first.options is None:
                    results = self.engine.reply([ready for _, ready in group])
                else:
                    sessions, messages = [one.session for one in asked], [one.messages for one in asked]
                    results = self.engine.look(
                        sessions,
                        messages,
                        options=first.options,
                        map_always=first.map_always,
                        further=first.further,
                        prepared=[one.ready for _, one in group],
                    )
            except Exception as error:
                told = error if isinstance(error, BackendError) else BackendError(f"{type(error).__name__}: {error}")
                for one in asked:
                    one.result.set_exception(told)
            else:
                for one, result in zip(asked, cast(Sequence[Any], results), strict=True):
                    for record in [result] if first.options is None else result:
                        record.seconds += one.seconds + share
                    one.result.set_result(result)


def prepared(batch: Sequence[Request]) -> list[tuple[Request, GenerationRequest]]:
    """Prepare the conversations of a batch. One that cannot continue gets its error as result and is left out."""
    found = []
    for one in batch:
        try:
            ready = one.session.prepare(one.messages)
        except Exception as error:
            one.result.set_exception(error)
        else:
            found.append((one, GenerationRequest(one.session, ready, one.settings, one.on_text)))
    return found


def batched(backend: Any, size: int) -> BatchedBackend:
    """Return the backend with its sessions computed in batches. Raises BackendError for one that is not local."""
    if not isinstance(backend, HFBackend):
        raise BackendError(f"The model '{backend.name}' does not run on a device here, so there is nothing to batch.")
    return BatchedBackend(backend, size)
