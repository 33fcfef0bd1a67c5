"""Episodes that run side by side on one model, in a bounded number of threads.

Requests that arrive at different times share the model's steps: sessions of `BatchedBackend` wait for one another a few
milliseconds, and what they ask for at about the same time is one batch.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.answer import Event as Step
from qzoom_agent.async_events import Receiver, events_of
from qzoom_agent.errors import ImageError
from qzoom_agent.images import load_image
from qzoom_agent.integrations.limits import ServeConfig
from qzoom_agent.integrations.serve.errors import RequestError


class Question(NamedTuple):
    """A conversation as the agent is asked it."""

    images: Sequence[str]
    """As the client named them: data URIs or addresses."""
    text: str
    changes: Mapping[str, Any] = {}
    """Changes of the agent's configuration, by dotted key."""
    seed: int | None = None


class EpisodePool:
    """Answers `config.batch` questions at a time; `config.queue` more may wait. For use in one event loop."""

    def __init__(self, agent: Agent, config: ServeConfig) -> None:
        self._config = config
        self.running = 0
        """Number of episodes under way."""
        agent, _ = agent.side_by_side(config.batch if getattr(agent.backend, "workers", 1) > 1 else 1)
        if queue := getattr(agent.backend, "queue", None):
            queue.callers = lambda: self.running  # a single client's steps wait for nobody
        self.agent = agent
        self._agent = lru_cache(maxsize=128)(lambda changes: agent.replace(**json.loads(changes)))
        self._threads = ThreadPoolExecutor(config.batch, thread_name_prefix="episode")
        self._free, self._closed = asyncio.Semaphore(config.batch), False
        self._tasks = set[asyncio.Task[Answer]]()

    @property
    def waiting(self) -> int:
        """Number of episodes that wait for a place."""
        return len(self._tasks) - self.running

    def start(self, question: Question, steps: asyncio.Queue[Step | None] | None = None) -> asyncio.Task[Answer]:
        """Return the task of an episode; cancelled, it ends at its next piece of text, or before it begins.

        Args:
            question: The question.
            steps: Receives each step but the last.

        Raises:
            RequestError: Too many wait (status 429), or the server is shutting down (503).
        """
        if self._closed:
            raise RequestError("The server is shutting down.", status=503, code="shutting_down")
        if len(self._tasks) >= self._config.batch + self._config.queue:
            raise RequestError(
                f"The server answers {self._config.batch} requests at a time and {self._config.queue} are waiting. "
                "Ask again later.",
                status=429,
                code="queue_full",
            )
        task = asyncio.create_task(self._answer(question, steps))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel what is left and wait for its end."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)

    def _ended(self, task: asyncio.Task[Answer]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of nobody once the client left

    async def _answer(self, question: Question, steps: asyncio.Queue[Step | None] | None) -> Answer:
        async with self._free:
            self.running += 1
            try:
                async with aclosing(events_of(self._play(question), Receiver(self._threads))) as events:
                    async for step in events:
                        if step.answer is not None:
                            return step.answer
                        if steps is not None:
                            steps.put_nowait(step)
            finally:
                self.running -= 1
        raise AssertionError("a stream ends with its answer")

    def _play(self, question: Question) -> Iterator[Step]:
        """Yield the steps of an episode; runs in a thread."""
        agent = self._agent(json.dumps(question.changes, sort_keys=True))
        yield from agent.stream(self._images(question.images), question.text, seed=question.seed)

    def _images(self, sources: Sequence[str]) -> list[Image.Image]:
        most, images = min(self._config.max_pixels, self.agent.config.max_pixels), list[Image.Image]()
        for source in sources:
            images.append(load_image(source, allow_url=self._config.allow_urls, max_pixels=most))
            if sum(one.width * one.height for one in images) > most:
                raise ImageError(f"The images of a request may have {most} px together. Send smaller ones, or fewer.")
        return images
