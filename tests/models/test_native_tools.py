"""Native tool calls by Chat Completions and Responses: requests, results by id, streams, and bad output as turns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qzoom_agent.agent import Agent, Answer
from qzoom_agent.cli.main import main
from qzoom_agent.errors import ConfigError
from qzoom_agent.images import load_image
from qzoom_agent.models.chat_messages import chat_messages, response_items
from qzoom_agent.models.chat_reply import CompletionReader, ReplyReader, ResponseReader, UnusableReply
from qzoom_agent.models.hosted import connection, served_preset
from tests.cases import each_case
from tests.models.misbehaving import CALL, Connection, Misbehaving
from tests.models.replies import REASONING, call, events, replay, turn

PHOTO = Image.new("RGB", (1200, 900), "white")
APIS = ("chat", "responses")
SIGNED = {"google": {"thought_signature": "c2lnbmVk"}}


def play(server: Misbehaving, *replies: dict[str, Any]) -> None:
    server.script = replay(*replies)


def ask(server: Misbehaving, api: str, *, streamed: bool = False, **options: Any) -> Answer:
    options = {"model": "served", "protocol": "qwen3vl", "tools": "native", "timeout": 10.0, "api": api, **options}
    agent = Agent.from_server(server.url, **options)
    if not streamed:
        return agent.run(PHOTO, "What is it?")
    *told, last = agent.stream(PHOTO, "What is it?")
    assert last.answer is not None
    for one in last.answer.trace.turns:
        pieces = [event.data["text"] for event in told if event.kind == "token" and event.data["turn"] == one.index]
        assert "".join(pieces) == one.text
    return last.answer


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_completions_get_each_result_by_its_id_and_its_image_in_the_next_user_turn(
    server: Misbehaving, streamed: bool
) -> None:
    two = (call(0, extra_content=SIGNED), call(1))
    play(server, turn("chat", "I look twice.", *two), turn("chat", "It says 42."))
    answer = ask(server, "chat", streamed=streamed)
    assert (answer.text, answer.usage.served) == ("It says 42.", 2)
    assert [one.id for one in answer.trace.turns[0].calls] == ["call_0", "call_1"]
    first, second = (one.body for one in server.requests)
    assert first["tools"] == second["tools"] and first["tools"][0]["function"]["name"] == "image_zoom_in_tool"
    assert "tool_choice" not in second
    assert [one["role"] for one in first["messages"]] == ["user"], "the schema is not in the text too"
    assert second["messages"][: len(first["messages"])] == first["messages"], "the prefix is what it was"
    said, one, other, shown = second["messages"][1:]
    assert said["content"] == [{"type": "text", "text": "I look twice."}]
    assert [part["id"] for part in said["tool_calls"]] == ["call_0", "call_1"]
    assert said["tool_calls"][0]["function"]["arguments"] == two[0]["arguments"], "as it was written"
    assert said["tool_calls"][0]["extra_content"] == SIGNED and "extra_content" not in said["tool_calls"][1]
    assert [(part["role"], part["tool_call_id"]) for part in (one, other)] == [("tool", "call_0"), ("tool", "call_1")]
    assert all(isinstance(part["content"], str) and "follows" in part["content"] for part in (one, other))
    assert shown["role"] == "user"
    assert [part["type"] for part in shown["content"]] == ["text", "image_url"] * 2
    assert ["call_0" in shown["content"][0]["text"], "call_1" in shown["content"][2]["text"]] == [True, True]
    assert answer.trace.config["tools"] == "native" and "Chat" in answer.trace.environment["placement"]


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_get_each_image_in_the_output_of_its_function(server: Misbehaving, streamed: bool) -> None:
    play(
        server,
        turn("responses", "I look twice.", call(0), call(1), thought=True),
        turn("responses", "It says 42."),
    )
    answer = ask(server, "responses", streamed=streamed)
    assert (answer.text, answer.usage.served) == ("It says 42.", 2)
    assert (answer.trace.turns[0].prompt_tokens, answer.trace.turns[0].cached_tokens) == (30, 20)
    first, second = (one.body for one in server.requests)
    assert server.requests[0].head.startswith("POST /v1/responses ")
    assert first["max_output_tokens"] and first["store"] is False and "messages" not in first
    assert not {"seed", "stop", "stream_options", "max_tokens"} & first.keys(), "fields of the other API"
    assert first["tools"][0]["name"] == "image_zoom_in_tool" and first["tools"][0]["strict"] is False
    assert second["input"][: len(first["input"])] == first["input"], "the prefix is what it was"
    thought, said, one, other, *results = second["input"][len(first["input"]) :]
    assert thought == {key: value for key, value in REASONING.items() if key != "status"}
    assert said == {"role": "assistant", "content": "I look twice."}
    assert [part["call_id"] for part in (one, other, *results)] == ["call_0", "call_1"] * 2
    assert one["type"] == "function_call" and one["arguments"] == call(0)["arguments"]
    for result, view in zip(results, answer.trace.views[2:], strict=True):
        assert result["type"] == "function_call_output"
        (image,) = [part for part in result["output"] if part["type"] == "input_image"]
        assert load_image(image["image_url"]).size == view.size and image["detail"] == "high"
    assert "Responses" in answer.trace.environment["placement"]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (call(0, '{"bbox_2d": [1, 2'), "image_zoom_in_tool"),
        (call(0, "[]"), "image_zoom_in_tool"),
        (call(0, '{"bbox_2d": [NaN, 1, 2, 3]}'), "image_zoom_in_tool"),
        (call(0, '{"bbox_2d": "here"}'), "image_zoom_in_tool"),
        (call(0, ""), "image_zoom_in_tool"),
        (call(0, name="paint"), "no tool 'paint'"),
        (call(0, {"bbox_2d": [0, 0, 9, 9], "img_idx": 7}), "img_idx"),
    ],
)
def test_a_call_that_cannot_be_run_is_answered_under_its_id(
    server: Misbehaving, api: str, streamed: bool, wrong: dict[str, Any], told: str
) -> None:
    play(server, turn(api, "", wrong, call(1)), turn(api, "42"))
    answer = ask(server, api, streamed=streamed)
    assert answer.text == "42" and answer.usage.served == 1
    body = server.requests[1].body
    if api == "chat":
        said, refused, served, shown = body["messages"][1:]
        assert all(isinstance(json.loads(one["function"]["arguments"]), dict) for one in said["tool_calls"])
        assert refused["tool_call_id"] == "call_0" and told in refused["content"]
        assert served["tool_call_id"] == "call_1" and shown["content"][-1]["type"] == "image_url"
    else:
        one, _, refused, served = body["input"][1:]
        assert isinstance(json.loads(one["arguments"]), dict)
        assert refused["call_id"] == "call_0" and told in refused["output"][0]["text"]
        assert served["call_id"] == "call_1" and served["output"][0]["type"] == "input_image"


@pytest.mark.parametrize("api", APIS)
def test_too_many_calls_and_ids_that_are_missing_or_the_same_are_all_answered(server: Misbehaving, api: str) -> None:
    same = [call(index % 2, id=("" if index < 3 else "x")) for index in range(6)]
    play(server, turn(api, "", *same), turn(api, "42"))
    answer = ask(server, api)
    assert answer.text == "42" and answer.usage.requested == 4
    items = server.requests[1].body["messages" if api == "chat" else "input"]
    if api == "chat":
        asked = [one["id"] for one in items[1]["tool_calls"]]
        given = [one["tool_call_id"] for one in items if one["role"] == "tool"]
    else:
        asked = [one["call_id"] for one in items if one.get("type") == "function_call"]
        given = [one["call_id"] for one in items if one.get("type") == "function_call_output"]
    assert asked == given and len(set(given)) == 6


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_reply_that_is_cut_off_in_a_call_is_a_turn(server: Misbehaving, api: str, streamed: bool) -> None:
    play(server, turn(api, "Let me", call(0, '{"bbox_2d": [10'), cut=True), turn(api, "42"))
    answer = ask(server, api, streamed=streamed)
    assert (answer.text, answer.trace.turns[0].finish) == ("42", "length")
    assert "cut off" in json.dumps(server.requests[1].body)


@pytest.mark.parametrize("api", APIS)
def test_the_last_turn_keeps_the_tools_and_forbids_to_call_them(server: Misbehaving, api: str) -> None:
    play(server, turn(api, "", call(0)), turn(api, "42"))
    answer = ask(server, api, budget={"max_turns": 1})
    assert (answer.text, answer.status) == ("42", "budget")
    first, last = (one.body for one in server.requests)
    assert first["tools"] == last["tools"] and last["tool_choice"] == "none"
    assert "Answer the question now" in json.dumps(last)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("logprob", "requests"), [(-0.01, 1), (-1.0, 2)])
def test_the_first_answer_is_kept_by_its_log_probabilities(
    server: Misbehaving, api: str, streamed: bool, logprob: float, requests: int
) -> None:
    told, reply = [{"token": "42", "logprob": logprob}], turn(api, "42")
    if api == "chat":
        reply["choices"][0]["logprobs"] = {"content": told}
        parts = [*events(api, reply)]
        parts[-2]["choices"][0]["logprobs"] = {"content": told}
        server.script = lambda connection: (
            connection.stream(*parts) if connection.body.get("stream") else connection.reply(reply)
        )
    else:
        reply["output"][0]["content"][0]["logprobs"] = told
        play(server, reply)
    answer = ask(server, api, streamed=streamed, **{"perception.gate": "answer"})
    assert (answer.text, len(server.requests)) == ("42", requests)
    first = server.requests[0].body
    asked = {"logprobs": True} if api == "chat" else {"include": ["message.output_text.logprobs"]}
    assert {key: first.get(key) for key in asked} == asked
    assert first["tool_choice"] == "none" and answer.trace.turns[0].confidence == pytest.approx(math.exp(logprob))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("reason", ["I cannot help with faces.", "content_filter"])
def test_a_refusal_is_a_turn_and_its_reason_is_kept(server: Misbehaving, api: str, streamed: bool, reason: str) -> None:
    reply = turn(api, "So far")
    filtered = reason == "content_filter"
    if api == "chat":
        choice = reply["choices"][0]
        choice["message"] |= {} if filtered else {"refusal": reason}
        choice["finish_reason"] = reason if filtered else "stop"
        chunk = {"choices": [{"index": 0, "delta": choice["message"], "finish_reason": choice["finish_reason"]}]}
        told: list[Any] = [chunk]
    elif filtered:
        reply |= {"status": "incomplete", "incomplete_details": {"reason": reason}}
        told = events(api, reply)
    else:
        reply["output"][0]["content"].append({"type": "refusal", "refusal": reason})
        told = events(api, reply)
    server.script = lambda one: one.stream(*told) if one.body.get("stream") else one.reply(reply)
    answer = ask(server, api, streamed=streamed)
    assert answer.status == "error" and reason in str(answer.trace.error) and len(server.requests) == 1
    assert (answer.trace.turns[0].text, answer.trace.turns[0].withheld) == ("So far", reason)


def test_a_run_is_resumed_with_its_calls_and_signatures(server: Misbehaving, tmp_path: Path) -> None:
    fails = {"error": {"message": "no more", "code": "insufficient_quota"}}
    play(server, turn("chat", "", call(0, extra_content=SIGNED)), fails)
    options: dict[str, Any] = {"model": "served", "protocol": "qwen3vl", "tools": "native", "state_dir": tmp_path}
    with Agent.from_server(server.url, **options, attempts=1) as agent:
        assert agent.run(PHOTO, "What is it?", thread="one").status == "error"
    play(server, turn("chat", "42"))
    with Agent.from_server(server.url, **options) as agent:
        assert agent.resume("one").text == "42"
    before, after = (one.body["messages"] for one in server.requests[1:])
    assert after == before and after[1]["tool_calls"][0]["extra_content"] == SIGNED


def test_a_call_in_the_text_is_served_though_the_server_did_not_find_it(server: Misbehaving) -> None:
    play(server, turn("chat", CALL), turn("chat", "42"))
    answer = ask(server, "chat")
    assert (answer.text, answer.usage.served) == ("42", 1)
    said, shown = server.requests[1].body["messages"][1:]
    assert (said["role"], shown["role"]) == ("assistant", "user") and "tool_calls" not in said


def test_parallel_calls_of_a_stream_that_all_have_index_0_are_told_apart() -> None:
    reader = CompletionReader()
    for number in (0, 1):
        one = {"index": 0, "id": f"f{number}", "function": {"name": "zoom", "arguments": json.dumps({"n": number})}}
        reader.take({"choices": [{"delta": {"tool_calls": [one]}, "finish_reason": None}]})
    reader.take({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    assert [(one["call_id"], one["arguments"]) for one in reader.completion().calls] == [
        ("f0", '{"n": 0}'),
        ("f1", '{"n": 1}'),
    ]


@pytest.mark.parametrize(
    ("reply", "requests", "reason"),
    [
        ({"type": "error", "code": "server_error", "message": "overloaded"}, 2, "overloaded"),
        ({"status": "failed", "error": {"code": "invalid_image", "message": "no image"}, "output": []}, 1, "no image"),
        ({"status": "in_progress", "output": []}, 1, "no response"),
        ({"choices": []}, 1, "no response"),
        ([{"error": {"message": "bad signature"}}], 1, "bad signature"),
    ],
)
def test_a_response_that_is_none_says_what_it_is(server: Misbehaving, reply: Any, requests: int, reason: str) -> None:
    server.script = lambda connection: connection.reply(reply)
    answer = ask(server, "responses", attempts=2)
    assert answer.status == "error" and reason in str(answer.trace.error)
    assert len(server.requests) == requests


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
LEAF = st.none() | st.integers() | st.text(max_size=3)
FIELD = st.sampled_from(["type", "status", "output", "content", "text", "arguments", "call_id", "summary", "refusal"])
KIND = st.sampled_from(["message", "reasoning", "function_call", "output_text", "completed", "incomplete", "refusal"])
THING = st.recursive(LEAF | KIND, lambda inner: st.dictionaries(FIELD, inner | KIND) | st.lists(inner), max_leaves=12)


@settings(max_examples=30, deadline=None)
@given(value=THING, output=THING, kind=st.none() | st.sampled_from(["response.completed", "response.output_item.done"]))
@pytest.mark.parametrize("reader", [CompletionReader, ResponseReader])
def test_no_reply_breaks_a_reader(reader: type[ReplyReader], value: Any, output: Any, kind: str | None) -> None:
    reading = reader()
    whole = {"status": "completed", "output": output, "choices": [{"message": output, "finish_reason": "stop"}]}
    try:
        for one in (value, {"type": kind, "response": value, "item": output}, whole):
            reading.take(one)
        found = reading.completion()
    except UnusableReply:
        return
    json.dumps([found.text, found.reasoning, found.items]).encode()
    user: Any = {"role": "user", "content": [{"type": "text", "text": "go"}]}
    said: Any = {"role": "assistant", "content": [], "items": list(found.items)}
    for write in (chat_messages, response_items):
        assert json.dumps(write([user, said, user], lambda view: {}))


# -- fields of a request ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
        ("seed", "Unknown parameter: 'seed'."),
        ("seed", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'),
        ("top_p", "`temperature` and `top_p` cannot both be specified for this model. Please use only one."),
        ("temperature", "`temperature` is deprecated for this model."),
    ],
)
def test_a_field_that_a_model_refuses_is_left_out_and_said_once(
    server: Misbehaving, field: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def script(connection: Connection) -> None:
        refused = field in connection.body
        error = {"error": {"message": message}}
        connection.reply(error, status="400 Bad Request") if refused else connection.reply(turn("chat", "42"))

    server.script = script
    generation = {"temperature": 0.5} if field == "top_p" else {}
    agent = Agent.from_server(server.url, model="served", generation=generation)
    assert [agent.run(PHOTO, "What?").text for _ in range(2)] == ["42", "42"]
    assert [field in one.body for one in server.requests] == [True, False, False]
    assert sum(field in record.getMessage() for record in caplog.records if record.name.endswith("chat_client")) == 1
    given = Agent.from_server(server.url, model="served", extra_body={field: 1})
    assert given.run(PHOTO, "What?").status == "error", "a field of the user's own is never left out"


def test_flags_choose_the_api_and_the_form_of_calls(server: Misbehaving, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "a.png")
    play(server, turn("responses", "", call(0)), turn("responses", "42"))
    argv = ["ask", str(tmp_path / "a.png"), "What?", "--server", server.url, "--model", "served", "-q"]
    flags = ["--api", "responses", "--tools", "native", "--header", "api-version: 2026-01-01"]
    assert main([*argv, *flags]) == 0
    assert [one.head.split()[1] for one in server.requests] == ["/v1/responses"] * 2
    assert "api-version: 2026-01-01" in server.requests[0].head and server.requests[0].body["tools"]
    assert main([*argv, "--header", "no value"]) == 2
    assert main([*argv[:3], "--api", "chat"]) == 2


@pytest.mark.parametrize("protocol", ["plain", "nano", "mini_o3"])
def test_a_format_without_a_schema_has_no_native_calls(server: Misbehaving, protocol: str) -> None:
    with pytest.raises(ConfigError, match="--tools text"):
        ask(server, "chat", protocol=protocol)


def test_native_calls_need_a_server() -> None:
    with pytest.raises(ConfigError, match="--server"):
        Agent.from_pretrained("nano", tools="native", protocol="qwen3vl")


@each_case(
    ("url", "model", "api", "key", "native"),
    [
        ("https://api.openai.com/v1", "gpt-5-mini", "responses", "OPENAI_API_KEY", True),
        ("https://eu.api.openai.com/v1", "o4-mini", "responses", "OPENAI_API_KEY", True),
        ("https://fakeapi.openai.com.example/v1", "o4-mini", "chat", "OPENAI_API_KEY", True),
        ("https://api.anthropic.com/v1", "claude-sonnet-5", "chat", "ANTHROPIC_API_KEY", True),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-3-flash", "chat", "GEMINI_API_KEY", True),
        ("https://a.router/api/v1", "anthropic/claude-opus-4.8", "chat", "OPENAI_API_KEY", True),
        ("https://a.router/api/v1", "openai/gpt-oss-120b", "chat", "OPENAI_API_KEY", False),
        ("http://localhost:8000/v1", "Qwen/Qwen3-VL-4B-Instruct", "chat", "OPENAI_API_KEY", False),
        ("http://localhost:8000/v1", "my-model", "chat", "OPENAI_API_KEY", False),
    ],
)
def test_hosted_models_are_known_by_name_or_address(url: str, model: str, api: str, key: str, native: bool) -> None:
    found = connection(url, {})
    assert (found.api or "chat", found.key_variable or "OPENAI_API_KEY") == (api, key)
    assert connection(url, {"api": "chat"}).api == "chat"
    agent = Agent.from_server(url, model=model)
    assert agent.config.tools == ("native" if native else None)
    assert agent.backend.name == served_preset(url, model).source
    assert Agent.from_server(url, model=model, tools="text").config.tools == "text"


def test_an_unknown_model_with_native_calls_gets_a_format_with_a_schema() -> None:
    assert Agent.from_server("http://there/v1", model="my-model", tools="native").config.protocol == "qwen3vl"
    assert Agent.from_server("http://there/v1", model="deepeyes", tools="native").config.protocol == "deepeyes"


@pytest.mark.parametrize("api", APIS)
def test_own_tools_are_called_natively_and_their_images_zoomed_into(server: Misbehaving, api: str) -> None:
    calls = [
        call(0, {"degrees": 90}, name="rotate"),
        call(1, {"bbox_2d": [0, 500, 500, 1000], "label": "", "img_idx": 1}),
        call(2, "{}", name="read"),
    ]

    def read(image: Image.Image) -> str:
        """Read an image."""
        return f"{image.width} wide"

    play(server, *(turn(api, "", one) for one in calls), turn(api, "42"))
    answer = ask(server, api, own_tools=["rotate", read])
    assert (answer.text, answer.usage.tool_calls, answer.boxes) == ("42", 2, [(0, 0, 600, 450)])
    first, turned, zoomed, told = (one.body for one in server.requests)
    assert [(one.get("function") or one)["name"] for one in first["tools"]] == ["image_zoom_in_tool", "rotate", "read"]
    assert "rotate" not in json.dumps(first[{"chat": "messages", "responses": "input"}[api]])
    if api == "chat":
        result, shown = turned["messages"][-2:]
        assert result["tool_call_id"] == "call_0" and "img_idx 1" in result["content"]
        assert shown["content"][-1]["type"] == "image_url" and zoomed["messages"][-2]["tool_call_id"] == "call_1"
        assert told["messages"][-1]["content"] == "1200 wide"
    else:
        assert [part["type"] for part in turned["input"][-1]["output"]] == ["input_image", "input_text"]
        assert told["input"][-1]["output"] == [{"type": "input_text", "text": "1200 wide"}]
