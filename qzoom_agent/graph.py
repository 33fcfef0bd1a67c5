"""The loop of one episode as a LangGraph: perceive, then think and act in turns, then finish.

    draft      gate `answer` alone, see `first_turns`
    locate     policy `locate` alone, in place of `perceive`, see `first_turns`
    perceive   coarse view, the look that the policy wants, the crops that it inserts; again with these in context, look
               after look, until the branches have enough or a budget ends it; opening messages
    think      one assistant turn; the forced last one if a budget is spent
    approve    where a person decides on calls: ask about the next one, see `approval`
    act        parse the calls, review and serve each, tell the model the outcome
    finish     name the outcome: answered, budget, refused (calls could not be served and no answer came), or error

State, context and the steps that nodes share are in `episode_state`. A model's output never raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import isfinite
from time import perf_counter
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.runtime import Runtime

from qzoom_agent.approval import after_approve, approve, decided, executor, is_waiting
from qzoom_agent.episode_state import (
    Context,
    State,
    add_coarse,
    emit,
    generate,
    gold_box,
    opening_of,
    reason_to_end,
    show,
    withheld,
)
from qzoom_agent.errors import BackendError, ConfigError, ImageError, describe_error
from qzoom_agent.first_turns import after_draft, draft, first_step, locate
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, text, with_system
from qzoom_agent.models.interface import PerceivingSession
from qzoom_agent.models.perceiver import cells_of, look_with
from qzoom_agent.protocols.parsing import own_turn
from qzoom_agent.review import Last
from qzoom_agent.telemetry import span
from qzoom_agent.tool_calls import record_of
from qzoom_agent.trace import PendingCall, PerceptionRecord, QuestionRecord, Status, Trace, Turn, Usage
from qzoom_agent.views import View, coarse_id, original_id
from qzoom_agent.zoom.zoom import ZoomPlan, sparse_plan


def perceive(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Show the coarse view and the crops that the policy inserts; write the opening messages.

    Where the branches can look again, each further look is one more pass through this node, and the last of them writes
    the messages. A failed look ends the episode with status "error"; a proposal that cannot be cut is left out.

    Raises:
        ImageError: The image cannot be shown.
    """
    began = perf_counter()
    ctx = runtime.context
    ctx.waited = 0.0
    if state.get("looking"):
        return _look_again(state, runtime, began)
    store = ctx.store
    before = len(store.shown)  # a draft has shown the coarse view
    record: PerceptionRecord | None = None
    placed = state["placed"]
    error: str | None = None
    if ctx.policy.looks:
        try:
            record = _with_gate(take_look(ctx, state["question"]), state["perception"])
        except ImageError:
            raise
        except Exception as failure:
            error = describe_error(failure)
        else:
            placed = {**state["placed"], **_insert(ctx, record)}
    else:
        add_coarse(ctx)
    for box in _inserted(state, ctx):
        plan = ctx.zoom.plan(store, box)
        if not plan.error and not _has_room(ctx, plan):
            break
        cut = ctx.zoom.cut(store, plan)
        if cut.view is None:
            raise ConfigError(
                f"The crop of policy '{ctx.policy.name}' cannot be cut: {cut.error} Check the boxes given."
            )
    new = store.shown[before:]
    coarse = show(runtime, (view for view in new if view.kind != "crop"))
    if record is not None:
        emit(runtime, "look", record.model_dump(mode="json"))
    crops = show(runtime, (view for view in new if view.kind == "crop"))
    return {
        "views": [*coarse, *crops],
        "perception": state["perception"] if record is None else record.model_dump(mode="json"),
        "placed": placed,
        "error": error,
        **_opening(state, ctx, record, looks=1, new=len(crops), began=began),
    }


def _inserted(state: State, ctx: Context) -> list[Box]:
    """Return the crops that the policy shows unasked without a look; of several images, of those with a gold box."""
    gold = None if state["gold"] is None else [gold_box(values) for values in state["gold"]]
    held = {box.view for box in gold or ()} or {"original"}
    boxes = []
    for view in (one for one in ctx.store.originals if one.id in held):
        own = None if gold is None else [box for box in gold if box.view == view.id]
        found = ctx.policy.inserts(view.size, gold=own, seed=ctx.config.seed)
        boxes += [replace(box, view=view.id) for box in found]
    return boxes


def _look_again(state: State, runtime: Runtime[Context], began: float) -> dict[str, Any]:
    """Look with the crops so far in context; show the crops that are proposed then."""
    ctx = runtime.context
    before = len(ctx.store.shown)
    try:
        record = _look(ctx, state["question"], placed=state["placed"], further=True)
    except Exception as failure:
        seconds = perf_counter() - began
        taken = state["perceive_seconds"] + seconds - ctx.waited
        return {"error": describe_error(failure), "looking": False, "perceive_seconds": taken, "seconds": seconds}
    placed = _insert(ctx, record, further=True)
    emit(runtime, "look", record.model_dump(mode="json"))
    shown = show(runtime, ctx.store.shown[before:])
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
        record: The look; None: the policy does not look.
        looks: Looks so far, this one counted.
        new: Crops that this look showed; without any, another look would see the same.
    """
    budget, most, shown = ctx.config.budget, ctx.config.perception.max_looks, ctx.own_views
    seconds = perf_counter() - began
    again = (
        (record is not None and record.further and ctx.policy.looks_again and new > 0)
        and len(shown) < budget.max_views
        and looks < min(budget.max_turns, most or budget.max_turns)
        and (budget.max_seconds is None or state["seconds"] + seconds < budget.max_seconds)
    )
    return {
        "messages": [] if again else opening_of(state, ctx),
        "looking": again,
        "perceive_seconds": state["perceive_seconds"] + seconds - ctx.waited,
        "seconds": seconds,
    }


def think(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Generate one assistant turn; leave it to `act` if it has no answer and is not the last."""
    began = perf_counter()
    ctx = runtime.context
    last = reason_to_end(state, ctx)
    asked = ctx.protocol.final() if last else []
    try:
        turn, parsed, reply = generate(state, runtime, asked, read=ctx.read, forced=last is not None)
    except Exception as error:  # whatever a model or a server does wrong ends the episode, not the user's program
        if ctx.left:
            raise  # a saved run has to repeat this turn, not to end here
        return {"turn": None, "error": describe_error(error), "seconds": perf_counter() - began}
    ends = last is not None or turn.answer is not None
    if last is not None:
        turn.calls = [
            record_of(call, "refused", "The last turn has no tools.", code="last_turn") for call in parsed.calls
        ]
    data = turn.model_dump(mode="json")
    emit(runtime, "turn", data)
    # The model never reads a result that it made up, nor a mark that would end its turn, as its own words.
    said = text("assistant", own_turn(turn.text))
    if reply.items:
        said["items"] = reply.items
    update: dict[str, Any] = {"messages": [*asked, said], "last": last, "seconds": perf_counter() - began}
    if turn.withheld:
        update["error"] = withheld(turn)
    return {**update, "turn": None, "turns": [data]} if ends or turn.withheld else {**update, "turn": data}


def act(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Serve or refuse each call of the turn, and tell the model the outcome and what could not be parsed."""
    began = perf_counter()
    ctx = runtime.context
    assert state["turn"] is not None
    turn = Turn(**state["turn"])
    before, known = len(ctx.store.shown), len(ctx.store.views)
    messages: list[Message] = []
    last: Last | None = None
    execute = executor(ctx, state, turn)
    native = "items" in next(one for one in reversed(state["messages"]) if one["role"] == "assistant")

    def answering(call: str, answer: list[Message]) -> list[Message]:
        return [{**one, "call": call} for one in answer] if native else answer

    # Parsed again rather than stored: a checkpoint cannot hold every string that a call can (lone surrogates).
    calls = ctx.read(turn, views=execute.views_read).calls[len(turn.calls) :]
    now = calls[:1] if ctx.config.approve else calls
    for call in now:
        about = {"gen_ai.tool.name": call.name, "gen_ai.tool.type": "function", "gen_ai.tool.call.id": call.id or None}
        with span("execute_tool", call.name, about, parent=ctx.span) as run:
            record, answer, ends = decided(state, execute, call) if ctx.config.approve else execute(call)
            run.set({"qzoom.tool.decision": record.decision})
            if record.decision in ("refused", "failed"):
                run.fail(record.code or record.decision)
        turn.calls.append(record)
        messages += answering(call.id, answer)
        last = last or ends
        emit(runtime, "call", {"turn": turn.index, **record.model_dump(mode="json")})
    done = len(now) == len(calls)
    if turn.problems and done:
        messages += answering("", ctx.protocol.refusal("\n".join(turn.problems)))
    seconds = perf_counter() - began
    turn.act_seconds += seconds
    data = turn.model_dump(mode="json")
    show(runtime, ctx.store.shown[before:])
    views = [view.model_dump(mode="json") for view in ctx.store.views[known:]]
    return {
        "turn": None if done else data,
        "turns": [data] if done else [],
        "views": views,
        "messages": messages,
        "last": state["last"] or last,
        "seconds": seconds,
        "waiting": None,
        "approval": None,
    }


def finish(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
    """Name the outcome. A model that answers within the budgets has answered, even if its last call was refused."""
    last = state["turns"][-1] if state["turns"] else None
    # Of a first answer that was not kept and a last turn without an answer, the first answer.
    answer = next((turn["answer"] for turn in reversed(state["turns"]) if turn["answer"] is not None), None)
    cut = last is not None and last["finish"] == "length"
    looks = (state["perception"] or {}, *state.get("further_looks", []))
    status: Status = "answered"
    if state["error"] is not None:
        status = "error"
    elif state["last"] == "budget" or cut or any(look.get("withheld") for look in looks):
        status = "budget"
    elif answer is None:
        status = "refused"
    emit(runtime, "answer", {"status": status, "answer": answer, "error": state["error"]})
    return {"status": status, "answer": answer}


def after_perceive(state: State) -> Literal["perceive", "think", "finish"]:
    if state["error"] is not None:
        return "finish"
    if state.get("looking"):
        return "perceive"
    return "think" if len(state["messages"]) > state.get("opened", 0) else "finish"


def after_think(state: State) -> Literal["act", "approve", "finish"]:
    if state["turn"] is None:
        return "finish"
    return "approve" if state["config"].get("approve") else "act"


def after_act(state: State) -> Literal["approve", "think"]:
    return "think" if state["turn"] is None else "approve"


@cache
def _builder() -> StateGraph[State, Context, State, State]:
    graph = StateGraph(State, context_schema=Context)
    for node in (draft, locate, perceive, think, approve, act, finish):
        graph.add_node(node.__name__, node)
    graph.add_conditional_edges(START, first_step)
    graph.add_conditional_edges("draft", after_draft)
    graph.add_conditional_edges("locate", after_perceive)
    graph.add_conditional_edges("perceive", after_perceive)
    graph.add_conditional_edges("think", after_think)
    graph.add_conditional_edges("approve", after_approve)
    graph.add_conditional_edges("act", after_act)
    graph.add_edge("finish", END)
    return graph


def compile_graph(
    checkpointer: BaseCheckpointSaver[str] | None = None,
) -> CompiledStateGraph[State, Context, State, State]:
    """Return the graph, ready to run; with a checkpointer every step is saved before the next begins."""
    return _compiled() if checkpointer is None else _builder().compile(checkpointer=checkpointer, name="qzoom")


@cache
def _compiled() -> CompiledStateGraph[State, Context, State, State]:
    # Within a node of somebody else's graph it would else share that graph's checkpoints, and a node that is run again
    # after an interrupt would be given the answer to what it asked before.
    return _builder().compile(checkpointer=False, name="qzoom")


def to_record(state: State) -> QuestionRecord:
    """Return the record of a question that is finished, or waits for a person; ConfigError for one that is neither."""
    status: Status | None = "waiting" if is_waiting(state) else state["status"]
    if status is None:  # the graph has no node of the name that is saved as the next one
        raise ConfigError(
            f"The run '{state['id']}' is at a step that this qzoom-agent does not have: a later release saved it. "
            "Resume it with that one, or ask the question again under another name."
        )
    views = [View(**view) for view in state["views"]]
    turns = [Turn(**turn) for turn in [*state["turns"], *([state["turn"]] if state["turn"] else [])]]
    gold = state["gold"] or []
    several = any(len(one) > 4 for one in gold)
    earlier = [view for one in state.get("asked", []) for view in one["views"]]
    # A first answer that was kept was given from the coarse views alone.
    whole = state.get("history", True) and len(state["messages"]) > state.get("opened", 0)
    before = sum(view["tokens"] for view in earlier if whole or view["kind"] == "coarse")
    usage = Usage.tally(views, turns, perceive=state["perceive_seconds"], before=before)
    if state["error"] is not None:  # the request that failed is no turn
        usage.seconds.think += max(0.0, state["seconds"] - usage.seconds.total)
    return QuestionRecord(
        question=state["question"],
        status=status,
        answer=state["answer"],
        waiting=PendingCall(**(state.get("waiting") or {})) if status == "waiting" else None,
        views=views,
        perception=None if state["perception"] is None else PerceptionRecord(**state["perception"]),
        further_looks=[PerceptionRecord(**look) for look in state.get("further_looks", [])],
        turns=turns,
        usage=usage,
        gold=[(x1, y1, x2, y2) for x1, y1, x2, y2, *_ in gold],
        gold_images=[int(sum(one[4:])) for one in gold] if several else [],
        error=state["error"],
    )


def to_trace(state: State, *, protocol: str, environment: dict[str, str]) -> Trace:
    """Return the record of a finished episode, with the earlier questions of a conversation."""
    first, *others = [*(QuestionRecord(**one) for one in state.get("asked", [])), to_record(state)]
    return Trace(
        **dict(first),
        id=state["id"],
        model=state["backend"],
        protocol=protocol,
        policy=state["config"]["policy"],
        config=state["config"],
        seed=state["config"]["seed"],
        environment=environment,
        follow_ups=others,
    )


def take_look(ctx: Context, question: str, *, map_always: bool = False) -> PerceptionRecord:
    """Add the coarse view and look at it; return the result with boxes in original pixels.

    `map_always`: make the map even where the gate does not fire.

    Raises:
        BackendError: The model cannot be run.
    """
    add_coarse(ctx)
    if ctx.perceiver is None:
        return _look(ctx, question, placed={}, map_always=map_always)
    options, found = ctx.policy.look_options, []
    for view in ctx.store.originals:
        image = ctx.store.image(view.id)
        seen = look_with(ctx.perceiver, image, question, options=options, map_always=map_always)
        found.append(seen.model_copy(update={"image": view.image}))
    return _of_all(found)


def _look(
    ctx: Context, question: str, *, placed: dict[str, list[float]], further: bool = False, map_always: bool = False
) -> PerceptionRecord:
    """Look at each image with its own views, as branches are trained on one image; return the result for all.

    A further look is for images with a crop.
    """
    every = [[view for view in ctx.own_views if view.image == one.image] for one in ctx.store.originals]
    if further and len(every) > 1:
        every = [views for views in every if any(view.kind == "crop" for view in views)]
    session = ctx.open(placed, alone=True)
    if not isinstance(session, PerceivingSession):
        raise BackendError(
            f"The model '{ctx.backend.name}' says that it looks (`perceives`), but its session has no look() and "
            "place(). Add them, or set `perceives` to False."
        )
    more: dict[str, Any] = {"further": True} if further else {}  # sessions of other people may know one look alone
    found = []
    for shown in reversed(every):  # the first image last: the conversation goes on from its states
        opening = ctx.protocol.opening(question, shown, tools=ctx.policy.looks_with_tools)
        if ctx.config.perception.prompt == "opening":
            opening = with_system(opening, ctx.config.system)
        began = perf_counter()
        seen = session.look(opening, options=ctx.policy.look_options, map_always=map_always, **more)
        if own := seen[0].seconds:  # 0 in sessions of other people that do not say
            ctx.waited += max(0.0, perf_counter() - began - own)
        found.append(_of_image(ctx, list(zip(shown, seen, strict=False)), further))
    ctx.keep_look()
    return _of_all(found[::-1])


def _of_all(found: Sequence[PerceptionRecord]) -> PerceptionRecord:
    """Return the result for all images of a question, each of which was looked at alone.

    The gate asks for more detail where it does for any image. Where foreground is a share of each map's peak, a map
    none of whose cells reaches the highest cutoff shows less of what is asked than another image does.
    """
    if len(found) == 1:
        return found[0]
    cutoffs = [one.cutoff for one in found if one.boxes and one.cutoff is not None]
    floor = max(filter(isfinite, cutoffs), default=0.0)
    less = {"boxes": [], "cells": [], "foreground": [], "route": "direct"}
    peaks = [max((cell for row in one.heat for cell in row), default=floor) for one in found]
    surest = max(found, key=lambda one: one.score or 0.0)
    gate = {"score": surest.score, "threshold": surest.threshold}
    kept = [
        one.model_copy(update=gate if peak >= floor else less | gate) for one, peak in zip(found, peaks, strict=True)
    ]
    route = "zoom" if any(one.boxes for one in kept) else "direct"
    return kept[0].model_copy(update={"reason": surest.reason, "route": route, "others": kept[1:]})


def _of_image(ctx: Context, pairs: Sequence[tuple[View, PerceptionRecord]], further: bool) -> PerceptionRecord:
    """Return the result of a look at the views of one image, with boxes in pixels of its original.

    Map and extent are those of the view with the first proposed box: the coarse view, or in a further look perhaps a
    crop. `cells` are those of each box's own view.
    """
    number = pairs[0][0].image
    size = ctx.store.original(pairs[0][0].id).size
    boxes, cells, foreground = [], [], []
    for view, one in pairs:
        margin = _margin(ctx, one)
        inside = [Box(*box, view=view.id).clamp(view.size) for box in one.boxes]
        boxes += [view.to_original(box).padded(margin).clamp(size) for box in inside]
        cells += cells_of(one, inside, view.size)
        foreground += [view.to_original(Box(*box, view=view.id)).clamp(size) for box in one.foreground]
    view, best = next((pair for pair in pairs if pair[1].boxes), pairs[0])
    extent = None if best.extent is None else view.to_original(Box(*best.extent, view=view.id))
    return best.model_copy(
        update={
            "view": original_id(number),
            "image": number,
            "route": "zoom" if boxes else "direct",
            "extent": None if extent is None else extent.corners,
            "boxes": [box.corners for box in boxes],
            "cells": cells,
            "foreground": [box.corners for box in foreground],
            "visual_tokens": sum(one.visual_tokens for _, one in pairs) if further else best.visual_tokens,
        }
    )


def _margin(ctx: Context, seen: PerceptionRecord) -> float:
    wanted = ctx.config.perception.margin
    return seen.margin if wanted is None else wanted


def _insert(ctx: Context, record: PerceptionRecord, *, further: bool = False) -> dict[str, list[float]]:
    """Cut the proposed crops within the budgets; return those with aligned positions and the cells really cut."""
    before, placed = len(ctx.store.shown), dict[str, list[float]]()
    for one in record.every:
        placed |= _insert_of_image(ctx, one, further=further)
    # What the budget keeps back of one image matters only if nothing of any is shown.
    record.withheld = len(ctx.store.shown) == before and any(one.withheld for one in record.every)
    return placed


def _insert_of_image(ctx: Context, record: PerceptionRecord, *, further: bool) -> dict[str, list[float]]:
    placed: dict[str, list[float]] = {}
    coarse, origin = ctx.store.view(coarse_id(record.image)), original_id(record.image)
    before = len(ctx.store.shown)
    sparse, foreground = ctx.config.perception.sparse_crop, [Box(*box, view=origin) for box in record.foreground]
    for box, cells in zip(record.boxes, record.cells, strict=True):
        plan, shown = ctx.roi_zoom.plan(ctx.store, Box(*box, view=origin)), ctx.store.shown
        if sparse is not None:
            plan = sparse_plan(plan, foreground, scale=sparse, factor=ctx.views.factor)
        how = {"further": further or ctx.follows, "close": record.close}
        kept_back = "" if plan.error else ctx.policy.keeps_back(shown, plan, **how)
        if kept_back:
            record.reason += f"; {kept_back}"
            continue
        if not _has_room(ctx, plan):
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


def _has_room(ctx: Context, plan: ZoomPlan) -> bool:
    """Return whether the budgets of views and visual tokens allow another crop."""
    budget, shown = ctx.config.budget, ctx.own_views
    spent = sum(view.tokens for view in shown) + plan.tokens
    return len(shown) < budget.max_views and (budget.max_visual_tokens is None or spent <= budget.max_visual_tokens)


def _with_gate(record: PerceptionRecord, drafted: dict[str, Any] | None) -> PerceptionRecord:
    """Return the record of a look with the score of the gate that asked for it: that of a draft."""
    if drafted is None:
        return record
    gate = {key: drafted[key] for key in ("score", "threshold")}
    others = [one.model_copy(update=gate) for one in record.others]
    return record.model_copy(update={**gate, "others": others, "reason": f"{drafted['reason']}; {record.reason}"})
