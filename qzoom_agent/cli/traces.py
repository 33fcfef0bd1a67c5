"""`qzoom trace show|report DIR`: a saved run in the terminal, or as one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.main import OK


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(prog="qzoom trace", description="Look at a saved run.")
    verbs = flags.add_subparsers(dest="verb", required=True, metavar="show|report")
    show = verbs.add_parser("show", help="print the steps")
    show.add_argument("run", metavar="DIR", help="folder that --save wrote")
    show.add_argument("-v", "--verbose", action="store_true", help="show what the model wrote")
    report = verbs.add_parser("report", help="write one HTML page that shows where the model looked")
    report.add_argument("run", metavar="DIR", help="folder that --save wrote")
    report.add_argument("--out", metavar="FILE", help="where to write it (default: DIR/report.html)")
    report.add_argument("--expected", metavar="TEXT", help="the right answer, shown beside the model's")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb. Raises TraceError if the folder holds no trace."""
    args = parser().parse_args(argv)

    from qzoom_agent.cli.live import replay, summary
    from qzoom_agent.trace import Trace, saved_images

    trace = Trace.load(args.run)
    if args.verb == "report":
        from qzoom_agent.report.episode import write_report

        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        out = Path(args.out) if args.out else folder / "report.html"
        print(write_report(trace, saved_images(folder), out, expected=args.expected))
        return OK
    # The steps are the result here, so they go to stdout.
    console = Console(verbosity=int(args.verbose), stream=sys.stdout)
    console.line(printable(trace.question), "bold")
    console.line(f"{trace.model}, protocol {trace.protocol}, policy {trace.policy}, seed {trace.seed}", "dim")
    replay(trace, console)
    console.line(f"answer {printable(trace.answer)}" if trace.answer else "no answer", "bold")
    if trace.error:
        console.line(f"error: {printable(trace.error)}", "red")
    console.line(summary(trace), "dim")
    return OK
