"""The text formats, by name: `PROTOCOLS["deepeyes"]`, or `get_protocol("deepeyes")` for a name that a user gave."""

from typing import Final

from qzoom_agent.errors import ConfigError
from qzoom_agent.protocols.base import Parsed, ToolCall, ZoomProtocol
from qzoom_agent.protocols.nano import Nano

PROTOCOLS: Final[dict[str, ZoomProtocol]] = {protocol.name: protocol for protocol in (Nano(),)}

__all__ = ["PROTOCOLS", "Parsed", "ToolCall", "ZoomProtocol", "get_protocol"]


def get_protocol(name: str) -> ZoomProtocol:
    """The protocol of this name; ConfigError for an unknown one."""
    if name not in PROTOCOLS:
        raise ConfigError(f"There is no protocol {name!r}. Choose one of: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
