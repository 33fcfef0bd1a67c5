"""Whatever a server does wrong ends as an answer with a status: in time, in little memory, and without the key."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.models import chat_client, chat_reply
from tests.cases import each_case
from tests.models.misbehaving import (
    CALL,
    IMAGE,
    KEY,
    ZOOM,
    Connection,
    Misbehaving,
    Script,
    ask,
    completion,
    delta,
    every,
    function,
)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("qwen3vl", {"reasoning_content": f"I should zoom. {CALL}"}),
        ("qwen3vl", {"reasoning": CALL}),
        ("qwen3vl", {"tool_calls": function(ZOOM["arguments"])}),
        ("qwen3vl", {"tool_calls": function(json.dumps(ZOOM["arguments"]))}),
        ("qwen3vl", {"content": "Let me look.", "tool_calls": function(json.dumps(ZOOM["arguments"])[:-1])}),
        ("qwen3vl", {"function_call": function(ZOOM["arguments"])[0]["function"]}),
        ("qwen3_5", {"tool_calls": function(ZOOM["arguments"])}),
        ("deepeyes", {"tool_calls": function({"bbox_2d": [5, 5, 50, 50]})}),
        ("mini_o3", {"tool_calls": function({"bbox_2d": [0.1, 0.1, 0.5, 0.5], "source": "original_image"})}),
        ("plain", {"tool_calls": function(json.dumps(ZOOM["arguments"]))}),
        ("plain", {"reasoning_content": "ZOOM: 100, 100, 500, 500"}),
    ],
)
def test_a_call_is_run_wherever_a_server_puts_it(
    server: Misbehaving, protocol: str, message: dict[str, Any], streamed: bool
) -> None:
    def script(connection: Connection) -> None:
        first = len(server.requests) == 1
        said = {"content": None, **message} if first else {"content": "<answer>42</answer>"}
        if connection.body.get("stream"):
            connection.stream(delta("stop", **said))
        else:
            connection.reply({"choices": [{"message": said, "finish_reason": "tool_calls" if first else "stop"}]})

    server.script = script
    answer = ask(server, protocol=protocol, streamed=streamed)
    assert (answer.text, answer.usage.served) == ("42", 1), answer.trace.turns[0]


@pytest.mark.parametrize("arguments", ["{broken", [1], None, 7, "", {"bbox_2d": None}])
def test_a_broken_tool_call_is_told_to_the_model(server: Misbehaving, arguments: Any) -> None:
    script = lambda connection: connection.reply(  # noqa: E731
        completion(None, tool_calls=function(arguments)) if len(server.requests) == 1 else completion("42")
    )
    server.script = script
    answer = ask(server, protocol="qwen3vl")
    assert answer.text == "42" and answer.trace.turns[0].problems


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "4"}, {"type": "image_url"}, "2", None, {"text": None}], "42"),
        ({"type": "text", "text": "42"}, "42"),
        ("\ud83d\ude00 \ud83d", "\U0001f600 \ufffd"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_content_in_parts_is_joined(server: Misbehaving, content: Any, text: str, streamed: bool) -> None:
    server.script = lambda connection: connection.reply(completion(content))
    assert ask(server, streamed=streamed).text == text


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": 10**30, "prompt_tokens_details": {"cached_tokens": -1}},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
        {"prompt_tokens": "many", "completion_tokens": [1], "prompt_tokens_details": 7},
        {"prompt_tokens": None, "prompt_tokens_details": []},
        "none",
        [],
        -1,
    ],
)
def test_a_usage_that_cannot_be_is_unknown(server: Misbehaving, usage: Any) -> None:
    server.script = lambda connection: connection.reply(completion("42", usage=usage))
    answer = ask(server)
    assert (answer.text, answer.status) == ("42", "answered")
    assert (answer.trace.turns[0].prompt_tokens, answer.trace.turns[0].new_tokens) == (0, 0)


def test_other_choices_and_a_wrong_content_type_do_not_matter(server: Misbehaving) -> None:
    one = completion("42")["choices"][0]
    other = {"index": 1, "message": {"content": "43"}}
    server.script = lambda connection: connection.reply({"choices": [one, other]}, Content_Type="text/html")
    assert ask(server).text == "42"
    server.script = lambda connection: connection.reply(
        gzip.compress(json.dumps(completion("42")).encode()), Content_Encoding="gzip"
    )
    assert ask(server).text == "42"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_that_was_cut_by_its_limit_says_so(server: Misbehaving, streamed: bool) -> None:
    server.script = lambda connection: connection.reply(completion("The total is", finish="length"))
    assert ask(server, streamed=streamed).trace.turns[0].finish == "length"
    server.requests.clear()
    server.script = lambda connection: connection.reply(
        completion(None, finish="length", reasoning_content="First I think")
        if len(server.requests) == 1
        else completion("42")
    )
    assert ask(server, streamed=streamed).trace.turns[0].answer is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("partly", finish="content_filter"), "content_filter"),
        (completion(None, refusal="I cannot help with that."), "I cannot help with that"),
        (completion([{"type": "refusal", "refusal": "No faces."}]), "No faces"),
    ],
)
def test_a_withheld_answer_is_asked_for_once_and_its_reason_kept(
    server: Misbehaving, reply: dict[str, Any], reason: str
) -> None:
    server.script = lambda connection: connection.reply(reply)
    answer = ask(server)
    assert answer.status == "error" and reason in str(answer.trace.error)
    assert len(server.requests) == 1


# -- streams ----------------------------------------------------------------------------------------------------------


def test_tokens_come_as_they_are_written(server: Misbehaving) -> None:
    heard = threading.Event()

    def script(connection: Connection) -> None:
        connection.stream(delta(role="assistant"), delta(content="It is "), end="")
        assert heard.wait(5), "the first words wait for the last"
        connection.send(f"data: {json.dumps(delta('stop', content='42'))}\r\n\r\n: ping\n\n")
        usage = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 4}}
        connection.send(f"event: message\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n")

    server.script = script
    pieces = []
    for event in Agent.from_server(server.url, model="served").stream(IMAGE, "What is it?"):
        if event.kind == "token":
            pieces.append(event.data["text"])
            heard.set()
    assert pieces == ["It is ", "42"]
    assert event.answer is not None and event.answer.text == "It is 42"
    assert event.answer.trace.turns[0].prompt_tokens == 30
    assert server.requests[0].body["stream_options"] == {"include_usage": True}


def test_leaving_a_stream_closes_the_reply_and_a_saved_run_repeats_the_turn(
    server: Misbehaving, tmp_path: Path
) -> None:
    left = threading.Event()

    def script(connection: Connection) -> None:
        connection.stream(delta(role="assistant"), end="")
        try:
            every(connection, 0.01, lambda: f"data: {json.dumps(delta(content='word '))}\n\n".encode())
        except OSError:
            left.set()

    server.script = script
    with Agent.from_server(server.url, model="served", state_dir=tmp_path) as agent:
        for event in agent.stream(IMAGE, "What is it?", thread="one"):
            if event.kind == "token":
                break
        assert left.wait(2), "the server writes on"
        server.script = lambda connection: connection.reply(completion("42"))
        answer = agent.resume("one")
    assert (answer.text, len(answer.trace.turns)) == ("42", 1)


@pytest.mark.parametrize(
    ("events", "end"),
    [
        ([delta(content="4"), delta("stop", content="2")], ""),
        ([delta(content="4"), delta(content="2")], "data: [DONE]\n\n"),
        ([delta(content="4"), delta(content="2"), delta("stop")], "data: {broken\n\n"),
        ([f"data: {json.dumps(delta(content='4'))}\ndata: {json.dumps(delta(content='2'))}\n"], "data: [DONE]"),
        (
            [
                f"data: {json.dumps(delta('stop', content='42'), indent=1)}\n\n".replace("\n ", "\ndata:  ").replace(
                    "\n}\n", "\ndata: }\n"
                )
            ],
            "",
        ),
        (["\ufeff", 'data: {"type": "ping"}\n\n', delta(content="42")], "data:[DONE]\n\n"),
        ([{"choices": [{"index": 1, "delta": {"content": "7"}}]}, delta(content="42")], "data: [DONE]\n\n"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stream_may_end_in_several_ways(server: Misbehaving, events: list[Any], end: str, streamed: bool) -> None:
    server.script = lambda connection: connection.stream(*events, end=end)
    assert ask(server, streamed=streamed).text == "42"


def test_a_stream_that_is_not_closed_ends_with_its_last_word(server: Misbehaving) -> None:
    def script(connection: Connection) -> None:
        connection.stream(delta("stop", content="42"), end="")
        every(connection, 0.02, lambda: b": ping\n\n")

    server.script = script
    assert ask(server, seconds=1, streamed=True).text == "42"


@pytest.mark.parametrize("end", ["", "data: {broken\n\n", 'data: {"error": {"message": "out of memory"}}\n\n'])
def test_a_broken_stream_is_no_answer_and_is_not_repeated(server: Misbehaving, end: str) -> None:
    server.script = lambda connection: connection.stream(delta(content="It is"), end=end)
    answer = ask(server, streamed=True)
    assert answer.status == "error" and not answer.text
    assert len(server.requests) == 1


def test_a_stream_of_roles_is_an_empty_turn(server: Misbehaving) -> None:
    server.script = lambda connection: connection.stream(delta(role="assistant"), delta("stop"))
    answer = ask(server, streamed=True)
    assert answer.status != "answered" and answer.trace.turns[0].problems
    assert all(turn["content"] for turn in server.requests[-1].body["messages"])


# -- replies that do not end, or are too large -------------------------------------------------------------------------

OPEN = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


def _dripped_body(connection: Connection) -> None:
    connection.send(OPEN)
    every(connection, 0.05, lambda: b" ")


def _dripped_headers(connection: Connection) -> None:
    connection.send("HTTP/1.1 200 OK\r\n")
    every(connection, 0.05, lambda: b"X-More: 1\r\n")


def _dripped_status(connection: Connection) -> None:
    every(connection, 0.05, lambda: b"H")


def _informational(connection: Connection) -> None:
    every(connection, 0.05, lambda: b"HTTP/1.1 102 Processing\r\n\r\n")


def _silent(connection: Connection) -> None:
    time.sleep(5)


def _dripped_error(connection: Connection) -> None:
    connection.send("HTTP/1.1 401 Unauthorized\r\n\r\n")
    every(connection, 0.05, lambda: KEY.encode())


def _pings(connection: Connection) -> None:
    connection.stream(end="")
    every(connection, 0.02, lambda: b": ping\n\n")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (_dripped_body, "within 0.4 s"),
        (_dripped_headers, "within 0.4 s"),
        (_dripped_status, "within 0.4 s|complete"),
        (_informational, "within 0.4 s"),
        (_silent, "within 0.4 s"),
        (_pings, "within 0.4 s"),
        (_dripped_error, "OPENAI_API_KEY"),
    ],
)
def test_a_reply_has_one_deadline(server: Misbehaving, script: Script, reason: str) -> None:
    server.script = script
    answer = ask(server, seconds=0.4, streamed=script is _pings)
    assert answer.status == "error" and any(part in str(answer.trace.error) for part in reason.split("|"))


def _endless(data: bytes) -> Script:
    def script(connection: Connection) -> None:
        connection.send(OPEN)
        every(connection, 0, lambda: data * (2**16 // len(data)))

    return script


@pytest.mark.parametrize(
    "script",
    [
        _endless(b" "),
        _endless(b'{"choices": ['),
        _endless(b"data: {}\n\n"),
        _endless(b"data: 0"),
        _endless(b": ping\n"),
    ],
)
def test_an_endless_reply_has_a_limit_of_bytes(
    server: Misbehaving, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_reply, "MOST_BYTES", 2**20)
    monkeypatch.setattr(chat_reply, "MOST_STREAMED", 2**20)
    server.script = script
    assert "more than 1 MiB" in str(ask(server, seconds=20).trace.error)
    assert len(server.requests) == 1


PACKED = gzip.compress(bytes(100 * 2**20), 1)


@pytest.mark.parametrize("packing", ["gzip", "identity"])
def test_a_large_reply_takes_little_memory(server: Misbehaving, packing: str) -> None:
    body = PACKED if packing == "gzip" else b'{"x": "' + bytes(100 * 2**20)
    server.script = lambda connection: connection.reply(body, Content_Encoding=packing)
    tracemalloc.start()
    try:
        answer = ask(server, seconds=20)
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20, "the reply's own 100 MB are counted"
    finally:
        tracemalloc.stop()
    assert "more than 8 MiB" in str(answer.trace.error)


# -- replies that are no completion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "returned nothing"),
        ("<html>Welcome</html>", "no JSON: <html>"),
        ('{"choices": [{"message": {"content": "4', "cut off or damaged"),
        ("[" * 100_000, "cut off or damaged"),
        ("9" * 5000, "no JSON"),
        ("null", "no chat completion: null"),
        ("[]", "no chat completion"),
        ('"text"', "no chat completion"),
        ('{"choices": null}', "no chat completion"),
        ('{"choices": {}}', "no chat completion"),
        ('{"choices": []}', "no chat completion"),
        ('{"choices": [null]}', "no chat completion"),
        ('{"choices": [{"message": null}]}', "no chat completion"),
        ('{"choices": [{"message": "42"}]}', "no chat completion"),
        ('{"error": {"message": "no such thing"}}', "no such thing"),
        ('{"error": "no such thing"}', "no such thing"),
        (b"\xff\xfe\x00", "no JSON"),
        ("data: 1\n\n", "ended its stream"),
        ("data", "no JSON"),
    ],
)
def test_a_reply_of_another_shape_is_named(server: Misbehaving, body: str | bytes, reason: str) -> None:
    server.script = lambda connection: connection.reply(body)
    answer = ask(server, attempts=1)
    assert answer.status == "error" and reason in str(answer.trace.error)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n{}",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 999 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 200_000,
        b"HTTP/1.1 200 OK\r\nSet-Cookie: \xff\x00;;;\r\n\r\n",
    ],
)
def test_broken_http_is_an_error_of_the_server(server: Misbehaving, raw: bytes) -> None:
    server.script = lambda connection: connection.send(raw)
    answer = ask(server, attempts=1)
    assert answer.status == "error" and server.url in str(answer.trace.error)


# -- statuses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "requests"),
    [
        ("400 Bad Request", "did not accept the request.*extra_body", 1),
        ("401 Unauthorized", "does not accept the key.*OPENAI_API_KEY", 1),
        ("403 Forbidden", "does not accept the key.*OPENAI_API_KEY", 1),
        ("404 Not Found", "no model 'served'", 1),
        ("405 Method Not Allowed", "no model 'served'", 1),
        ("422 Unprocessable", "did not accept the request", 1),
        ("429 Too Many Requests", "takes no more requests now.*asked 3 times", 3),
        ("500 Internal Server Error", "failed .500.*asked 3 times", 3),
        ("503 Service Unavailable", "failed .503", 3),
    ],
)
@pytest.mark.parametrize("body", ["<html>", '{"error": {"message": "THIS"}}'])
def test_each_status_has_its_own_message(
    server: Misbehaving, status: str, reason: str, requests: int, body: str
) -> None:
    server.script = lambda connection: connection.reply(body, status=status)
    with pytest.raises(BackendError, match=f"(?s){reason}") as caught:
        complete(server)
    assert len(server.requests) == requests
    assert ("THIS" in str(caught.value)) == ("THIS" in body)
    assert "below /v1" not in str(caught.value)


def complete(server: Misbehaving, **options: Any) -> str:
    return (
        chat_client.ChatClient(options.pop("url", server.url), model="served", pause=0.01, **options)
        .complete([], max_tokens=4)
        .text
    )


def test_a_spent_quota_is_not_asked_again(server: Misbehaving) -> None:
    server.script = lambda connection: connection.reply(
        {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, status="429 Too Many"
    )
    assert "exceeded your quota" in str(ask(server).trace.error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", ["404 Not Found", "200 OK"])
def test_an_address_without_v1_is_hinted_at(server: Misbehaving, status: str) -> None:
    server.script = lambda connection: connection.reply("<html>", status=status)
    short = server.url.removesuffix("/v1")
    assert f"try {short}/v1." in str(ask(server, url=short).trace.error)


def test_without_a_key_a_server_that_wants_one_is_named(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.script = lambda connection: connection.reply("", status="401 Unauthorized")
    assert "wants a key (401). Put a valid key into OPENAI_API_KEY" in str(ask(server).trace.error)
    assert "Check api_key" in str(ask(server, api_key="sk-another-key").trace.error)
    assert "Authorization: Bearer sk-another-key" in server.requests[-1].head.replace("authorization", "Authorization")


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308", "300", "304"])
@pytest.mark.parametrize("where", ["other", "self", "none"])
def test_redirects_are_refused_and_the_key_stays(server: Misbehaving, status: str, where: str) -> None:
    with Misbehaving() as other:
        to = {"other": f"{other.url}?key={KEY}", "self": server.url, "none": ""}[where]
        server.script = lambda connection: connection.reply("", status=f"{status} Moved", Location=to)
        answer = ask(server)
        assert answer.status == "error" and f"({status})" in str(answer.trace.error)
        with pytest.raises(BackendError, match="redirects"):
            Judge(server.url, key_variable="OPENAI_API_KEY").check()
        assert not other.requests and len(server.requests) == 2


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("4", 4, 4),
        ("0", 0, 0),
        ("-3", 0, 0),
        (timedelta(seconds=30), 15, 30),
        (timedelta(days=-30), 0, 0),
        ("999999999999", 60, 60),
        ("1e400", 60, 60),
        ("9" * 5000, 60, 60),
        ("nan", 0.5, 0.5),
        ("soon", 0.5, 0.5),
        ("Wed, 99 Foo 2026", 0.5, 0.5),
        ("", 0.5, 0.5),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    server: Misbehaving, told: str | timedelta, least: float, most: float
) -> None:
    if isinstance(told, timedelta):
        told = format_datetime(datetime.now(UTC) + told, usegmt=True)
    server.script = lambda connection: (
        connection.reply("", status="429 Busy", Retry_After=told)
        if len(server.requests) == 1
        else connection.reply(completion("42"))
    )
    waits: list[float] = []
    client = chat_client.ChatClient(server.url, model="served", sleep=waits.append)
    assert client.complete([], max_tokens=4).text == "42"
    assert len(waits) == 1 and least <= waits[0] <= most


def test_a_pause_longer_than_the_deadline_is_not_waited_for(server: Misbehaving) -> None:
    server.script = lambda connection: connection.reply("", status="429 Busy", Retry_After="30")
    assert "asks to wait 30 s" in str(ask(server, seconds=0.5).trace.error)
    assert len(server.requests) == 1


# -- fields of a request ----------------------------------------------------------------------------------------------


def test_the_name_of_the_limit_is_found_out(server: Misbehaving) -> None:
    def script(connection: Connection) -> None:
        if "max_tokens" in connection.body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            connection.reply({"error": {"message": said}}, status="400 Bad Request")
        else:
            connection.reply(completion("42"))

    server.script = script
    client = chat_client.ChatClient(server.url, model="served", attempts=1)
    assert [client.complete([], max_tokens=9).text for _ in range(2)] == ["42", "42"]
    assert [one.body.get("max_completion_tokens") for one in server.requests] == [None, 9, 9], "asked for once"


def test_fields_and_headers_of_ones_own_are_sent(server: Misbehaving, tmp_path: Path) -> None:
    ask(server, extra_body={"top_k": 20, "seed": None}, headers={"api-key": "header-secret"})
    request = server.requests[0]
    assert request.body["top_k"] == 20 and "seed" not in request.body and "temperature" in request.body
    assert "api-key: header-secret" in request.head
    IMAGE.save(tmp_path / "a.png")
    argv = ["ask", str(tmp_path / "a.png"), "What?", "--server", server.url, "--model", "served", "-q"]
    assert (
        main([*argv, "--extra-body", "{top_k: 5, stop: null}", "--server-timeout", "9", "--key-variable", "MINE"]) == 0
    )
    assert server.requests[1].body["top_k"] == 5 and "authorization" not in server.requests[1].head.lower()
    assert main([*argv[:3], "--extra-body", "{top_k: 5}"]) == 2
    assert main([*argv, "--extra-body", "5"]) == 2


@each_case(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": float("nan")},
        {"attempts": 0},
        {"concurrency": 0},
        {"extra_body": {"x": object()}},
        {"headers": {"X": "a\nb"}},
        {"headers": {"X": "ä"}},
        {"api_key": "a\nb"},
    ],
)
def test_arguments_are_checked_before_anything_is_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Agent.from_server("http://127.0.0.1:9/v1", model="served", **wrong)


# -- connections ------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "cannot be reached" in str(ask(server, url=f"http://127.0.0.1:{port}/v1", attempts=1).trace.error)
    tls = server.url.replace("http:", "https:")
    monkeypatch.setattr(Connection, "handle", lambda self: self.send(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert "without TLS write http://" in str(ask(server, url=tls, attempts=1).trace.error)
    assert "cannot be found" in str(ask(server, url="http://nowhere.invalid/v1", attempts=1).trace.error)


def test_a_name_that_is_never_resolved_does_not_outlive_the_deadline(
    server: Misbehaving, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, free = socket.getaddrinfo, threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: free.wait(5) and resolve(*args, **more))
    assert "within 0.3 s" in str(ask(server, url="http://slow.invalid/v1", seconds=0.3).trace.error)
    free.set()


# -- secrets ----------------------------------------------------------------------------------------------------------
