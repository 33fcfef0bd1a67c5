"""The state of an episode, the objects around it, and the steps that nodes of the loop share.

The state is plain JSON of a few kB; pixels and the model are reached through `Context`, which is never stored. A
resumed episode opens a new session and gives it all messages.
"""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, cast, get_args, get_origin, get_type_hints

from langgraph.runtime import Runtime
from typing_extensions import TypedDict

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import BackendError, ImageError
from qzoom_agent.messages import Message
from qzoom_agent.models.interface import (
    Backend,
    Perceiver,
    PerceivingSession,
    Reply,
    SamplingParams,
    Session,
    SparseSession,
)
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.interface import Parsed, ZoomProtocol
from qzoom_agent.protocols.parsing import cut_off, own_turn
from qzoom_agent.review import Last
from qzoom_agent.trace import SERVED, Status, Turn
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.own_tools import OwnTool
from qzoom_agent.zoom.zoom import Tool, Zoom

EventKind = Literal["view", "look", "token", "turn", "call", "answer"]


class State(TypedDict):
    """The content of a checkpoint: JSON only."""

    id: str
    question: str
    backend: str
    config: dict[str, Any]
    """The resolved `AgentConfig`; a resumed episode goes on under it."""
    gold: list[list[float]] | None
    """Gold boxes in original pixels, for `oracle` and `random`."""
    views: Annotated[list[dict[str, Any]], operator.add]
    messages: Annotated[list[Message], operator.add]
    """The whole conversation; images are view ids."""
    turns: Annotated[list[dict[str, Any]], operator.add]
    """Finished turns."""
    turn: dict[str, Any] | None
    """The turn whose calls `act` has to run."""
    last: Last | None
    """Reason that `act` found for making the next turn the last."""
    perception: dict[str, Any] | None
    """Result of the first look (`PerceptionRecord`)."""
    further_looks: NotRequired[Annotated[list[dict[str, Any]], operator.add]]
    """Results of further looks; missing in runs that earlier versions saved."""
    looking: NotRequired[bool]
    """`perceive` looks again before the first turn."""
    placed: dict[str, list[float]]
    """Crops with aligned positions, and their boxes in cells of the coarse view."""
    perceive_seconds: float
    seconds: Annotated[float, operator.add]
    """Wall-clock time of all steps so far; the time between a kill and its resume does not count."""
    status: Status | None
    answer: str | None
    error: str | None


@dataclass
class Context:
    """The objects of one run; never stored."""

    backend: Backend
    protocol: ZoomProtocol
    policy: CropPolicy
    config: AgentConfig
    views: ViewBudget
    tool: Tool
    """Serves the model's calls."""
    zoom: Zoom
    """Cuts the crops of `oracle` and `random`."""
    roi_zoom: Zoom
    """Cuts the crops that the branches propose, at their budget."""
    store: ViewStore
    perceiver: Perceiver | None = None
    """Looks for the model that answers; None: its own branches look."""
    tools: tuple[str, ...] = ()
    """Schemas of the tools that the model may call natively."""
    own: Mapping[str, OwnTool] = field(default_factory=dict)
    """Tools that the model may call beside zoom, by name."""
    live: bool = False
    """Stream the text of each turn as it is written."""
    left: bool = False
    """Nobody reads the stream any longer: the turn under way ends at its next piece of text."""
    session: Session | None = field(default=None, init=False)

    def open(self, placed: dict[str, list[float]]) -> Session:
        """Return the session, opened at the first call, with the placed and the sparse crops made known to it."""
        if self.session is None:
            self.session = self.backend.session(self.policy.eyes(self.store))
        if isinstance(self.session, PerceivingSession):
            for view, (x1, y1, x2, y2) in placed.items():
                self.session.place(view, source="coarse", cells=(x1, y1, x2, y2))
        if isinstance(self.session, SparseSession):
            for one in self.store.shown:
                if one.kept is not None:
                    self.session.show_part(one.id, kept=one.kept)
        return self.session

    def reply(
        self, state: State, asked: list[Message], *, on_text: Callable[[str], None] | None, logprobs: bool = False
    ) -> Reply:
        """Generate the next assistant turn of the conversation so far, followed by the messages `asked`."""
        seed = self.config.seed + len(state["turns"])
        settings = SamplingParams(
            **self.config.generation.model_dump(),
            seed=seed,
            logprobs=logprobs,
            stop=self.protocol.stop,
            tools=self.tools,
            may_call=not asked,
        )
        return self.open(state["placed"]).reply([*state["messages"], *asked], settings=settings, on_text=on_text)

    def read(self, turn: Turn) -> Parsed:
        """Parse a turn; one that its limit of tokens cut off has neither an answer nor a call."""
        if turn.withheld:
            return Parsed(thought=own_turn(turn.text).strip())
        if turn.finish == "length":
            return cut_off(turn.text, limit=self.config.generation.max_new_tokens)
        return self.protocol.parse(turn.text, self.store.shown)

    def close(self) -> None:
        """Free the session."""
        if self.session is not None:
            self.session.close()
            self.session = None


def start(
    *, id: str, question: str, backend: str, config: AgentConfig, gold: list[list[float]] | None, original: View
) -> State:
    """Return the state of an episode before its first step."""
    return State(
        id=id,
        question=question,
        backend=backend,
        config=config.model_dump(mode="json"),
        gold=gold,
        views=[original.model_dump(mode="json")],
        messages=[],
        turns=[],
        turn=None,
        last=None,
        perception=None,
        further_looks=[],
        looking=False,
        placed={},
        perceive_seconds=0.0,
        seconds=0.0,
        status=None,
        answer=None,
        error=None,
    )


def advanced(state: State, update: dict[str, Any]) -> State:
    """Return the state after a node's update, merged as the compiled graph does; for callers that run nodes by hand."""
    kinds = get_type_hints(State, include_extras=True)
    merged: dict[str, Any] = {**state}
    for key, value in update.items():
        kind = kinds[key]
        if get_origin(kind) is NotRequired:
            (kind,) = get_args(kind)
        reduce = getattr(kind, "__metadata__", (None,))[0]
        merged[key] = value if reduce is None else reduce(merged[key], value)
    return cast(State, merged)


def add_coarse(ctx: Context) -> View:
    """Return the coarse view, added at the first call. Raises ImageError if its budget cannot hold the image."""
    if "coarse" in ctx.store:
        return ctx.store.view("coarse")
    views, limit = ctx.views, ctx.config.budget.max_visual_tokens
    low, high = views.coarse_limits(ctx.store.view("original").size)
    coarse = ctx.store.add_coarse(factor=views.factor, min_tokens=low, max_tokens=high)
    if limit is not None and coarse.tokens > limit:
        size = ctx.store.view("original").size
        raise ImageError(
            f"An image of {size.width}x{size.height} pixels costs {coarse.tokens} visual tokens at the least, and "
            f"budget.max_visual_tokens is {limit}. Raise it, or cut the image into parts that are less long."
        )
    return coarse


def opening_of(state: State, ctx: Context) -> list[Message]:
    """Return the opening messages; none where a draft has answered and there is nothing new to see or to ask for."""
    shown, tools = ctx.store.shown, ctx.policy.offers_tools
    drafted = any(turn["answer"] is not None for turn in state["turns"])
    if drafted and len(shown) == 1 and not tools:
        return []
    return ctx.protocol.opening(state["question"], shown, tools=tools)


def generate(
    state: State,
    runtime: Runtime[Context],
    asked: list[Message],
    *,
    read: Callable[[Turn], Parsed],
    forced: bool = False,
    logprobs: bool = False,
) -> tuple[Turn, Parsed, Reply]:
    """Generate the next turn of the conversation, followed by the messages `asked`, and read it."""
    ctx, index = runtime.context, len(state["turns"])
    on_text = _live(runtime, index) if ctx.live else None
    reply = ctx.reply(state, asked, on_text=on_text, logprobs=logprobs)
    written = Turn(index=index, **reply.model_dump(), forced=forced)
    # Parse the text as the record keeps it (valid Unicode), so that `act` and a resumed run parse the same.
    parsed = read(written)
    fields = parsed.model_dump(include={"thought", "answer", "problems", "repairs"})
    return Turn(**{**written.model_dump(), **fields}), parsed, reply


def withheld(turn: Turn) -> str | None:
    """Return the error of a turn that the model or a filter kept back; None for any other."""
    if not turn.withheld:
        return None
    return f"The answer was withheld: {turn.withheld}. Ask in other words, or ask another model."


def reason_to_end(state: State, ctx: Context) -> Last | None:
    """Return the reason for which the next turn has to be the last; None if there is none."""
    if state["last"] is not None:
        return state["last"]
    budget, turns = ctx.config.budget, state["turns"]
    failed = 0
    for turn in reversed(turns):
        if turn["answer"] is not None or any(call["decision"] in SERVED for call in turn["calls"]):
            break
        failed += 1
    if failed >= budget.max_failed_calls:
        return "failed"
    # A model that was told to be shorter and cut off again has its last try; without tools, the second reply is it.
    tries = 2 if ctx.policy.offers_tools else 1
    if len(turns) >= budget.max_turns or sum(turn["finish"] == "length" for turn in turns) >= tries:
        return "budget"
    if budget.max_seconds is not None and state["seconds"] >= budget.max_seconds:
        return "budget"
    return None


def emit(runtime: Runtime[Context], kind: EventKind, data: dict[str, Any]) -> None:
    """Stream an event of the run."""
    runtime.stream_writer({"kind": kind, "data": data})


def _live(runtime: Runtime[Context], index: int) -> Callable[[str], None]:
    """Return a receiver of text pieces that any thread may call."""
    here = contextvars.copy_context()  # where a stream writer finds its run

    def receive(piece: str) -> None:
        if runtime.context.left:
            raise BackendError("The reader of the stream left.")  # closes a server's reply, or ends the generation
        here.copy().run(emit, runtime, "token", {"turn": index, "text": piece})

    return receive
