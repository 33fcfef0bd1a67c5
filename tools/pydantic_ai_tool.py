"""Give the zoom tool to an agent of pydantic-ai.

    pip install "pydantic-ai-slim[openai]"
    OPENAI_API_KEY=... python tools/pydantic_ai_tool.py receipt.jpg "What is the total?" --model openai:gpt-5-mini

A crop is returned as binary content; pydantic-ai puts it into the tool's result where the model's API takes images
there, and into the following user message elsewhere.
"""

import argparse
from typing import Any

from pydantic_ai import Agent, BinaryContent

from qzoom_agent.integrations.frameworks import pydantic_ai_tool
from qzoom_agent.zoom import ImageZoom
from qzoom_agent.zoom.image_zoom import png


def answer(model: Any, zoom: ImageZoom, question: str) -> str:
    """Let a model of pydantic-ai answer a question about an image that it may zoom into."""
    agent = Agent(model, tools=[pydantic_ai_tool(zoom)])
    return str(agent.run_sync([BinaryContent(png(zoom.coarse), media_type="image/png"), question]).output)


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to an agent of pydantic-ai.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="as pydantic-ai names it, such as openai:gpt-5-mini")
    given = parser.parse_args()
    zoom = ImageZoom(given.image)
    print(answer(given.model, zoom, given.question))
    print(f"{len(zoom.crops)} crop(s)")


if __name__ == "__main__":
    main()
