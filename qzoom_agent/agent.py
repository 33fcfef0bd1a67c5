"""The agent: answers one question about one image, with the whole record.

    agent = Agent.from_pretrained("nano")
    answer = agent.run("board.png", "What is printed on the red star?")
    print(answer)
    answer.save("run")

Runs may overlap. Bad input raises a `QzoomError` before the model is asked; a failure of the model or its server does
not raise, it is the `status` of the answer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack
from uuid import uuid4

from langchain_core.runnables import RunnableConfig

from qzoom_agent.agent_parts import AgentParts, Boxes, Images, changed, gold_boxes, split_objects
from qzoom_agent.answer import Answer, Event, LookResult
from qzoom_agent.approval import Decision, is_waiting, read_decision
from qzoom_agent.async_events import Receiver, events_of, result_of
from qzoom_agent.config import AgentConfig
from qzoom_agent.episode_run import play
from qzoom_agent.episode_state import Context, State, start
from qzoom_agent.errors import ConfigError, describe_error
from qzoom_agent.graph import take_look, to_trace
from qzoom_agent.images import ImageSource, load_image
from qzoom_agent.messages import require_question
from qzoom_agent.models.interface import Backend, Perceiver
from qzoom_agent.protocols import PROTOCOLS, ZoomProtocol, get_protocol
from qzoom_agent.protocols.wording import PromptFile, read_given
from qzoom_agent.saved_runs import SavedRuns
from qzoom_agent.trace import PendingCall, Trace
from qzoom_agent.views import View, ViewStore, original_id
from qzoom_agent.zoom.own_tools import require_place

if TYPE_CHECKING:
    from qzoom_agent.chat import Chat

logger = logging.getLogger(__name__)


class RunOptions(TypedDict, total=False):
    """Further arguments of `Agent.run`, `stream` and their other forms."""

    boxes: Boxes | None
    """Gold boxes, for the policies `oracle` and `random` and for the record."""
    seed: int | None
    """Seed of the run instead of the configuration's."""
    thread: str | None
    """Name to save each step under in `state_dir`, for `resume`."""


class Agent:
    """A model that answers questions about images and may look closer.

    Keyword arguments beyond those named change `config` (policy="direct", budget={"max_turns": 3}). Of these,
    `protocol`, `tool` and `rule` also take an object: a `ZoomProtocol`, a `Tool`, a `PolicyRule`; `prompt`, a file with
    the model's own words, also takes its parts as a mapping; `perceiver`, a local model that looks for the one that
    answers, also takes a `Perceiver`.

    `tools` is a list of own tools that the model may call beside zoom: typed functions with a docstring, LangChain
    tools, `module:name`, entry points, or "rotate", "enhance" and "read_text" (`qzoom_agent.zoom.own_tools`). With
    tools="native" or "text", the form of calls, the list is the argument `own_tools`.

    `approve` is a function that is asked about each call before it is run (`qzoom_agent.approval`); True stops a run
    with a `thread` before each call, until `resume` is given the decision. An `async def` function is awaited by
    `arun`, `astream` and `abatch`; the other methods refuse it.

    `checkpointer` is any checkpointer of LangGraph, for the steps of runs with a `thread` in place of a SQLite file in
    `state_dir`, which then has the images alone; without one they last as long as the agent. `callbacks` are callback
    handlers of LangChain that each run reports to.
    """

    backend: Backend
    config: AgentConfig
    """The configuration of each run, with the backend's presets filled in."""
    protocol: ZoomProtocol
    perceiver: Perceiver | None
    """Looks for the model; None: its own branches look, if it has any."""
    state_dir: Path | None
    """Folder of runs with a `thread`."""

    def __init__(
        self,
        backend: Backend,
        *,
        config: AgentConfig | None = None,
        state_dir: str | Path | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            backend: The model.
            config: The configuration; None: defaults.
            state_dir: Save each step of runs with a `thread` name here, for `resume`.
            overrides: Changes of `config`, see the class.

        Raises:
            ConfigError: This backend cannot run the configuration.
        """
        self.backend = backend
        self._parts = AgentParts(backend, config, overrides)
        self.config, self.perceiver = self._parts.config, self._parts.perceiver
        checkpointer = self._parts.objects.get("checkpointer")
        self._images: TemporaryDirectory[str] | None = None
        if state_dir is None and checkpointer is not None:
            self._images = TemporaryDirectory(prefix="qzoom-")
            state_dir = self._images.name
        self.state_dir = None if state_dir is None else Path(state_dir)
        self._saved = SavedRuns(self.state_dir, checkpointer) if self.state_dir else None
        self.protocol = self._parts.context(self.config, ViewStore()).protocol

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
        check: bool = True,
        **overrides: Any,
    ) -> Agent:
        """Return an agent with a local model; for the other arguments see `Agent`.

        Args:
            model: A preset name, a path or a hub id.
            device: Such as "cpu" or "cuda:1"; "auto" takes the best there is.
            dtype: Number format of the weights.
            branches: Folder or hub id of branches (gate, SD-RPN) instead of those that come with the model.
            check: False skips the comparison with the stock model at load.

        Raises:
            ConfigError: The configuration is wrong.
            BackendError: The model cannot be loaded.
        """
        changes, objects = split_objects(overrides)
        config = changed(config, {"model": model, **changes})
        if config.protocol is not None:
            get_protocol(config.protocol)  # a wrong name should not cost the loading of weights
        tools = objects.get("own_tools", config.own_tools)
        if tools:
            from qzoom_agent.models.presets import resolve_model

            require_place(tools, objects.get("protocol") or config.protocol or resolve_model(model).protocol)
        if isinstance(prompt := read_given(objects.get("prompt", config.prompt)), PromptFile):
            objects["prompt"] = prompt
        from qzoom_agent.models.hf import load_backend

        # A protocol from elsewhere is the agent's alone: the backend keeps the budget of its own.
        own = config.protocol if config.protocol in PROTOCOLS else None
        backend = load_backend(model, check=check, device=device, dtype=dtype, protocol=own, branches=branches)
        return cls(backend, config=config, state_dir=state_dir, **objects)

    @classmethod
    def from_server(
        cls,
        url: str | Sequence[str],
        *,
        model: str,
        config: AgentConfig | None = None,
        state_dir: str | Path | None = None,
        **options: Any,
    ) -> Agent:
        """Return an agent with a model behind an OpenAI-compatible server.

            Agent.from_server("http://localhost:8000/v1", model="qwen3-vl-4b", timeout=60, policy="explicit")

        Args:
            url: Such as http://localhost:8000/v1. Several servers of the model share the runs.
            model: A preset, whose hub id the server is asked for, or the server's own name of the model. Models of
                OpenAI, Anthropic and Google are recognised by name or address, and call tools natively.
            config: As for `Agent`.
            state_dir: As for `Agent`.
            options: Those of the requests (`qzoom_agent.models.connection.Connection`): api, key_variable, api_key,
                headers, extra_body, timeout, concurrency, attempts. Others change the configuration, as for `Agent`:
                tools="native" lets the model call the zoom tool by the API, and `perceiver` names a local model with
                branches that decides whether the server's model is shown crops, and which.

        Raises:
            ConfigError: The address, the model, the configuration or another argument is wrong.
            BackendError: The perceiver cannot be loaded.
        """
        from qzoom_agent.models.connection import Connection
        from qzoom_agent.models.hosted import connection, served_preset
        from qzoom_agent.models.presets import UNKNOWN_BUDGET, guess_of
        from qzoom_agent.models.server import ServerBackend, ServerPool

        of_requests = {key: options.pop(key) for key in Connection.model_fields if key in options}
        changes, objects = split_objects(options)
        config = changed(config, {"model": model, **changes})
        urls = [url] if isinstance(url, str) else list(url)
        if not urls:
            raise ConfigError("There is no server in the list. Give the address of at least one.")
        preset = served_preset(urls[0], model, native=config.tools == "native")
        if config.protocol is None and (guess := guess_of(preset)):
            logger.warning(guess)
        # A server has no branches for a preset's thresholds.
        settings = {key: value for key, value in preset.settings.items() if not key.startswith("perception.")}
        if tools := objects.get("own_tools", config.own_tools):
            require_place(tools, objects.get("protocol") or config.protocol or preset.protocol)
        requests = dict(connection(urls[0], of_requests))
        servers = [
            ServerBackend(
                one,
                model=preset.source,
                protocol=(config.protocol if config.protocol in PROTOCOLS else None) or preset.protocol or "plain",
                defaults=preset.budget or UNKNOWN_BUDGET,
                settings=settings,
                **requests,
            )
            for one in urls
        ]
        backend = servers[0] if len(servers) == 1 else ServerPool(servers)
        return cls(backend, config=config, state_dir=state_dir, **objects)

    def replace(self, **changes: Any) -> Agent:
        """Return an agent with the same model under a changed configuration; keys as for `AgentConfig.replace`.

        `backend` gives another model instead, or the same one in batches.
        """
        if "model" in changes and "backend" not in changes:
            raise ConfigError("An agent keeps its model. Load another with Agent.from_pretrained, or give its backend.")
        backend: Backend = changes.pop("backend", self.backend)
        # Changes the configuration as it was given: presets filled in for it may give way to the changes.
        objects = {**self._parts.objects, **({"perceiver": self.perceiver} if self.perceiver else {})}
        agent = Agent(backend, config=self._parts.given, state_dir=self.state_dir, **{**objects, **changes})
        agent._images = self._images  # lives as long as an agent that has images there
        return agent

    @property
    def perceives(self) -> bool:
        """True if something looks before the model answers: its own branches, or a perceiver."""
        return self._parts.perceives

    def run(self, image: Images, question: str, **options: Unpack[RunOptions]) -> Answer:
        """Answer one question about one image, or several.

        Args:
            image: A path, bytes, a Pillow image or an array; or a list of these.
            question: The question.
            options: `boxes`, `seed` and `thread`, see `RunOptions`.

        Raises:
            ImageError: The image cannot be read or shown.
            ConfigError: Another argument is wrong.
        """
        self._parts.require_caller()
        state, context = self.begin(image, question, **options)
        return self._finish(state, context, options.get("thread"))

    def chat(
        self,
        image: Images | None = None,
        *,
        history: bool | None = None,
        seed: int | None = None,
        thread: str | None = None,
    ) -> Chat:
        """Begin a conversation about an image, or go on with a saved one.

        Args:
            image: As for `run`; None: the conversation saved under `thread`, whose interrupted question is answered
                first.
            history: True: the model reads the earlier questions, answers and crops with each question. False: it reads
                the coarse view and what is shown for this question, so that its answers are those of single runs. None:
                as its format says; nano, which was trained on single questions, reads none.
            seed: As for `run`.
            thread: Save each step under this name in `state_dir`.

        Raises:
            ImageError: The image cannot be read.
            ConfigError: There is neither an image nor a saved conversation, or another argument is wrong.
        """
        from qzoom_agent.chat import Chat, reopened

        self._parts.require_caller()
        if self._parts.waits:
            raise ConfigError("A conversation cannot stop before a call (approve=True). Give approve a function.")
        if image is not None:
            if history is None:
                history = getattr(self.protocol, "history", True)
            return Chat(self, self._prepared(image, seed=seed, thread=thread), thread=thread, history=history)
        if thread is None:
            raise ConfigError("A conversation is about an image, or is one that was saved. Give an image or a thread.")
        with self._saved_runs(thread).claimed(thread, new=False):
            self._resume(thread)
            context, state, _ = self._restored(thread)
        return Chat(self, context, thread=thread, state=reopened(self, state, context, history=history, seed=seed))

    def look(self, image: ImageSource, question: str) -> LookResult:
        """Run the coarse pass alone: does the question need more detail, and where? Nothing is answered.

        The map is made even where the gate does not fire; nothing is proposed then.

        Raises:
            ImageError: The image cannot be read or shown.
            ConfigError: The model has no branches and no perceiver, or the question is wrong.
            BackendError: The model cannot be run.
        """
        if not self.perceives:
            raise ConfigError(
                f"The model '{self.backend.name}' has no branches (gate and SD-RPN), so it cannot look. "
                "Train them with `qzoom train`, give a folder of branches, or name a local model that looks for it "
                "(--perceiver, in Python: perceiver)."
            )
        require_question(question)
        context = self._prepared(image)
        try:
            record = take_look(context, question, map_always=True)
        finally:
            context.close()
        model = record.perceiver or self.backend.name
        return LookResult(record=record, store=context.store, question=question, model=model)

    def stream(self, image: Images, question: str, **options: Unpack[RunOptions]) -> Iterator[Event]:
        """Answer as `run`, but yield each `Event` as it happens; the last carries the `Answer`.

        Leaving early ends the episode, and a turn under way at its next piece of text; a server is told to stop.
        """
        self._parts.require_caller()
        state, context = self.begin(image, question, **options)
        context.live = True
        return self._stream(state, context, options.get("thread"))

    def begin(
        self,
        image: Images,
        question: str,
        *,
        boxes: Boxes | None = None,
        seed: int | None = None,
        thread: str | None = None,
    ) -> tuple[State, Context]:
        """Check the arguments of `run` and return the first state and the context of an episode.

        For callers that run the graph's nodes by hand. The model is not asked and nothing is saved yet.
        """
        require_question(question)
        if thread is None and self._parts.waits:
            raise ConfigError(
                "This agent stops before each call until somebody decides on it (approve=True), so its run has to be "
                "saved. Give the agent a state_dir and the run a thread, or give approve a function that decides."
            )
        context = self._prepared(image, seed=seed, thread=thread)
        return self._first_state(context, question, boxes=boxes, thread=thread), context

    def _prepared(self, image: Images, *, seed: int | None = None, thread: str | None = None) -> Context:
        """Return the context of a new episode, with the originals in its store."""
        config = self.config if seed is None else self.config.replace(seed=seed)
        given: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        if not 1 <= len(given) <= config.budget.max_views:
            raise ConfigError(
                f"A question is about one image or several, each of them a view: up to budget.max_views, which is "
                f"{config.budget.max_views}; got {len(given)}."
            )
        pixels = [load_image(one, max_pixels=config.max_pixels) for one in given]
        folder = None
        if thread is not None:
            saved = self._saved_runs(thread)
            saved.require_free(thread)
            folder = saved.folder(thread)
        store = ViewStore(folder, count=getattr(self.backend, "view_tokens", None))
        for number, one in enumerate(pixels):
            store.add_original(one, number=number)
        return self._parts.context(config, store)

    def _first_state(self, context: Context, question: str, *, boxes: Boxes | None, thread: str | None) -> State:
        return start(
            id=thread or uuid4().hex[:12],
            question=question,
            backend=self.backend.name,
            config=context.config,
            gold=gold_boxes(context, boxes),
            originals=context.store.originals,
        )

    async def arun(self, image: Images, question: str, **options: Unpack[RunOptions]) -> Answer:
        """Answer as `run`, with its options, without blocking the event loop."""
        agent, receiver = self._in_event_loop()
        return await result_of(lambda: agent.run(image, question, **options), receiver)

    def astream(self, image: Images, question: str, **options: Unpack[RunOptions]) -> AsyncIterator[Event]:
        """Yield the events of `stream`, with its options; a task that is cancelled ends the episode."""
        agent, receiver = self._in_event_loop()
        return events_of(agent.stream(image, question, **options), receiver)

    async def abatch(self, pairs: Iterable[tuple[Images, str]], *, workers: int | None = None) -> list[Answer]:
        """Answer as `batch` without blocking the event loop."""
        agent, receiver = self._in_event_loop()
        return await result_of(lambda: agent.batch(pairs, workers=workers), receiver)

    def batch(self, pairs: Iterable[tuple[Images, str]], *, workers: int | None = None) -> list[Answer]:
        """Answer (image, question) pairs, in their order; a pair that fails gives an Answer with status "error".

        Args:
            pairs: Such as a list, or `zip(images, questions)`.
            workers: Most questions at a time. A local model computes those together on its device, a server is asked
                for them side by side. None: as many as suit the model.

        Raises:
            ConfigError: `pairs` does not hold pairs, or `workers` < 1.
        """
        if not isinstance(pairs, Iterable):
            raise ConfigError(f"A batch is a list of pairs (image, question); got {type(pairs).__name__}.")
        for at, pair in enumerate(pairs := list(pairs)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"Item {at} is not a pair (image, question); got {type(pair).__name__}.")
        asker, workers = self.side_by_side(workers, most=len(pairs))

        def one(pair: tuple[Images, str]) -> Answer:
            try:
                return asker.run(*pair)
            except Exception as error:  # a failing item is data; its neighbours go on
                return self._failed(str(pair[1]), error)

        if workers <= 1:
            return [one(pair) for pair in pairs]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda here, pair: here.run(one, pair), [copy_context() for _ in pairs], pairs))

    def side_by_side(self, workers: int | None = None, *, most: int | None = None) -> tuple[Agent, int]:
        """Return the agent for runs in several threads, whose questions a local model computes together, and how many.

        Args:
            workers: Most questions at a time. None: as many as suit the model.
            most: Number of questions, if there are fewer.

        Raises:
            ConfigError: `workers` < 1.
        """
        self._parts.require_caller()
        if workers is None:
            workers = int(getattr(self.backend, "workers", 1))
        if not isinstance(workers, int) or workers < 1:
            raise ConfigError(f"workers is the number of runs at a time, 1 or more; got {workers!r:.40}.")
        workers = workers if most is None else min(workers, most)
        together = getattr(self.backend, "together", None)
        if workers > 1 and together is not None:
            return self.replace(backend=together(workers)), workers
        return self, workers

    def resume(self, thread: str, decision: Decision | None = None, *, call: PendingCall | None = None) -> Answer:
        """Finish an interrupted run under the configuration it began with, or return the answer of a finished one.

        Turns that are done are not generated again; a run that ended with status "error" repeats the step that failed.

        Args:
            thread: Name of the run.
            decision: About the call that a run of status "waiting" has stopped before: True runs it, a box of the
                original (four numbers in its pixels) shows that region instead, and a text refuses it for this reason.
                Without a decision such a run asks the agent's `approve`, or goes on waiting.
            call: The call that was decided on (`Answer.waiting`). A decision sent twice then meets no other one.

        Raises:
            ConfigError: There is no such run, another process is at it, it belongs to another model, its saved steps
                are damaged, the decision does not fit, or the run waits before another `call`.
            ImageError: Its images are gone.
        """
        self._parts.require_caller()
        with self._saved_runs(thread).claimed(thread, new=False):
            return self._resume(thread, decision, call)

    def _resume(self, thread: str, decision: Decision | None = None, call: PendingCall | None = None) -> Answer:
        context, state, failed = self._restored(thread)
        if is_waiting(state):
            update: dict[str, Any] = {"waiting": None}
            if decision is not None:
                pending = PendingCall(**(state.get("waiting") or {}))
                size = context.store.view(original_id(pending.image)).size
                found = read_decision(decision, pending, size, decided=call)
                update = {"approval": found.model_dump(mode="json")}
            elif context.approve is None:
                return self._answer(state, context)
            self._saved_runs(thread).update(thread, update, after="think" if decision is None else "approve")
        elif decision is not None:
            raise ConfigError(f"The run '{thread}' does not wait for a decision. Leave it out.")
        if not state["status"]:
            return self._finish(None, context, thread, since=failed)
        self._saved_runs(thread).drop_steps(thread)  # unless that was done when it ended
        return self._answer(state, context)

    def _restored(self, thread: str) -> tuple[Context, State, RunnableConfig | None]:
        """Return context and state of a saved run; of one that failed, those before, and the step to go on from."""
        saved = self._saved_runs(thread)
        state = saved.state(thread)
        if not state:
            known = ", ".join(saved.names()) or "none"
            raise ConfigError(f"There is no run '{thread}' in {self.state_dir}. Saved runs: {known}.")
        if state["backend"] != self.backend.name:
            raise ConfigError(
                f"The run '{thread}' was begun by the model '{state['backend']}' and this agent has "
                f"'{self.backend.name}'. Resume it with the same model."
            )
        failed = None
        if state["status"] == "error":
            failed, state = saved.before_failure(thread)
        views = [view for one in (*state.get("asked", []), state) for view in one["views"]]
        store = ViewStore.restore(saved.folder(thread), [View(**view) for view in views])
        store.count = getattr(self.backend, "view_tokens", None)
        context = self._parts.context(AgentConfig.model_validate(state["config"]), store)
        context.follow(state)
        return context, state, failed

    def threads(self) -> list[str]:
        """Return the names of the runs saved in `state_dir`, sorted. Raises ConfigError for a damaged file."""
        return self._saved.names() if self._saved else []

    def close(self) -> None:
        """Close the file of saved steps; the agent opens it again when needed."""
        if self._saved:
            self._saved.close()

    def __repr__(self) -> str:
        return f"Agent(model={self.backend.name!r}, policy={self.config.policy!r}, protocol={self.protocol.name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(
        self, state: State | None, context: Context, thread: str | None, *, since: RunnableConfig | None = None
    ) -> Answer:
        """Run an episode to its end, from `state` or after a saved step: the last, or `since`."""
        *_, last = self._stream(state, context, thread, since=since, events=False)
        assert last.answer is not None
        return last.answer

    def _stream(
        self,
        state: Mapping[str, Any] | None,
        context: Context,
        thread: str | None,
        *,
        since: RunnableConfig | None = None,
        left_at: Callable[[State], None] | None = None,
        events: bool = True,
    ) -> Iterator[Event]:
        """Yield the events of an episode, the answer last; see `play`."""
        saved = None if thread is None else self._saved_runs(thread)
        options: dict[str, Any] = {"callbacks": self._parts.objects.get("callbacks"), "left_at": left_at}
        options |= {"saved": saved, "thread": thread or "", "since": since, "events": events}
        ending, final = yield from play(state, context, **options)
        answer = self._answer(final, context)
        if left_at is None:
            answer.store.count = None  # an answer that is kept does not keep the model
            context.store = ViewStore()  # LangGraph keeps the context until Python collects cycles, not the pixels
        yield ending.model_copy(update={"answer": answer})

    def _in_event_loop(self) -> tuple[Agent, Receiver]:
        """Return this agent for a thread beside the running event loop, which awaits an asynchronous `approve`."""
        # A thread of its own: a waiting run must not hold the one that `approve` needs.
        receiver = Receiver(ThreadPoolExecutor(1) if self._parts.awaits else None)
        found = copy(self)  # with the same saved runs
        found._parts = self._parts.received_by(receiver)
        return found, receiver

    def _saved_runs(self, thread: str) -> SavedRuns:
        if self._saved is None:
            raise ConfigError(f"The run '{thread}' has nowhere to be saved. Give the agent a state_dir.")
        return self._saved

    def _answer(self, state: State, context: Context) -> Answer:
        trace = to_trace(state, protocol=context.protocol.name, environment=self._parts.environment)
        calibration = getattr(self.backend, "calibration", None)
        # It is of first questions to the model as it comes.
        if calibration is not None and self._parts.as_published(context.config):
            temperature = context.config.generation.temperature
            trace.confidence = calibration.of(trace.answer_probability, policy=trace.policy, temperature=temperature)
        return Answer.of(trace, context.store)

    def _failed(self, question: str, error: Exception) -> Answer:
        trace = Trace(
            question=question,
            status="error",
            model=self.backend.name,
            policy=self.config.policy or "",
            config=self.config.model_dump(mode="json"),
            seed=self.config.seed,
            environment=self._parts.environment,
            error=describe_error(error),
        )
        return Answer(text="", status="error", trace=trace, store=ViewStore())
