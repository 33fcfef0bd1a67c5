"""`qzoom run TABLE --out DIR`: ask every row of a table, or one question about every image of a folder.

The same command resumes. The path of the results goes to stdout, progress and rows that failed to stderr.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoom_agent.cli.console import Console, Progress, printable
from qzoom_agent.cli.main import BACKEND, OK
from qzoom_agent.cli.options import add_agent_flags, add_column_flag, load_agent, read_config
from qzoom_agent.config import positive_int
from qzoom_agent.errors import redact
from qzoom_agent.files import require_folder


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Ask every row of a table, or one question about every image of a folder. No answers are needed. "
        "An interrupted run goes on with the same command. On several devices: accelerate launch --multi_gpu "
        "--num_processes 4 -m qzoom_agent run TABLE --out DIR."
    )
    flags.add_argument(
        "table",
        type=Path,
        help="JSON lines, JSON, CSV, TSV or parquet with columns image and question; or a folder of images and PDFs",
    )
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder, with results.parquet")
    flags.add_argument("--question", metavar="TEXT", help="ask this about every image, instead of a column")
    add_column_flag(flags)
    flags.add_argument("--n", type=int, help="ask the first N rows (default: all)")
    flags.add_argument("--split", help="split of a saved dataset")
    flags.add_argument(
        "--workers", type=positive_int, metavar="N", help="questions at a time (default: as many as suit the model)"
    )
    flags.add_argument("--traces", action="store_true", help="keep the record of every episode, with pictures")
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the verb; exit code 4 if every row failed."""
    from qzoom_agent.data.rows import listed_rows
    from qzoom_agent.evaluation.run_log import environment
    from qzoom_agent.evaluation.runner import Shard
    from qzoom_agent.evaluation.table_run import find_questions, run_table

    asked = find_questions(
        args.table,
        out=args.out,
        max_pixels=read_config(args).max_pixels,
        question=args.question,
        columns=dict(args.columns or ()),
        n=args.n,
        split=args.split,
    )
    require_folder(args.out)
    shard = Shard.launched()
    console = Console(verbosity=0 if shard.index == 0 else -1)
    agent = load_agent(args, device=shard.device if args.device == "auto" else None)
    console.line(f"run folder {args.out}", "dim")
    progress = Progress(console)
    try:
        done = run_table(
            agent,
            asked,
            out=args.out,
            n=args.n,
            split=args.split,
            workers=args.workers,
            traces=args.traces,
            environment=environment(str(getattr(agent.backend, "placement", "")), command=redact(args.command)),
            shard=shard,
            watch=progress,
        )
    except KeyboardInterrupt:
        raise progress.interrupted(args.out) from None
    if shard.index:
        return OK
    console.clear()
    if done.failed:
        told = printable(listed_rows(done.failed))
        console.error(
            f"{len(done.failed)} of {done.rows} rows have no answer: {told}. The same command asks them again."
        )
    print(done.path, flush=True)
    return BACKEND if len(done.failed) == done.rows else OK
