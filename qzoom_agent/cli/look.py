"""`qzoom look IMAGE QUESTION`: the findings of the coarse pass, before anything is answered.

The findings go to stdout, as lines or as the record's JSON; pictures go to files. Boxes are in the original's pixels,
each with the same box in cells of the coarse view's token grid, so that a line can be checked against the heat map.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, printable, table
from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ImageError
from qzoom_agent.files import atomic_write, require_file

if TYPE_CHECKING:
    from qzoom_agent.trace import PerceptionRecord


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Show whether a question needs more detail than the coarse view, and where, without answering it. "
        "Needs a model with branches (gate and SD-RPN)."
    )
    flags.add_argument("image", help="path of an image, FILE.pdf#page=N, a data URI, or - for stdin")
    flags.add_argument("question")
    flags.add_argument("--png", metavar="FILE", help="write the image with heat map and proposed boxes drawn on it")
    flags.add_argument("--html", metavar="FILE", help="write one HTML page that shows all of it")
    flags.add_argument("--json", action="store_true", help="print the record as JSON instead of the lines")
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run the verb. Raises ConfigError for a model that has no branches."""
    console = Console()

    from qzoom_agent.images import load_image
    from qzoom_agent.messages import require_question

    require_question(args.question)
    image = load_image(sys.stdin.buffer if args.image == "-" else args.image, max_pixels=read_config(args).max_pixels)
    for path in (args.png, args.html):
        if path is not None:
            require_file(path)
    look = load_agent(args).look(image, args.question)
    record = look.record
    if args.json:
        print(record.model_dump_json(indent=1), flush=True)
    else:
        print("\n".join(lines(record)), flush=True)
    if args.png:
        from qzoom_agent.report.overlay import overlay

        with atomic_write(Path(args.png), error=ImageError) as part:
            overlay(look.store.image("original"), record).save(part, format="PNG")
        console.line(f"png     {args.png}")
    if args.html:
        from qzoom_agent.report.look import write_look

        console.line(f"html    {write_look(record, look.store, look.question, look.model, args.html)}")
    return OK


def lines(record: PerceptionRecord) -> list[str]:
    """Return the record for a terminal, one fact a line."""
    from qzoom_agent.report.look import compared, verdict, work
    from qzoom_agent.report.page import listed

    reason = f": {printable(record.reason)}" if record.reason else ""
    rows = [("gate", f"{compared(record)}, {verdict(record)}"), ("decision", record.route + reason)]
    for rank, box in enumerate(record.boxes, start=1):
        cells = f", cells {listed(record.cells[rank - 1])}" if rank <= len(record.cells) else ""
        rows.append((f"box {rank}", f"{listed(box)} px{cells}"))
    rows += [
        ("visual tokens", f"{record.visual_tokens:,}"),
        ("prompt tokens", f"{record.prompt_tokens:,}"),
        ("token-layers", work(record)),
        ("seconds", f"{record.seconds:.2f}"),
    ]
    return table(rows)
