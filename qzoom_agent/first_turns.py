"""Requests before the opening messages, each in a conversation of its own: a first answer, and the box to look at.

    draft    gate `answer`: an answer from the coarse view, kept if the model is sure of it
    locate   policy `locate`: the model names the boxes of what the question needs, and their crops are cut

Both are nodes of the loop in `graph`. Their turns are on the record like others, but no part of the conversation that
follows: the model answers from the views alone.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, Literal

from langgraph.runtime import Runtime

from qzoom_agent.episode_state import (
    Context,
    State,
    add_coarse,
    emit,
    generate,
    opening_of,
    reason_to_end,
    show,
    withheld,
)
from qzoom_agent.errors import BackendError, describe_error
from qzoom_agent.gate import CONFIDENCE
from qzoom_agent.messages import with_system
from qzoom_agent.policy import ASK_FIRST, drafts
from qzoom_agent.protocols.interface import Parsed
from qzoom_agent.protocols.locate import ask_for_boxes, read_boxes
from qzoom_agent.tool_calls import ToolCallExecutor
from qzoom_agent.trace import PerceptionRecord, Turn


def draft(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Answer from the coarse view alone; the gate `answer` asks for more detail unless the model is sure.

    Raises:
        ImageError: The image cannot be shown.
    """
    began = perf_counter()
    ctx = runtime.context
    before = len(ctx.store.shown)  # an earlier question has shown the coarse view
    coarse = add_coarse(ctx)
    shown = show(runtime, ctx.store.shown[before:])
    asked = with_system(ctx.protocol.opening(state["question"], coarse, tools=False), ctx.config.system)
    try:
        turn, _, reply = generate(state, runtime, asked, read=ctx.read, logprobs=True, alone=True)
        if not reply.logprobs and not turn.withheld:
            raise BackendError(
                f"The model '{ctx.backend.name}' gave no log-probabilities, and the gate 'answer' decides by them. "
                "Choose another perception.gate."
            )
    except Exception as error:
        if ctx.left:
            raise
        return {"views": shown, "error": describe_error(error), "seconds": perf_counter() - began}
    turn.confidence = turn.confidence or 0.0
    record = PerceptionRecord(score=1 - turn.confidence, threshold=1 - (ctx.config.perception.confidence or CONFIDENCE))
    record.reason = "the model is unsure of its first answer" if record.fired else "the model is sure of its answer"
    data, look = turn.model_dump(mode="json"), record.model_dump(mode="json")
    emit(runtime, "turn", data)
    emit(runtime, "look", look)
    seconds = perf_counter() - began
    now: State = {**state, "turns": [data], "seconds": state["seconds"] + seconds}
    return {
        "views": shown,
        "turns": [data],
        "perception": look,
        # A spent budget ends the episode here, if there is an answer.
        "last": reason_to_end(now, ctx) if record.fired and turn.answer is not None else None,
        "error": withheld(turn),
        "seconds": seconds,
    }


def locate(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Ask the model where it has to look, cut what it names within the budgets, and write the opening messages.

    Raises:
        ImageError: The image cannot be shown.
    """
    began = perf_counter()
    ctx, store = runtime.context, runtime.context.store
    before, most = len(store.shown), ctx.config.perception.max_regions
    views = add_coarse(ctx)
    read_so_far = len(store.shown)
    new = show(runtime, store.shown[before:])
    asked = ask_for_boxes(ctx.protocol, state["question"], views, limit=most)

    def read(turn: Turn) -> Parsed:
        if turn.withheld or turn.finish == "length":
            return ctx.read(turn)
        return read_boxes(ctx.protocol, turn.text, views, limit=most)

    try:
        turn, parsed, _ = generate(state, runtime, asked, read=read, alone=True)
    except Exception as error:
        if ctx.left:
            raise
        return {"views": new, "error": describe_error(error), "seconds": perf_counter() - began}
    execute = ToolCallExecutor(ctx, views_read=read_so_far)
    served = [execute(call) for call in parsed.calls]
    turn.calls = [outcome.record for outcome in served]
    data = turn.model_dump(mode="json")
    emit(runtime, "turn", data)
    for call in data["calls"]:
        emit(runtime, "call", {"turn": turn.index, **call})
    return {
        "views": [*new, *show(runtime, store.shown[read_so_far:])],
        "turns": [data],
        "messages": opening_of(state, ctx),
        "last": next((outcome.last for outcome in served if outcome.last), None),
        "error": withheld(turn),
        "seconds": perf_counter() - began,
    }


def first_step(state: State) -> Literal["draft", "locate", "perceive"]:
    config = state["config"]
    return "draft" if drafts(config["policy"], config["perception"]["gate"]) else _first_look(state)


def after_draft(state: State) -> Literal["locate", "perceive", "finish"]:
    look = state["perception"]
    unsure = look is not None and PerceptionRecord(**look).fired and state["error"] is None
    return _first_look(state) if unsure and state["last"] is None else "finish"


def _first_look(state: State) -> Literal["locate", "perceive"]:
    return "locate" if state["config"]["policy"] in ASK_FIRST else "perceive"
