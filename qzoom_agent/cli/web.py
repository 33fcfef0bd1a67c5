"""`qzoom web` serves a page on which people ask the agent in a browser, until it is told to end."""

from __future__ import annotations

import argparse
import os
import sys
from tempfile import TemporaryDirectory

from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.cli.serve import LOCAL, listen, serve_until_ended, shown_address


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom web`."""
    flags.description = "Serve a page: a picture and a question in; answer, annotated picture, heat map and crops out."
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    flags.add_argument("--port", type=int, default=7860, help="port; 0 takes a free one (default: 7860)")
    flags.add_argument("--batch", type=int, default=4, metavar="N", help="questions answered at a time (default: 4)")
    flags.add_argument("--queue", type=int, default=32, metavar="N", help="questions that may wait (default: 32)")
    flags.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="S",
        help="seconds after which the model has to answer (default: 300)",
    )
    flags.add_argument(
        "--max-bytes", type=int, default=32_000_000, metavar="N", help="size of a picture (default: 32000000)"
    )
    flags.add_argument("--max-pixels", type=int, metavar="N", help="pixels of a picture (default: 89 million)")
    flags.add_argument(
        "--choose-model",
        action="store_true",
        help="let visitors load other models, and name servers that this machine then asks",
    )
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom web` until it is interrupted or terminated."""
    from qzoom_agent.integrations.web.settings import WebConfig

    limits = {"max_pixels": args.max_pixels} if args.max_pixels else {}
    config = WebConfig(
        batch=args.batch,
        queue=args.queue,
        timeout=args.timeout,
        max_bytes=args.max_bytes,
        choose_model=args.choose_model,
        **limits,
    )
    read_config(args)
    with TemporaryDirectory(prefix="qzoom-web-") as folder, listen(args.host, args.port) as listening:
        os.environ["GRADIO_TEMP_DIR"] = folder  # pictures of visitors: this user's alone, and gone at the end
        from qzoom_agent.integrations.web.handlers import create_app

        agent = load_agent(args)
        app = create_app(agent, config)
        print(f"{agent.backend.name} at {shown_address(listening)} (policy {agent.config.policy})", flush=True)
        if args.host not in LOCAL:
            print(f"qzoom web: anybody who reaches {args.host} may use the page.", file=sys.stderr)
        serve_until_ended(app, listening, grace=2)
    return OK
