"""A key or a password is in nothing that is written or shown, whatever a server returns."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.scorers.judge import Judge
from tests.models.misbehaving import (
    IMAGE,
    KEY,
    Misbehaving,
    Script,
    ask,
    completion,
    delta,
    function,
)

ECHOES: list[Script] = [
    lambda one: one.reply({"error": {"message": f"Bad key {KEY}"}}, status="401 Unauthorized"),
    lambda one: one.reply(one.head, status="500 Broken"),
    lambda one: one.reply(f"{'x' * 290}{KEY}", status="400 Bad Request"),
    lambda one: one.reply({"choices": KEY}),
    lambda one: one.reply(KEY),
    lambda one: one.reply({"error": KEY}),
    lambda one: one.reply("", status="302 Found", Location=f"http://there/{KEY}"),
    lambda one: one.reply("", status=f"200 {KEY}", Content_Encoding=KEY),
    lambda one: one.send(f"{KEY}\r\n\r\n"),
    lambda one: one.reply(completion(f"It is {KEY}.")),
    lambda one: one.reply(completion(None, refusal=f"No {KEY}")),
    lambda one: one.reply(completion(None, tool_calls=function(KEY), reasoning=KEY)),
    lambda one: one.stream(*(delta(content=letter) for letter in f"It is {KEY} or sk-T"), delta("stop")),
]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_key_that_the_server_returns_is_written_nowhere(
    server: Misbehaving,
    echo: Script,
    streamed: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = echo
    answer = ask(server, streamed=streamed, attempts=1)
    answer.save(tmp_path)
    answer.report(tmp_path / "report.html")
    if streamed:
        events = list(Agent.from_server(server.url, model="served").stream(IMAGE, "What?"))
        assert KEY not in "".join(str(event.data.get("text")) for event in events)
    IMAGE.save(tmp_path / "a.png")
    main(["ask", str(tmp_path / "a.png"), "What?", "--server", server.url, "--model", "served", "-v"])
    said = capsys.readouterr()
    assert KEY not in f"{said.out}{said.err}{caplog.text}"
    assert "never retrieved" not in caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_key_is_in_nothing_that_an_evaluation_writes(
    server: Misbehaving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = iter(range(10**6))
    server.script = lambda one: ECHOES[next(places) % len(ECHOES)](one)
    IMAGE.save(tmp_path / "a.png")
    rows = [json.dumps({"image": "a.png", "question": f"What is {at}?", "answer": "x"}) for at in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    secret = server.url.replace("//", "//me:hunter2-secret@")
    command = [
        "eval",
        str(tmp_path / "rows.jsonl"),
        "--server",
        secret,
        "--model",
        "served",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) in (0, 4)
    said = capsys.readouterr()
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 24
    for text in (KEY, "hunter2-secret"):
        assert text not in f"{said.out}{said.err}"
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}\r\n\r\nGET /", f"“{KEY}”", f"{KEY}\x00"])
def test_a_key_that_cannot_be_sent_is_not_shown(server: Misbehaving, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", key.replace("\x00", "\x01"))
    answer = ask(server, key_variable="MINE")
    assert answer.status == "error" and "The key in MINE holds a line break" in str(answer.trace.error)
    assert not server.requests


def test_secrets_of_an_address_are_sent_and_not_shown(
    server: Misbehaving, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = lambda one: one.reply(f"{one.head} hunter2/secret", status="500 Broken")
    url = server.url.replace("//", "//me:hunter2%2Fsecret@") + "?api_key=query-secret&version=3"
    answer = ask(server, url=url, attempts=1)
    head = server.requests[0].head
    assert "POST /v1/chat/completions?api_key=query-secret&version=3" in head
    assert "Basic bWU6aHVudGVyMi9zZWNyZXQ=" in head and KEY not in head
    with pytest.raises(BackendError) as judged:
        Judge(url, sleep=lambda _: None).check()
    IMAGE.save(tmp_path / "a.png")
    assert main(["ask", str(tmp_path / "a.png"), "What?", "--server", url, "--model", "served"]) == 4
    assert main(["ask", str(tmp_path / "a.png"), "What?", "--server", url.replace("http", "ftp"), "--model", "m"]) == 2
    said = capsys.readouterr()
    for secret in ("hunter2", "query-secret", "bWU6aHVudGVyMi9zZWNyZXQ="):
        assert secret not in f"{answer.trace.model_dump_json()}{judged.value}{said.out}{said.err}{caplog.text}"


@pytest.mark.parametrize("given", [{"headers": f"api-key: {KEY}"}, {"headers": [KEY]}, {"api_key": [KEY]}])
def test_a_secret_in_a_wrong_form_is_not_shown(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"Bad value for '{next(iter(given))}': .*; got a value of type ") as caught:
        Agent.from_server("http://localhost:1/v1", model="served", **given)
    assert KEY not in str(caught.value)


def test_what_a_server_says_does_not_steer_a_terminal(server: Misbehaving, caplog: pytest.LogCaptureFixture) -> None:
    """Errors go to the terminal, and warnings to the log."""
    server.script = lambda one: one.reply({"error": {"message": "top_p is unknown \x1b]0;title\x07"}}, status="400 Bad")
    agent = Agent.from_server(server.url, model="served", generation={"temperature": 1.0, "top_p": 0.5}, attempts=1)
    error = agent.run(IMAGE, "What?").trace.error
    assert error is not None and "unknown \\x1b]0;title\\x07" in error + caplog.text
    assert "\x1b" not in error + caplog.text and "does not take top_p" in caplog.text
