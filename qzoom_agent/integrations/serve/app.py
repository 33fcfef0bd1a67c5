"""The application: Chat Completions, models, health, metrics and traces, over one pool of episodes.

app = create_app(Agent.from_pretrained("nano"), ServeConfig())
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection

from qzoom_agent import __version__
from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer
from qzoom_agent.answer import Event as Step
from qzoom_agent.errors import QzoomError
from qzoom_agent.integrations.limits import ServeConfig
from qzoom_agent.integrations.serve.chat import ChatRequest, Reply, read_question
from qzoom_agent.integrations.serve.episodes import EpisodePool
from qzoom_agent.integrations.serve.errors import ERRORS, ErrorBody, Left, RequestError, failure, of_request
from qzoom_agent.integrations.serve.guard import KeyCheck, LimitedRoute

logger = logging.getLogger(__name__)

ALIAS: Final = "qzoom"
"""A name that the served model always has."""


def create_app(agent: Agent, config: ServeConfig | None = None) -> FastAPI:
    """Return the application that serves an agent; its threads end with its lifespan.

    Args:
        agent: The model and the configuration of a request that changes nothing.
    """
    server = _Server(agent, config or ServeConfig())
    told: Any = {status: {"model": ErrorBody, "description": text} for status, text in ERRORS.items()}
    app = FastAPI(
        title="qzoom serve",
        version=__version__,
        lifespan=server.lifespan,
        responses=told,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = LimitedRoute
    app.state.config = server.config
    app.state.readers = asyncio.Semaphore(server.config.batch + server.config.queue + 16)
    app.post(
        "/v1/chat/completions",
        responses={200: {"description": "The answer", "content": {"text/event-stream": {"schema": {}}}}},
        openapi_extra={"requestBody": {"required": True}},
    )(server.chat)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.get("/health")(server.health)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics_text)
    app.get("/traces/{trace_id}")(server.trace)
    for kind in (QzoomError, Left, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, server.failed)
    if server.config.api_key is not None:
        app.add_middleware(
            AuthenticationMiddleware, backend=KeyCheck(server.config.api_key), on_error=server.error_reply
        )
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
        await self.pool.close()

    # -- answers -------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer the last question of a conversation."""
        self._require(body.model)
        asked = read_question(body.messages, allow_urls=self.config.allow_urls)
        question = asked._replace(changes=body.changes(self.config), seed=body.seed)
        reply = Reply(body, id=f"chatcmpl-{uuid4().hex}")
        if not body.stream:
            return JSONResponse(reply.whole(await self._run(request, self.pool.start(question))))
        steps = asyncio.Queue[Step | None]()
        running = asyncio.create_task(self._run(request, self.pool.start(question, steps)))
        running.add_done_callback(lambda _: steps.put_nowait(None))
        first = await steps.get()
        if first is None and (error := running.exception()):  # in time for a status of its own
            raise error
        return StreamingResponse(
            _sse(self._chunks(reply, running, first, steps)), media_type="text/event-stream", headers=_NOT_KEPT
        )

    async def _chunks(
        self, reply: Reply, running: asyncio.Task[Answer], step: Step | None, steps: asyncio.Queue[Step | None]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed reply: each step, then the answer, or the error that took its place."""
        try:
            yield reply.chunk({"role": "assistant", "content": ""})
            while step is not None:
                yield reply.chunk({}, qzoom={"step": step.model_dump(mode="json")})
                step = await steps.get()
            for chunk in reply.last_chunks(running.result()):
                yield chunk
        except Exception as error:
            told = of_request(error)
            self.metrics.refused(told.code)
            yield told.body
        finally:
            running.cancel()

    async def _run(self, request: Request, episode: asyncio.Task[Answer]) -> Answer:
        """Wait for the answer of an episode; end it if the client leaves or the time is over."""
        began, most = time.monotonic(), self.config.timeout
        gone = asyncio.create_task(_leaves(request))
        try:
            await asyncio.wait({episode, gone}, timeout=most, return_when=asyncio.FIRST_COMPLETED)
            if not episode.done():
                late = f"The answer took longer than {most:g} s. Ask for less, or raise --timeout."
                raise Left if gone.done() else RequestError(late, status=504, code="timeout")
            found = episode.result()
        except asyncio.CancelledError:
            self.metrics.refused("left")
            raise
        finally:
            gone.cancel()
            episode.cancel()
        if found.status == "error":
            raise failure(found.trace.error or "")
        self.metrics.answered(found, time.monotonic() - began)
        self._traces[found.trace.id] = found.trace.model_dump_json()
        while len(self._traces) > self.config.traces:
            self._traces.popitem(last=False)
        return found

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
        return self.error_reply(request, error)

    def error_reply(self, request: HTTPConnection, error: Exception) -> Response:
        """Return the reply about an error, and count it."""
        told = of_request(error)
        if told.status_code == 500 and told.code != "left" and not isinstance(error, QzoomError):
            logger.error("A request failed: %s", request.url.path, exc_info=error)
        self.metrics.refused(told.code)
        headers = dict(getattr(error, "headers", None) or {}) | _HEADERS.get(told.status_code, {})
        return JSONResponse(told.body, told.status_code, headers)


class Metrics:
    """The counts of one server, for Prometheus."""

    def __init__(self, pool: EpisodePool) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("qzoom_requests", "Requests by outcome", ["outcome"], registry=registry)
        self._seconds = Histogram("qzoom_request_seconds", "Seconds to an answer", registry=registry)
        self._visual = Counter("qzoom_visual_tokens", "Visual tokens of the views", ["view"], registry=registry)
        self._written = Counter("qzoom_written_tokens", "Tokens that the model wrote", registry=registry)
        self._calls = Counter("qzoom_zoom_calls", "Zoom calls of the model by outcome", ["outcome"], registry=registry)
        Gauge("qzoom_running", "Requests under way", registry=registry).set_function(lambda: pool.running)
        Gauge("qzoom_waiting", "Requests that wait for a place", registry=registry).set_function(lambda: pool.waiting)

    def answered(self, answer: Answer, seconds: float) -> None:
        usage = answer.usage
        self._requests.labels(answer.status).inc()
        self._seconds.observe(seconds)
        self._visual.labels("coarse").inc(usage.coarse_tokens)
        self._visual.labels("crop").inc(usage.crop_tokens)
        self._visual.labels("tool").inc(usage.tool_tokens)
        self._written.inc(usage.written_tokens)
        for outcome, count in (("served", usage.served), ("refused", usage.refused), ("failed", usage.failed)):
            self._calls.labels(outcome).inc(count)

    def refused(self, outcome: str) -> None:
        """Count a request without an answer: its error's code or status, or "left"."""
        self._requests.labels(outcome).inc()

    def text(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


_LAST: Final = {"Connection": "close"}
"""Of replies to a request whose body is not read to its end."""
_HEADERS: Final[dict[int, dict[str, str]]] = {
    401: {"WWW-Authenticate": "Bearer", **_LAST},
    408: _LAST,
    413: _LAST,
    429: {"Retry-After": "1", **_LAST},
}
_NOT_KEPT: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _leaves(request: Request) -> None:
    """Return once the client has closed the connection."""
    with suppress(RuntimeError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


async def _sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n".encode()
    yield b"data: [DONE]\n\n"
