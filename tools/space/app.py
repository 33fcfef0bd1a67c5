"""The page of `qzoom web` as a Hugging Face Space: copy this folder into one, or run `python tools/space/app.py`.

The variable QZOOM_MODEL names another model than nano: a preset or a hub id, for which the Space needs a GPU.
"""

from __future__ import annotations

import os
import sys

import uvicorn

from qzoom_agent import Agent
from qzoom_agent.errors import finished
from qzoom_agent.integrations.web.handlers import create_app


def main() -> int:
    """Serve the page at the port that Spaces expect."""
    agent = Agent.from_pretrained(os.environ.get("QZOOM_MODEL", "nano"))
    uvicorn.run(create_app(agent), host="0.0.0.0", port=int(os.environ.get("PORT", "7860")), log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(finished("app.py", main))
