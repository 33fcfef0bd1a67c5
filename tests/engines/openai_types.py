"""Check requests and replies against the types of the openai package; run by the Python of an environment with it.

Reads a JSON list of [kind, value] from stdin and prints the values that are not of their kind, or have unknown fields.
"""

import json
import sys
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


for name, module in list(sys.modules.items()):
    if name.startswith("openai.types") and hasattr(module, "Iterable"):
        module.Iterable = list  # type: ignore[attr-defined]  # pydantic checks an Iterable only when it is read
for kind, value in json.load(sys.stdin):
    try:
        found = TypeAdapter(KINDS[kind]).validate_python(value)
        if isinstance(found, list) and found != value:
            print(f"{kind}: unknown fields: {json.dumps(value)[:2000]} became {str(found)[:2000]}")
    except ValidationError as error:
        print(f"{kind}: {error}")
