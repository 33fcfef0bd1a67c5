"""A conversation in the form of a server's API: messages of Chat Completions, or items of Responses.

A turn with native tool calls is sent again as its server wrote it, and each call gets the messages that answer it, by
its id. Chat Completions takes no image in a tool's result, so images follow in the next user turn; Responses takes them
in the output of the function. All other turns are text and images: role "tool" is sent as "user", and consecutive turns
of one role as one. What was sent is never changed by a later turn, so that a server finds it in its prefix cache.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

from qzoom_agent.messages import Message, Part, plain_text

Api = Literal["chat", "responses"]
Json = dict[str, Any]
Encode = Callable[[str], Json]
"""Returns a view as an image part of Chat Completions, by its id."""

_SHOWN_NEXT: Final = "The image follows in the next message."
_NO_RESULT: Final = "This call was not run."


def chat_messages(messages: Sequence[Message], image: Encode) -> list[Json]:
    """Return the messages of a request to Chat Completions."""
    turns: list[Json] = []

    def add(role: str, content: list[Json]) -> None:
        if content and turns and turns[-1]["role"] == role and "tool_calls" not in turns[-1]:
            turns[-1]["content"] += content
        elif content:  # an empty reply, which servers refuse to be shown, is left out
            turns.append({"role": role, "content": content})

    def part(one: Part) -> Json:
        return {"type": "text", "text": one["text"]} if one["type"] == "text" else image(one["view"])

    for message, answers in _exchanges(messages):
        if not answers:
            role = "user" if message["role"] == "tool" else message["role"]
            add(role, [part(one) for one in message["content"]])
            continue
        calls = [item for item in message["items"] if item["type"] == "function_call"]
        text = "".join(item["text"] for item in message["items"] if item["type"] == "message")
        said: Json = {"content": [{"type": "text", "text": text}]} if text else {}
        turns.append({"role": "assistant", **said, "tool_calls": [_tool_call(item) for item in calls]})
        for id, parts in answers.items():
            views = any(one["type"] == "image" for one in parts)
            words = [plain_text({"role": "tool", "content": parts}).strip(), _SHOWN_NEXT if views else ""]
            turns.append({"role": "tool", "tool_call_id": id, "content": " ".join(filter(None, words)) or _NO_RESULT})
        for id, parts in answers.items():
            shown = [part(one) for one in parts if one["type"] == "image"]
            add("user", [{"type": "text", "text": f"Result of call {id}:"}, *shown] if shown else [])
    return turns


def response_items(messages: Sequence[Message], image: Encode) -> list[Json]:
    """Return the input items of a request to Responses."""
    items: list[Json] = []

    def part(one: Part) -> Json:
        if one["type"] == "text":
            return {"type": "input_text", "text": one["text"]}
        # in full: the view has the size that the model is meant to see
        return {"type": "input_image", "image_url": image(one["view"])["image_url"]["url"], "detail": "high"}

    for message, answers in _exchanges(messages):
        role = "user" if message["role"] == "tool" else message["role"]
        for item in message.get("items", ()):
            if item["type"] == "message":
                said = {key: item[key] for key in ("phase",) if key in item}
                items.append({"role": "assistant", "content": item["text"], **said})
            elif item["type"] == "function_call":
                known = {key: item[key] for key in ("type", "call_id", "name")}
                items.append({**known, "arguments": _object(item["arguments"])})
            else:
                items.append(item)
        for id, parts in answers.items():
            output = [part(one) for one in parts] or _NO_RESULT
            items.append({"type": "function_call_output", "call_id": id, "output": output})
        if answers or not message["content"]:
            continue
        if role == "assistant":
            items.append({"role": role, "content": plain_text(message)})
        elif items and items[-1].get("role") == role:
            items[-1]["content"] += [part(one) for one in message["content"]]
        else:
            items.append({"role": role, "content": [part(one) for one in message["content"]]})
    return items


def _exchanges(messages: Sequence[Message]) -> Iterator[tuple[Message, dict[str, list[Part]]]]:
    """Yield each message that answers no native call, and, if it has such calls, the answer to each, by its id.

    A call that no message names is answered by those for the others: the problems of calls that could not be read.
    """
    taken = 0
    for at, message in enumerate(messages):
        if at < taken:
            continue
        taken, answers = at + 1, dict[str, list[Part]]()
        ids = [item["call_id"] for item in message.get("items", ()) if item["type"] == "function_call"]
        answering = []
        if ids:
            rest = messages[taken:]
            count = next((index for index, one in enumerate(rest) if "call" not in one), len(rest))
            answering, taken = list(rest[:count]), taken + count
        named = {one["call"] for one in answering}
        source = {id: id if id in named else "" for id in ids}
        for id, call in source.items():
            parts = [part for one in answering if one["call"] == call for part in one["content"]]
            answers[id] = parts if call else [part for part in parts if part["type"] == "text"]  # no crop of another
        yield message, answers
        for one in answering:
            if one["call"] not in source.values():  # about a call in the text
                yield one, {}


def _tool_call(item: Json) -> Json:
    function = {"name": item["name"], "arguments": _object(item["arguments"])}
    more = {"extra_content": item["extra_content"]} if "extra_content" in item else {}
    return {"id": item["call_id"], "type": "function", "function": function, **more}


def _object(arguments: str) -> str:
    """Return the arguments of a call as they were written, or in an object if they are none: servers parse them."""
    try:
        valid = isinstance(json.loads(arguments, parse_constant=int), dict)  # int("NaN") fails: it is no JSON
    except (ValueError, RecursionError):
        valid = False
    return arguments if valid else json.dumps({"INVALID_JSON": arguments})


def schemas(tools: Sequence[str], api: Api) -> list[Json]:
    """Return the tools of a request; Responses has the function's fields beside the type."""
    found: list[Json] = [json.loads(tool) for tool in tools]
    return found if api == "chat" else [{"type": "function", "strict": False, **one["function"]} for one in found]
