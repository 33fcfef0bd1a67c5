"""Episodes that run side by side on one model, in a bounded number of threads.

Requests that arrive at different times share the model's steps: sessions of `BatchedBackend` wait for one another a few
milliseconds, and what they ask for at about the same time is one batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from threading import BoundedSemaphore, Event, Lock
from typing import Any

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.answer import Event as Step
from qzoom_agent.errors import ImageError
from qzoom_agent.images import load_image
from qzoom_agent.integrations.limits import ServeConfig
from qzoom_agent.integrations.serve.errors import RequestError


@dataclass(eq=False)
class Episode:
    """A question that waits for its answer."""

    images: Sequence[str]
    question: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the agent's configuration, by dotted key."""
    seed: int | None = None
    on_step: Callable[[Step], None] | None = None
    """Receives each step, from another thread."""
    left: Event = field(default_factory=Event)
    """Nobody waits for the answer any longer."""
    answer: Future[Answer] = field(default_factory=Future, init=False)

    def cancel(self) -> None:
        """End the episode at its next piece of text, or before it begins."""
        self.left.set()
        self.answer.cancel()


class Left(Exception):
    """The client went away."""


class EpisodePool:
    """Answers `config.batch` episodes at a time; `config.queue` more may wait."""

    def __init__(self, agent: Agent, config: ServeConfig) -> None:
        self._config = config
        together = getattr(agent.backend, "together", None)
        if together is not None and config.batch > 1 and getattr(agent.backend, "workers", 1) > 1:
            agent = agent.replace(backend=together(config.batch))
        self.agent = agent
        self._agent = lru_cache(maxsize=128)(lambda changes: agent.replace(**json.loads(changes)))
        self._places = BoundedSemaphore(config.batch + config.queue)
        self._threads = ThreadPoolExecutor(config.batch, thread_name_prefix="episode")
        self._lock = Lock()
        self._episodes: set[Episode] = set()
        self._running = 0

    @property
    def running(self) -> int:
        """Number of episodes under way."""
        return self._running

    @property
    def waiting(self) -> int:
        """Number of episodes that wait for a place."""
        return max(0, len(self._episodes) - self._running)

    def submit(self, episode: Episode) -> None:
        """Begin an episode as soon as there is a place. Raises RequestError with status 429 if too many wait."""
        if not self._places.acquire(blocking=False):
            raise RequestError(
                f"The server answers {self._config.batch} requests at a time and {self._config.queue} are waiting. "
                "Ask again later.",
                status=429,
                code="queue_full",
            )
        with self._lock:
            self._episodes.add(episode)
        try:
            episode.answer = self._threads.submit(self._play, episode)
        except RuntimeError:  # the threads have been shut down
            self._leave(episode)
            raise RequestError("The server is shutting down.", status=503, code="shutting_down") from None
        episode.answer.add_done_callback(lambda _: self._leave(episode))

    def close(self) -> None:
        """Cancel what is left and wait for the threads."""
        with self._lock:
            episodes = list(self._episodes)
        for episode in episodes:
            episode.cancel()
        self._threads.shutdown(cancel_futures=True)

    def _leave(self, episode: Episode) -> None:
        with self._lock:
            self._episodes.discard(episode)
        self._places.release()

    def _play(self, episode: Episode) -> Answer:
        with self._lock:
            self._running += 1
        try:
            return self._answer(episode)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, episode: Episode) -> Answer:
        if episode.left.is_set():
            raise Left
        agent = self._agent(json.dumps(episode.changes, sort_keys=True))
        with closing(agent.stream(self._images(episode.images), episode.question, seed=episode.seed)) as steps:  # type: ignore[type-var]
            for step in steps:
                if step.answer is not None:
                    return step.answer
                if episode.left.is_set():
                    raise Left
                if episode.on_step is not None:
                    episode.on_step(step)
        raise AssertionError("a stream ends with its answer")

    def _images(self, sources: Sequence[str]) -> list[Image.Image]:
        most, images = min(self._config.max_pixels, self.agent.config.max_pixels), list[Image.Image]()
        for source in sources:
            images.append(load_image(source, allow_url=self._config.allow_urls, max_pixels=most))
            if sum(one.width * one.height for one in images) > most:
                raise ImageError(f"The images of a request may have {most} px together. Send smaller ones, or fewer.")
        return images
