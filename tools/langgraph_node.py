"""Ask the agent from a node of your own LangGraph graph.

    python tools/langgraph_node.py receipt.jpg "What is the total?"

The graph below answers at the default budgets, and once more with larger ones if a budget ended the first run. Pixels
stay out of the graph's state: it holds the path of the image, and the trace as JSON.
"""

import argparse
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from qzoom_agent import Agent


class State(TypedDict, total=False):
    """State of the graph: JSON only, so any checkpointer can store it."""

    image: str
    question: str
    answer: str
    status: str
    traces: list[dict[str, Any]]


def build(agent: Agent, patient: Agent) -> CompiledStateGraph[State, None, State, State]:
    """Return a graph that asks `agent`, and `patient` where a budget ended the first run."""

    def ask(state: State, who: Agent) -> State:
        answer = who.run(state["image"], state["question"])
        traces = [*state.get("traces", []), answer.trace.model_dump(mode="json")]
        return {"answer": answer.text, "status": answer.status, "traces": traces}

    graph = StateGraph(State)
    graph.add_node("look", lambda state: ask(state, agent))
    graph.add_node("look_longer", lambda state: ask(state, patient))
    graph.add_edge(START, "look")
    graph.add_conditional_edges("look", lambda state: "look_longer" if state["status"] == "budget" else END)
    graph.add_edge("look_longer", END)
    return graph.compile()


def main() -> None:
    """Answer one question from the command line."""
    parser = argparse.ArgumentParser(description="Ask the agent from a node of a LangGraph graph.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", default="nano", help="preset, folder or hub id (default: nano)")
    given = parser.parse_args()
    agent = Agent.from_pretrained(given.model, budget={"max_turns": 2})
    graph = build(agent, agent.replace(budget={"max_turns": 8}))
    done = graph.invoke({"image": given.image, "question": given.question})
    print(f"{done['answer']} ({done['status']} after {len(done['traces'])} run(s))")


if __name__ == "__main__":
    main()
