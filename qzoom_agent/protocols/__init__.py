"""The protocols of all model families, by name."""

from collections.abc import Mapping
from typing import Any, Final

from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import find, satisfying
from qzoom_agent.protocols.interface import NativeProtocol, Parsed, ToolCall, ToolProtocol, ZoomProtocol
from qzoom_agent.protocols.nano import Nano
from qzoom_agent.protocols.plain import Plain
from qzoom_agent.protocols.tagged import published_families

_OWN: tuple[ZoomProtocol, ...] = (Nano(), Plain())
PROTOCOLS: Final[dict[str, ZoomProtocol]] = {**{one.name: one for one in _OWN}, **published_families()}

__all__ = ["PROTOCOLS", "Parsed", "ToolCall", "ZoomProtocol", "get_protocol", "native_form", "with_tools"]


def get_protocol(name: str, *, known: Mapping[str, Any] = PROTOCOLS) -> ZoomProtocol:
    """Return the protocol called `name`: one of `known`, `module:attribute` or an entry point.

    Raises:
        ConfigError: There is none, or it does not satisfy `ZoomProtocol`.
    """
    found: ZoomProtocol = satisfying(find(name, kind="protocol", known=known), ZoomProtocol, kind="protocol")
    return found


def native_form(protocol: ZoomProtocol) -> NativeProtocol:
    """Return a protocol for native tool calls. Raises ConfigError if it has none."""
    if not isinstance(protocol, NativeProtocol):
        raise ConfigError(
            f"The format '{protocol.name}' is text alone and has no native tool calls. Use tools 'text' (--tools "
            "text), or another protocol such as qwen3vl."
        )
    return protocol.native()


def with_tools(protocol: ZoomProtocol, tools: Mapping[str, str]) -> ZoomProtocol:
    """Return a protocol that offers own tools (function schemas in JSON, by name).

    Raises:
        ConfigError: It has no place for them, or one has the name of its zoom tool.
    """
    if not tools:
        return protocol
    if not isinstance(protocol, ToolProtocol):
        able = ", ".join(sorted(name for name, one in PROTOCOLS.items() if isinstance(one, ToolProtocol)))
        raise ConfigError(
            f"The format '{protocol.name}' writes zoom calls alone, so the tools {', '.join(tools)} cannot be offered "
            f"in it. Leave them out, or choose another protocol for a model that knows it: {able}."
        )
    return protocol.with_tools(tools)
