"""`qzoom eval SUITE`: accuracy with its interval, and what it cost.

The table goes to stdout, progress to stderr. With `--json FILE` the result and every row are written, and the rows are
kept in FILE.rows.jsonl while the run lasts: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, printable, table
from qzoom_agent.cli.main import BACKEND, INTERRUPTED, OK
from qzoom_agent.cli.options import add_agent_flags, load_agent

if TYPE_CHECKING:
    from qzoom_agent.evals.runner import Result, Row, Share


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(
        prog="qzoom eval", description="Measure accuracy and what it costs on a suite of generated boards."
    )
    flags.add_argument("suite", help="needle-global, needle-scene, needle-doc or needle-hop")
    flags.add_argument("--n", type=int, default=100, help="questions (default: 100)")
    flags.add_argument("--seed", type=int, default=0, help="draws other questions; two seeds share none (default: 0)")
    flags.add_argument(
        "--split", choices=("test", "ood"), default="test", help="ood: typefaces that no training image has"
    )
    flags.add_argument("--fonts", type=Path, metavar="DIR", help="draw with the typefaces in this folder instead")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the result and every row")
    add_agent_flags(flags)
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb; exit code 4 if the model failed on every question."""
    args = parser().parse_args(argv)

    from qzoom_agent.errors import ConfigError
    from qzoom_agent.evals.runner import evaluate, summarise
    from qzoom_agent.evals.suites.needle import SUITES

    if args.suite not in SUITES:
        raise ConfigError(f"There is no suite {args.suite!r}. Choose one of: {', '.join(SUITES)}.")
    console = Console()
    agent = load_agent(args)
    journal = args.json.with_name(f"{args.json.name}.rows.jsonl") if args.json else None
    progress = _Progress(console, args.suite, args.n)
    try:
        result = evaluate(
            agent,
            args.suite,
            n=args.n,
            seed=args.seed,
            split=args.split,
            fonts=args.fonts,
            journal=journal,
            on_row=progress.row,
        )
    except KeyboardInterrupt:
        console.clear()
        if progress.rows:
            partial = summarise(
                progress.rows,
                suite=args.suite,
                split=args.split,
                seed=args.seed,
                planned=args.n,
                config=agent.config,
            )
            show(partial)
        kept = f" Finished questions are in {journal}; the same command goes on." if journal else ""
        console.error(f"Interrupted after {len(progress.rows)} of {args.n} questions.{kept}")
        return INTERRUPTED
    console.clear()
    show(result)
    if args.json and journal:
        args.json.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        # Complete: kept any longer, it would answer for a model whose weights have changed since.
        journal.unlink()
        console.line(f"written {args.json}")
    failed = [row for row in result.rows if row.status == "error"]
    if failed:
        console.error(f"{len(failed)} of {result.n} questions failed and count as wrong. The first: {failed[0].error}")
    return BACKEND if len(failed) == result.n else OK


def show(result: Result) -> None:
    """Print a result to stdout."""
    config, failed = result.config, result.failed_call_share
    lines = [("accuracy", _share(result))]
    lines += [(f"  {kind}", _share(share)) for kind, share in result.kinds.items()] if len(result.kinds) > 1 else []
    lines += [
        ("zooms", f"{result.zooms:.2f} a question"),
        ("visual tokens", f"{result.visual_tokens:.1f} a question{_range(result.visual_tokens_interval, '.1f')}"),
        ("seconds", f"{result.seconds:.3f} a question{_range(result.seconds_interval, '.3f')}"),
        ("failed calls", "no calls" if failed is None else f"{failed:.1%}  ({result.failed_calls} of {result.calls})"),
    ]
    if result.needless_zooms is not None:
        lines.append(("needless zooms", f"{result.needless_zooms:.1%} of the questions that the coarse view answers"))
    if result.covered is not None:
        lines.append(("needle covered", f"{result.covered:.1%} by the best crop"))
    lines.append(("ended", ", ".join(f"{status} {count}" for status, count in sorted(result.statuses.items()))))
    coarse, total = config.budget.coarse_tokens, config.budget.max_visual_tokens
    print(
        f"{result.suite} ({result.split}, seed {result.seed}): {config.model}, policy {config.policy}"
        + (f", coarse view of at most {coarse} visual tokens" if coarse else "")
        + (f", at most {total} in all" if total else "")
    )
    for line in table(lines):
        print(line)
    sys.stdout.flush()


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{share.accuracy:.3f}  [{low:.3f}, {high:.3f}]  {share.correct} of {share.n}"


def _range(interval: tuple[float, float] | None, form: str) -> str:
    return f"  [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


class _Progress:
    """Rows so far, and the line that shows how it goes."""

    def __init__(self, console: Console, suite: str, total: int) -> None:
        self.console, self.suite, self.total = console, suite, total
        self.rows: list[Row] = []
        self.began = monotonic()

    def row(self, row: Row) -> None:
        from qzoom_agent.evals.stats import wilson

        self.rows.append(row)
        if row.status == "error":
            self.console.error(f"{row.id}: {printable(row.error or 'failed')}")
        done, correct = len(self.rows), sum(row.correct for row in self.rows)
        low, high = wilson(correct, done)
        left = (monotonic() - self.began) / done * (self.total - done)
        text = f"{self.suite} {done}/{self.total}  accuracy {correct / done:.2f} [{low:.2f}, {high:.2f}]"
        self.console.progress(done, self.total, f"{text}  {left:.0f} s left")
