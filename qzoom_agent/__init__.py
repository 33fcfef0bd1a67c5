"""Thinking with images: zoom tools, learned perception and a LangGraph loop.

    from qzoom_agent import Agent
    print(Agent.from_pretrained("nano").run("board.png", "What is printed on the red star?"))

The public names are loaded at first use: `import qzoom_agent` loads neither torch nor transformers nor langgraph.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qzoom_agent import moved

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent
    from qzoom_agent.answer import Answer
    from qzoom_agent.config import AgentConfig
    from qzoom_agent.evaluation.table_run import run_table
    from qzoom_agent.geometry import Box
    from qzoom_agent.images import load_image
    from qzoom_agent.trace import Trace

__version__ = "0.2.0"
__all__ = ["Agent", "AgentConfig", "Answer", "Box", "Trace", "__version__", "load_image", "run_table"]

_HOME = {
    "Agent": "qzoom_agent.agent",
    "AgentConfig": "qzoom_agent.config",
    "Answer": "qzoom_agent.answer",
    "Box": "qzoom_agent.geometry",
    "Trace": "qzoom_agent.trace",
    "load_image": "qzoom_agent.images",
    "run_table": "qzoom_agent.evaluation.table_run",
}


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qzoom_agent' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
