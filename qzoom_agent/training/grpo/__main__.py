"""`accelerate launch -m qzoom_agent.training.grpo`: the command, for many processes."""

import sys

from qzoom_agent.errors import finished
from qzoom_agent.training.grpo.launch import main

if __name__ == "__main__":
    sys.exit(finished("qzoom train grpo", main))
