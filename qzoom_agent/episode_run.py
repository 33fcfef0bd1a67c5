"""One episode through the graph: its events as they happen, and its last state."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from langchain_core.runnables import RunnableConfig

from qzoom_agent.answer import Event
from qzoom_agent.approval import is_waiting
from qzoom_agent.episode_state import Context, State
from qzoom_agent.graph import compile_graph, to_record
from qzoom_agent.saved_runs import SavedRuns
from qzoom_agent.telemetry import AGENT, describe_run, span


def play(
    state: Mapping[str, Any] | None,
    context: Context,
    *,
    saved: SavedRuns | None = None,
    thread: str = "",
    callbacks: Sequence[Any] | None = None,
    since: RunnableConfig | None = None,
    left_at: Callable[[State], None] | None = None,
    events: bool = True,
) -> Generator[Event, None, tuple[Event, State]]:
    """Yield the events of an episode and return its last event, which has no answer yet, and its final state.

    Args:
        state: The first state; None: go on after a saved step. Of a saved conversation it may be the update that asks
            a question.
        saved: Where each step is saved, under `thread`.
        since: The saved step to go on from; None: the last.
        left_at: Receives the final state, and keeps the sessions open for the next question.
        events: False: yield none. The steps then run in this thread; LangGraph streams from threads of its own.
    """
    # A look, and a step a turn and two a call; LangGraph's own limit must never end an episode before our budget.
    steps = 2 + 2 * context.protocol.max_calls_per_turn
    config: RunnableConfig = {"recursion_limit": steps * context.config.budget.max_turns + 10}
    if callbacks is not None:
        config["callbacks"] = list(callbacks)
    graph = compile_graph()
    guard: AbstractContextManager[None] = nullcontext()
    options: dict[str, Any] = {"context": context, "stream_mode": ["custom", "values"] if events else ["values"]}
    if saved is not None:
        graph = saved.graph()
        if state is not None:  # `resume` has claimed its run
            guard = saved.claimed(thread, new=not context.follows)
        options["durability"] = "sync"
        config = {**saved.run_config(thread), **config, **(since or {})}
    ending: Event | None = None
    try:
        about = {"gen_ai.request.model": context.backend.name, "gen_ai.provider.name": context.provider}
        with guard, span("invoke_agent", AGENT, about) as context.span:
            final = yield from _events(graph.stream(cast(Any, state), config, **options), context)
            ends: dict[str, Any] = {"status": "waiting", "answer": None, "error": None}
            if not is_waiting(final):
                ends = {name: final[name] for name in ends}
                if saved is not None:
                    saved.drop_steps(thread)
            ending = Event(kind="answer", data=ends)
            describe_run(context.span, to_record(final) if final["status"] else None, id=final["id"])
        if left_at is not None:
            left_at(final)
    finally:
        if left_at is None or ending is None:
            context.close()
    assert ending is not None
    return ending, final


def _events(stream: Iterable[tuple[str, Any]], context: Context) -> Generator[Event, None, Any]:
    """Yield the events of LangGraph's stream, but for the last, which is made of the final state; return that state."""
    final: Any = None
    for mode, data in stream:
        if context.receiver is not None and context.receiver.left:
            context.left = True  # as below
            context.receiver.require()
        if mode == "values":
            final = data
        elif data["kind"] != "answer":
            try:
                yield Event(**data)
            except GeneratorExit:
                context.left = True  # before LangGraph's stream is closed, which waits for the turn
                raise
    return final
