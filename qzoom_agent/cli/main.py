"""`qzoom VERB ...`: finds the verb's module, and turns errors into messages and exit codes.

Help must be instant, so this file imports nothing but the standard library and the error classes, and a verb's module
is imported when the verb is used. Every verb is a function `main(argv) -> exit code`.

Exit codes: 0 answered or done, 2 wrong usage (a flag, a file, a setting), 3 a budget ended the run, 4 the model or the
machine failed, 130 interrupted. An error a user can mend prints without a traceback; a traceback means a bug here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Final, NamedTuple

from qzoom_agent import __version__
from qzoom_agent.errors import QzoomError

OK: Final = 0
USAGE: Final = 2
BUDGET: Final = 3
BACKEND: Final = 4
INTERRUPTED: Final = 130


class Verb(NamedTuple):
    module: str
    summary: str


VERBS: Final = {
    "ask": Verb("qzoom_agent.cli.ask", "answer one question about one image"),
    "look": Verb("qzoom_agent.cli.look", "show whether one question needs more detail, and where"),
    "demo": Verb("qzoom_agent.cli.demo", "three questions of rising difficulty on generated boards"),
    "trace": Verb("qzoom_agent.cli.traces", "show a saved run in the terminal, or write its report"),
    "eval": Verb("qzoom_agent.cli.evaluate", "measure accuracy and what it costs on a task"),
    "bench": Verb("qzoom_agent.cli.bench", "accuracy against cost of a model with branches, and ablations"),
    "train": Verb("qzoom_agent.cli.train", "train a model from a recipe"),
    "calibrate": Verb("qzoom_agent.cli.calibrate", "thresholds of trained branches for questions of your own"),
    "reproduce": Verb("qzoom_agent.cli.moved", "moved to the script rl/reproduce.py"),
    "convert": Verb("qzoom_agent.cli.convert", "take the branches out of a published checkpoint, or put ours into one"),
    "models": Verb("qzoom_agent.cli.presets", "list the models that can be named"),
    "doctor": Verb("qzoom_agent.cli.doctor", "check this machine: one table to paste into a bug report"),
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        prog="qzoom",
        usage="qzoom [--version] VERB ...",
        description="Thinking with images: a model that decides whether and where to look closer.",
        epilog="verbs:\n"
        + "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
        + "\n\n'qzoom VERB --help' explains one. Exit codes: 0 answered, 2 usage, 3 budget, 4 backend.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qzoom-agent {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; usage errors leave through argparse's SystemExit(2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return USAGE
    # Only the first word is ours: everything after a verb belongs to that verb's own parser.
    verb = VERBS[parser.parse_args(argv[:1]).verb]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without these letters shows what it can
    try:
        return int(importlib.import_module(verb.module).main(argv[1:]))
    except QzoomError as error:
        print(f"qzoom {argv[0]}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) went away; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
