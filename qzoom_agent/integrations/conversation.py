"""One visitor's questions about one image. A thread answers each, and waits wherever a person has to decide on a call.

    conversation = Conversation(agent, image, asks=True)
    for step in conversation.ask("What is the total?"): ...      # ends with the answer, or with a `PendingCall`
    for step in conversation.decide(True): ...                   # goes on from there

The sessions of the model are freed after each answer, so that the memory of idle visitors is that of their images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Lock, Thread
from typing import Any, Final

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Event as Step
from qzoom_agent.approval import Decision, read_decision
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Size
from qzoom_agent.trace import PendingCall

_SECONDS_TO_END: Final = 10


class Conversation:
    """A conversation with an agent, whose answers are read step by step. One question is answered at a time."""

    waiting: PendingCall | None = None
    """The call that a person has to decide on."""

    def __init__(self, agent: Agent, image: Image.Image, *, asks: bool = False, patience: float = 600) -> None:
        """
        Args:
            asks: Ask about each call before it is run.
            patience: Seconds that a call waits for a decision.

        Raises:
            ConfigError, ImageError: The agent cannot be asked about this image.
        """
        self.agent, self.image, self._patience = agent, image, patience
        self._chat = (agent.replace(approve=self._wait) if asks else agent).chat(image)
        self._steps, self._decisions = Queue[Step | PendingCall | Exception | None](), Queue[Decision | None]()
        self._left = Event()
        self._thread: Thread | None = None
        self._lock = Lock()

    def ask(self, question: str) -> Iterator[Step | PendingCall]:
        """Answer a question after those before it; one that is still under way ends without its answer.

        Raises:
            ConfigError: The question is empty or too long, or the one before does not end.
        """
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                self.leave()
                self._thread.join(_SECONDS_TO_END)
                if self._thread.is_alive():
                    raise ConfigError("The last question is still being ended. Ask again in a moment.")
            events = self._chat.stream(question)
            self._steps, self._decisions, self._left = Queue(), Queue(), Event()
            self._thread = Thread(target=self._answer, args=(events,), name="conversation", daemon=True)
            self._thread.start()
            return self._follow(self._steps, self._left)

    def decide(self, decision: Decision) -> Iterator[Step | PendingCall]:
        """Decide on the call that waits, and go on.

        Raises:
            ConfigError: No call waits any longer, or the decision does not fit it; it then goes on waiting.
        """
        with self._lock:  # a second click decides on no call that comes later
            if self.waiting is None:
                raise ConfigError("No call waits for a decision any longer. Ask the question again.")
            self._decisions.put(read_decision(decision, self.waiting, Size(*self.image.size)))
            self.waiting = None
            return self._follow(self._steps, self._left)

    def leave(self) -> None:
        """End the question under way at its next step, without waiting for that."""
        self._left.set()
        self._decisions.put(None)

    @property
    def earlier(self) -> list[tuple[str, str]]:
        """The questions so far, each with its answer."""
        questions = self._chat.answer.trace.questions if self._chat.answer else []
        return [(one.question, one.answer or f"no answer ({one.status})") for one in questions]

    def report(self, path: Path) -> Path:
        """Write the HTML page that shows all questions so far. Raises ConfigError before the first answer."""
        return self._chat.report(path)

    def _follow(self, steps: Queue[Any], left: Event) -> Iterator[Step | PendingCall]:
        """Yield steps until the answer, or a call that waits. A reader that goes away ends the question."""
        done = False
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                done = isinstance(step, PendingCall) or step.answer is not None
                yield step
                if done:
                    return
        finally:
            if not done:
                left.set()

    def _answer(self, events: Iterator[Step]) -> None:
        """Read the events of a question; runs in a thread."""
        steps, left = self._steps, self._left
        try:
            with closing(events):  # type: ignore[type-var]
                for event in events:
                    if left.is_set():
                        return
                    steps.put(event)
        except Exception as error:
            steps.put(error)
        finally:
            self._chat.close()
            steps.put(None)

    def _wait(self, call: PendingCall) -> Decision:
        """Return a person's decision on a call; runs in the thread of the question."""
        self.waiting = call
        self._steps.put(call)
        try:
            decision = self._decisions.get(timeout=self._patience)
        except Empty:
            decision = None
        finally:
            self.waiting = None
        if decision is None:
            raise ConfigError(f"Nobody decided on the call within {self._patience:.0f} s. Ask the question again.")
        return decision
