"""Replies of Chat Completions and Responses, whole and as the events of a stream, by the openai package's types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.models.misbehaving import Connection, Script

BOXES = ([100, 100, 300, 300], [600, 600, 900, 900])
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed", "status": "completed"}


def call(number: int, arguments: Any = None, **more: Any) -> dict[str, Any]:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {"bbox_2d": BOXES[number]})
    return {"id": f"call_{number}", "name": "image_zoom_in_tool", "arguments": written, **more}


def turn(api: str, text: str = "", *calls: dict[str, Any], cut: bool = False, thought: bool = False) -> dict[str, Any]:
    """Return a whole reply of a server."""
    return _completion(text, *calls, cut=cut) if api == "chat" else _response(text, *calls, cut=cut, thought=thought)


def _completion(text: str, *calls: dict[str, Any], cut: bool) -> dict[str, Any]:
    functions = [
        {"id": one["id"], "type": "function", "function": {key: one[key] for key in ("name", "arguments")}}
        | {key: one[key] for key in ("extra_content",) if key in one}
        for one in calls
    ]
    message = {"role": "assistant", "content": text or None, "refusal": None}
    message |= {"tool_calls": functions} if calls else {}
    details = {"cached_tokens": 20, "audio_tokens": 0}
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34, "prompt_tokens_details": details}
    finish = "length" if cut else "tool_calls" if calls else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "served"}
    return {**head, "choices": [choice], "usage": usage}


def _response(text: str, *calls: dict[str, Any], cut: bool, thought: bool) -> dict[str, Any]:
    output: list[dict[str, Any]] = [REASONING] if thought else []
    if text:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        output.append({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]})
    for one in calls:
        known = {"call_id": one["id"], "name": one["name"], "arguments": one["arguments"]}
        output.append({"type": "function_call", "id": f"fc_{one['id']}", "status": "completed", **known})
    read = {"cached_tokens": 20, "cache_write_tokens": 0}
    usage = {"input_tokens": 30, "output_tokens": 4, "total_tokens": 34, "input_tokens_details": read}
    usage["output_tokens_details"] = {"reasoning_tokens": 0}
    status: dict[str, Any] = {"status": "completed", "incomplete_details": None}
    if cut:
        status = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    head = {"id": "resp_1", "object": "response", "created_at": 1.0, "model": "served", "error": None}
    settings = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "instructions": None, "metadata": {}}
    return {**head, **settings, "output": output, "usage": usage, **status}


def events(api: str, reply: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events that a whole reply is streamed as, texts and arguments in pieces of three characters."""
    return list(_chunks(reply) if api == "chat" else _response_events(reply))


def _pieces(text: str) -> list[str]:
    return [text[at : at + 3] for at in range(0, len(text), 3)]


def _chunks(reply: dict[str, Any]) -> Iterator[dict[str, Any]]:
    head = {"id": reply["id"], "object": "chat.completion.chunk", "created": 1, "model": "served"}
    choice = reply["choices"][0]
    message = choice["message"]
    parts: list[dict[str, Any]] = [{"role": "assistant"}]
    parts += [{"content": piece} for piece in _pieces(message["content"] or "")]
    for index, one in enumerate(message.get("tool_calls", ())):
        named = {"name": one["function"]["name"], "arguments": ""}
        parts.append({"tool_calls": [{**one, "index": index, "function": named}]})
        for piece in _pieces(one["function"]["arguments"]):
            parts.append({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    for part in parts:
        yield {**head, "choices": [{"index": 0, "delta": part, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    yield {**head, "choices": [], "usage": reply["usage"]}


def _response_events(reply: dict[str, Any]) -> Iterator[dict[str, Any]]:
    begun = {**reply, "output": [], "usage": None, "status": "in_progress", "incomplete_details": None}
    found: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(reply["output"]):
        place = {"output_index": index}
        found.append({"type": "response.output_item.added", "item": {**item, "status": "in_progress"}, **place})
        place["item_id"] = item["id"]
        for piece in _pieces(item["content"][0]["text"] if item["type"] == "message" else ""):
            more = {"delta": piece, "content_index": 0, "logprobs": []}
            found.append({"type": "response.output_text.delta", **more, **place})
        for piece in _pieces(item.get("arguments", "")):
            found.append({"type": "response.function_call_arguments.delta", "delta": piece, **place})
        found.append({"type": "response.output_item.done", "item": item, "output_index": index})
    found.append({"type": f"response.{reply['status']}", "response": reply})
    for number, one in enumerate(found):
        yield {**one, "sequence_number": number}


def replay(*replies: dict[str, Any]) -> Script:
    """Play these replies of `turn` in their order, then the last again, whole or streamed."""

    def script(connection: Connection) -> None:
        reply = replies[min(len(connection.server.requests), len(replies)) - 1]
        if not connection.body.get("stream"):
            connection.reply(reply)
        elif reply.get("object") == "response":
            told = (f"event: {one['type']}\ndata: {json.dumps(one)}\n\n" for one in events("responses", reply))
            connection.stream(*told, end="")
        else:
            connection.stream(*events("chat", reply))

    return script
