"""Give the zoom tool to a chat model of LangChain.

    pip install langchain langchain-openai
    OPENAI_API_KEY=... python tools/langchain_tool.py receipt.jpg "What is the total?" --model openai:gpt-5-mini

The model sees a coarse view and may zoom into the original as often as it likes. A crop comes back as an image block of
the tool message; a call that makes no sense comes back as text that says what would be legal.
"""

import argparse
import base64
import io
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from qzoom_agent import load_image
from qzoom_agent.views import ViewStore
from qzoom_agent.zoom import Zoom, ZoomConfig, as_langchain_tool

COARSE = {"factor": 28, "min_tokens": 64, "max_tokens": 256}
"""Budget of the coarse view in visual tokens, and the side of a token in pixels."""


def look(image: Any) -> ViewStore:
    """Return the views of one run: the original, and the coarse view that the model is shown."""
    store = ViewStore()
    store.add_original(load_image(image))
    store.add_coarse(**COARSE)
    return store


def build(model: BaseChatModel, store: ViewStore) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return a tool-calling loop of `model` with the zoom tool on the views of `store`."""
    tool = as_langchain_tool(Zoom(ZoomConfig(min_tokens=64, max_tokens=256)), store)
    bound = model.bind_tools([tool])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


def question(store: ViewStore, text: str) -> HumanMessage:
    """Return the user message: the coarse view and the question."""
    png = io.BytesIO()
    store.image("coarse").save(png, format="PNG")
    data = base64.b64encode(png.getvalue()).decode("ascii")
    return HumanMessage([{"type": "image", "base64": data, "mime_type": "image/png"}, {"type": "text", "text": text}])


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Give the zoom tool to a chat model of LangChain.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", required=True, help="as init_chat_model takes it, such as openai:gpt-5-mini")
    given = parser.parse_args()
    from langchain.chat_models import init_chat_model

    store = look(given.image)
    done = build(init_chat_model(given.model), store).invoke({"messages": [question(store, given.question)]})
    print(done["messages"][-1].text)
    print(f"{sum(view.kind == 'crop' for view in store.views)} crop(s)")


if __name__ == "__main__":
    main()
