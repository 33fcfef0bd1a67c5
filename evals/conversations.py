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

DEMO = resources.files("qzoom_agent.data") / "demo"
ASKED = {
    "nano": (
        "2-scene.png",
        {
            "the region was shown before": "what is the code on the orange circle?",
            "the coarse view suffices": "how many shapes are there?",
            "a new region": "what is the code on the blue star?",
        },
    ),
    "nano-paper": (
        "4-receipt.jpg",
        {"the region was shown before": "what is the total?", "a new region": "what is the date?"},
    ),
}
"""Image, and second questions by what they need. The first of them is also asked first."""


def milliseconds(agent: Agent, image: str, first: str, second: str, *, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a run, and of the same question as the second of a conversation."""
    alone, further = [], []
    for _ in range(repeats):
        began = process_time()
        agent.run(image, second)
        alone.append(process_time() - began)
        with agent.chat(image) as chat:
            chat.ask(first)
            began = process_time()
            chat.ask(second)
            further.append(process_time() - began)
    return 1e3 * median(alone), 1e3 * median(further)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that the command names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "pairs"))
    parser.add_argument("--model", default="nano", choices=ASKED)
    parser.add_argument("--policy", action="append", help="may be repeated (default: implicit and explicit)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the agent")
    args = parser.parse_args(argv)
    changes = dict(one.split("=", 1) for one in args.set)
    for policy in args.policy or ["implicit", "explicit"]:
        agent = Agent.from_pretrained(args.model, policy=policy, check=False, **changes)
        if args.what == "time":
            name, questions = ASKED[args.model]
            first, *_ = questions.values()
            for needs, question in questions.items():
                run, again = milliseconds(agent, str(DEMO / name), first, question, repeats=args.repeats)
                print(f"{policy}, {needs}: {run:.1f} ms a run, {again:.1f} ms asked again, {again / run:.2f}")
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
