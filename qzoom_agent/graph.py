"""The loop of one episode as a LangGraph: perceive, then think and act in turns, then finish.

    perceive   coarse view, the look that the policy wants, the crops that it inserts; again with these in context, look
               after look, until the branches have enough or a budget ends it; opening messages
    think      one assistant turn; the forced last one if a budget is spent
    act        parse the calls, review and serve each, tell the model the outcome
    finish     name the outcome: answered, budget, refused (calls could not be served and no answer came), or error

The state is plain JSON of a few kB; pixels and the model are reached through `Context`, which is never stored. A
resumed episode opens a new session and gives it all messages. A model's output never raises.
"""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter
from typing import Annotated, Any, Literal, NotRequired, cast, get_args, get_origin, get_type_hints

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime
from typing_extensions import TypedDict

from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import BackendError, ConfigError, ImageError, describe_error
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, text
from qzoom_agent.models.interface import Backend, Perceiver, PerceivingSession, Reply, SamplingParams, Session
from qzoom_agent.models.perceiver import look_with
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.interface import Parsed, ZoomProtocol
from qzoom_agent.protocols.parsing import cut_off, own_turn
from qzoom_agent.review import Last, refused_on_opinion
from qzoom_agent.tool_calls import ToolCallExecutor, record_of
from qzoom_agent.trace import PerceptionRecord, Status, Trace, Turn, Usage
from qzoom_agent.views import View, ViewStore
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
    live: bool = False
    """Stream the text of each turn as it is written."""
    left: bool = False
    """Nobody reads the stream any longer: the turn under way ends at its next piece of text."""
    session: Session | None = field(default=None, init=False)

    def open(self, placed: dict[str, list[float]]) -> Session:
        """Return the session, opened at the first call, with the placed crops made known to it."""
        if self.session is None:
            self.session = self.backend.session(self.policy.eyes(self.store))
        if isinstance(self.session, PerceivingSession):
            for view, (x1, y1, x2, y2) in placed.items():
                self.session.place(view, source="coarse", cells=(x1, y1, x2, y2))
        return self.session

    def reply(self, state: State, asked: list[Message], *, on_text: Callable[[str], None] | None) -> Reply:
        """Generate the next assistant turn of the conversation so far, followed by the messages `asked`."""
        seed = self.config.seed + len(state["turns"])
        settings = SamplingParams(
            **self.config.generation.model_dump(),
            seed=seed,
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


def perceive(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Show the coarse view and the crops that the policy inserts; write the opening messages.

    Where the branches can look again, each further look is one more pass through this node, and the last of them writes
    the messages. A failed look ends the episode with status "error"; a proposal that cannot be cut is left out.

    Raises:
        ImageError: The image cannot be shown.
    """
    began = perf_counter()
    if state.get("looking"):
        return _look_again(state, runtime, began)
    ctx = runtime.context
    store = ctx.store
    record: PerceptionRecord | None = None
    placed: dict[str, list[float]] = {}
    error: str | None = None
    if ctx.policy.looks:
        try:
            record = take_look(ctx, state["question"])
        except ImageError:
            raise
        except Exception as failure:
            error = describe_error(failure)
        else:
            placed = _insert(ctx, record)
    else:
        _add_coarse(ctx)
    gold = None if state["gold"] is None else [Box(x1, y1, x2, y2) for x1, y1, x2, y2 in state["gold"]]
    for box in ctx.policy.inserts(store.view("original").size, gold=gold, seed=ctx.config.seed):
        cut = ctx.zoom(store, box)
        if cut.view is None:
            raise ConfigError(
                f"The crop of policy '{ctx.policy.name}' cannot be cut: {cut.error} Check the boxes given."
            )
    shown = [view.model_dump(mode="json") for view in store.shown]
    _emit(runtime, "view", shown[0])
    if record is not None:
        _emit(runtime, "look", record.model_dump(mode="json"))
    for view in shown[1:]:
        _emit(runtime, "view", view)
    return {
        "views": shown,
        "perception": None if record is None else record.model_dump(mode="json"),
        "placed": placed,
        "error": error,
        **_opening(state, ctx, record, looks=1, new=len(shown) - 1, began=began),
    }


def _look_again(state: State, runtime: Runtime[Context], began: float) -> dict[str, Any]:
    """Look with the crops so far in context; show the crops that are proposed then."""
    ctx = runtime.context
    before = len(ctx.store.shown)
    try:
        record = _look(ctx, state["question"], placed=state["placed"], further=True)
    except Exception as failure:
        seconds = perf_counter() - began
        taken = state["perceive_seconds"] + seconds
        return {"error": describe_error(failure), "looking": False, "perceive_seconds": taken, "seconds": seconds}
    placed = _insert(ctx, record, further=True)
    shown = [view.model_dump(mode="json") for view in ctx.store.shown[before:]]
    _emit(runtime, "look", record.model_dump(mode="json"))
    for view in shown:
        _emit(runtime, "view", view)
    looks = 2 + len(state.get("further_looks", []))
    return {
        "views": shown,
        "further_looks": [record.model_dump(mode="json")],
        "placed": {**state["placed"], **placed},
        **_opening(state, ctx, record, looks=looks, new=len(shown), began=began),
    }


def _opening(
    state: State, ctx: Context, record: PerceptionRecord | None, *, looks: int, new: int, began: float
) -> dict[str, Any]:
    """Return the update of the seconds, and the opening messages unless `perceive` looks again.

    Args:
        state: The state before this look.
        ctx: The run.
        record: The look; None: the policy does not look.
        looks: Looks so far, this one counted.
        new: Crops that this look showed; without any, another look would see the same.
        began: Clock at the beginning of the step.
    """
    budget, most, shown = ctx.config.budget, ctx.config.perception.max_looks, ctx.store.shown
    seconds = perf_counter() - began
    again = (
        (record is not None and record.further and ctx.policy.looks_again and new > 0)
        and len(shown) < budget.max_views
        and looks < min(budget.max_turns, most or budget.max_turns)
        and (budget.max_seconds is None or state["seconds"] + seconds < budget.max_seconds)
    )
    opening = ctx.protocol.opening(state["question"], shown, tools=ctx.policy.offers_tools)
    return {
        "messages": [] if again else opening,
        "looking": again,
        "perceive_seconds": state["perceive_seconds"] + seconds,
        "seconds": seconds,
    }


def think(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Generate one assistant turn; leave it to `act` if it has no answer and is not the last."""
    began = perf_counter()
    ctx = runtime.context
    last = _last(state, ctx)
    index = len(state["turns"])
    asked = ctx.protocol.final() if last else []
    try:
        reply = ctx.reply(state, asked, on_text=_live(runtime, index) if ctx.live else None)
        written = Turn(index=index, **reply.model_dump(), forced=last is not None)
    except Exception as error:  # whatever a model or a server does wrong ends the episode, not the user's program
        if ctx.left:
            raise  # a saved run has to repeat this turn, not to end here
        return {"turn": None, "error": describe_error(error)}
    # Parse the text as the record keeps it (valid Unicode), so that `act` and a resumed run parse the same.
    parsed = ctx.read(written)
    read = parsed.model_dump(include={"thought", "answer", "problems", "repairs"})
    turn = Turn(**{**written.model_dump(), **read})
    ends = last is not None or turn.answer is not None
    if last is not None:
        turn.calls = [
            record_of(call, "refused", "The last turn has no tools.", code="last_turn") for call in parsed.calls
        ]
    data = turn.model_dump(mode="json")
    _emit(runtime, "turn", data)
    # The model never reads a result that it made up, nor a mark that would end its turn, as its own words.
    said = text("assistant", own_turn(turn.text))
    if reply.items:
        said["items"] = reply.items
    update = {"messages": [*asked, said], "last": last, "seconds": perf_counter() - began}
    if turn.withheld:
        update["error"] = f"The answer was withheld: {turn.withheld}. Ask in other words, or ask another model."
    return {**update, "turn": None, "turns": [data]} if ends or turn.withheld else {**update, "turn": data}


def act(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Serve or refuse each call of the turn, and tell the model the outcome and what could not be parsed."""
    began = perf_counter()
    ctx = runtime.context
    assert state["turn"] is not None
    turn = Turn(**state["turn"])
    before = len(ctx.store.shown)
    messages: list[Message] = []
    last: Last | None = None
    execute = ToolCallExecutor(
        store=ctx.store,
        tool=ctx.tool,
        policy=ctx.policy,
        protocol=ctx.protocol,
        look=None if state["perception"] is None else PerceptionRecord(**state["perception"]),
        refused_turns=refused_on_opinion([Turn(**one).calls for one in state["turns"]]),
        views_read=before,
    )
    native = "items" in state["messages"][-1]

    def answering(call: str, answer: list[Message]) -> list[Message]:
        return [{**one, "call": call} for one in answer] if native else answer

    # Parsed again rather than stored: a checkpoint cannot hold every string that a call can (lone surrogates).
    for call in ctx.read(turn).calls:
        record, answer, ends = execute(call)
        turn.calls.append(record)
        messages += answering(call.id, answer)
        last = last or ends
        _emit(runtime, "call", {"turn": turn.index, **record.model_dump(mode="json")})
    if turn.problems:
        messages += answering("", ctx.protocol.refusal("\n".join(turn.problems)))
    turn.act_seconds = perf_counter() - began
    views = [view.model_dump(mode="json") for view in ctx.store.shown[before:]]
    for view in views:
        _emit(runtime, "view", view)
    return {
        "turn": None,
        "turns": [turn.model_dump(mode="json")],
        "views": views,
        "messages": messages,
        "last": last,
        "seconds": turn.act_seconds,
    }


def finish(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Name the outcome. A model that answers within the budgets has answered, even if its last call was refused."""
    last = state["turns"][-1] if state["turns"] else None
    answer = None if last is None else last["answer"]
    cut = last is not None and last["finish"] == "length"
    status: Status = "answered"
    if state["error"] is not None:
        status = "error"
    elif state["last"] == "budget" or cut or any(look.get("withheld") for look in _looks(state)):
        status = "budget"
    elif answer is None:
        status = "refused"
    _emit(runtime, "answer", {"status": status, "answer": answer, "error": state["error"]})
    return {"status": status, "answer": answer}


def _looks(state: State) -> list[dict[str, Any]]:
    """Return the results of all looks."""
    return [*([state["perception"]] if state["perception"] else []), *state.get("further_looks", [])]


def after_perceive(state: State) -> Literal["perceive", "think", "finish"]:
    if state["error"] is not None:
        return "finish"
    return "perceive" if state.get("looking") else "think"


def after_think(state: State) -> Literal["act", "finish"]:
    return "finish" if state["turn"] is None else "act"


@cache
def _builder() -> StateGraph[State, Context, State, State]:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("perceive", perceive)
    graph.add_node("think", think)
    graph.add_node("act", act)
    graph.add_node("finish", finish)
    graph.add_edge(START, "perceive")
    graph.add_conditional_edges("perceive", after_perceive)
    graph.add_conditional_edges("think", after_think)
    graph.add_edge("act", "think")
    graph.add_edge("finish", END)
    return graph


def compile_graph(
    checkpointer: BaseCheckpointSaver[str] | None = None,
) -> CompiledStateGraph[State, Context, State, State]:
    """Return the graph, ready to run; with a checkpointer every step is saved before the next begins."""
    return _compiled() if checkpointer is None else _builder().compile(checkpointer=checkpointer, name="qzoom")


@cache
def _compiled() -> CompiledStateGraph[State, Context, State, State]:
    return _builder().compile(name="qzoom")


def to_trace(state: State, *, protocol: str, environment: dict[str, str]) -> Trace:
    """Return the record of a finished episode."""
    assert state["status"] is not None, "only a finished episode has a record"
    views = [View(**view) for view in state["views"]]
    turns = [Turn(**turn) for turn in state["turns"]]
    return Trace(
        id=state["id"],
        question=state["question"],
        status=state["status"],
        answer=state["answer"],
        model=state["backend"],
        protocol=protocol,
        policy=state["config"]["policy"],
        config=state["config"],
        seed=state["config"]["seed"],
        views=views,
        perception=None if state["perception"] is None else PerceptionRecord(**state["perception"]),
        further_looks=[PerceptionRecord(**look) for look in state.get("further_looks", [])],
        turns=turns,
        usage=Usage.tally(views, turns, perceive=state["perceive_seconds"]),
        gold=[(x1, y1, x2, y2) for x1, y1, x2, y2 in state["gold"] or ()],
        environment=environment,
        error=state["error"],
    )


def take_look(ctx: Context, question: str, *, map_always: bool = False) -> PerceptionRecord:
    """Add the coarse view and look at it; return the result with boxes in original pixels.

    Args:
        ctx: The run.
        question: The question to look for.
        map_always: Make the map even where the gate does not fire.

    Raises:
        BackendError: The model cannot be run.
    """
    _add_coarse(ctx)
    if ctx.perceiver is not None:
        image, options = ctx.store.image("original"), ctx.policy.look_options
        return look_with(ctx.perceiver, image, question, options=options, map_always=map_always)
    return _look(ctx, question, placed={}, map_always=map_always)


def _look(
    ctx: Context, question: str, *, placed: dict[str, list[float]], further: bool = False, map_always: bool = False
) -> PerceptionRecord:
    """Look at the question with all views shown so far; return the result with boxes in original pixels.

    Map and extent of the result are those of the view with the first proposed box: the coarse view, or in a further
    look perhaps a crop. `cells` are those of each box's own view.
    """
    shown = ctx.store.shown
    opening = ctx.protocol.opening(question, shown, tools=ctx.policy.looks_with_tools)
    session = ctx.open(placed)
    assert isinstance(session, PerceivingSession)
    more: dict[str, Any] = {"further": True} if further else {}  # sessions of other people may know one look alone
    seen = session.look(opening, options=ctx.policy.look_options, map_always=map_always, **more)
    size = ctx.store.view("original").size
    boxes, cells = [], []
    for view, one in zip(shown, seen, strict=False):
        margin = _margin(ctx, one)
        inside = [view.to_original(Box(*box, view=view.id).clamp(view.size)) for box in one.boxes]
        boxes += [box.padded(margin).clamp(size) for box in inside]
        cells += one.cells
    best, view = next(((one, view) for one, view in zip(seen, shown, strict=False) if one.boxes), (seen[0], shown[0]))
    extent = None if best.extent is None else view.to_original(Box(*best.extent, view=view.id))
    return best.model_copy(
        update={
            "view": "original",
            "route": "zoom" if boxes else "direct",
            "extent": None if extent is None else (extent.x1, extent.y1, extent.x2, extent.y2),
            "boxes": [(box.x1, box.y1, box.x2, box.y2) for box in boxes],
            "cells": cells,
            "visual_tokens": sum(one.visual_tokens for one in seen) if further else best.visual_tokens,
        }
    )


def _margin(ctx: Context, seen: PerceptionRecord) -> float:
    wanted = ctx.config.perception.margin
    return seen.margin if wanted is None else wanted


def _add_coarse(ctx: Context) -> View:
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


def _insert(ctx: Context, record: PerceptionRecord, *, further: bool = False) -> dict[str, list[float]]:
    """Cut the proposed crops within the budgets; return those with aligned positions and the cells really cut."""
    placed: dict[str, list[float]] = {}
    coarse, budget, before = ctx.store.view("coarse"), ctx.config.budget, len(ctx.store.shown)
    for box, cells in zip(record.boxes, record.cells, strict=True):
        plan = ctx.roi_zoom.plan(ctx.store, Box(*box))
        kept_back = "" if plan.error else ctx.policy.keeps_back(ctx.store.shown, plan, further=further)
        if kept_back:
            record.reason += f"; {kept_back}"
            continue
        spent = sum(view.tokens for view in ctx.store.shown)
        full = budget.max_visual_tokens is not None and spent + plan.tokens > budget.max_visual_tokens
        if full or len(ctx.store.shown) >= budget.max_views:
            record.reason += "; the budget has no room for a crop"
            record.withheld = len(ctx.store.shown) == before
            break
        cut = ctx.roi_zoom.cut(ctx.store, plan)
        if cut.view is None:
            record.reason += f"; a crop could not be cut: {cut.error}"
        elif record.aligned:
            # The map's own cells where exactly they were cut; else the part of the grid that was.
            # A further look may propose cells of a crop.
            changed = further or bool(plan.notes) or _margin(ctx, record) > 0 or any(value % 1 for value in cells)
            real = coarse.from_original(cut.view.region).to_frame("cell", coarse.size, coarse.cell)
            placed[cut.view.id] = real.as_list() if changed else list(cells)
    return placed


def _last(state: State, ctx: Context) -> Last | None:
    """Return the reason for which the next turn has to be the last; None if there is none."""
    if state["last"] is not None:
        return state["last"]
    budget, turns = ctx.config.budget, state["turns"]
    failed = 0
    for turn in reversed(turns):
        if any(call["result"] is not None for call in turn["calls"]):
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


def _emit(runtime: Runtime[Context], kind: EventKind, data: dict[str, Any]) -> None:
    runtime.stream_writer({"kind": kind, "data": data})


def _live(runtime: Runtime[Context], index: int) -> Callable[[str], None]:
    """Return a receiver of text pieces that any thread may call."""
    here = contextvars.copy_context()  # where a stream writer finds its run

    def receive(piece: str) -> None:
        if runtime.context.left:
            raise BackendError("The reader of the stream left.")  # closes a server's reply, or ends the generation
        here.copy().run(_emit, runtime, "token", {"turn": index, "text": piece})

    return receive
