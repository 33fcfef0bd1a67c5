"""`qzoom VERB ...`: finds the verb's module, and turns errors into messages and exit codes.

Help must be instant: this file imports only the standard library and the error classes, and a verb's module is imported
when the verb is used. Such a module has functions `parser()` and `main(argv)`, which returns the exit code.

Exit codes: 0 answered or done, 2 wrong usage (a flag, a file, a setting), 3 a budget ended the run, 4 the model or the
machine failed, 130 interrupted. An error that the user can correct is printed without a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, Final, NamedTuple

from qzoom_agent import __version__
from qzoom_agent.errors import QzoomError

OK: Final = 0
USAGE: Final = 2
BUDGET: Final = 3
BACKEND: Final = 4
INTERRUPTED: Final = 130


class Verb(NamedTuple):
    """A verb and the module that has its functions `main` and `parser`."""

    module: str
    summary: str
    prefix: str = ""
    """Beginning of the functions' names, in a module with several verbs."""

    def function(self, name: str) -> Any:
        """Import the module and return its function `main` or `parser`."""
        return getattr(import_module(f"qzoom_agent.cli.{self.module}"), self.prefix + name)


VERBS: Final = {
    "ask": Verb("ask", "answer one question about one image"),
    "chat": Verb("chat", "answer questions about one image, one after another"),
    "look": Verb("look", "show whether a question needs more detail, and where"),
    "run": Verb("run", "ask every row of a table, or one question about every image of a folder"),
    "demo": Verb("demo", "answer three questions of rising difficulty about pictures in the package"),
    "trace": Verb("ask", "show a saved run in the terminal, or write its report", "trace_"),
    "eval": Verb("evaluate", "measure accuracy and cost on a task"),
    "audit": Verb("audit", "measure whether looking helps: the policy against its controls"),
    "serve": Verb("serve", "serve the agent behind an OpenAI-compatible API"),
    "web": Verb("web", "serve a page on which people ask the agent in a browser"),
    "mcp": Verb("mcp", "offer look, propose, zoom and ask to clients of the Model Context Protocol"),
    "bench": Verb("bench", "measure accuracy against cost of a model with branches, and ablations"),
    "train": Verb("train", "train a model from a recipe"),
    "calibrate": Verb("train", "fit the thresholds of trained branches to your own questions", "calibrate_"),
    "reproduce": Verb("train", "moved to the script rl/reproduce.py", "reproduce_"),
    "convert": Verb("models", "read the branches of a published checkpoint, or write ours into one", "convert_"),
    "push": Verb("push", "upload trained branches, without their base, to the Hugging Face hub"),
    "models": Verb("models", "list the models that --model knows by name"),
    "doctor": Verb("doctor", "check this machine: one table to paste into a bug report"),
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
    # Only the first word belongs to this parser; the rest belongs to the verb's own.
    verb = VERBS[parser.parse_args(argv[:1]).verb]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks some letters
    try:
        return int(verb.function("main")(argv[1:]))
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
    except OSError as error:
        print(f"qzoom {argv[0]}: {error}. Check the path, its permissions and the free space.", file=sys.stderr)
        return USAGE
