"""A server that plays a script to each request, and an episode that asks it."""

from __future__ import annotations

import json
import re
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.answer import Answer

KEY = "sk-Test-0123456789abcdef"
IMAGE = Image.new("RGB", (60, 60))
Script = Callable[["Connection"], None]


class Connection(socketserver.StreamRequestHandler):
    """One request, read, and the raw bytes of a reply."""

    server: Misbehaving
    body: dict[str, Any]
    head: str

    def handle(self) -> None:
        lines = iter(self.rfile.readline, b"\r\n")
        self.head = b"".join(line for line in lines if line).decode("latin-1")
        if self.head.startswith("GET "):
            known = self.server.models is not None
            self.reply(self.server.models or {}, status="200 OK" if known else "404 Not Found")
            return
        length = next(line for line in self.head.lower().splitlines() if line.startswith("content-length"))
        self.body = json.loads(self.rfile.read(int(length.partition(":")[2])))
        self.server.requests.append(self)
        with suppress(OSError):  # the client left
            self.server.script(self)

    @property
    def key(self) -> str | None:
        """What the client authorizes itself with."""
        found = re.search(r"(?im)^authorization: (.*?)\r?$", self.head)
        return found and found[1]

    def send(self, data: bytes | str) -> None:
        self.wfile.write(data if isinstance(data, bytes) else data.encode())

    def reply(self, body: Any, *, status: str = "200 OK", **headers: str) -> None:
        data = (
            body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        )
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode() + data)

    def stream(self, *events: Any, end: str = "data: [DONE]\n\n") -> None:
        self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for event in events:
            self.send(event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n")
        self.send(end)


class Misbehaving(socketserver.ThreadingTCPServer):
    """A server that plays a script to each request."""

    daemon_threads, allow_reuse_address, block_on_close = True, True, False

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.requests: list[Connection] = []
        self.script: Script = script or (lambda connection: connection.reply(completion("42")))
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.models: Any = None
        """The list of models; None: there is none."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def completion(content: Any, *, usage: Any = None, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": finish}], "usage": usage}


def delta(finish: str | None = None, **part: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": part, "finish_reason": finish}]}


def ask(server: Misbehaving, *, seconds: float = 5.0, streamed: bool = False, **options: Any) -> Answer:
    """Run one episode; no more than two seconds over its deadline."""
    agent = Agent.from_server(
        options.pop("url", server.url), model="served", timeout=options.pop("timeout", seconds), **options
    )
    began = time.monotonic()
    if streamed:
        *_, last = agent.stream(IMAGE, "What is it?")
        assert last.answer is not None
        answer = last.answer
    else:
        answer = agent.run(IMAGE, "What is it?")
    assert time.monotonic() - began < seconds + 2
    assert KEY not in f"{answer} {answer.trace.model_dump_json()} {answer._repr_html_()}"
    return answer


def every(connection: Connection, seconds: float, data: Callable[[], bytes]) -> None:
    while True:
        connection.send(data())
        time.sleep(seconds)


# -- replies that are right -------------------------------------------------------------------------------------------

ZOOM = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 100, 500, 500]}}
CALL = f"<tool_call>\n{json.dumps(ZOOM)}\n</tool_call>"


def function(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "1", "type": "function", "function": {"name": ZOOM["name"], "arguments": arguments}}]
