"""`qzoom serve`, `qzoom web` and `qzoom mcp`: the agent for other programs, until it is told to end.

serve   answers the requests of OpenAI's clients
web     serves a page on which people ask the agent in a browser
mcp     offers look, propose, zoom and ask to clients of the Model Context Protocol, over stdio or HTTP
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, add_fields, given, load_agent, read_config
from qzoom_agent.errors import ConfigError, hide_secret
from qzoom_agent.integrations.limits import LOCAL, ServeConfig, WebConfig

KEY_VARIABLE: Final = "QZOOM_API_KEY"
_MOST_BYTES: Final = 32_000_000
_SHARED: Final = {
    "batch": "--batch N",
    "queue": "--queue N",
    "timeout": "--timeout S",
    "max_bytes": "--max-bytes N",
    "max_pixels": "--max-pixels N",
}
LIMITS: Final = {**_SHARED, "allow_urls": "--allow-urls", "allow": "--allow KEY", "traces": "--traces N"}
"""Flags of the limits of a server."""
_PAGE_LIMITS: Final = {**_SHARED, "choose_model": "--choose-model"}
"""Flags of the limits of a page."""


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Serve the agent behind an OpenAI-compatible API: POST /v1/chat/completions, GET /v1/models, "
        "/health, /metrics and /traces/ID."
    )
    add_address_flags(flags, port=8000)
    flags.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients have to send (default: the variable {KEY_VARIABLE}, or none)",
    )
    add_fields(flags, ServeConfig, LIMITS)
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom serve` until it is interrupted or terminated; requests under way are answered first."""
    key = os.environ.get(KEY_VARIABLE) or None if args.api_key is None else args.api_key
    config = ServeConfig(api_key=key, **given(args, LIMITS))
    if config.api_key:
        hide_secret(config.api_key)
    read_config(args)
    listening = listen(args.host, args.port)
    from qzoom_agent.integrations.serve.app import create_app

    agent = load_agent(args)
    app = create_app(agent, config)
    print(f"{agent.backend.name} at {shown_address(listening)}/v1 (policy {agent.config.policy})", flush=True)
    if args.host not in LOCAL and not config.api_key:
        print(f"qzoom serve: anybody who reaches {args.host} may ask. Set a key: --api-key.", file=sys.stderr)
    serve_until_ended(app, listening, grace=30)
    return OK


def add_web_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Serve a page: a picture and a question in; answer, annotated picture, heat map and crops out."
    add_address_flags(flags, port=7860)
    add_fields(flags, WebConfig, _PAGE_LIMITS)
    add_agent_flags(flags)


def run_web(args: argparse.Namespace) -> int:
    """Run `qzoom web` until it is interrupted or terminated."""
    config = WebConfig(**given(args, _PAGE_LIMITS))
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


def add_mcp_flags(flags: argparse.ArgumentParser) -> None:
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


def run_mcp(args: argparse.Namespace) -> int:
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


def add_address_flags(flags: argparse.ArgumentParser, *, port: int) -> None:
    """Add the flags that say where a server listens."""
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    flags.add_argument("--port", type=int, default=port, help=f"port; 0 takes a free one (default: {port})")


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise ConfigError(
            f"The server cannot listen at {host}, port {port}: {reason}. Give another --host or --port."
        ) from None


def shown_address(listening: socket.socket) -> str:
    """Return the address of a listening socket as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_ended(app: Any, listening: socket.socket, *, grace: int) -> None:
    """Serve an ASGI application until the process is ended; requests under way then have `grace` seconds."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it is done
    uvicorn.Server(config).run(sockets=[listening])
