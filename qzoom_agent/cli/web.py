"""`qzoom web` serves a page on which people ask the agent in a browser, until it is told to end."""

from __future__ import annotations

import argparse
import os
import sys
from tempfile import TemporaryDirectory
from typing import Final

from qzoom_agent.cli.fields import add_fields, given
from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.cli.serve import LOCAL, add_address_flags, listen, serve_until_ended, shown_address
from qzoom_agent.integrations.limits import WebConfig

LIMITS: Final = {
    "batch": "--batch N",
    "queue": "--queue N",
    "timeout": "--timeout S",
    "max_bytes": "--max-bytes N",
    "max_pixels": "--max-pixels N",
    "choose_model": "--choose-model",
}
"""Flags of the limits of a page."""


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom web`."""
    flags.description = "Serve a page: a picture and a question in; answer, annotated picture, heat map and crops out."
    add_address_flags(flags, port=7860)
    add_fields(flags, WebConfig, LIMITS)
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom web` until it is interrupted or terminated."""
    config = WebConfig(**given(args, LIMITS))
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
