"""`qzoom mcp` offers look, propose, zoom and ask to clients of the Model Context Protocol, over stdio or HTTP."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Final

from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.cli.serve import LOCAL, add_address_flags, listen, shown_address
from qzoom_agent.errors import ConfigError

_MOST_BYTES: Final = 32_000_000


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom mcp`."""
    flags.description = (
        "Offer the tools look, propose, zoom and ask to MCP clients: over stdin and stdout, or over HTTP."
    )
    flags.add_argument("--http", action="store_true", help="serve streamable HTTP at /mcp instead of stdin and stdout")
    add_address_flags(flags, port=8001)
    flags.add_argument(
        "--folder",
        action="append",
        metavar="DIR",
        help="folder whose images clients may name by path; may be repeated (default: the working directory; with "
        "--http none)",
    )
    flags.add_argument("--allow-urls", action="store_true", help="fetch images from addresses that clients name")
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom mcp` until the client closes stdin, or until it is interrupted."""
    from qzoom_agent.integrations.mcp_server import ImageAccess, ImageTools, create_server

    folders = [Path(folder) for folder in args.folder or ([] if args.http else ["."])]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"There is no folder {missing[0]}. Give --folder one that exists.")
    access = ImageAccess(folders=tuple(folders), allow_urls=args.allow_urls, max_pixels=read_config(args).max_pixels)
    server = create_server(ImageTools(partial(load_agent, args), access))
    if not args.http:
        server.run("stdio")
        return OK
    if args.host not in LOCAL:
        print(f"qzoom mcp: anybody who reaches {args.host} may use the tools.", file=sys.stderr)
    with listen(args.host, args.port) as free:  # for an error of ours, and the number of a free port
        address, port = shown_address(free), free.getsockname()[1]
    print(f"{address}/mcp", flush=True)
    server.run("streamable-http", host=args.host, port=port, max_request_body_size=_MOST_BYTES)
    return OK
