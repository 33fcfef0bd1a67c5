"""Give the zoom tool to an agent of LangChain.

    pip install langchain langchain-openai
    OPENAI_API_KEY=... python tools/langchain_tool.py receipt.jpg "What is the total?" --model openai:gpt-5-mini

The model sees a coarse view and may zoom into the original as often as it likes. A crop comes back as an image block of
the tool message; a call that makes no sense comes back as text that says what would be legal.
"""

import argparse
from typing import Any

from langchain.agents import create_agent

from qzoom_agent.integrations.frameworks import langchain_message, langchain_tool
from qzoom_agent.zoom import ImageZoom


def answer(model: Any, zoom: ImageZoom, question: str) -> str:
    """Let a chat model, or one by name, answer a question about an image that it may zoom into."""
    agent = create_agent(model, tools=[langchain_tool(zoom)])
    done = agent.invoke({"messages": [langchain_message(zoom, question)]})
    return str(done["messages"][-1].text)


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to an agent of LangChain.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="as init_chat_model takes it, such as openai:gpt-5-mini")
    given = parser.parse_args()
    zoom = ImageZoom(given.image)
    print(answer(given.model, zoom, given.question))
    print(f"{len(zoom.crops)} crop(s)")


if __name__ == "__main__":
    main()
