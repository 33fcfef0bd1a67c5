"""How a reply of a server ends: in pieces that name no end, given up, filtered, repeated whole, with commentary."""

from __future__ import annotations

from typing import Any

import pytest

from qzoom_agent.models.chat_messages import chat_messages
from qzoom_agent.models.chat_reply import CompletionReader, ReplyReader, ResponseReader, UnusableReply
from qzoom_agent.models.server import _call


def chunk(finish: str | None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def read(reader: ReplyReader, *values: Any) -> ReplyReader:
    for value in values:
        reader.take(value)
    return reader


@pytest.mark.parametrize("none", ["", "null", None])
def test_a_piece_without_a_reason_does_not_finish_a_reply(none: str | None) -> None:
    reader = read(CompletionReader(), chunk(none, content="The total is "))
    assert reader.finish is None
    assert read(reader, chunk(none, content="42"), chunk("stop")).completion().text == "The total is 42"


@pytest.mark.parametrize("reason", ["abort", "error", "insufficient_system_resource"])
def test_a_reply_that_the_server_gave_up_is_asked_for_again(reason: str) -> None:
    with pytest.raises(UnusableReply, match=reason) as told:
        read(CompletionReader(), chunk(reason, content="The total is 1")).completion()
    assert told.value.again


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_response_that_failed_without_an_error_is_no_answer(status: str) -> None:
    said = {"type": "message", "content": [{"type": "output_text", "text": "The total is 1"}]}
    with pytest.raises(UnusableReply, match=status):
        read(ResponseReader(), {"status": status, "output": [said]}).completion()


def test_a_filter_of_another_name_withholds_the_answer() -> None:
    assert read(CompletionReader(), chunk("SAFETY", content="Th")).completion().withheld == "safety"


def test_a_whole_message_after_its_pieces_is_not_said_twice() -> None:
    whole = {"choices": [{"message": {"content": "Total: 42"}, "finish_reason": "stop"}]}
    assert read(CompletionReader(), chunk(None, content="Total: 42"), whole).completion().text == "Total: 42"
    assert read(CompletionReader(), whole).completion().text == "Total: 42"


def message(text: str, phase: str | None) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    return item if phase is None else {**item, "phase": phase}


@pytest.mark.parametrize("streamed", [False, True])
def test_commentary_is_no_part_of_the_answer(streamed: bool) -> None:
    def found(*items: dict[str, Any]) -> Any:
        reader = ResponseReader()
        for place, item in enumerate(items if streamed else ()):
            reader.take({"type": "response.output_item.added", "output_index": place, "item": {**item, "content": []}})
            delta = item["content"][0]["text"]
            reader.take({"type": "response.output_text.delta", "output_index": place, "delta": delta})
        whole = {"status": "completed", "output": list(items)}
        return read(reader, {"type": "response.completed", "response": whole} if streamed else whole).completion()

    both = found(message("Checking row 3.", "commentary"), message("42", "final_answer"))
    assert (both.text, both.reasoning) == ("42", "Checking row 3.")
    assert found(message("one", None), message("two", None)).text == "one\ntwo"
    assert found(message("Only this.", "commentary")).text == "Only this."


def test_a_place_that_is_no_number_breaks_nothing() -> None:
    delta = {"type": "response.output_text.delta", "output_index": [1], "delta": "42"}
    whole = {"status": "completed", "output": [message("42", None)]}
    assert read(ResponseReader(), delta, whole).completion().text == "42"


def test_a_tag_in_an_argument_is_no_mark_and_a_call_without_a_result_gets_no_crop() -> None:
    call = {"call_id": "a", "name": "zoom", "arguments": '{"label": "the <img> tag"}'}
    assert "<img>" not in _call(call, "qwen3vl") and "\\u003cimg>" in _call(call, "qwen3vl")
    items = [{"type": "function_call", "call_id": id, "name": "zoom", "arguments": "{}"} for id in ("a", "b")]
    shown = [{"type": "text", "text": "No."}, {"type": "image", "view": "crop1"}]
    talk: Any = [
        {"role": "assistant", "content": [], "items": items},
        {"role": "user", "content": shown, "call": "a"},
        {"role": "user", "content": shown, "call": ""},
    ]
    sent = chat_messages(talk, lambda view: {"type": "image_url", "image_url": {"url": view}})
    assert [one["content"] for one in sent if one["role"] == "tool"][1] == "No."
    pictures = [part for one in sent for part in one.get("content") or () if isinstance(part, dict)]
    assert sum(part["type"] == "image_url" for part in pictures) == 1
