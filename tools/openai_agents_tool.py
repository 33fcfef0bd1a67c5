"""Give the zoom tool to an agent of the OpenAI Agents SDK.

    pip install openai-agents
    OPENAI_API_KEY=... python tools/openai_agents_tool.py receipt.jpg "What is the total?" --model gpt-5-mini

The Responses API takes an image as output of a function, and this SDK sends it there. Chat Completions takes none, so
use a model behind the Responses API (vLLM serves it, too).
"""

import argparse
from typing import Any

from agents import Agent, Runner

from qzoom_agent.integrations.frameworks import openai_agents_tool
from qzoom_agent.zoom import ImageZoom


def question_with(zoom: ImageZoom, text: str) -> list[Any]:
    """Return the input of a run: the coarse view and the question."""
    image = {"type": "input_image", "image_url": zoom.url, "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


def answer(model: Any, zoom: ImageZoom, question: str) -> str:
    """Let a model of the SDK, or one of OpenAI's by name, answer a question about an image that it may zoom into."""
    agent = Agent(name="reader", model=model, tools=[openai_agents_tool(zoom)])
    return str(Runner.run_sync(agent, question_with(zoom, question), max_turns=10).final_output)


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to an agent of the OpenAI Agents SDK.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    zoom = ImageZoom(given.image)
    print(answer(given.model, zoom, given.question))
    print(f"{len(zoom.crops)} crop(s)")


if __name__ == "__main__":
    main()
