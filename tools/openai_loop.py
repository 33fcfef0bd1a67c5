"""Give the zoom tool to any model behind an OpenAI-compatible API, with nothing but its client.

    pip install openai
    OPENAI_API_KEY=... python tools/openai_loop.py receipt.jpg "What is the total?" --model gpt-5-mini
    python tools/openai_loop.py receipt.jpg "What is the total?" --model Qwen/Qwen3-VL-8B-Instruct --url http://localhost:8000/v1

A tool message of Chat Completions holds text alone, so a crop follows it in a user message.
"""

import argparse
import os
from typing import Any

from qzoom_agent.zoom import ImageZoom

MOST_CALLS = 8


def shown(url: str) -> dict[str, Any]:
    """Return an image block of Chat Completions."""
    return {"type": "image_url", "image_url": {"url": url}}


def answer(client: Any, model: str, zoom: ImageZoom, question: str) -> str:
    """Ask `model` through `client` (an `openai.OpenAI`) until it answers."""
    messages: list[Any] = [{"role": "user", "content": [shown(zoom.url), {"type": "text", "text": question}]}]
    for left in reversed(range(MOST_CALLS + 1)):
        tools = {"tools": [zoom.schema]} if left else {}
        reply = client.chat.completions.create(model=model, messages=messages, **tools).choices[0].message
        if not reply.tool_calls:
            return reply.content or ""
        messages.append(reply)
        results = [(call.id, zoom(call.function.arguments)) for call in reply.tool_calls]
        messages += [{"role": "tool", "tool_call_id": id, "content": result.text} for id, result in results]
        crops = [shown(result.url) for _, result in results if result.url]
        if crops:
            messages.append({"role": "user", "content": crops})
    raise AssertionError("the last request offers no tool, so it ends the loop")


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to a model behind an OpenAI-compatible API.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", help="address of the API (default: OpenAI's)")
    given = parser.parse_args()
    from openai import OpenAI

    zoom = ImageZoom(given.image)
    # A server of your own needs no key, but the client does.
    key = os.environ.get("OPENAI_API_KEY") or ("none" if given.url else None)
    print(answer(OpenAI(base_url=given.url, api_key=key), given.model, zoom, given.question))
    print([view.box for view in zoom.crops])


if __name__ == "__main__":
    main()
