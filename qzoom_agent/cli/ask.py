"""`qzoom ask IMAGE QUESTION`: one run, its steps on stderr as they happen, the answer on stdout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.files import require_file, require_folder


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(
        prog="qzoom ask",
        description="Answer one question about one image. Exit code 0: answered, 2: wrong usage, "
        "3: a budget ended the run, 4: the model failed.",
    )
    flags.add_argument("image", help="path of an image, or a data URI")
    flags.add_argument("question")
    flags.add_argument("--report", metavar="FILE", help="write one HTML page that shows where the model looked")
    flags.add_argument("--save", metavar="DIR", help="save the run: trace.json, its images, config.yaml")
    flags.add_argument("--json", action="store_true", help="print the whole trace as JSON instead of the answer")
    loud = flags.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="show what the model writes")
    loud.add_argument("-q", "--quiet", action="store_true", help="show the answer only")
    add_agent_flags(flags)
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code that the run's status stands for."""
    args = parser().parse_args(argv)
    console = Console(verbosity=args.verbose - args.quiet)

    from qzoom_agent.cli.live import EXIT_CODES, follow, summary
    from qzoom_agent.images import load_image

    image = load_image(args.image, max_pixels=read_config(args).max_pixels)
    if args.save:
        require_folder(args.save)
    if args.report:
        require_file(args.report)
    agent = load_agent(args)
    placement = str(getattr(agent.backend, "placement", ""))
    if placement:
        console.line(f"model   {agent.backend.name} on {placement}", "dim", level=1)
    answer = follow(agent.stream(image, args.question), console, area=image.width * image.height)
    trace = answer.trace
    if args.json:
        print(trace.model_dump_json(indent=1))
    elif answer.text:
        print("\n".join(printable(line) for line in answer.text.splitlines()), flush=True)
    if trace.error:
        console.error(f"The model failed: {printable(trace.error)}")
    elif not answer.text:
        console.error("There is no answer.")
    console.line(summary(trace), "dim" if trace.status == "answered" else "yellow")
    if args.save:
        console.line(f"saved   {answer.save(args.save)}")
    if args.report:
        console.line(f"report  {answer.report(args.report)}")
    return EXIT_CODES[trace.status]
