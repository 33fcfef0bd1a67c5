"""The application: Chat Completions, models, health, metrics and traces, over one pool of episodes.

app = create_app(Agent.from_pretrained("nano"), ServeConfig())
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qzoom_agent import __version__
from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.answer import Event as Step
from qzoom_agent.errors import BackendError, MissingDependency, QzoomError, redact
from qzoom_agent.integrations.limits import ServeConfig
from qzoom_agent.integrations.serve.chat import ChatRequest, Reply, read_question
from qzoom_agent.integrations.serve.episodes import Episode, EpisodePool, Left
from qzoom_agent.integrations.serve.errors import RequestError
from qzoom_agent.integrations.serve.guard import Application, Guard
from qzoom_agent.integrations.serve.metrics import Metrics
from qzoom_agent.models.interface import TOO_LONG

logger = logging.getLogger(__name__)

ALIAS: Final = "qzoom"
"""A name that the served model always has."""


class ErrorDetail(BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of a reply that is no success."""

    error: ErrorDetail


_ERRORS: Final = {
    400: "The request is wrong",
    401: "The key is missing or wrong",
    404: "There is no such model, path or trace",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests wait",
    500: "The model failed",
    503: "The server is shutting down",
    504: "The answer took too long",
}


def create_app(agent: Agent, config: ServeConfig | None = None) -> FastAPI:
    """Return the application that serves an agent; its threads end with its lifespan.

    Args:
        agent: The model and the configuration of a request that changes nothing.
        config: Limits of the server.
    """
    server = _Server(agent, config or ServeConfig())
    app = FastAPI(title="qzoom serve", version=__version__, lifespan=server.lifespan, docs_url=None, redoc_url=None)
    told: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()
    }
    chat = {**told, 200: {"description": "The answer", "content": {"text/event-stream": {"schema": {}}}}}
    with_body = {"requestBody": {"required": True}}
    paths: tuple[tuple[str, str, Callable[..., Any], dict[int | str, dict[str, Any]]], ...] = (
        ("POST", "/v1/chat/completions", server.chat, chat),
        ("GET", "/v1/models", server.models, told),
        ("GET", "/v1/models/{name:path}", server.model, told),
        ("GET", "/health", server.health, told),
        ("GET", "/metrics", server.metrics_text, told),
        ("GET", "/traces/{trace_id}", server.trace, told),
    )
    for method, path, handler, responses in paths:
        app.add_api_route(
            path,
            handler,
            methods=[method],
            responses=responses,
            response_model=None,
            response_class=PlainTextResponse if path == "/metrics" else JSONResponse,
            openapi_extra=with_body if method == "POST" else None,
        )
    for kind in (QzoomError, Left, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, server.failed)
    guard: Any = Guard
    app.add_middleware(guard, config=server.config, refuse=server.refused)
    return app


class _Server:
    """The handlers, and what they share."""

    def __init__(self, agent: Agent, config: ServeConfig) -> None:
        self.config = config
        self.pool = EpisodePool(agent, config)
        self.metrics = Metrics(self.pool)
        self._names = dict.fromkeys([agent.backend.name, ALIAS])
        self._began = int(time.time())
        self._traces = OrderedDict[str, str]()

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """End the threads with the application."""
        yield
        await asyncio.to_thread(self.pool.close)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer the last question of a conversation."""
        self._require(body.model)
        question = read_question(body.messages, allow_urls=self.config.allow_urls, max_images=self.config.max_images)
        episode = Episode(question.images, question.text, body.changes(self.config), seed=body.seed)
        reply = Reply(body, id=f"chatcmpl-{uuid4().hex}")
        ends = time.monotonic() + self.config.timeout
        if not body.stream:
            return JSONResponse(reply.whole(await self._run(request, episode, ends)))
        steps = asyncio.Queue[Step]()
        loop = asyncio.get_running_loop()

        def follow(step: Step) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        episode.on_step = follow
        running = asyncio.create_task(self._run(request, episode, ends))
        first = asyncio.create_task(steps.get())
        await asyncio.wait({running, first}, return_when=asyncio.FIRST_COMPLETED)
        if running.done() and (error := running.exception()):  # in time for a status of its own
            first.cancel()
            raise error
        return StreamingResponse(
            _sse(self._chunks(reply, running, first, steps)), media_type="text/event-stream", headers=_NOT_KEPT
        )

    async def _chunks(
        self, reply: Reply, running: asyncio.Task[Answer], first: asyncio.Task[Step], steps: asyncio.Queue[Step]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed reply: each step, then the answer, or the error that took its place."""
        following = first
        try:
            yield reply.chunk({"role": "assistant", "content": ""})
            while not running.done() or following.done() or not steps.empty():
                await asyncio.wait({running, following}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    step = following.result()
                    following = asyncio.create_task(steps.get())
                    yield reply.chunk({}, qzoom={"step": step.model_dump(mode="json")})
            for chunk in reply.last_chunks(running.result()):
                yield chunk
        except Exception as error:
            yield _shape(error)[1]
        finally:
            following.cancel()
            running.cancel()

    async def _run(self, request: Request, episode: Episode, ends: float) -> Answer:
        """Wait for the answer of an episode; end it if the client leaves or the time is over."""
        began = time.monotonic()
        try:
            self.pool.submit(episode)
            answer: asyncio.Future[Any] = asyncio.wrap_future(episode.answer)
            answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # of nobody once the client left
            gone: asyncio.Future[Any] = asyncio.create_task(_leaves(request))
            try:
                await asyncio.wait({answer, gone}, timeout=max(0.0, ends - began), return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    found: Answer = answer.result()
                elif gone.done():
                    raise Left
                else:
                    raise RequestError(
                        f"The answer took longer than {self.config.timeout:g} s. Ask for less, or raise --timeout.",
                        status=504,
                        code="timeout",
                    )
            finally:
                gone.cancel()
                episode.cancel()
            if found.status == "error":
                raise _failure(found.trace.error or "")
        except asyncio.CancelledError:
            self.metrics.refused("left")
            raise
        except Exception as error:
            self.metrics.refused("left" if isinstance(error, Left) else _shape(error)[1]["error"]["code"])
            raise
        self.metrics.answered(found, time.monotonic() - began)
        self._keep(found)
        return found

    def _keep(self, answer: Answer) -> None:
        self._traces[answer.trace.id] = answer.trace.model_dump_json()
        while len(self._traces) > self.config.traces:
            self._traces.popitem(last=False)

    # -- the rest ------------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """List the names of the model."""
        return {"object": "list", "data": [self._model(name) for name in self._names]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model by one of its names."""
        self._require(name)
        return self._model(name)

    async def health(self) -> dict[str, Any]:
        """Tell that the server runs, and how much it has to do."""
        return {"status": "ok", "running": self.pool.running, "waiting": self.pool.waiting}

    async def metrics_text(self) -> Response:
        """Return the counts in Prometheus' text format."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def trace(self, trace_id: str) -> Response:
        """Return the record of one of the last answers, as `qzoom.trace` of its reply names it."""
        if trace_id not in self._traces:
            raise RequestError(
                f"There is no trace '{trace_id[:40]}'. The last {self.config.traces} are kept.",
                status=404,
                code="trace_not_found",
            )
        return Response(self._traces[trace_id], media_type="application/json")

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "qzoom"}

    def _require(self, name: str) -> None:
        if name not in self._names:
            raise RequestError(
                f"There is no model '{name[:80]}'. This server has: {', '.join(self._names)}.",
                status=404,
                code="model_not_found",
                param="model",
            )

    # -- errors --------------------------------------------------------------------------------------------------------

    async def failed(self, request: Request, error: Exception) -> Response:
        """Answer with an error in OpenAI's form."""
        status, body = _shape(error)
        if status == 500 and not isinstance(error, QzoomError | Left):
            logger.error("A request failed: %s", request.url.path, exc_info=error)
        headers = dict(getattr(error, "headers", None) or {})
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 429 else {}
        return Response(json.dumps(body), status_code=status, headers=headers, media_type="application/json")

    def refused(self, error: RequestError) -> Application:
        """Return the application that answers with an error of the guard."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            self.metrics.refused(str(error.code))
            response = await self.failed(Request(scope), error)
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)

        return answer


_NOT_KEPT: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def _failure(message: str) -> QzoomError:
    """Return the error of a failed episode; a question that is too long for the model is the client's."""
    if TOO_LONG in message:
        return RequestError(message, code="context_length_exceeded", param="messages")
    return BackendError(message)


def _shape(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of a reply about an error."""
    status, kind, code, param = 500, "server_error", "server_error", None
    message = "The server failed. Its log says more."
    if isinstance(error, RequestError):
        status, kind, code, param = error.status, error.type, error.code or "invalid_request", error.param
        message = str(error)
    elif isinstance(error, BackendError | MissingDependency):
        message = str(error)
    elif isinstance(error, QzoomError):  # of the image or of a setting
        status, kind, code, message = 400, "invalid_request_error", "invalid_request", str(error)
    elif isinstance(error, RequestValidationError):
        status, kind, code = 400, "invalid_request_error", "invalid_request"
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")[:200] or None
        message = redact(f"The request is wrong: {param or 'body'}: {first['msg']}.")
    elif isinstance(error, HTTPException):
        status, message = error.status_code, f"{error.detail}."
        kind = code = "not_found_error" if status == 404 else "invalid_request_error"
    elif isinstance(error, Left):
        message, code = "The client left.", "left"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _leaves(request: Request) -> None:
    """Return once the client has closed the connection."""
    with suppress(RuntimeError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def _sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield server-sent events."""
    async for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n".encode()
    yield b"data: [DONE]\n\n"
