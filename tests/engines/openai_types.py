"""Check requests and replies against the types of the openai package; run by the Python of an environment with it.

Reads a JSON list of [kind, value] from stdin and prints the values that are not of their kind, or have unknown fields.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
)
from openai.types.responses import Response, ResponseInputItemParam, ResponseStreamEvent, ToolParam
from pydantic import TypeAdapter, ValidationError

KINDS: dict[str, Any] = {
    "messages": list[ChatCompletionMessageParam],
    "chat tools": list[ChatCompletionToolUnionParam],
    "chat reply": ChatCompletion,
    "chat chunk": ChatCompletionChunk,
    "input": list[ResponseInputItemParam],
    "responses tools": list[ToolParam],
    "responses reply": Response,
    "responses event": ResponseStreamEvent,
}


def plain(value: Any) -> Any:
    """Return validated parameters as JSON; what pydantic validates lazily is validated here."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


for kind, value in json.load(sys.stdin):
    try:
        found = TypeAdapter(KINDS[kind]).validate_python(value)
        if isinstance(found, list) and plain(found) != value:
            print(f"{kind}: unknown fields: {json.dumps(value)[:2000]} became {json.dumps(plain(found))[:2000]}")
    except ValidationError as error:
        print(f"{kind}: {error}")
