"""The server over real sockets, with a scripted model: answers, streams, refusals, limits and clients that leave."""

from __future__ import annotations

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main, read
from qzoom_agent.cli.options import load_agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.run_log import RunFolder
from qzoom_agent.evaluation.tasks.catalog import find_task
from qzoom_agent.messages import Message, plain_text, view_ids
from qzoom_agent.models.scripted import ScriptedBackend
from qzoom_agent.zoom.image_zoom import data_url
from tests.models.misbehaving import Misbehaving

uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("prometheus_client", reason="the extra [serve] is not installed")

from fastapi.testclient import TestClient  # noqa: E402

from qzoom_agent.cli.serve import listen  # noqa: E402
from qzoom_agent.integrations.limits import ServeConfig  # noqa: E402
from qzoom_agent.integrations.serve.app import create_app  # noqa: E402
from qzoom_agent.integrations.serve.chat import ChatMessage, ChatRequest, Options, read_question, usage_of  # noqa: E402
from qzoom_agent.integrations.serve.errors import RequestError  # noqa: E402

KEY = "a-secret-key"
PICTURE = Image.linear_gradient("L").resize((600, 400)).convert("RGB")


def uri(image: Image.Image = PICTURE) -> str:
    return data_url(image)


def parts(*content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def asked(text: str = "which number?", *, url: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the body of a request."""
    image = {"type": "image_url", "image_url": {"url": uri() if url is None else url}}
    content = [image, {"type": "text", "text": text}]
    return {"model": "qzoom", "messages": [{"role": "user", "content": content}], **more}


def zooms_once(messages: list[Message]) -> str:
    """Zoom, then answer with the number of views and the question's last word."""
    views = view_ids(messages)
    return "ZOOM: 100, 100, 300, 300" if len(views) == 1 else f"{len(views)} {plain_text(messages[-1])[-20:]}"


@contextmanager
def running(agent: Agent, config: ServeConfig | None = None) -> Iterator[httpx.Client]:
    """Serve an agent in this process; yield a client of the server."""
    app = create_app(agent, config)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listening.getsockname()[1]
    headers = {"Authorization": f"Bearer {config.api_key}"} if config and config.api_key else {}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def agent() -> Agent:
    return Agent(ScriptedBackend(zooms_once, protocol="plain"), policy="explicit")


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[httpx.Client]:
    limits = ServeConfig(
        api_key=KEY, max_bytes=300_000, max_pixels=1_000_000, traces=2, allow=("perception.max_looks",)
    )
    with running(agent, limits) as found:
        yield found


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_is_that_of_the_agent_with_boxes_and_cost(client: httpx.Client, agent: Agent) -> None:
    reply = client.post("/v1/chat/completions", json=asked()).json()
    direct = agent.run(PICTURE, "which number?")
    choice = reply["choices"][0]
    assert choice["message"]["content"] == direct.text and choice["finish_reason"] == "stop"
    assert reply["qzoom"]["boxes"] == [list(box) for box in direct.boxes] and len(direct.boxes) == 1
    assert reply["qzoom"]["visual_tokens"] == direct.usage.visual_tokens
    assert reply["usage"]["completion_tokens"] == direct.usage.written_tokens
    trace = client.get(f"/traces/{reply['qzoom']['trace']}").json()
    assert trace["question"] == "which number?" and trace["answer"] == direct.text


@pytest.mark.parametrize("policy", ["implicit", "explicit"])
def test_what_the_look_of_an_answer_computed_is_no_cached_prompt(policy: str) -> None:
    """Clients pay less for what an earlier request left in the cache."""
    (sample,) = find_task("needle-scene").load(TaskSource(n=1))
    with Agent.from_pretrained("nano", policy=policy, check=False) as agent:
        answer = agent.run(sample.image, sample.question)
    first, *others = answer.trace.turns
    found = usage_of(answer)["prompt_tokens_details"]["cached_tokens"]
    assert found == sum(turn.cached_tokens for turn in others)
    assert (first.cached_tokens > 0) == (policy == "implicit") and bool(others) == (policy == "explicit")


def test_a_single_client_waits_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with Agent.from_pretrained("nano", check=False) as agent:
        app = create_app(agent, ServeConfig(batch=8))
        served = {route.path: route.endpoint for route in app.routes if hasattr(route, "endpoint")}
        queue = served["/health"].__self__.pool.agent.backend.queue
        waited: list[float] = []  # for the other seven
        monkeypatch.setattr(queue._changed, "wait", waited.append)
        with TestClient(app) as client:
            reply = client.post("/v1/chat/completions", json=asked())
    assert reply.status_code == 200 and reply.json()["qzoom"]["status"] == "answered" and not waited


def test_what_a_look_after_a_first_answer_computed_is_no_cached_prompt() -> None:
    (sample,) = find_task("needle-scene").load(TaskSource(n=1))
    unsure = {"perception.gate": "answer", "perception.confidence": 1.0}
    with Agent.from_pretrained("nano", policy="implicit", check=False, **unsure) as agent:
        answer = agent.run(sample.image, sample.question)
    assert [turn.cached_tokens > 0 for turn in answer.trace.turns] == [False, True]
    assert usage_of(answer)["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_question_may_be_about_several_images(client: httpx.Client, agent: Agent) -> None:
    body, other = asked(), PICTURE.rotate(90, expand=True)
    body["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": uri(other)}})
    found = client.post("/v1/chat/completions", json=body).json()["qzoom"]
    direct = agent.run([other, PICTURE], "which number?")
    assert found["boxes"] == [list(box) for box in direct.boxes]
    assert found["box_images"] == [number for number, _ in direct.evidence]
    assert found["image_sizes"] == [list(other.size), list(PICTURE.size)] and found["image_size"] == list(other.size)


def test_a_stream_has_the_steps_and_ends_with_the_answer(client: httpx.Client, agent: Agent) -> None:
    body = asked(stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(client.post("/v1/chat/completions", json=body).text)
    said = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks if one["choices"])
    assert said == agent.run(PICTURE, "which number?").text
    steps = [one["qzoom"]["step"]["kind"] for one in chunks if "step" in one.get("qzoom", {})]
    assert steps[0] == "view" and {"token", "turn", "call"} <= set(steps)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["qzoom"]["status"] == "answered"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert len({one["id"] for one in chunks}) == 1


def test_a_request_changes_policy_and_budget_within_limits(client: httpx.Client) -> None:
    options = {"policy": "direct", "budget": {"coarse_tokens": 16}, "settings": {"perception.max_looks": 1}}
    reply = client.post("/v1/chat/completions", json=asked(qzoom=options, max_tokens=10**6)).json()
    assert reply["qzoom"]["policy"] == "direct" and reply["qzoom"]["coarse_tokens"] <= 16
    assert reply["qzoom"]["boxes"] == []
    stopped = client.post("/v1/chat/completions", json=asked(stop=["#", " "])).json()
    assert stopped["choices"][0]["message"]["content"] == "2"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt-9"}, 404, "This server has: scripted, qzoom"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "what?"}]}, 400, "this one has 0"),
        ({"messages": [{"role": "tool", "content": "what?"}]}, 400, "messages.0.role"),
        (asked(url="/etc/passwd"), 400, "a data URI"),
        (asked(url="http://localhost/x.png"), 400, "fetches no addresses"),
        (asked(url="data:image/png;base64,aaaa"), 400, "image"),
        (asked(url="data:image/png;base64," + "a" * 400_000), 413, "300000 bytes"),
        (asked(url=uri(Image.new("RGB", (1001, 1000)))), 400, "limit of 1000000 px"),
        ({"messages": asked()["messages"] * 5}, 400, "1000000 px together"),
        (asked(" "), 400, "the user's question"),
        (asked("\ud83d"), 400, "question"),
        (
            parts({"type": "image_url", "image_url": "data:image/png;base64,"}),
            400,
            "messages.0.content.0.image_url: Input",
        ),
        (parts({"type": "image", "image": "x"}), 400, "tag 'image' found using 'type'"),
        ({"n": 2}, 400, "n: "),
        ({"tools": [{}]}, 400, "tools"),
        ({"temperature": 3}, 400, "temperature"),
        ({"stream": "yes"}, 400, "stream"),
        ({"qzoom": {"policy": "oracle"}}, 400, "qzoom.policy"),
        ({"qzoom": {"budget": {"max_turns": 99}}}, 400, "at most 12"),
        ({"qzoom": {"budget": {"max_turns": 10**400}}}, 400, "at most 12"),
        ({"qzoom": {"budget": {"max_visual_tokens": 10**400}}}, 400, "at most 16384"),
        ({"model": "\ud83d"}, 404, "There is no model"),
        ({"qzoom": {"budget": {"max_view": 1}}}, 400, "qzoom.budget.max_view"),
        ({"qzoom": {"budget": {"coarse_tokens": 50, "max_visual_tokens": 10}}}, 400, "budget.max_visual_tokens"),
        ({"qzoom": {"settings": {"model": "other"}}}, 400, "It allows: perception.max_looks"),
        ({"qzoom": {"settings": {"perception.max_looks": 0}}}, 400, "perception.max_looks"),
    ],
)
def test_a_wrong_request_is_refused_in_openais_form(
    client: httpx.Client, change: dict[str, Any], status: int, words: str
) -> None:
    for stream in (False, True):
        sent = json.dumps({"stream": stream, **asked(), **change})
        reply = client.post("/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"})
        error = reply.json()["error"]
        assert (reply.status_code, set(error)) == (status, {"message", "type", "param", "code"})
        assert words in error["message"] or words in (error["param"] or "")
        assert not error["message"].startswith(str(reply.status_code))


def test_a_body_that_is_no_json_or_is_not_sent_as_json_is_told_so(client: httpx.Client) -> None:
    plain = client.post("/v1/chat/completions", content=json.dumps(asked()), headers={"Content-Type": "text/plain"})
    assert "the header 'Content-Type: application/json'" in plain.json()["error"]["message"]
    for unread in (b'{"model": "\xff"}', gzip.compress(b"{}")):
        wrong = client.post("/v1/chat/completions", content=unread, headers={"Content-Type": "application/json"})
        assert wrong.status_code == 400 and "Send JSON in UTF-8" in wrong.json()["error"]["message"]
    for body in ('{"model": ', "no"):
        wrong = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        error = wrong.json()["error"]
        assert wrong.status_code == 400 and error["param"] is None
        assert error["message"].startswith("The body is not JSON: ") and "at character" in error["message"]


def test_requests_without_the_key_or_a_path_are_refused(client: httpx.Client) -> None:
    for sent in ("", "Bearer wrong", f"Basic {KEY}"):
        reply = client.get("/metrics", headers={"Authorization": sent})
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert client.get("/traces/unknown").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["scripted", "qzoom"]
    assert client.get("/v1/models/scripted").json()["owned_by"] == "qzoom"
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("api_key", [None, KEY])
def test_a_page_from_elsewhere_needs_the_key(agent: Agent, api_key: str | None) -> None:
    """A page that gives its own name the address of this machine is, to a browser, at home on the server."""
    with running(agent, ServeConfig(api_key=api_key)) as client:
        for origin, told in {
            "http://evil.example:8000": 200 if api_key else 403,
            "https://[": 200 if api_key else 403,
            "http://localhost:3000": 200,
            "chrome-extension://abc": 200,
        }.items():
            reply = client.post("/v1/chat/completions", json=asked(), headers={"Origin": origin})
            assert reply.status_code == told, origin
            assert told == 200 or reply.json()["error"]["code"] == "foreign_page"


def test_counts_are_told_to_prometheus(client: httpx.Client) -> None:
    client.post("/v1/chat/completions", json=asked())
    text = client.get("/metrics").text
    assert 'qzoom_requests_total{outcome="answered"}' in text and "qzoom_running 0.0" in text
    assert 'qzoom_visual_tokens_total{view="crop"}' in text


def test_the_images_of_own_tools_are_counted() -> None:
    script = ['TOOL: rotate {"degrees": 90}', "42"]
    with running(Agent(ScriptedBackend(script, protocol="plain"), tools=["rotate"], policy="explicit")) as client:
        told = client.post("/v1/chat/completions", json=asked()).json()["qzoom"]
        counted = re.findall(r'qzoom_visual_tokens_total\{view="\w+"\} (\S+)', client.get("/metrics").text)
    assert told["visual_tokens"] > told["coarse_tokens"] + told["crop_tokens"]
    assert sum(map(float, counted)) == told["visual_tokens"]


def test_an_empty_key_is_no_key_that_keeps_strangers_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key", ""]) == 2
    assert "serve.api_key" in capsys.readouterr().err


def test_a_server_is_asked_for_as_many_turns_as_questions_are_answered_at_a_time() -> None:
    server = ["--server", "http://localhost:1/v1", "--model", "my-model", "--protocol", "plain"]
    _, flags = read(["serve", "--batch", "32", *server])
    assert getattr(load_agent(flags).backend, "workers", 1) == 32


def test_a_key_from_a_file_ends_where_its_line_does() -> None:
    assert ServeConfig(api_key=f"{KEY}\n").api_key == KEY
    with pytest.raises(ConfigError, match=r"serve\.api_key"):
        ServeConfig(api_key=" \n")


class Gate:
    """A model that answers once it is let."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.turns = 0

    def __call__(self, messages: list[Message]) -> str:
        self.turns += 1
        self.open.wait(10)
        return "ZOOM: 100, 100, 300, 300" if len(view_ids(messages)) < 4 else "done"


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_so_and_a_client_that_leaves_makes_room(stream: bool) -> None:
    gate = Gate()
    agent = Agent(ScriptedBackend(gate, protocol="plain"), policy="explicit")
    with running(agent, ServeConfig(batch=1, queue=1)) as client:

        def health() -> tuple[int, int]:
            found = client.get("/health").json()
            return found["running"], found["waiting"]

        def ask() -> None:
            timeout = httpx.Timeout(20, read=1.0)
            with httpx.Client(base_url=client.base_url, timeout=timeout) as own, pytest.raises(httpx.ReadTimeout):
                own.post("/v1/chat/completions", json=asked(stream=stream))

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for one in clients:
            one.start()
        until(lambda: health() == (1, 1))
        refused = client.post("/v1/chat/completions", json=asked())
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["Retry-After"] == "1"
        for one in clients:
            one.join()
        until(lambda: health()[1] == 0)  # the one that waited made room though the model is busy
        gate.open.set()
        until(lambda: health() == (0, 0))
        assert gate.turns == 1, "the turn under way was the last, and the second question was never asked"
        assert client.post("/v1/chat/completions", json=asked()).json()["choices"][0]["message"]["content"] == "done"
        assert 'outcome="left"} 2.0' in client.get("/metrics").text


def test_a_client_that_leaves_while_it_sends_is_no_wrong_request(caplog: pytest.LogCaptureFixture) -> None:
    with running(Agent(ScriptedBackend(["42"]), policy="direct")) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as leaving:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {10**6}\r\n\r\n{{"
            leaving.sendall(head.encode())
            time.sleep(0.2)
        until(lambda: 'outcome="left"} 1.0' in client.get("/metrics").text)
        assert "invalid_request" not in client.get("/metrics").text
    assert not caplog.records


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    gate = Gate()
    with running(Agent(ScriptedBackend(gate, protocol="plain"), policy="direct"), ServeConfig(timeout=0.6)) as client:
        late = client.post("/v1/chat/completions", json=asked())
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        streamed = client.post("/v1/chat/completions", json=asked(stream=True))
        assert chunks_of(streamed.text)[-1]["error"]["code"] == "timeout"
        gate.open.set()


def test_a_body_that_does_not_arrive_is_given_up(agent: Agent) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    with running(agent, ServeConfig(read_timeout=0.2)) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10) as slow:
            slow.sendall(head)
            said = b"".join(iter(lambda: slow.recv(4096), b""))
        assert said.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.2 s" in said


def test_a_model_that_fails_is_an_error() -> None:
    with running(Agent(ScriptedBackend([], protocol="plain"), policy="direct")) as client:
        reply = client.post("/v1/chat/completions", json=asked())
        assert reply.status_code == 500 and "ran out of replies" in reply.json()["error"]["message"]
        assert 'outcome="server_error"} 1.0' in client.get("/metrics").text


def said(role: str, *parts: str) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": parts[0] if len(parts) == 1 else None})


def test_what_was_said_before_stands_in_front_of_the_question() -> None:
    image = ChatMessage.model_validate(asked("which number?", url="data:,x")["messages"][0])
    talk = [said("system", "Be short."), image, said("assistant", "42"), said("user", "and the next?")]
    found = read_question(talk, allow_urls=False)
    assert found.text == ("Be short.\n\nThe conversation so far:\nUser: which number?\nAssistant: 42\n\nand the next?")
    assert read_question([image], allow_urls=False).text == "which number?"
    with pytest.raises(RequestError, match="last message"):
        read_question([image, said("assistant", "42")], allow_urls=False)
    with pytest.raises(RequestError, match="1 to 8 images; this one has 9"):
        read_question([image] * 9, allow_urls=False)


def test_settings_that_name_files_are_never_a_requests() -> None:
    for key in ("prompt", "tool", "own_tools", "approve", "review.rule", "nothing"):
        with pytest.raises(ConfigError, match="cannot be allowed"):
            ServeConfig(allow=(key,))


def test_an_allowed_key_keeps_the_servers_limits() -> None:
    keys = ("budget.max_views", "generation.max_new_tokens", "perception.max_regions", "budget.coarse_min_tokens")
    server = ServeConfig(allow=keys)

    def changes(**settings: Any) -> dict[str, Any]:
        wanted = {key: settings[key.partition(".")[2]] for key in keys if key.partition(".")[2] in settings}
        return ChatRequest(**asked(), qzoom=Options(settings=wanted)).changes(server)

    assert changes(max_views=12, max_regions="2") == {"budget.max_views": 12, "perception.max_regions": "2"}
    for many in (10**6, 10**400):
        assert changes(max_new_tokens=many) == {"generation.max_new_tokens": 4096}
    for over in (1000, "1000", 1e300):
        with pytest.raises(RequestError, match=r"budget\.max_views may be at most 12 on this server"):
            changes(max_views=over)
    with pytest.raises(RequestError, match=r"budget\.coarse_min_tokens may be at most 4096 on this server"):
        changes(coarse_min_tokens=20_000)
    for key in ("policy", "budget", "generation"):
        with pytest.raises(ConfigError, match="cannot be allowed"):
            ServeConfig(allow=(key,))


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as held, pytest.raises(ConfigError, match="Give another --host or --port"):
        listen("127.0.0.1", held.getsockname()[1])


@pytest.mark.slow
def test_nano_served_to_the_openai_client_and_to_qzoom_eval(tmp_path: Path) -> None:
    """One process as a user starts it: equal answers, an evaluation, and an end that loses nothing."""
    openai = pytest.importorskip("openai")
    command = [sys.executable, "-m", "qzoom_agent", "serve", "--port", "0", "--batch", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.match(r"nano at (http://127\.0\.0\.1:\d+/v1) \(policy implicit\)", server.stdout.readline())
        assert found is not None
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=0)
        boards = find_task("needle-scene").load(TaskSource(n=4))

        def ask(board: Any, **more: Any) -> Any:
            messages = asked(board.question, url=uri(board.image))["messages"]
            return client.chat.completions.create(model="nano", messages=messages, **more)

        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(ask, boards))
        nano = Agent.from_pretrained("nano", device="cpu")
        answers = [nano.run(board.image, board.question) for board in boards]
        assert [one.choices[0].message.content for one in replies] == [one.text for one in answers]
        assert [one.model_extra["qzoom"]["boxes"] for one in replies] == [
            [list(b) for b in one.boxes] for one in answers
        ]
        parts = [one.choices[0].delta.content or "" for one in ask(boards[0], stream=True) if one.choices]
        assert "".join(parts) == answers[0].text
        with pytest.raises(openai.NotFoundError, match="This server has: nano, qzoom"):
            client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "?"}])

        line = f"eval needle-scene --n 4 --server {found[1]} --model qzoom --policy direct --budget 800 --workers 4"
        assert main([*line.split(), "--out", str(tmp_path / "run")]) == 0
        rows = {row.index: row.answer for row in RunFolder(tmp_path / "run").latest()}
        assert sum(rows[index] == one.text for index, one in enumerate(answers)) >= 3  # boards are resized on the way

        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, boards[0])
            health = found[1].removesuffix("/v1") + "/health"
            until(lambda: httpx.get(health).json()["running"] == 1)
            server.send_signal(signal.SIGTERM)
            assert last.result().choices[0].message.content == answers[0].text
        assert server.wait(30) == 0


@pytest.mark.parametrize(
    "told",
    [
        "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens.",
        "Your input exceeds the context window of this model. Please adjust your input and try again.",
        "prompt is too long: 208310 tokens > 200000 maximum",
        "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
        "the request exceeds the available context size (4096 tokens), try increasing it",
    ],
)
def test_a_question_that_is_too_long_for_the_models_server_is_the_clients(told: str) -> None:
    refusing = Misbehaving(lambda sent: sent.reply({"error": {"message": told}}, status="400 Bad Request"))
    with refusing as server, running(Agent.from_server(server.url, model="served", policy="direct")) as client:
        reply = client.post("/v1/chat/completions", json=asked())
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "context_length_exceeded"), error
    assert told[:40] in error["message"] and "shorter question" in error["message"]
