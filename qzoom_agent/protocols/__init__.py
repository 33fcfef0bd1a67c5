"""The protocols of all model families, by name."""

from collections.abc import Mapping
from typing import Any, Final

from qzoom_agent.extensions import find, satisfying
from qzoom_agent.protocols.hermes import DEEPEYES, QWEN3VL
from qzoom_agent.protocols.interface import Parsed, ToolCall, ZoomProtocol
from qzoom_agent.protocols.mini_o3 import MINI_O3
from qzoom_agent.protocols.nano import Nano
from qzoom_agent.protocols.pixel_reasoner import PIXEL_REASONER
from qzoom_agent.protocols.plain import Plain
from qzoom_agent.protocols.qwen3_5 import QWEN3_5
from qzoom_agent.protocols.visionthink import ADAPTVISION, VISIONTHINK

_ALL: tuple[ZoomProtocol, ...] = (
    Nano(),
    Plain(),
    QWEN3VL,
    QWEN3_5,
    DEEPEYES,
    MINI_O3,
    PIXEL_REASONER,
    ADAPTVISION,
    VISIONTHINK,
)
PROTOCOLS: Final[dict[str, ZoomProtocol]] = {protocol.name: protocol for protocol in _ALL}

__all__ = ["PROTOCOLS", "Parsed", "ToolCall", "ZoomProtocol", "get_protocol"]


def get_protocol(name: str, *, known: Mapping[str, Any] = PROTOCOLS) -> ZoomProtocol:
    """Return the protocol called `name`: one of `known`, `module:attribute` or an entry point.

    Raises:
        ConfigError: There is none, or it does not satisfy `ZoomProtocol`.
    """
    found: ZoomProtocol = satisfying(find(name, kind="protocol", known=known), ZoomProtocol, kind="protocol")
    return found
