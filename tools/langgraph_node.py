"""Ask the agent from a node of your own LangGraph graph, or serve that graph with LangGraph's server.

    python tools/langgraph_node.py receipt.jpg "What is the total?"
    cd tools && langgraph dev          # pip install "langgraph-cli[inmem]"; reads langgraph.json

The graph below answers at the default budgets, and once more with larger ones if a budget ended the first run. Pixels
stay out of the graph's state: it holds the path of the image, and the trace as JSON.
"""

import argparse
import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from qzoom_agent import Agent
from qzoom_agent.integrations.frameworks import as_node


class State(TypedDict, total=False):
    """State of the graph: JSON only, so any checkpointer can store it."""

    image: str
    question: str
    answer: str
    trace: dict[str, Any]


def build(
    agent: Agent | Callable[[], Agent], patient: Agent | Callable[[], Agent]
) -> CompiledStateGraph[State, None, State, State]:
    """Return a graph that asks `agent`, and `patient` where a budget ended the first run."""
    graph = StateGraph(State)
    graph.add_node("look", as_node(agent))
    graph.add_node("look_longer", as_node(patient))
    graph.add_edge(START, "look")
    graph.add_conditional_edges("look", lambda state: "look_longer" if state["trace"]["status"] == "budget" else END)
    graph.add_edge("look_longer", END)
    return graph.compile()


@cache
def load() -> Agent:
    """Return the agent of the model in the variable QZOOM_MODEL (default: nano)."""
    return Agent.from_pretrained(os.environ.get("QZOOM_MODEL", "nano"), budget={"max_turns": 2})


def make() -> CompiledStateGraph[State, None, State, State]:
    """Return the graph; `langgraph.json` names this. The model is loaded when it is first asked."""
    return build(load, lambda: load().replace(budget={"max_turns": 8}))


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Ask the agent from a node of a LangGraph graph.")
    parser.add_argument("image")
    parser.add_argument("question")
    given = parser.parse_args()
    done = make().invoke({"image": given.image, "question": given.question})
    print(f"{done['answer']} ({done['trace']['status']})")


if __name__ == "__main__":
    main()
