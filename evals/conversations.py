"""Measure what a further question of a conversation costs, and what a second image does to accuracy.

    python evals/conversations.py time --repeats 30
    python evals/conversations.py pairs --n 200 --policy implicit

`time` asks a question as a run of its own and as the second question of a conversation, in turn in one process, and
compares medians of processor time, which other processes do not lengthen. `pairs` asks each question of needle-pair
about both boards, and about the board that it is about alone.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import resources
from statistics import median
from time import process_time

import numpy as np

from qzoom_agent import Agent
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.stats import figure, paired
from qzoom_agent.evaluation.tasks.needle.tasks import NEEDLE_PAIR

BOARD = str(resources.files("qzoom_agent.data") / "demo" / "2-scene.png")
FIRST = "what is the code on the orange circle?"
SECOND = {
    "the coarse view suffices": "how many shapes are there?",
    "the region was shown before": FIRST,
    "a new region": "what is the code on the blue star?",
}
"""Second questions, by what they need."""


def milliseconds(agent: Agent, question: str, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a run, and of the same question as the second of a conversation."""
    runs, seconds = [], []
    for _ in range(repeats):
        began = process_time()
        agent.run(BOARD, question)
        runs.append(process_time() - began)
        with agent.chat(BOARD) as chat:
            chat.ask(FIRST)
            began = process_time()
            chat.ask(question)
            seconds.append(process_time() - began)
    return 1e3 * median(runs), 1e3 * median(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "pairs"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--policy", action="append", help="may be repeated (default: implicit and explicit)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the agent")
    args = parser.parse_args(argv)
    changes = dict(one.split("=", 1) for one in args.set)
    for policy in args.policy or ["implicit", "explicit"]:
        agent = Agent.from_pretrained(args.model, policy=policy, check=False, **changes)
        if args.what == "time":
            for needs, question in SECOND.items():
                run, second = milliseconds(agent, question, args.repeats)
                print(f"{policy}, {needs}: {run:.1f} ms a run, {second:.1f} ms asked again, {second / run:.2f}")
            continue
        samples = list(NEEDLE_PAIR.load(TaskSource(n=args.n)))
        both = [float(agent.run(one.images, one.question).text == one.answer) for one in samples]
        alone = [
            float(agent.run(one.images[int(str(one.meta["board"]))], one.question).text == one.answer)
            for one in samples
        ]
        kinds = np.array([one.kind for one in samples])
        found = paired(alone, both)
        print(f"{policy}, n = {len(samples)}: both {figure(both)}, alone {figure(alone)}, difference {found}")
        for kind in sorted(set(kinds)):
            at = np.flatnonzero(kinds == kind)
            print(
                f"  {kind} ({len(at)}): {np.mean([both[i] for i in at]):.3f} of {np.mean([alone[i] for i in at]):.3f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
