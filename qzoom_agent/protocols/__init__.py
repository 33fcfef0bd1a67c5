"""The protocols of all model families, by name."""

from collections.abc import Mapping
from typing import Any, Final

from qzoom_agent.extensions import find, satisfying
from qzoom_agent.protocols.interface import Parsed, ToolCall, ZoomProtocol
from qzoom_agent.protocols.nano import Nano
from qzoom_agent.protocols.plain import Plain
from qzoom_agent.protocols.tagged import published_families

_OWN: tuple[ZoomProtocol, ...] = (Nano(), Plain())
PROTOCOLS: Final[dict[str, ZoomProtocol]] = {**{one.name: one for one in _OWN}, **published_families()}

__all__ = ["PROTOCOLS", "Parsed", "ToolCall", "ZoomProtocol", "get_protocol"]


def get_protocol(name: str, *, known: Mapping[str, Any] = PROTOCOLS) -> ZoomProtocol:
    """Return the protocol called `name`: one of `known`, `module:attribute` or an entry point.

    Raises:
        ConfigError: There is none, or it does not satisfy `ZoomProtocol`.
    """
    found: ZoomProtocol = satisfying(find(name, kind="protocol", known=known), ZoomProtocol, kind="protocol")
    return found
