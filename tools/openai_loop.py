"""Give the zoom tool to any model behind an OpenAI-compatible API, with nothing but its client.

    pip install openai
    OPENAI_API_KEY=... python tools/openai_loop.py receipt.jpg "What is the total?" --model gpt-5-mini
    python tools/openai_loop.py receipt.jpg "What is the total?" --model Qwen/Qwen3-VL-8B-Instruct --url http://localhost:8000/v1

A tool message of Chat Completions holds text alone, so a crop follows it in a user message.
"""

import argparse
import base64
import io
import json
from typing import Any

from pydantic import ValidationError

from qzoom_agent import Box, load_image
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom import Zoom, ZoomConfig, zoom_schema
from qzoom_agent.zoom.schema import ZoomArguments

MOST_CALLS = 8


def image_block(store: ViewStore, view: str) -> dict[str, Any]:
    """Return a view as an image block of Chat Completions."""
    png = io.BytesIO()
    store.image(view).save(png, format="PNG")
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def serve(store: ViewStore, zoom: Zoom, arguments: str) -> tuple[str, str | None]:
    """Return the text for the model and the id of the crop, if one was served."""
    try:
        asked = ZoomArguments.model_validate_json(arguments)
    except ValidationError as error:
        return f"The call could not be read: {error}", None
    x1, y1, x2, y2 = asked.bbox_2d
    result = zoom(store, Box(x1, y1, x2, y2, frame="per_mille", view=asked.view), label=asked.label)
    if result.view is None:
        return result.error or "", None
    return " ".join([f"View '{result.view.id}' is shown below.", *result.notes]), result.view.id


def answer(client: Any, model: str, *, image: Any, question: str) -> tuple[str, ViewStore]:
    """Ask `model` through `client` (an `openai.OpenAI`) until it answers; return the text and all views."""
    store, zoom = ViewStore(), Zoom(ZoomConfig(min_tokens=64, max_tokens=1024))
    store.add_original(load_image(image))
    store.add_coarse(factor=28, min_tokens=64, max_tokens=512)
    messages: list[Any] = [
        {"role": "user", "content": [image_block(store, "coarse"), {"type": "text", "text": question}]}
    ]
    for left in reversed(range(MOST_CALLS + 1)):
        tools = {"tools": [zoom_schema(frame="per_mille")]} if left else {}
        reply = client.chat.completions.create(model=model, messages=messages, **tools).choices[0].message
        if not reply.tool_calls:
            return reply.content or "", store
        messages.append(reply)
        crops = []
        for call in reply.tool_calls:
            text, crop = serve(store, zoom, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
            crops += [crop] if crop else []
        if crops:
            messages.append({"role": "user", "content": [image_block(store, crop) for crop in crops]})
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

    text, store = answer(OpenAI(base_url=given.url), given.model, image=given.image, question=given.question)
    print(text)
    print(json.dumps([view.box for view in store.views if view.kind == "crop"]))


if __name__ == "__main__":
    main()
