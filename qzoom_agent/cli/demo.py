"""`qzoom demo`: three questions of rising difficulty, with the model that ships with the package.

The boards are drawn on the spot and belong to the test split: no training image has their pixels. The right answer is
shown beside the model's, right or wrong. Those of the default seed were chosen, because nano answers all three; another
`--seed` draws others, on which it errs at the rates of docs/nano.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.files import require_file, require_folder

STEPS: Final = {
    "needle-global": "the coarse view is enough",
    "needle-scene": "one zoom: the detail is too small in the coarse view",
    "needle-hop": "two zooms, which the model asks for: the first shows where the second has to look",
}

SEED: Final = 2
"""Chosen: nano is right on all three of its questions, and on two of those of seed 0."""


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(prog="qzoom demo", description="Three questions of rising difficulty.")
    flags.add_argument("--out", metavar="DIR", default="qzoom-demo", help="where boards and reports go")
    flags.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help=f"draws other boards (default: {SEED}, chosen for a whole success)",
    )
    add_agent_flags(flags)
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the demo; exit code 4 if the model failed on a question, 0 otherwise, right or wrong."""
    args = parser().parse_args(argv)
    console = Console()

    from qzoom_agent.cli.live import EXIT_CODES, follow, summary
    from qzoom_agent.errors import ConfigError
    from qzoom_agent.evaluation.scorers.match import exact_match
    from qzoom_agent.evaluation.tasks.needle import sample, sample_seed
    from qzoom_agent.report.episode import write_report
    from qzoom_agent.trace import by_digest

    if args.seed < 0:
        raise ConfigError(f"A seed is 0 or more; got {args.seed}.")
    out = require_folder(args.out)
    names = [f"{number}-{task.removeprefix('needle-')}" for number, task in enumerate(STEPS, start=1)]
    for name in names:
        require_file(out / f"{name}.png")
        require_file(out / f"{name}.html")
    agent = load_agent(args)
    code = 0
    for number, (name, (task, difficulty)) in enumerate(zip(names, STEPS.items(), strict=True), start=1):
        question = sample(task, sample_seed(args.seed, number))
        board = out / f"{name}.png"
        question.image.save(board)
        console.line(f"{number}. {question.question}", "bold")
        console.line(f"   {difficulty}", "dim")
        # The gold boxes are for the report only: neither default policy looks at them.
        # What needs several steps no single look can find: there the model asks for crops by itself.
        steps = task == "needle-hop" and read_config(args).policy is None
        asked = agent.replace(policy="explicit") if steps else agent
        events = asked.stream(question.image, question.question, boxes=question.boxes)
        answer = follow(events, console, area=question.image.width * question.image.height)
        right = exact_match(answer.text, question.answer)
        print(
            f"{printable(answer.text) or 'no answer'}  ({'right' if right else f'wrong, it is {question.answer}'})",
            flush=True,
        )
        if answer.trace.error:
            console.error(f"The model failed: {printable(answer.trace.error)}")
        console.line(summary(answer.trace), "dim")
        images = by_digest(answer.trace.views, answer.store.image)
        page = write_report(answer.trace, images, out / f"{name}.html", expected=question.answer)
        console.line(f"board {board}, report {page}\n")
        if answer.status == "error":
            code = EXIT_CODES["error"]
    console.line(f"Open the reports in {out} with a browser to see where the model looked.")
    return code
