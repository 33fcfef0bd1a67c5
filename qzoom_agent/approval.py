"""A person in the loop: each call is approved, moved or refused before it is run.

    def decide(call: PendingCall) -> Decision:
        return True if call.box is None else "Do not look at faces."

    agent = Agent.from_pretrained("qwen3-vl-4b", approve=decide)

With `approve=True` and a `thread`, a run stops instead, with status `waiting`, and `Agent.resume(thread, decision)`
goes on from there, in any process. An `async def` function is awaited by `Agent.arun`, `astream` and `abatch`. A person
sees a call after the policy's review: calls that cannot be served are not asked about. What is approved is on the
checkpoint, and it is run as it stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import iscoroutine
from typing import Any, Literal

from langgraph.runtime import Runtime

from qzoom_agent.episode_state import Context, State, emit
from qzoom_agent.errors import BoxError, ConfigError
from qzoom_agent.geometry import Box, Size
from qzoom_agent.protocols.interface import ToolCall
from qzoom_agent.review import refused_on_opinion
from qzoom_agent.tool_calls import CallOutcome, ToolCallExecutor
from qzoom_agent.trace import Approval, PendingCall, PerceptionRecord, Turn
from qzoom_agent.views import original_id

Decision = bool | str | Box | Sequence[float] | Approval
"""True: run the call. A box, in original pixels or any frame of it: zoom there instead. A text: refuse it, for this
reason; False: without one."""
Decide = Callable[[PendingCall], Decision]


def read_decision(given: Decision, call: PendingCall, image: Size, *, decided: PendingCall | None = None) -> Approval:
    """Return a decision about a call as a record; `decided` is the call that it was made about, where that is known.

    Raises:
        ConfigError: It is no decision, was made about another call, or moves a call that has no box.
    """
    if decided is not None and decided != call:
        raise ConfigError(
            f"The decision is about {_told(decided)}, and the run waits before {_told(call)} now. Nothing was run: "
            "decide on that call."
        )
    if iscoroutine(given):
        given.close()  # Python warns of one that nobody awaits
        raise ConfigError(
            "approve returned a coroutine instead of a decision. Give approve the `async def` function itself, and run "
            "the agent with arun, astream or abatch."
        )
    if isinstance(given, Approval):
        given = True if given.action == "approve" else given.reason if given.action == "refuse" else given.box or ()
    if isinstance(given, bool | str):
        return Approval(action="approve") if given is True else Approval(action="refuse", reason=given or "")
    try:
        x1, y1, x2, y2 = given.as_list() if isinstance(given, Box) else given
        original = original_id(call.image)
        box = given if isinstance(given, Box) else Box(x1, y1, x2, y2, view=original)
        if not box.finite or box.view != original:
            raise BoxError("It is no box of the original.")
        pixel = box.to_pixel(image).ordered()
    except (TypeError, ValueError, BoxError):
        raise ConfigError(
            "A decision about a call is True, a box of the original (x1, y1, x2, y2 in its pixels), or the reason to "
            f"refuse it; got {given!r:.80}."
        ) from None
    if call.box is None:
        raise ConfigError(f"The call of {call.name!r} has no box that could be moved. Approve it, or give a reason.")
    if pixel.x1 == pixel.x2 or pixel.y1 == pixel.y2:
        raise ConfigError(f"The box {given!r:.80} has no area. Give two corners that are apart.")
    if min(pixel.x2, image.width) <= max(pixel.x1, 0) or min(pixel.y2, image.height) <= max(pixel.y1, 0):
        raise ConfigError(f"The box {given!r:.80} lies outside the image of {image.width}x{image.height} pixels.")
    return Approval(action="move", box=pixel.clamp(image).corners)


def _told(call: PendingCall) -> str:
    return f"the call {call.name} {list(call.box) if call.box is not None else call.arguments}"


def approve(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Review the next call of the turn, and ask about it: the callback of the agent, or whoever resumes the run."""
    ctx = runtime.context
    assert state["turn"] is not None
    turn = Turn(**state["turn"])
    execute = executor(ctx, state, turn)
    calls = ctx.read(turn, views=execute.views_read).calls[len(turn.calls) :]
    nothing = {"waiting": None, "approval": None}
    if not calls:
        return nothing
    found = execute.consider(calls[0])
    if isinstance(found, CallOutcome):
        return nothing
    pending = execute.pending(calls[0], found, turn)
    data = pending.model_dump(mode="json")
    if ctx.approve is None:
        emit(runtime, "waiting", data)
        return {"waiting": data, "approval": None}
    size = ctx.store.view(original_id(pending.image)).size
    decision = read_decision(ctx.approve(pending), pending, size)
    return {"waiting": data, "approval": decision.model_dump(mode="json")}


def after_approve(state: State) -> Literal["act", "__end__"]:
    return "__end__" if is_waiting(state) else "act"


def is_waiting(state: State) -> bool:
    """Return whether a run has stopped before a call that nobody has decided on."""
    return state.get("waiting") is not None and state.get("approval") is None and state["status"] is None


def decided(state: State, execute: ToolCallExecutor, call: ToolCall) -> CallOutcome:
    """Run a call as it was decided on; one that the review turns down was not asked about."""
    waiting, approval = state.get("waiting"), state.get("approval")
    if waiting is not None and approval is not None:
        return execute.decided(call, PendingCall(**waiting), Approval(**approval))
    found = execute.consider(call)
    assert isinstance(found, CallOutcome), "a call is run only if somebody has approved it"
    return found


def executor(ctx: Context, state: State, turn: Turn) -> ToolCallExecutor:
    """Return the executor of the calls of a turn, some of which may have been run."""
    done = sum(call.result is not None for call in turn.calls)
    look = None if state["perception"] is None else PerceptionRecord(**state["perception"])
    refused = refused_on_opinion([Turn(**one).calls for one in state["turns"]])
    return ToolCallExecutor(ctx, look, refused_turns=refused, views_read=len(ctx.store.shown) - done)
