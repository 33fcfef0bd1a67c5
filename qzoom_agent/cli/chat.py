"""`qzoom chat IMAGE` answers questions about one image, one after another, and keeps what it has computed and shown.

Questions are read from the terminal or, one a line, from stdin; an empty line or the end of the input ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from qzoom_agent.cli.ask import EXIT_CODES, add_output_flags, follow, keep, prepare, show_answer
from qzoom_agent.cli.console import Console
from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, read_config
from qzoom_agent.errors import ConfigError


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom chat`."""
    flags.description = (
        "Answer questions about one image, one after another, until an empty line. Exit code 0: the last "
        "question was answered, 2: wrong usage, 3: a budget ended it, 4: the model failed."
    )
    flags.add_argument("image", help="path of an image, FILE.pdf#page=N, or a data URI")
    flags.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="show the model the earlier questions and answers with each question (default: as its format says)",
    )
    add_output_flags(flags)
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom chat` and return the exit code that the status of the last question stands for."""
    console = Console(verbosity=args.verbose - args.quiet)

    from qzoom_agent.images import load_image

    if args.image == "-":
        raise ConfigError("stdin has the questions, so the image cannot be read from it. Give a path.")
    image = load_image(args.image, max_pixels=read_config(args).max_pixels)
    agent = prepare(args, console)
    with agent.chat(image, history=args.history) as chat:
        for question in _questions():
            try:
                events = chat.stream(question)
            except ConfigError as error:
                console.error(str(error))
                continue
            answer = follow(events, console, area=image.width * image.height)
            show_answer(answer, console, as_json=args.json)
        if chat.answer is None:
            return OK
        keep(chat.answer, console, args)
        return EXIT_CODES[chat.answer.status]


def _questions() -> Iterator[str]:
    """Yield lines until an empty one, or the end of the input."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
