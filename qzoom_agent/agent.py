"""The agent: one image, one question, an `Answer` with its whole record.

    agent = Agent.from_pretrained("nano")
    answer = agent.run("board.png", "What is printed on the red star?")
    print(answer)
    answer.save("run")

An agent holds a backend and a configuration and nothing of an episode: every run has its own view store, session and
state, so runs may overlap (`batch`). With a `state_dir` and a `thread` name, each step of a run is saved before the
next begins, and `resume(thread)` goes on after a kill or a failure of the model, in this process or another, without
asking the model again for turns that are done.

Bad input raises a `QzoomError` before the model is asked anything. What the model or its server does wrong does not
raise: it is the `status` of the answer.
"""

from __future__ import annotations

import html
import re
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import uuid4

from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from qzoom_agent.config import AgentConfig
from qzoom_agent.errors import BoxError, ConfigError, QzoomError
from qzoom_agent.geometry import Box
from qzoom_agent.graph import Context, EventKind, State, compile_graph, start, take_look, to_trace
from qzoom_agent.images import ImageSource, load_image
from qzoom_agent.models.interface import Backend
from qzoom_agent.policy import CropPolicy
from qzoom_agent.protocols import ZoomProtocol, get_protocol
from qzoom_agent.trace import PerceptionRecord, Status, Trace, by_digest, describe_environment
from qzoom_agent.views import View, ViewStore
from qzoom_agent.zoom.zoom import Zoom, ZoomConfig

if TYPE_CHECKING:
    from langgraph.checkpoint.sqlite import SqliteSaver

Graph = CompiledStateGraph[State, Context, State, State]
Boxes = Sequence[Box | Sequence[float]]
"""Boxes of the original: `Box` in any frame, or four numbers in pixels."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_STEPS = "episodes.sqlite"
_THREAD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Answer:
    """What came out of one episode."""

    text: str
    """The answer; empty if there is none."""
    status: Status
    trace: Trace
    store: ViewStore
    """The pixels of every view on the trace."""

    def save(self, folder: str | Path) -> Path:
        """Write trace.json, images/ and config.yaml into `folder`; returns it. TraceError if it cannot be written."""
        written = self.trace.save(folder, by_digest(self.trace.views, self.store.image))
        AgentConfig.model_validate(self.trace.config).save(written / "config.yaml")
        return written

    def report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file that shows where the model looked; returns its path."""
        from qzoom_agent.report.episode import write_report

        write_report(self.trace, by_digest(self.trace.views, self.store.image), path)
        return Path(path)

    def __str__(self) -> str:
        if self.status == "answered":
            return self.text
        return f"{self.text or 'no answer'} ({self.status}{f': {self.trace.error}' if self.trace.error else ''})"

    def _repr_html_(self) -> str:
        usage = self.trace.usage
        return (
            f"<p><i>{html.escape(self.trace.question)}</i></p><p><b>{html.escape(str(self))}</b></p>"
            f"<p>{usage.served + usage.inserted} crops, {usage.visual_tokens} visual tokens, "
            f"{usage.seconds.total:.2f} s</p>"
        )


@dataclass(frozen=True)
class Look:
    """What the branches said of one question, see `Agent.look`."""

    record: PerceptionRecord
    store: ViewStore
    """The pixels of the original and the coarse view."""
    question: str
    model: str


class Event(BaseModel):
    """Something that just happened in a streamed run.

    view: a `View` that the model is shown; look: what gate and SD-RPN said, a `PerceptionRecord`; token: {turn, text}
    as it is written; turn: a `Turn` as the model left it; call: a `CallRecord` with its turn; answer: {status, answer,
    error}, always the last.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    kind: EventKind
    data: dict[str, Any]
    answer: Answer | None = Field(default=None, exclude=True, repr=False)
    """The whole `Answer`, with the event of that kind; not part of the JSON."""


class Agent:
    """Answers questions about images with a model that may look closer. See the module's note."""

    backend: Backend
    config: AgentConfig
    """The configuration of each run, with nothing left to the backend's presets."""
    protocol: ZoomProtocol
    state_dir: Path | None
    """Where runs with a `thread` are saved."""

    def __init__(
        self, backend: Backend, *, config: AgentConfig | None = None, state_dir: str | Path | None = None
    ) -> None:
        """Raises ConfigError for a configuration that this backend cannot run."""
        self.backend = backend
        self._given = config or AgentConfig()
        self.config = self._given.resolved(
            model=backend.name, protocol=backend.protocol, defaults=backend.defaults, perceives=backend.perceives
        )
        self.state_dir = None if state_dir is None else Path(state_dir)
        self._graph = compile_graph()
        self._saved: Graph | None = None
        self._saver: SqliteSaver | None = None
        self.protocol = self._context(self.config, ViewStore()).protocol

    @classmethod
    def from_pretrained(
        cls,
        model: str = "nano",
        *,
        config: AgentConfig | None = None,
        state_dir: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        branches: str | Path | None = None,
        **overrides: Any,
    ) -> Agent:
        """An agent with a local model: a preset name, a path or a hub id.

        `branches` is a folder of branches (gate, SD-RPN) to use instead of those that come with the model.
        `overrides` change `config` (policy="direct", budget={"max_turns": 3}, ...). Raises ConfigError or BackendError.
        """
        config = (config or AgentConfig()).replace(model=model, **overrides)
        if config.protocol is not None:
            get_protocol(config.protocol)  # a wrong name should not cost the loading of weights
        from qzoom_agent.models.hf import HFBackend

        backend = HFBackend.load(model, device=device, dtype=dtype, protocol=config.protocol, branches=branches)
        return cls(backend, config=config, state_dir=state_dir)

    @classmethod
    def from_server(
        cls,
        url: str,
        *,
        model: str,
        config: AgentConfig | None = None,
        state_dir: str | Path | None = None,
        concurrency: int = 8,
        **overrides: Any,
    ) -> Agent:
        """An agent with a model behind an OpenAI-compatible server (`url` such as http://localhost:8000/v1).

        `model` is a preset, whose hub id is what the server is asked for, or what the server calls it. The key is read
        from OPENAI_API_KEY. Raises ConfigError.
        """
        config = (config or AgentConfig()).replace(model=model, **overrides)
        from qzoom_agent.models.presets import UNKNOWN_BUDGET, served_model
        from qzoom_agent.models.server import ServerBackend

        preset = served_model(model)
        backend = ServerBackend(
            url,
            model=preset.source,
            protocol=config.protocol or preset.protocol or "plain",
            defaults=preset.budget or UNKNOWN_BUDGET,
            concurrency=concurrency,
        )
        return cls(backend, config=config, state_dir=state_dir)

    def replace(self, **changes: Any) -> Agent:
        """An agent with the same model under a changed configuration (keys as `AgentConfig.replace` takes them)."""
        # of what was asked for, not of what it came to: limits that were the backend's may give way to the changes
        return Agent(self.backend, config=self._given.replace(**changes), state_dir=self.state_dir)

    def run(
        self,
        image: ImageSource,
        question: str,
        *,
        boxes: Boxes | None = None,
        seed: int | None = None,
        thread: str | None = None,
    ) -> Answer:
        """Answer one question about one image.

        boxes: where the answer is known to be, for the policies `oracle` and `random`, and for the record.
        seed: instead of the configuration's.
        thread: save each step under this name in `state_dir`, for `resume`.
        Raises ImageError or ConfigError for what was given; never for what the model did.
        """
        state, context = self._begin(image, question, boxes=boxes, seed=seed, thread=thread)
        return self._invoke(state, context, thread)

    def look(self, image: ImageSource, question: str) -> Look:
        """Only the coarse pass: whether the question needs more detail, and where. Nothing is answered.

        The map is made even where the gate says that it is not needed; nothing is proposed then.
        Raises ImageError or ConfigError for what was given, BackendError if the model cannot be run.
        """
        if not self.backend.perceives:
            raise ConfigError(
                f"The model '{self.backend.name}' has no branches (gate and SD-RPN), so it cannot look. "
                "Train them with `qzoom train`, or give a folder of branches."
            )
        _, context = self._begin(image, question, boxes=[], seed=None, thread=None)
        try:
            record, _ = take_look(context, question, map_always=True)
        finally:
            context.close()
        return Look(record=record, store=context.store, question=question, model=self.backend.name)

    def stream(
        self,
        image: ImageSource,
        question: str,
        *,
        boxes: Boxes | None = None,
        seed: int | None = None,
        thread: str | None = None,
    ) -> Iterator[Event]:
        """As `run`, but yields each `Event` as it happens; the last carries the `Answer`.

        Leaving early ends the episode after the turn under way.
        """
        state, context = self._begin(image, question, boxes=boxes, seed=seed, thread=thread)
        return self._stream(state, context, thread)

    def begin(
        self, image: ImageSource, question: str, *, boxes: Boxes | None = None, seed: int | None = None
    ) -> tuple[State, Context]:
        """An episode that the caller drives by the graph's own nodes: its state before its first step, and its context.

        Raises ImageError or ConfigError for what was given.
        """
        return self._begin(image, question, boxes=boxes, seed=seed, thread=None)

    def batch(self, pairs: Sequence[tuple[ImageSource, str]], *, workers: int = 1) -> list[Answer]:
        """Answers to (image, question) pairs, in their order; one that fails is an Answer with status "error".

        Raises ConfigError for what is no sequence of pairs, or no number of workers.
        """
        if workers < 1:
            raise ConfigError(f"workers is the number of runs at a time, 1 or more; got {workers}.")
        for at, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"Item {at} is not a pair (image, question); got {type(pair).__name__}.")

        def one(pair: tuple[ImageSource, str]) -> Answer:
            try:
                return self.run(*pair)
            except Exception as error:  # a failing item is data; its neighbours go on
                return self._failed(str(pair[1]), error)

        if workers == 1:
            return [one(pair) for pair in pairs]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, pairs))

    def resume(self, thread: str) -> Answer:
        """Finish an interrupted run under the configuration it began with; a finished one is returned as it is.

        One that the model or its server ended ("error") goes on with the step that failed. Raises ConfigError if there
        is no such run, it belongs to another model or the file of saved steps cannot be read, ImageError if its images
        are gone.
        """
        state = self._saved_state(thread)
        if not state:
            known = ", ".join(self.threads()) or "none"
            raise ConfigError(f"There is no run '{thread}' in {self.state_dir}. Saved runs: {known}.")
        if state["backend"] != self.backend.name:
            raise ConfigError(
                f"The run '{thread}' was begun by the model '{state['backend']}' and this agent has "
                f"'{self.backend.name}'. Resume it with the same model."
            )
        failed = None
        if state["status"] == "error":
            failed, state = self._before_failure(thread)
        store = ViewStore.restore(self._folder(thread), [View(**view) for view in state["views"]])
        context = self._context(AgentConfig.model_validate(state["config"]), store)
        return self._answer(state, context) if state["status"] else self._invoke(None, context, thread, since=failed)

    def threads(self) -> list[str]:
        """Names of the runs saved in `state_dir`, sorted. ConfigError if the file of saved steps cannot be read."""
        if self.state_dir is None or not (self.state_dir / _STEPS).is_file():
            return []
        with self._reading_steps():
            return sorted({saved.config["configurable"]["thread_id"] for saved in self._steps().list(None)})

    def close(self) -> None:
        """Close the file of saved steps; the agent opens it again when needed."""
        if self._saver is not None:
            self._saver.conn.close()
        self._saver = self._saved = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(
        self, image: ImageSource, question: str, *, boxes: Boxes | None, seed: int | None, thread: str | None
    ) -> tuple[State, Context]:
        """Check everything that was given, before anything is saved or the model is asked."""
        if not isinstance(question, str) or not question.strip() or _SURROGATE.search(question):
            raise ConfigError(f"A question is a text of valid characters that is not empty; got {question!r}.")
        config = self.config if seed is None else self.config.replace(seed=seed)
        pixels = load_image(image, max_pixels=config.max_pixels)
        gold = None if boxes is None else [_gold(box, pixels) for box in boxes]
        folder = None
        if thread is not None:
            if self._saved_state(thread):
                raise ConfigError(
                    f"There is already a run '{thread}' in {self.state_dir}. "
                    f"Go on with resume('{thread}'), or choose another name."
                )
            folder = self._folder(thread)
        store = ViewStore(folder)
        context = self._context(config, store)
        context.policy.require(gold)
        state = start(
            id=thread or uuid4().hex[:12],
            question=question,
            backend=self.backend.name,
            config=config,
            gold=None if gold is None else [box.as_list() for box in gold],
            original=store.add_original(pixels),
        )
        return state, context

    def _context(self, config: AgentConfig, store: ViewStore) -> Context:
        views = config.budget.view_budget(self.backend.defaults)
        zoom = ZoomConfig(
            factor=views.factor,
            min_tokens=views.crop_min_tokens,
            max_tokens=views.crop_max_tokens,
            **config.crop.model_dump(),
        )
        return Context(
            backend=self.backend,
            protocol=get_protocol(config.protocol or self.backend.protocol),
            policy=CropPolicy(config, views, perceives=self.backend.perceives),
            config=config,
            views=views,
            zoom=Zoom(zoom),
            roi_zoom=Zoom(zoom.for_proposals(config.perception)),
            store=store,
        )

    def _invoke(
        self, state: State | None, context: Context, thread: str | None, *, since: RunnableConfig | None = None
    ) -> Answer:
        """
        Args:
            since: go on after this saved step instead of the last.
        """
        graph, options = self._graph_for(thread, context)
        if since is not None:
            options["config"] = {**options["config"], **since}
        try:
            with self._reading_steps():
                final = graph.invoke(state, context=context, **options)
        finally:
            context.close()
        return self._answer(cast(State, final), context)

    def _stream(self, state: State, context: Context, thread: str | None) -> Iterator[Event]:
        graph, options = self._graph_for(thread, context)
        context.live = True
        final: Any = None
        ending: Event | None = None
        try:
            with self._reading_steps():
                for mode, data in graph.stream(state, context=context, stream_mode=["custom", "values"], **options):
                    if mode == "values":
                        final = data
                    elif data["kind"] == "answer":
                        ending = Event(**data)
                    else:
                        yield Event(**data)
        finally:
            context.close()
        assert ending is not None
        yield ending.model_copy(update={"answer": self._answer(final, context)})

    def _graph_for(self, thread: str | None, context: Context) -> tuple[Graph, dict[str, Any]]:
        # Two steps a turn; LangGraph's own limit must never end an episode before our budget does.
        limit = 2 * context.config.budget.max_turns + 10
        if thread is None:
            return self._graph, {"config": {"recursion_limit": limit}}
        config = {**_run_config(thread), "recursion_limit": limit}
        return self._saving_graph(thread), {"config": config, "durability": "sync"}

    def _saving_graph(self, thread: str) -> Graph:
        if self.state_dir is None:
            raise ConfigError(f"The run '{thread}' has nowhere to be saved. Give the agent a state_dir.")
        if not _THREAD.fullmatch(thread) or thread.lower().startswith(_STEPS):
            raise ConfigError(
                f"{thread!r} cannot name a run: use up to 100 letters, digits, '.', '_' and '-', the first of them a "
                f"letter, a digit or '_', and not {_STEPS}, the file of saved steps."
            )
        if self._saved is None:
            self._saved = compile_graph(self._steps())
        return self._saved

    def _saved_state(self, thread: str) -> State:
        """The last saved step of a run; empty if there is none."""
        graph = self._saving_graph(thread)
        with self._reading_steps():
            return cast(State, graph.get_state(_run_config(thread)).values)

    def _before_failure(self, thread: str) -> tuple[RunnableConfig, State]:
        """The last saved step of a run before the one that failed, and the state it left."""
        graph = self._saving_graph(thread)
        with self._reading_steps():
            steps = graph.get_state_history(_run_config(thread))
            return next((step.config, cast(State, step.values)) for step in steps if step.values["error"] is None)

    def _steps(self) -> SqliteSaver:
        """The file of saved steps, opened. One for all runs of this agent: it keeps its threads apart."""
        from langgraph.checkpoint.sqlite import SqliteSaver

        assert self.state_dir is not None
        if self._saver is None:
            try:
                self.state_dir.mkdir(parents=True, exist_ok=True)
                self._saver = SqliteSaver(sqlite3.connect(self.state_dir / _STEPS, check_same_thread=False))
            except (OSError, sqlite3.Error) as error:
                raise ConfigError(f"Cannot save runs in {self.state_dir}: {error}. Choose another state_dir.") from None
        return self._saver

    @contextmanager
    def _reading_steps(self) -> Iterator[None]:
        """What sqlite says of a damaged or locked file, as a ConfigError; nothing else that runs here uses sqlite."""
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(
                f"The saved steps in {self.state_dir}/{_STEPS} cannot be used: {error}. If another process is at work "
                "there, wait for it; else choose another state_dir."
            ) from None

    def _folder(self, thread: str) -> Path:
        assert self.state_dir is not None
        return self.state_dir / thread

    def _answer(self, state: State, context: Context) -> Answer:
        trace = to_trace(state, protocol=context.protocol.name, environment=self._environment())
        return Answer(text=trace.answer or "", status=trace.status, trace=trace, store=context.store)

    def _environment(self) -> dict[str, str]:
        """Versions, and the device and number format with the reason for them."""
        placement = str(getattr(self.backend, "placement", ""))
        return {**_versions(), **({"placement": placement} if placement else {})}

    def _failed(self, question: str, error: Exception) -> Answer:
        trace = Trace(
            question=question,
            status="error",
            model=self.backend.name,
            policy=self.config.policy or "",
            config=self.config.model_dump(mode="json"),
            seed=self.config.seed,
            environment=self._environment(),
            error=str(error) if isinstance(error, QzoomError) else f"{type(error).__name__}: {error}",
        )
        return Answer(text="", status="error", trace=trace, store=ViewStore())


def _gold(box: Box | Sequence[float], image: Image.Image) -> Box:
    """A gold box in pixels of the original, inside it."""
    if not isinstance(box, Box):
        try:
            x1, y1, x2, y2 = box
            box = Box(x1, y1, x2, y2)
        except (TypeError, ValueError, BoxError):
            raise ConfigError(
                f"A box is four numbers x1, y1, x2, y2 in pixels of the original; got {box!r:.80}. Give a list of them."
            ) from None
    if box.view != "original" or not box.finite:
        raise ConfigError(f"A gold box has finite numbers and refers to the original; got {box}.")
    return box.to_pixel(image.size).ordered().clamp(image.size)


def _run_config(thread: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread}}


@cache
def _versions() -> dict[str, str]:
    return describe_environment()
