"""Give the zoom tool to an agent of smolagents.

    pip install "smolagents[openai]"
    OPENAI_API_KEY=... python tools/smolagents_tool.py receipt.jpg "What is the total?" --model gpt-5-mini
    python tools/smolagents_tool.py receipt.jpg "What is the total?" --model qwen --url http://localhost:8000/v1

A tool of smolagents tells the model a text alone, so a step callback adds each crop to the images of its step.
"""

import argparse
import os
from typing import Any

from smolagents import OpenAIModel, ToolCallingAgent

from qzoom_agent.integrations.frameworks import smolagents_tool
from qzoom_agent.zoom import ImageZoom


def answer(model: Any, zoom: ImageZoom, question: str) -> str:
    """Let a model of smolagents answer a question about an image that it may zoom into."""
    tool = smolagents_tool(zoom)
    agent = ToolCallingAgent(tools=[tool], model=model, step_callbacks=[tool.show], max_steps=8)
    return str(agent.run(question, images=[zoom.coarse]))


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to an agent of smolagents.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    parser.add_argument("--url", help="address of the API (default: OpenAI's)")
    given = parser.parse_args()
    zoom = ImageZoom(given.image)
    # A server of your own needs no key, but the client does.
    key = os.environ.get("OPENAI_API_KEY") or ("none" if given.url else None)
    print(answer(OpenAIModel(given.model, api_base=given.url, api_key=key), zoom, given.question))
    print(f"{len(zoom.crops)} crop(s)")


if __name__ == "__main__":
    main()
