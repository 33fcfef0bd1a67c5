"""What the loop itself costs a step: scripted replies, no model, no checkpointer.

    python -m qzoom_agent.evals.overhead

Prints the median milliseconds a step (a node of the graph) over many episodes of four zooms, the crops' resizing and
hashing included, since every backend pays for them.
"""

import sys
from statistics import median, quantiles
from time import perf_counter

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.backends.scripted import ScriptedBackend
from qzoom_agent.messages import Message

EPISODES = 200
_REPLIES = (*(f"<zoom><loc_{x}><loc_28><loc_{x + 84}><loc_112></zoom>" for x in (0, 28, 56, 84)), "done")
STEPS = 2 + len(_REPLIES) + len(_REPLIES) - 1
"""perceive and finish, one think a reply, one act a call."""


def milliseconds_a_step(episodes: int = EPISODES) -> list[float]:
    """The mean milliseconds a step of each episode."""

    def reply(messages: list[Message]) -> str:
        return _REPLIES[sum(message["role"] == "assistant" for message in messages)]

    agent = Agent(ScriptedBackend(reply))
    image = Image.effect_mandelbrot((700, 660), (-2.0, -1.5, 1.0, 1.5), 40).convert("RGB")
    agent.run(image, "warm up")
    times = []
    for _ in range(episodes):
        began = perf_counter()
        answer = agent.run(image, "what is there?")
        times.append(1000 * (perf_counter() - began) / STEPS)
        assert answer.text == "done" and len(answer.trace.turns) == len(_REPLIES)
    return times


def main() -> int:
    times = milliseconds_a_step()
    low, _, high = quantiles(times, n=4)
    print(f"{median(times):.2f} ms a step (quartiles {low:.2f} to {high:.2f}; {len(times)} episodes of {STEPS} steps)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
