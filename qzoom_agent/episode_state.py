"""The state of an episode, the objects around it, and the steps that nodes of the loop share.

The state is plain JSON of a few kB; pixels and the model are reached through `Context`, which is never stored. A
resumed episode opens a new session and gives it all messages.
"""

from __future__ import annotations

import contextvars
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Final, Literal, NotRequired, cast, get_args, get_origin, get_type_hints

from langgraph.runtime import Runtime
from langgraph.types import Overwrite
from typing_extensions import TypedDict

from qzoom_agent.async_events import Receiver
from qzoom_agent.config import AgentConfig, ViewBudget
from qzoom_agent.errors import BackendError, ConfigError, ImageError, QzoomError, ReaderLeft, describe_error
from qzoom_agent.extensions import calling, reference
from qzoom_agent.gate import answer_confidence
from qzoom_agent.geometry import Box
from qzoom_agent.messages import Message, text, view_ids, with_system
from qzoom_agent.models.interface import (
    Backend,
    ForkingSession,
    Perceiver,
    PerceivingSession,
    Reply,
    SamplingParams,
    Session,
    SparseSession,
)
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols.interface import Parsed, ZoomProtocol
from qzoom_agent.protocols.parsing import cut_off, own_turn, split_thought
from qzoom_agent.review import Last
from qzoom_agent.telemetry import Span, installed, span
from qzoom_agent.trace import SERVED, PendingCall, Status, Turn
from qzoom_agent.views import View, ViewStore, coarse_id, original_id
from qzoom_agent.zoom.own_tools import OwnTool
from qzoom_agent.zoom.zoom import Tool, Zoom

logger = logging.getLogger(__name__)

EventKind = Literal["view", "look", "token", "turn", "waiting", "call", "answer"]


class State(TypedDict):
    """The content of a checkpoint: JSON only."""

    id: str
    question: str
    backend: str
    config: dict[str, Any]
    """The resolved `AgentConfig`; a resumed episode goes on under it."""
    gold: list[list[float]] | None
    """Gold boxes in original pixels, for `oracle` and `random`; a fifth number is that of the image, from 1 on."""
    views: Annotated[list[dict[str, Any]], operator.add]
    """Views that this question added."""
    messages: Annotated[list[Message], operator.add]
    """The whole conversation; images are view ids."""
    turns: Annotated[list[dict[str, Any]], operator.add]
    """Finished turns of this question."""
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
    waiting: NotRequired[dict[str, Any] | None]
    """The call that a person is asked about (`PendingCall`), and until it is run the decision."""
    approval: NotRequired[dict[str, Any] | None]
    """The decision (`Approval`); None: there is none yet."""
    status: Status | None
    answer: str | None
    error: str | None
    asked: NotRequired[Annotated[list[dict[str, Any]], operator.add]]
    """Earlier questions of the conversation (`QuestionRecord`)."""
    opened: NotRequired[int]
    """Messages before this question."""
    history: NotRequired[bool]
    """False: each question of the conversation is asked with its own views alone."""


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
    approve: Callable[[PendingCall], Any] | None = None
    """Decides on calls, where the configuration wants that; None: the run stops before each."""
    live: bool = False
    """Stream the text of each turn as it is written."""
    left: bool = False
    """Nobody reads the stream any longer: the turn under way ends at its next piece of text."""
    receiver: Receiver | None = None
    """Who waits for the run in an event loop; once they have left, the run ends at its next step."""
    span: Span | None = None
    """The run's span, parent of those of its turns and calls."""
    chat: bool = False
    """Further questions may follow, for which the state of the first look is kept."""
    follows: bool = False
    """The question is a later one of a conversation."""
    earlier: frozenset[str] = frozenset()
    """Crops and images of tools that earlier questions showed. They do not count towards the budgets of this question,
    and a look does not read them."""
    waited: float = field(default=0.0, init=False)
    """Seconds of this step in which a look waited for others in its batch."""
    session: Session | None = field(default=None, init=False)
    beside: Session | None = field(default=None, init=False)
    """A second conversation with the same views: looks at later questions, and what is asked apart."""

    @property
    def own_views(self) -> list[View]:
        """The views that a run of this question alone would have shown so far."""
        return [view for view in self.store.shown if view.id not in self.earlier]

    @property
    def provider(self) -> str | None:
        """The name of who serves the model, for spans: of a server what it says it is. None: nobody records spans."""
        client = getattr(self.backend, "client", None)
        if client is None:
            return "qzoom_agent"
        try:
            return str(client.owner or "openai") if installed() else None
        except QzoomError:  # such as a key that cannot be sent: the first turn says so
            return "openai"

    def follow(self, state: State) -> None:
        """Take note of the earlier questions of a conversation."""
        asked = state.get("asked", [])
        self.follows = bool(asked)
        self.earlier = frozenset(
            view["id"] for one in asked for view in one["views"] if view["kind"] in ("crop", "tool")
        )
        if not state.get("history", True):
            self.store.hidden = self.earlier

    def open(self, placed: dict[str, list[float]], *, alone: bool = False) -> Session:
        """Return the session, opened at the first call, with the placed and the sparse crops made known to it.

        `alone`: for messages that are no part of the conversation. A later question has a second session for them, so
        that the first keeps what it holds.
        """
        if self.session is None:
            self.session = self._opened()
        session = self.session
        if alone and self.follows:
            session = self.beside = self.beside or self._opened(self.session)
        if isinstance(session, PerceivingSession):
            for view, (x1, y1, x2, y2) in placed.items():
                source = coarse_id(self.store.view(view).image)
                session.place(view, source=source, cells=(x1, y1, x2, y2))
        if isinstance(session, SparseSession):
            for one in self.store.shown:
                if one.kept is not None:
                    session.show_part(one.id, kept=one.kept)
        return session

    def keep_look(self) -> None:
        """Keep the state of a look that the session has just taken, for looks at later questions."""
        if self.chat and self.beside is None and self.session is not None:
            self.beside = self._opened(self.session)

    def _opened(self, other: Session | None = None) -> Session:
        """Open a session; one that shares what `other` has computed, where the model's sessions can."""
        if isinstance(other, ForkingSession):
            return other.fork(shared=True)
        return self.backend.session(self.policy.eyes(self.store))

    def read(self, turn: Turn, *, views: int | None = None) -> Parsed:
        """Parse a turn; one that its limit of tokens cut off has neither an answer nor a call.

        `views`: number of views that were shown before it; None: all.
        """
        if turn.withheld:
            return Parsed(thought=own_turn(turn.text).strip())
        if turn.finish == "length":
            most = self.config.generation.max_new_tokens
            return cut_off(turn.text, limit=min(turn.new_tokens or most, most))  # fewer at the end of the context
        name = reference(self.protocol)
        with calling(name, kind="protocol"):
            parsed = self.protocol.parse(turn.text, self.store.shown[:views])
        if not isinstance(parsed, Parsed):
            raise ConfigError(f"The protocol {name!r} returned {parsed!r:.80} from parse. Return a Parsed.")
        if self.policy.offers_tools or self.policy.locates or parsed.calls or parsed.answer is not None:
            return parsed
        # Where nothing can be called, an answer may quote what looks like a call that cannot be read.
        quoted = parsed.problems and (parsed.thought or not any(char.isdigit() or char == "<" for char in turn.text))
        answer = split_thought(own_turn(turn.text))[1] if quoted else ""
        return parsed.model_copy(update={"answer": answer, "problems": []}) if answer else parsed

    def close(self) -> None:
        """Free the sessions. One that cannot be closed is a warning, as the answer is there by then."""
        for session in filter(None, (self.session, self.beside)):
            try:
                session.close()
            except Exception as error:  # whatever somebody's session raises
                logger.warning(
                    "A session of the model '%s' cannot be closed: %s", self.backend.name, describe_error(error)
                )
        self.session = self.beside = None


def start(
    *,
    id: str,
    question: str,
    backend: str,
    config: AgentConfig,
    gold: list[list[float]] | None,
    originals: Sequence[View],
) -> State:
    """Return the state of an episode before its first step."""
    return State(
        id=id,
        question=question,
        backend=backend,
        config=config.model_dump(mode="json"),
        gold=gold,
        views=[view.model_dump(mode="json") for view in originals],
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


def follow_up(
    state: State, ctx: Context, question: str, *, record: dict[str, Any], gold: list[list[float]] | None
) -> dict[str, Any]:
    """Return the update of a finished state, with its `record`, that asks another question in the same conversation."""
    messages, closed = state["messages"], list[Message]()
    if not state.get("history", True):
        messages = []
    elif state["answer"] is not None and len(messages) == state.get("opened", 0):  # a draft that was kept
        closed = [*_asking(state, ctx), text("assistant", state["answer"])]
    elif messages and messages[-1]["role"] != "assistant":  # a question that failed; templates want turns to alternate
        closed = [text("assistant", NO_ANSWER)]
    return {
        "question": question,
        "gold": gold,
        "asked": [record],
        "opened": len(messages) + len(closed),
        "history": state.get("history", True),
        "messages": Overwrite([*messages, *closed]),
        **{name: Overwrite([]) for name in ("views", "turns", "further_looks")},
        "seconds": Overwrite(0.0),
        "perceive_seconds": 0.0,
        "looking": False,
        **dict.fromkeys(("turn", "last", "perception", "status", "answer", "error", "waiting", "approval")),
    }


NO_ANSWER: Final = "(no answer)"
"""The assistant's turn after a question that failed."""


def advanced(state: State, update: dict[str, Any]) -> State:
    """Return the state after a node's update, merged as the compiled graph does; for callers that run nodes by hand."""
    kinds = _kinds()
    merged: dict[str, Any] = {**state}
    for key, value in update.items():
        kind = kinds[key]
        if get_origin(kind) is NotRequired:
            (kind,) = get_args(kind)
        reduce = getattr(kind, "__metadata__", (None,))[0]
        if isinstance(value, Overwrite):
            reduce, value = None, value.value
        merged[key] = value if reduce is None else reduce(merged.get(key, []), value)
    return cast(State, merged)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(State, include_extras=True)


def add_coarse(ctx: Context) -> list[View]:
    """Return the coarse view of each image, added at the first call.

    Raises:
        ImageError: The budget cannot hold them.
    """
    store, views, limit = ctx.store, ctx.views, ctx.config.budget.max_visual_tokens
    if store.coarse:
        return store.coarse
    originals, spent = store.originals, 0
    for original in originals:
        low, high = views.coarse_limits(original.size)
        if limit is not None:  # several images share it
            high = min(high, max(1, limit // len(originals)))
            low = min(low, high)
        coarse = store.add_coarse(factor=views.factor, min_tokens=low, max_tokens=high, number=original.image)
        spent += coarse.tokens
        if limit is not None and spent > limit:
            size = original.size
            raise ImageError(
                f"An image of {size.width}x{size.height} pixels costs {coarse.tokens} visual tokens at the least, and "
                f"budget.max_visual_tokens is {limit}. Raise it, or cut the image into parts that are less long."
            )
    return store.coarse


def gold_box(values: Sequence[float]) -> Box:
    """Return a gold box of a state."""
    x1, y1, x2, y2, *number = values
    return Box(x1, y1, x2, y2, view=original_id(int(sum(number))))


def opening_of(state: State, ctx: Context) -> list[Message]:
    """Return the messages that ask the question, with the views that the conversation has not shown yet.

    There are none where a draft has answered and there is nothing new to see or to ask for.
    """
    drafted = any(turn["answer"] is not None for turn in state["turns"])
    if drafted and all(view.kind != "crop" for view in ctx.own_views) and not ctx.policy.offers_tools:
        return []
    return _asking(state, ctx)


def _asking(state: State, ctx: Context) -> list[Message]:
    tools, known = ctx.policy.offers_tools, set(view_ids(state["messages"]))
    new = [view for view in ctx.own_views if view.id not in known]
    said = with_system(ctx.protocol.opening(state["question"], new, tools=tools), ctx.config.system)
    return [one for one in said if one["role"] != "system"] if state["messages"] else said


def generate(
    state: State,
    runtime: Runtime[Context],
    asked: list[Message],
    *,
    read: Callable[[Turn], Parsed],
    forced: bool = False,
    logprobs: bool = False,
    alone: bool = False,
) -> tuple[Turn, Parsed, Reply]:
    """Generate the turn after the conversation and the messages `asked`, and read it.

    `alone`: the conversation so far is not read.
    """
    ctx, index = runtime.context, len(state["turns"])
    generation, model = ctx.config.generation, ctx.backend.name
    wanted = getattr(ctx.backend, "gives_logprobs", False) if generation.logprobs is None else generation.logprobs
    settings = SamplingParams(
        **generation.model_dump(exclude={"logprobs"}),
        seed=ctx.config.seed + index,
        logprobs=logprobs or wanted,
        stop=ctx.protocol.stop,
        tools=ctx.tools,
        may_call=not asked,
    )
    about = {
        "gen_ai.provider.name": ctx.provider,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": generation.max_new_tokens,
        "gen_ai.request.temperature": generation.temperature,
        "gen_ai.request.top_p": generation.top_p,
    }
    with span("chat", model, about, parent=ctx.span) as chat:
        session = ctx.open(state["placed"], alone=alone)
        # A copy: somebody's session may put the pixels into the messages themselves.
        talk = deepcopy([*([] if alone else state["messages"]), *asked])
        reply = session.reply(talk, settings=settings, on_text=_live(runtime, index) if ctx.live else None)
        if not isinstance(reply, Reply):
            raise BackendError(
                f"The model '{model}' returned a {type(reply).__name__} from reply(). It has to return a "
                "qzoom_agent.models.interface.Reply."
            )
        chat.set(
            {
                "gen_ai.usage.input_tokens": reply.prompt_tokens,
                "gen_ai.usage.output_tokens": reply.new_tokens,
                "gen_ai.response.finish_reasons": [reply.finish],
            }
        )
    written = Turn(index=index, **reply.model_dump(), forced=forced)
    # Parse the text as the record keeps it (valid Unicode), so that `act` and a resumed run parse the same.
    parsed = read(written)
    fields = parsed.model_dump(include={"thought", "answer", "problems", "repairs"})
    turn = Turn(**{**written.model_dump(), **fields})
    if reply.logprobs and turn.answer is not None:
        turn.confidence = answer_confidence(reply.logprobs, turn.answer)
    return turn, parsed, reply


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


def show(runtime: Runtime[Context], views: Iterable[View]) -> list[dict[str, Any]]:
    """Stream views that the model is shown; return them as a state has them."""
    shown = [view.model_dump(mode="json") for view in views]
    for view in shown:
        emit(runtime, "view", view)
    return shown


def _live(runtime: Runtime[Context], index: int) -> Callable[[str], None]:
    """Return a receiver of text pieces that any thread may call."""
    here = contextvars.copy_context()  # where a stream writer finds its run

    def receive(piece: str) -> None:
        if runtime.context.left:
            raise ReaderLeft("The reader of the stream left.")  # closes a server's reply, or ends the generation
        here.copy().run(emit, runtime, "token", {"turn": index, "text": piece})

    return receive
