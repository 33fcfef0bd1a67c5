"""The page of `qzoom web`: what happens when a visitor uses it.

Everything about a visitor is in one `Visit`, a session's state of gradio: no handler sees another session's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from time import monotonic
from typing import Any, Final
from weakref import WeakSet

import gradio as gr
from fastapi import FastAPI
from markupsafe import Markup
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Event
from qzoom_agent.approval import Decision
from qzoom_agent.errors import ConfigError, ImageError, QzoomError, describe_error
from qzoom_agent.files import expanded
from qzoom_agent.images import load_image
from qzoom_agent.integrations.conversation import Conversation
from qzoom_agent.integrations.limits import WebConfig
from qzoom_agent.integrations.progress import Progress
from qzoom_agent.integrations.web.layout import DEMO, Layout, about, changes, policies
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.report.page import asset, legible
from qzoom_agent.trace import PendingCall

logger = logging.getLogger(__name__)

Updates = dict[Any, Any]
"""New values of components."""
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?")
_TOKEN_SECONDS: Final = 0.1
"""Time between two updates while the model writes."""
_TO_RESULT: Final = """() => {
  const result = document.getElementById("qz-result");
  result.classList.add("qz-asked");
  if (innerWidth < 860 || result.getBoundingClientRect().top < 0) result.scrollIntoView({block: "start"});
}"""


@dataclass(eq=False)
class Visit:
    """What one visitor has done so far."""

    agent: Agent | None = None
    """A model that the visitor has chosen."""
    path: str | None = None
    """File of the picture of the conversation."""
    key: tuple[Any, ...] = ()
    """Model, picture and settings of the conversation; other ones begin another."""
    conversation: Conversation | None = None
    progress: Progress | None = None
    """The last question."""

    def leave(self) -> None:
        """End the question under way."""
        if self.conversation is not None:
            self.conversation.leave()


class Page:
    """The page: `layout.blocks` for gradio, and the handlers of its events."""

    def __init__(self, agent: Agent, config: WebConfig | None = None) -> None:
        self.config = config or WebConfig()
        self.agent = agent.side_by_side(most=self.config.batch)[0]
        self.layout = Layout(self.agent, self.config)
        self._loading, self._local = Lock(), lru_cache(maxsize=2)(self._load)
        self._conversations = WeakSet[Conversation]()
        with self.layout.blocks as blocks:
            self.visit = gr.State(Visit(), delete_callback=Visit.leave)
            self._connect()
        blocks.queue(max_size=self.config.queue)
        blocks.state_session_capacity = self.config.visitors

    def close(self) -> None:
        """End all questions under way, also those that wait for a visitor: their threads would outlive the server."""
        for conversation in list(self._conversations):
            conversation.leave()

    def _connect(self) -> None:
        on, visit, quiet = self.layout, self.visit, {"show_progress": "hidden", "api_visibility": "private"}
        shown = [
            visit, on.card, on.shown, on.panel, on.call, on.box, on.move, on.reason, on.tools, on.heat, on.look,
            on.report, on.further_row, on.further, on.crops, on.steps_fold, on.steps,
        ]  # fmt: skip
        run = {**quiet, "outputs": shown, "concurrency_id": "answers", "concurrency_limit": self.config.batch}
        settings = [on.policy, on.asks, on.zooms, on.visual, on.coarse]
        asked = [visit, on.picture, on.question, on.heat, *settings]
        asking = [on.ask.click, on.question.submit, on.ask_further.click, on.further.submit]
        gr.on([*asking, *(button.click for button in on.pictured)], None, js=_TO_RESULT)
        for button, row in zip(on.pictured, on.examples, strict=True):
            picked = button.click(
                partial(self.pick, row), visit, [on.picture, on.question, on.policy], queue=False, **quiet
            )
            picked.then(self.ask, asked, **run)
        gr.on(asking[:2], self.ask, asked, **run)
        gr.on(asking[2:], self.ask_further, [visit, on.further, on.heat, *settings], **run)
        for button, action in ((on.approve, "approve"), (on.move, "move"), (on.refuse, "refuse")):
            button.click(partial(self.decide, action), [visit, on.box, on.reason, on.heat], **run)
        on.shown.select(self.point, [visit, on.heat], [on.shown, on.box], queue=False, **quiet)
        on.heat.input(self.redraw, [visit, on.heat], on.shown, queue=False, trigger_mode="always_last", **quiet)
        on.look.click(self.look, [visit, on.heat], **run)
        if self.config.choose_model:
            given = [visit, on.model, on.server, on.secret]
            on.use.click(self.use_model, given, [visit, on.about, on.policy], api_visibility="private")

    # -- questions -----------------------------------------------------------------------------------------------------

    def pick(self, row: dict[str, Any], visit: Visit) -> tuple[str, str, str]:
        """Return picture, question and policy of an example."""
        # No look finds two crops of which the second depends on the first: there the model asks for them.
        policy = "explicit" if len(row["boxes"]) > 1 else str((visit.agent or self.agent).config.policy)
        return str(DEMO / row["image"]), row["question"], policy

    def ask(self, visit: Visit, path: str | None, question: str, opacity: float, *settings: Any) -> Iterator[Updates]:
        """Answer a question about a picture; with the same picture and settings the conversation goes on."""
        try:
            conversation = self._conversation(visit, path, settings)
            earlier, steps = conversation.earlier, conversation.ask(question)
        except Exception as error:
            yield {self.layout.card: problem(error)}
            return
        visit.progress = Progress(question, conversation.image, earlier=earlier)
        yield {self.visit: visit, self.layout.further: ""}  # gradio forgets a visit an hour after it was last given out
        yield from self._follow(conversation, visit.progress, steps, opacity)

    def ask_further(self, visit: Visit, question: str, opacity: float, *settings: Any) -> Iterator[Updates]:
        """Answer another question about the picture of the last one."""
        yield from self.ask(visit, visit.path, question, opacity, *settings)

    def decide(self, action: str, visit: Visit, box: str, reason: str, opacity: float) -> Iterator[Updates]:
        """Approve the call that waits, move its box, or refuse it for a reason that the model reads."""
        if visit.conversation is None or visit.progress is None:
            return
        try:
            sides = [float(side) for side in _NUMBER.findall(box[:200])]
            decisions: dict[str, Decision] = {"approve": True, "move": sides, "refuse": reason[:500]}
            if action == "move" and len(sides) != 4:
                raise ConfigError("A box is four numbers: left, top, right and bottom, in pixels of the picture.")
            steps = visit.conversation.decide(decisions[action])
        except Exception as error:
            yield {self.layout.card: problem(error)}
            return
        visit.progress.wait(None)
        yield from self._follow(visit.conversation, visit.progress, steps, opacity)

    def _conversation(self, visit: Visit, path: str | None, settings: tuple[Any, ...]) -> Conversation:
        """Return the visitor's conversation, or a new one if model, picture or settings are others."""
        if path is None:
            raise ConfigError("There is no picture yet. Click an example, or upload one.")
        key, old = (visit.agent, path, settings), visit.conversation
        if old is None or visit.key != key or len(old.earlier) >= self.config.questions:
            policy, asks, zooms, visual, coarse = settings
            changed = changes(self.config, policy=policy, zooms=zooms, visual=visual, coarse=coarse)
            agent = (visit.agent or self.agent).replace(**changed)
            most = min(self.config.max_pixels, agent.config.max_pixels)
            image = old.image if old is not None and visit.path == path else read_upload(Path(path), max_pixels=most)
            visit.leave()
            visit.conversation = Conversation(agent, image, asks=asks, patience=self.config.patience)
            visit.key, visit.path = key, path
            self._conversations.add(visit.conversation)
            return visit.conversation
        return old

    def _follow(
        self, conversation: Conversation, progress: Progress, steps: Iterator[Event | PendingCall], opacity: float
    ) -> Iterator[Updates]:
        """Show the steps of a question until its answer, or a call that waits for a decision."""
        on = self.layout
        yield self._whole(conversation, progress, opacity)
        drawn, told = progress.drawn, monotonic()
        try:
            for step in steps:
                if isinstance(step, PendingCall):
                    progress.wait(step)
                    continue
                progress.add(step)
                if step.kind != "token" or monotonic() - told > _TOKEN_SECONDS:
                    told = monotonic()
                    yield {on.card: progress.html("card"), on.steps: progress.html("steps")}
                if progress.drawn != drawn:
                    drawn = progress.drawn
                    yield {on.shown: progress.picture(opacity / 100), on.crops: progress.html("zooms")}
        except Exception as error:
            progress.error = sentence(error)
        with TemporaryDirectory(prefix="qzoom-") as folder:
            updates = self._whole(conversation, progress, opacity)
            if progress.answer is not None:
                updates[on.report] = str(conversation.report(Path(folder) / "report.html"))
            yield updates  # gradio copies the file before it goes on

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _whole(self, conversation: Conversation, progress: Progress, opacity: float) -> Updates:
        """Return the state of every component that shows something."""
        on, call, done = self.layout, progress.waiting, progress.answer is not None
        return {
            on.card: progress.html("card"),
            on.shown: gr.update(value=progress.picture(opacity / 100), visible=True),
            on.panel: gr.update(visible=call is not None),
            on.call: progress.html("call") if call else "",
            on.box: gr.update(value=_listed(progress.proposed), visible=progress.proposed is not None),
            on.move: gr.update(visible=progress.proposed is not None),
            on.reason: "",
            on.tools: gr.update(visible=done),
            on.heat: gr.update(visible=bool(progress.look.heat)),
            on.look: gr.update(visible=conversation.agent.perceives and not progress.look.heat),
            on.further_row: gr.update(visible=done),
            on.crops: progress.html("zooms"),
            on.steps_fold: gr.update(visible=True),
            on.steps: progress.html("steps"),
        }

    def redraw(self, visit: Visit, opacity: float) -> Any:
        """Return the picture with the heat map at another opacity, in percent."""
        return visit.progress.picture(opacity / 100) if visit.progress else gr.skip()

    def point(self, visit: Visit, opacity: float, event: gr.SelectData) -> tuple[Any, Any]:
        """Take a corner of the box that a visitor draws for the call that waits."""
        progress = visit.progress
        if progress is None or progress.proposed is None:
            return gr.skip(), gr.skip()
        progress.point(*event.index)
        return progress.picture(opacity / 100), _listed(progress.proposed)

    def look(self, visit: Visit, opacity: float) -> Updates:
        """Show the map of a look at the picture, for a run that made none."""
        conversation, progress = visit.conversation, visit.progress
        if conversation is None or progress is None:
            return {}
        try:
            progress.look = conversation.agent.look(conversation.image, progress.question).record
        except Exception as error:
            return {self.layout.card: problem(error)}
        return self._whole(conversation, progress, opacity)

    # -- models --------------------------------------------------------------------------------------------------------

    def use_model(self, visit: Visit, model: str, server: str, key: str) -> tuple[Visit, Any, Any]:
        """Load the model that a visitor names, or connect to a server, for the questions that follow."""
        model, server = model.strip(), server.strip()
        try:
            if server:
                # Without a key, the operator's would be read from the environment and sent to the visitor's server.
                key = key.strip() or "none"
                agent = Agent.from_server(server, model=model, api_key=key, timeout=self.config.timeout)
            elif model not in PRESETS and expanded(model).exists():
                raise ConfigError(f"'{model}' is on the disk of this page's machine. Name a preset or a hub id.")
            else:
                with self._loading:
                    agent = self._local(model)
        except Exception as error:
            return visit, problem(error), gr.skip()
        visit.agent = agent
        return visit, about(agent), gr.update(choices=policies(agent), value=agent.config.policy)

    def _load(self, model: str) -> Agent:
        return Agent.from_pretrained(model).side_by_side(most=self.config.batch)[0]


def read_upload(path: Path, *, max_pixels: int) -> Image.Image:
    """Return the picture that a visitor has uploaded. Raises ImageError if it is none, or no longer there."""
    try:
        with path.open("rb") as file:
            return load_image(file, max_pixels=max_pixels)
    except OSError:
        raise ImageError("The picture was deleted: uploads are kept for an hour. Upload it again.") from None


def _listed(box: Sequence[float] | None) -> str:
    return ", ".join(f"{side:.0f}" for side in box or ())


def problem(error: Exception) -> str:
    """Return what went wrong, as HTML."""
    card = Markup('<section class="qz-card error" role="alert"><p class="qz-error">{}</p></section>')
    return str(card.format(legible(sentence(error))))


def sentence(error: Exception) -> str:
    """Return what went wrong, for a visitor; an error that is not ours goes to the log too."""
    if not isinstance(error, QzoomError):
        logger.exception("a question failed", exc_info=error)
    return describe_error(error)


def create_app(agent: Agent, config: WebConfig | None = None) -> FastAPI:
    """Return the application that serves the page.

    Args:
        agent: The model and the configuration of a run that changes nothing.
    """
    page = Page(agent, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(page.close)

    undescribed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    mounted: FastAPI = gr.mount_gradio_app(
        FastAPI(lifespan=lifespan, **undescribed),
        page.layout.blocks,
        path="/",
        app_kwargs=undescribed,
        footer_links=[],
        run_history=False,
        allowed_paths=[str(DEMO)],
        max_file_size=page.config.max_bytes,
        ssr_mode=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", radius_size="lg"),
        css=asset("web.css"),
    )
    return mounted
