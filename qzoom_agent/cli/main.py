"""`qzoom VERB ...`: finds the verb's module and runs it.

Help must be instant: this file imports only the standard library and the error classes, and a verb's module is imported
when the verb is used. Such a module has the functions `add_flags(parser)` and `run(args)`, which returns the exit code;
`args.command` is the whole command line.

Exit codes: 0 answered or done, 2 wrong usage (a flag, a file, a setting), 3 a budget ended the run, 4 the model or the
machine failed, 130 interrupted, 141 ended because nobody reads its messages. An error that the user can correct is
printed without a traceback. If nobody reads its results any longer (`| head`), the work is finished all the same: files
that were asked for are written.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qzoom_agent import __version__
from qzoom_agent.errors import finished

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

OK: Final = 0
USAGE: Final = 2
BUDGET: Final = 3
BACKEND: Final = 4


class Verb(NamedTuple):
    """A verb and the module that has its functions `add_flags` and `run`."""

    module: str
    summary: str
    part: str = ""
    """Part of the functions' names, in a module with several verbs: `add_trace_flags` and `run_trace`."""

    def function(self, name: str) -> Callable[..., Any]:
        """Import the module and return a function, such as `function("add{}_flags")`."""
        part = self.part and f"_{self.part}"
        return getattr(import_module(f"qzoom_agent.cli.{self.module}"), name.format(part))  # type: ignore[no-any-return]


VERBS: Final = {
    "ask": Verb("ask", "answer one question about one image"),
    "chat": Verb("ask", "answer questions about one image, one after another", "chat"),
    "look": Verb("look", "show whether a question needs more detail, and where"),
    "run": Verb("run", "ask every row of a table, or one question about every image of a folder"),
    "demo": Verb("demo", "answer four questions of rising difficulty about pictures in the package"),
    "trace": Verb("ask", "show a saved run in the terminal, or write its report", "trace"),
    "eval": Verb("evaluate", "measure accuracy and cost on a task"),
    "audit": Verb("evaluate", "measure whether looking helps: the policy against its controls", "audit"),
    "serve": Verb("serve", "serve the agent behind an OpenAI-compatible API"),
    "web": Verb("serve", "serve a page on which people ask the agent in a browser", "web"),
    "mcp": Verb("serve", "offer look, propose, zoom and ask to clients of the Model Context Protocol", "mcp"),
    "bench": Verb("bench", "measure accuracy against cost of a model with branches, and ablations"),
    "train": Verb("train", "train a model from a recipe"),
    "calibrate": Verb("train", "fit the thresholds of trained branches to your own questions", "calibrate"),
    "reproduce": Verb("train", "moved to the script rl/reproduce.py", "reproduce"),
    "convert": Verb("models", "read the branches of a published checkpoint, or write ours into one", "convert"),
    "push": Verb("models", "upload trained branches, without their base, to the Hugging Face hub", "push"),
    "models": Verb("models", "list the models that --model knows by name"),
    "doctor": Verb("doctor", "check this machine: one table to paste into a bug report"),
}
EVAL_VERBS: Final = {
    f"eval {name}": Verb("eval_runs", "", name) for name in ("list", "compare", "rescore", "export", "calibrate")
}
"""Verbs of two words, which stand in place of a task."""


class _Output(FileIO):
    """Standard output that drops what is written after its reader went away."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)

    @classmethod
    def in_place_of(cls, stream: TextIOWrapper) -> TextIOWrapper:
        """Return a stream to the same file, buffered as this one."""
        stream.flush()
        raw = cls(stream.fileno(), "w", closefd=False)
        through = stream.write_through
        held: Any = raw if through else BufferedWriter(raw)
        return TextIOWrapper(held, stream.encoding, line_buffering=stream.line_buffering, write_through=through)


def choose(parser: argparse.ArgumentParser, kind: str, summaries: Mapping[str, str]) -> None:
    """Add the choice of a verb or a stage, and a list of them to the help."""
    width = max(map(len, summaries))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())
    parser.epilog = f"{kind}s:\n{listed}\n\n'{parser.prog} {kind.upper()} --help' explains one."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(kind, choices=summaries, metavar=kind.upper(), help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; usage errors leave through argparse's SystemExit(2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="qzoom",
        usage="qzoom [--version] VERB ...",
        description="Thinking with images: a model that decides whether and where to look closer.",
    )
    choose(parser, "verb", {name: verb.summary for name, verb in VERBS.items()})
    parser.epilog = f"{parser.epilog} Exit codes: 0 answered, 2 usage, 3 budget, 4 backend."
    parser.add_argument("--version", action="version", version=f"qzoom-agent {__version__}")
    if not argv:
        parser.print_help(sys.stderr)
        return USAGE
    # Only the first word belongs to this parser; the rest belongs to the verb's own.
    name = parser.parse_args(argv[:1]).verb
    for closed in (one for one in ("stdin", "stdout", "stderr") if getattr(sys, one) is None):  # as by 2>&-
        setattr(sys, closed, open(os.devnull, "r" if closed == "stdin" else "w"))  # noqa: SIM115, PTH123
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, TextIOWrapper):
        sys.stdout = _Output.in_place_of(sys.stdout)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal whose encoding lacks some letters
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; whoever reads the text refuses it
    return finished(f"qzoom {name}", lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    run, args = read(argv)
    return int(run(args))


def read(argv: Sequence[str]) -> tuple[Callable[[argparse.Namespace], Any], argparse.Namespace]:
    """Return the function that runs a command line, and the flags that it is given."""
    words = 2 if " ".join(argv[:2]) in EVAL_VERBS else 1
    name = " ".join(argv[:words])
    verb = {**VERBS, **EVAL_VERBS}[name]
    parser = argparse.ArgumentParser(prog=f"qzoom {name}")
    verb.function("add{}_flags")(parser)
    args = parser.parse_args(argv[words:])
    args.command = shlex.join(["qzoom", *argv])
    return verb.function("run{}"), args
