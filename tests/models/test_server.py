"""A model behind an OpenAI-compatible server: what it is sent, what is made of its answers, and what when it fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.cli.main import main
from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.evaluation.run_log import weights_of_agent
from qzoom_agent.images import load_image
from qzoom_agent.messages import image_part, message, text
from qzoom_agent.models import server as module
from qzoom_agent.models.interface import Reply, SamplingParams
from qzoom_agent.models.presets import NANO_BUDGET
from qzoom_agent.models.server import ServerBackend
from tests.models.misbehaving import Connection, Misbehaving

Answering = Callable[[dict[str, Any]], tuple[int, Any]]


class Playing(Misbehaving):
    """A server that plays back."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Answering = lambda body: (200, said("42"))
        self.models = {"error": "no such page"}
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.script = self.play

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [one.body for one in self.requests]

    def play(self, asked: Connection) -> None:
        assert asked.head.startswith("POST /v1/chat/completions ")
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        status, answer = self.answer(asked.body)
        with self.lock:
            self.at_once -= 1
        asked.reply(answer, status=f"{status} as asked")

    def wait_for_two(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Answer once a second request is there, however busy the machine is."""
        last = time.monotonic() + 5
        while self.most_at_once < 2 and time.monotonic() < last:
            time.sleep(0.01)
        return 200, said("42")


def said(words: str, **choice: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 20}}
    return {"choices": [{"message": {"content": words}, "finish_reason": "stop", **choice}], "usage": usage}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Playing]:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Playing() as played:
        yield played


def backend(server: Playing, **more: Any) -> ServerBackend:
    return ServerBackend(server.url, model="served", protocol="plain", defaults=NANO_BUDGET, **more)


def go(asked: ServerBackend, **settings: Any) -> Reply:
    return asked.session(picture).reply([text("user", "go")], settings=SamplingParams(**settings))


GREEDY = SamplingParams()


def picture(view: str) -> Image.Image:
    return Image.new("RGB", (56, 84), "red" if view == "coarse" else "blue")


def test_a_conversation_is_sent_in_the_form_that_every_server_takes(
    server: Playing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    conversation = [
        text("system", "Look closely."),
        message("user", image_part("coarse"), "What is it?"),
        text("assistant", "<zoom>"),
        message("tool", image_part("crop1"), "the crop"),
        text("user", "Answer now."),
    ]
    session = backend(server, key_variable="MY_KEY").session(picture)
    heard: list[str] = []
    reply = session.reply(
        conversation, settings=SamplingParams(max_new_tokens=9, temperature=0.5, seed=7), on_text=heard.append
    )
    assert (reply.text, heard, reply.finish) == ("42", ["42"], "stop")
    assert (reply.prompt_tokens, reply.cached_tokens, reply.new_tokens) == (30, 20, 4)
    assert reply.visual_tokens == 2 * 6
    (body,) = server.bodies
    assert server.requests[0].key == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("served", 9, 0.5, 7)
    assert "stop" not in body
    assert [turn["role"] for turn in body["messages"]] == ["system", "user", "assistant", "user"]
    shown, words, last = body["messages"][3]["content"]
    assert (words["text"], last["text"]) == ("the crop", "Answer now.")
    assert load_image(shown["image_url"]["url"]).getpixel((0, 0)) == (0, 0, 255)
    again = session.reply([*conversation, text("assistant", "42"), text("user", "Sure?")], settings=SamplingParams())
    assert again.visual_tokens == 0, "no view is counted twice"


@pytest.mark.parametrize(("owner", "read", "warned"), [("vllm", 11, True), ("vllm", 13, False), ("ollama", 11, False)])
def test_a_server_that_shrinks_images_is_named_once(
    server: Playing, caplog: pytest.LogCaptureFixture, owner: str, read: int, warned: bool
) -> None:
    server.models = {"data": [{"id": "served", "owned_by": owner}]}
    server.answer = lambda body: (200, {**said("42"), "usage": {"prompt_tokens": read, "completion_tokens": 1}})
    asked = backend(server)
    for _ in range(2):
        asked.session(picture).reply([message("user", image_part("coarse"), image_part("crop1"))], settings=GREEDY)
    told = [one.getMessage() for one in caplog.records if "max_pixels" in one.getMessage()]
    assert len(told) == warned
    assert all("has read 11 tokens" in one and "have 12 visual tokens of 28 px" in one for one in told)


def test_a_server_tells_weights_of_one_name_apart(server: Playing) -> None:
    """vLLM serves any folder under any name; what changes at each start says nothing of the weights."""
    found = []
    for told in ({"root": "runs/a"}, {"root": "runs/a", "created": 7}, {"root": "runs/b"}, {"meta": {"size": 3}}, {}):
        server.models = {"data": [{"id": "served", "owned_by": "vllm", **told}]}
        agent = Agent(backend(server), policy="explicit")
        found.append(weights_of_agent(agent))
    assert found[0] == found[1] is not None
    assert len(set(found)) == 4
    assert found[4] is None


@pytest.mark.parametrize(
    ("models", "named"),
    [
        ({"data": [{"id": "other", "owned_by": "me"}, {"id": "served", "owned_by": "vllm"}]}, True),
        ({"data": [{"id": "other", "owned_by": "vllm"}, {"id": "served", "owned_by": "openai"}]}, False),
        ({"data": [{"id": "other", "owned_by": "vllm"}]}, False),
        ({"data": {"served": "vllm"}}, False),
        ({"data": [7, {"id": "served"}, None]}, False),
        (["vllm"], False),
    ],
)
def test_images_are_named_to_vllm_alone_and_always_by_the_same_name(server: Playing, models: Any, named: bool) -> None:
    server.models = models
    asked, first = backend(server), [message("user", image_part("coarse"), "What?")]
    more = [*first, text("assistant", "<zoom>"), message("tool", image_part("crop1"), image_part("crop2"))]
    session = asked.session(picture)
    for conversation in (first, more):
        session.reply(conversation, settings=SamplingParams())
    asked.session(picture).reply(first, settings=SamplingParams())
    one, two, other = ([turn["content"] for turn in body["messages"]] for body in server.bodies)
    assert two[0] == one[0] == other[0], "the prefix is what it was"
    names = [part.get("uuid") for part in (one[0][0], *two[2])]
    if named:
        assert names[1] == names[2] != names[0], "by what they show"
        assert all(len(name) == 32 for name in names)
    else:
        assert names == [None, None, None]


@pytest.mark.parametrize(
    ("words", "choice", "whole"),
    [
        ('<grounding>{"a": 1}', {}, '<grounding>{"a": 1}</grounding>'),
        ("<zoom>1", {"stop_reason": "</zoom>"}, "<zoom>1</zoom>"),
        ("an answer", {}, "an answer"),
        ("<grounding>1</grounding>", {}, "<grounding>1</grounding>"),
        ("<grounding>1</grounding> then", {}, "<grounding>1</grounding> then"),
        ("<grounding>cut o", {"finish_reason": "length"}, "<grounding>cut o"),
        (None, {}, ""),
    ],
)
def test_a_stop_string_that_the_server_cut_off_is_put_back(
    server: Playing, words: str | None, choice: dict[str, Any], whole: str
) -> None:
    server.answer = lambda body: (200, said(words, **choice))  # type: ignore[arg-type]
    reply = go(backend(server), stop=("</grounding>", "</zoom>"))
    assert reply.text == whole
    assert reply.finish == ("length" if "finish_reason" in choice else "stop")
    assert server.bodies[0]["stop"] == ["</grounding>", "</zoom>"]


def test_log_probabilities_are_asked_for_only_where_they_are_needed(server: Playing) -> None:
    told = [{"token": "4", "logprob": -0.5}, {"token": "2", "logprob": 0}, {"token": None}, {"logprob": "x"}, 7]
    told += [{"token": "?", "logprob": bad} for bad in (float("nan"), 0.5, None)]
    server.answer = lambda body: (200, said("42", logprobs={"content": told}))
    asked = backend(server)
    reply = go(asked, logprobs=True)
    assert reply.logprobs == [("4", -0.5), ("2", 0.0)]
    assert "logprobs" not in reply.model_dump()
    parts = [{"token": f"\\x{one:x}", "bytes": [one], "logprob": -1.0} for one in "\u20ac".encode()]
    told = [{"token": " 4", "bytes": [32, 52], "logprob": 0}, *parts, {"token": "2", "bytes": None, "logprob": 0}]
    server.answer = lambda body: (200, said(" 4\u20ac2", logprobs={"content": told}))
    reply = go(asked, logprobs=True)
    assert reply.logprobs == [(" 4", 0.0), ("\u20ac", -1.0), ("2", 0.0)]
    for broken in (None, "x", {"content": 7}, {"content": None}):
        server.answer = lambda body, broken=broken: (200, said("42", logprobs=broken))  # type: ignore[misc]
        assert go(asked).logprobs == []
    assert [body.get("logprobs") for body in server.bodies[1:3]] == [True, None]


@pytest.mark.parametrize(
    "url", ["", "foo", "localhost:8000", "ftp://there/v1", "http://", "http://[x/v1", "http://a:b"]
)
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        Agent.from_server(url, model="served")


def test_a_server_is_not_asked_for_the_model_of_this_package() -> None:
    with pytest.raises(ConfigError, match="has: --model"):
        Agent.from_server("http://there/v1", model="nano")


@pytest.mark.parametrize(
    ("status", "answer", "requests", "match"),
    [
        (400, "no images here", 1, "no images here.*'served'"),
        (200, "not JSON", 3, "returned no JSON: not JSON"),
        (200, {"error": "strange"}, 1, "an error: strange"),
    ],
)
def test_a_failure_says_what_the_server_said(
    server: Playing, status: int, answer: Any, requests: int, match: str
) -> None:
    server.answer = lambda body: (status, answer)
    with pytest.raises(BackendError, match=match):
        go(backend(server))
    assert len(server.bodies) == requests


def test_a_server_that_is_not_there_ends_the_episode_and_not_the_program() -> None:
    nowhere = ServerBackend("http://127.0.0.1:9/v1", model="served", protocol="plain", defaults=NANO_BUDGET, attempts=1)
    answer = Agent(nowhere).run(Image.new("RGB", (60, 60)), "What is it?")
    assert answer.status == "error"
    assert "http://127.0.0.1:9/v1/chat/completions" in str(answer.trace.error)


def test_no_more_requests_are_under_way_than_allowed(server: Playing) -> None:
    server.answer = server.wait_for_two
    shared = backend(server, concurrency=2)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(go, [shared] * 6))
    assert len(server.bodies) == 6
    assert server.most_at_once == 2


def test_the_command_line_asks_a_server_and_serves_its_zoom_calls(
    server: Playing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [100, 100, 500, 500]}}</tool_call>'
    server.answer = lambda body: (200, said(call if len(server.bodies) == 1 else "It says 42."))
    Image.new("RGB", (800, 600), "white").save(tmp_path / "board.png")
    code = main(["ask", str(tmp_path / "board.png"), "What is it?", "--model", "qwen3-vl-4b", "--server", server.url])
    assert code == 0
    assert capsys.readouterr().out.strip() == "It says 42."
    first, second = server.bodies
    assert first["model"] == "Qwen/Qwen3-VL-4B-Instruct"
    images = [part for turn in second["messages"] for part in turn["content"] if part["type"] == "image_url"]
    assert len(images) == 2, "the coarse view and the crop that was asked for"


def test_an_evaluation_keeps_several_requests_under_way(server: Playing, tmp_path: Path) -> None:
    server.answer = server.wait_for_two
    argv = ["eval", "needle-doc", "--model", "my-model", "--protocol", "plain", "--server", server.url, "--n", "6"]
    assert main([*argv, "--policy", "direct", "--workers", "3", "--out", str(tmp_path / "run")]) == 0
    assert [body["model"] for body in server.bodies] == ["my-model"] * 6
    assert 1 < server.most_at_once <= 3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"]["needle-doc"]["n"] == 6
