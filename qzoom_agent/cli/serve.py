"""`qzoom serve` answers the requests of OpenAI's clients with the agent, until it is told to end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from typing import Any, Final

from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ConfigError, hide_secret

KEY_VARIABLE: Final = "QZOOM_API_KEY"
LOCAL: Final = {"127.0.0.1", "::1", "localhost"}
"""Hosts that other machines do not reach."""


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom serve`."""
    flags.description = (
        "Serve the agent behind an OpenAI-compatible API: POST /v1/chat/completions, GET /v1/models, "
        "/health, /metrics and /traces/ID."
    )
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    flags.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    flags.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients have to send (default: the variable {KEY_VARIABLE}, or none)",
    )
    flags.add_argument("--batch", type=int, default=8, metavar="N", help="requests answered at a time (default: 8)")
    flags.add_argument(
        "--queue", type=int, default=32, metavar="N", help="requests that may wait; more get status 429 (default: 32)"
    )
    flags.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for an answer (default: 300)")
    flags.add_argument(
        "--max-bytes", type=int, default=32_000_000, metavar="N", help="size of a request (default: 32000000)"
    )
    flags.add_argument(
        "--max-pixels", type=int, metavar="N", help="pixels of the images of a request (default: 89 million)"
    )
    flags.add_argument("--allow-urls", action="store_true", help="fetch images from addresses that clients name")
    flags.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="further setting that a request may change, such as perception.max_regions; may be repeated. Policy and "
        "budget always may, within limits",
    )
    flags.add_argument(
        "--traces", type=int, default=256, metavar="N", help="records kept for GET /traces/ID (default: 256)"
    )
    add_agent_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Run `qzoom serve` until it is interrupted or terminated; requests under way are answered first."""
    from qzoom_agent.integrations.serve.settings import ServeConfig

    limits = {"max_pixels": args.max_pixels} if args.max_pixels else {}
    config = ServeConfig(
        api_key=args.api_key or os.environ.get(KEY_VARIABLE) or None,
        batch=args.batch,
        queue=args.queue,
        timeout=args.timeout,
        max_bytes=args.max_bytes,
        allow_urls=args.allow_urls,
        allow=tuple(args.allow),
        traces=args.traces,
        **limits,
    )
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


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"The server cannot listen at {host}, port {port}: {reason}. Give another --host or --port."
        ) from None


def shown_address(listening: socket.socket) -> str:
    """Return the address of a listening socket as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_until_ended(app: Any, listening: socket.socket, *, grace: int) -> None:
    """Serve an application until the process is interrupted or terminated.

    Args:
        app: The ASGI application.
        listening: Socket of `listen`.
        grace: Seconds that requests under way then have.
    """
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it is done
    uvicorn.Server(config).run(sockets=[listening])
