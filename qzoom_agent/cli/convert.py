"""`qzoom convert SOURCE TARGET`: branches of a published checkpoint as our branch folder, or the other way round.

What was written and how large it is goes to stdout, notes on the source's config to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qzoom_agent.cli.console import Console, printable, table
from qzoom_agent.cli.main import OK


def parser() -> argparse.ArgumentParser:
    """The verb's flags."""
    flags = argparse.ArgumentParser(
        prog="qzoom convert",
        description="Take the branches (gate and SD-RPN) out of a checkpoint of the published Q-Zoom code, as a small "
        "folder that any copy of the base can be used with; or, with --official, put ours into such a checkpoint.",
    )
    flags.add_argument("source", help="official checkpoint (folder or hub id), or a folder of branches")
    flags.add_argument("target", metavar="DIR", help="folder to write")
    flags.add_argument(
        "--base", metavar="M", help="the model the branches belong to: preset, folder or hub id (default: the source)"
    )
    form = flags.add_mutually_exclusive_group()
    form.add_argument("--int8", action="store_true", help="store matrices as bytes, half the size")
    form.add_argument(
        "--official", action="store_true", help="write base and branches as one checkpoint for the published code"
    )
    flags.add_argument("--force", action="store_true", help="overwrite what is in the target")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the verb. Raises ConfigError or BackendError where nothing can be converted."""
    args = parser().parse_args(argv)
    console = Console()

    from qzoom_agent.models.convert import to_branches, to_checkpoint

    if args.official:
        done = to_checkpoint(args.source, args.target, base=args.base, force=args.force)
    else:
        done = to_branches(args.source, args.target, base=args.base, int8=args.int8, force=args.force)
    print("\n".join(table([(str(path), f"{path.stat().st_size:,} bytes") for path in done.files])))
    ratio = f" ({done.after / done.before:.2f} of it)" if done.before else ""
    print(f"branches: {done.before:,} bytes in the source, {done.after:,} in the target{ratio}", flush=True)
    for note in done.notes:
        console.line(f"note: {printable(note)}", "yellow")
    return OK
