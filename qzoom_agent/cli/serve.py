"""`qzoom serve` answers the requests of OpenAI's clients with the agent, until it is told to end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from typing import Any, Final

from qzoom_agent.cli.fields import add_fields, given
from qzoom_agent.cli.main import OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ConfigError, hide_secret
from qzoom_agent.integrations.limits import ServeConfig

KEY_VARIABLE: Final = "QZOOM_API_KEY"
LOCAL: Final = {"127.0.0.1", "::1", "localhost"}
"""Hosts that other machines do not reach."""


LIMITS: Final = {
    "batch": "--batch N",
    "queue": "--queue N",
    "timeout": "--timeout S",
    "max_bytes": "--max-bytes N",
    "max_pixels": "--max-pixels N",
    "allow_urls": "--allow-urls",
    "allow": "--allow KEY",
    "traces": "--traces N",
}
"""Flags of the limits of a server."""


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom serve`."""
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
    config = ServeConfig(api_key=args.api_key or os.environ.get(KEY_VARIABLE) or None, **given(args, LIMITS))
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
