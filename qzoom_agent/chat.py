"""A conversation about one image: each question goes on from what the earlier ones have computed and shown.

    with agent.chat("receipt.jpg") as chat:
        print(chat.ask("What is the total?"))
        print(chat.ask("Who is the seller?"))

The coarse view and all crops stay in the conversation, and only the new turn is prefilled. Gate and SD-RPN are asked
again for each question: they read the coarse view, the crops shown for this question and the question, as in a run of
its own, so a question should name what it is about. Budgets hold for each question.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qzoom_agent.agent_parts import Boxes, gold_boxes
from qzoom_agent.answer import Answer, Event
from qzoom_agent.episode_state import Context, State, advanced, follow_up
from qzoom_agent.errors import ConfigError
from qzoom_agent.graph import to_record
from qzoom_agent.messages import require_question

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent


def reopened(agent: Agent, state: State, context: Context, *, history: bool | None, seed: int | None) -> State:
    """Return the state of a saved conversation or run to go on from, with what is asked for in `Agent.chat`.

    Raises ConfigError if the conversation was begun with something else.
    """
    begun = state.get("history")
    for name, given, saved in (("history", history, begun), ("seed", seed, context.config.seed)):
        if given is not None and saved is not None and given != saved:
            raise ConfigError(f"What is saved was begun with {name}={saved}. Open it without {name}, or begin anew.")
    usual = getattr(agent.protocol, "history", True) if history is None else history
    return {**state, "history": usual if begun is None else begun}


class Chat:
    """A conversation of `Agent.chat`. Not for use from several threads at once."""

    def __init__(
        self,
        agent: Agent,
        context: Context,
        *,
        thread: str | None = None,
        history: bool = True,
        state: State | None = None,
    ) -> None:
        """
        Args:
            agent: The agent that answers.
            context: Its objects, with the original in the store.
            thread: Name under which each step is saved.
            history: The model reads the earlier questions with each one.
            state: The state after the last question of a saved conversation.
        """
        self._agent, self._context, self._thread, self._state = agent, context, thread, state
        self._history, self._unfinished = history, False
        self._running: Generator[Event] | None = None
        context.chat = True
        self.answer: Answer | None = None if state is None else agent._answer(state, context)
        """The answer to the last question. Its trace is that of the whole conversation."""

    def ask(self, question: str, *, boxes: Boxes | None = None) -> Answer:
        """Answer a question about the image, after those before it.

        Args:
            question: The question.
            boxes: As for `Agent.run`.

        Raises:
            ConfigError: An argument is wrong, or the question before was left without its answer.
        """
        *_, last = self._events(question, boxes, live=False)
        assert last.answer is not None
        return last.answer

    def stream(self, question: str, *, boxes: Boxes | None = None) -> Iterator[Event]:
        """Answer as `ask`, but yield each `Event` as it happens; the last carries the `Answer`.

        Leaving early ends the question, and so does the next. Unless the conversation is saved, it goes on as if it had
        not been asked.
        """
        return self._events(question, boxes, live=True)

    def save(self, folder: str | Path) -> Path:
        """Write the conversation as `Answer.save` does; return the folder."""
        return self._last().save(folder)

    def report(self, path: str | Path) -> Path:
        """Write one HTML file that shows all questions; return its path."""
        return self._last().report(path)

    def close(self) -> None:
        """Free the model's memory. A further question is answered all the same, more slowly."""
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last(self) -> Answer:
        if self.answer is None:
            raise ConfigError("No question of this conversation has been answered yet. Call ask(question) first.")
        return self.answer

    def _events(self, question: str, boxes: Boxes | None, *, live: bool) -> Iterator[Event]:
        require_question(question)
        if self.answer is not None and self.answer.status == "waiting":
            raise ConfigError("The last question waits for a decision about a call. Give it with resume() first.")
        if self._running is not None:
            try:
                self._running.close()  # a question that was left, but whose events somebody still holds
            except ValueError:  # by another thread
                raise ConfigError("The last question is still being answered. Ask again when it is.") from None
        if self._unfinished:
            raise ConfigError(
                f"The last question of the conversation '{self._thread}' was left without its answer. Open it again "
                f"with chat(thread='{self._thread}'), which answers it."
            )
        gold_boxes(self._context, boxes)  # wrong ones are told at once
        self._running = self._run(question, boxes, live)
        return self._running

    def _input(self, question: str, boxes: Boxes | None) -> dict[str, Any]:
        """Return what the graph is run on: a first state, or the update of the last one."""
        context, state = self._context, self._state
        if state is None:
            first = self._agent._first_state(context, question, boxes=boxes, thread=self._thread)
            return {**first, "history": self._history}
        record = to_record(state).model_dump(mode="json")
        update = follow_up(state, context, question, record=record, gold=gold_boxes(context, boxes))
        asked = advanced(state, update)
        context.follow(asked)
        # A saved thread holds the state already.
        return {**asked} if self._thread is None else update

    def _run(self, question: str, boxes: Boxes | None, live: bool) -> Generator[Event]:
        context = self._context
        context.live, context.left = live, False
        given, before = self._input(question, boxes), len(context.store.views)
        try:
            for event in self._agent._stream(given, context, self._thread, left_at=self._keep, events=live):
                self.answer = event.answer or self.answer
                yield event
        except BaseException:
            if self._thread is None:
                context.store.drop_after(before)  # the sessions, which know these views, are closed
            else:
                self._unfinished = True
            raise

    def _keep(self, state: State) -> None:
        self._state = state
