"""Models of hosted APIs: OpenAI, Anthropic and Google, the latter two by their OpenAI-compatible addresses.

They have no tokenizer here. A visual token has the size that their documentation charges images by, budgets and limits
are ours: a first view of a few hundred tokens, and room for the thinking that counts as written.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from qzoom_agent.config import ViewBudget
from qzoom_agent.models.chat_client import base_url
from qzoom_agent.models.chat_messages import Api
from qzoom_agent.models.connection import Connection
from qzoom_agent.models.presets import Preset, served_model, view_budget
from qzoom_agent.protocols import PROTOCOLS
from qzoom_agent.protocols.interface import NativeProtocol

_NATIVE: Final = "qwen3vl"
"""Format whose schema is asked of models with no format of their own: a box in thousandths of an image."""
_LIMITS: Final[dict[str, Any]] = {"tools": "native", "generation.max_new_tokens": 8192}


class _Provider(NamedTuple):
    """A hosted API and the models in it."""

    host: str
    names: str
    """Pattern of the names of its models, also at other addresses."""
    api: Api
    key_variable: str
    budget: ViewBudget


_PROVIDERS: Final = (
    _Provider(
        "api.openai.com",
        r"(?:gpt-(?!oss)|chatgpt-|o\d)",
        "responses",
        "OPENAI_API_KEY",
        view_budget(32, (64, 576), (256, 1536)),
    ),
    _Provider("api.anthropic.com", "claude-", "chat", "ANTHROPIC_API_KEY", view_budget(28, (64, 576), (256, 1536))),
    _Provider(
        "generativelanguage.googleapis.com",
        "gemini-",
        "chat",
        "GEMINI_API_KEY",
        view_budget(48, (64, 576), (128, 1024)),
    ),
)


def served_preset(url: str, model: str, *, native: bool = False) -> Preset:
    """Return how a model behind a server is asked: its preset, a hosted model's, or what its name tells.

    Args:
        model: A preset or the server's name for the model.
        native: The user wants native tool calls, which need a format with a schema.

    Raises:
        ConfigError: The address is none, or the model is nano, which no server has.
    """
    preset = served_model(model)
    name = model.rpartition("/")[2].lower()
    host = _provider(url)
    named = (one for one in _PROVIDERS if re.match(one.names, name))
    if preset.protocol is None and (provider := host or next(named, None)):
        return Preset(model, model, _NATIVE, provider.budget, settings=_LIMITS)
    if native and not isinstance(PROTOCOLS[preset.protocol or "plain"], NativeProtocol):
        return replace(preset, protocol=_NATIVE, guessed=True)
    return preset


def connection(url: str, options: Mapping[str, Any]) -> Connection:
    """Return the options of requests to a server, with API and environment variable of the key as its owner has them.

    Raises:
        ConfigError: An option is wrong.
    """
    given, provider = Connection(**options), _provider(url)
    if provider is None:
        return given
    own = {"api": given.api or provider.api, "key_variable": given.key_variable or provider.key_variable}
    return given.model_copy(update=own)


def _provider(url: str) -> _Provider | None:
    host = f".{urlsplit(base_url(url)).hostname}"
    return next((one for one in _PROVIDERS if host.endswith(f".{one.host}")), None)  # regions: eu.api.openai.com
