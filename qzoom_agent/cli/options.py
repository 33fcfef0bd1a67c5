"""Flags that several verbs share, and the agent they describe.

Flags are made from the fields of a configuration, which say type, default and description once. A flag of its own
overrides `--set`, which overrides the configuration file. Nothing heavy is imported before an agent
is loaded, so that `--help` of a verb is instant.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import is_reference

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from qzoom_agent.agent import Agent
    from qzoom_agent.config import AgentConfig


SETTINGS: Final = {
    "model": "--model M",
    "policy": "--policy",
    "protocol": "--protocol P",
    "tools": "--tools",
    "own_tools": "--tool NAME",
    "prompt": "--prompt FILE",
    "system": "--system TEXT",
    "perceiver": "--perceiver M",
}
"""Keys of the configuration that have flags of their own."""
BUDGET: Final = {"coarse_tokens": "--budget TOKENS"}
CONNECTION: Final = {"api": "--api", "key_variable": "--key-variable NAME", "timeout": "--server-timeout S"}


def add_column_flag(group: argparse._ActionsContainer) -> None:
    """Add the flag that says what the columns of a table are called."""
    group.add_argument(
        "--column",
        dest="columns",
        action="append",
        type=_column,
        metavar="OURS=NAME",
        help="what a column of your table is called, such as question=prompt (repeat it for others)",
    )


def _column(text: str) -> tuple[str, str]:
    ours, equals, name = text.partition("=")
    if not (ours and equals):
        raise argparse.ArgumentTypeError(f"write OURS=NAME, such as question=prompt; got {text!r}")
    return ours.strip(), name.strip()


def add_agent_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model runs, and how."""
    from qzoom_agent.config import AgentConfig, BudgetConfig
    from qzoom_agent.models.connection import Connection

    group = parser.add_argument_group("agent")
    add_fields(group, AgentConfig, SETTINGS)
    add_fields(group, BudgetConfig, BUDGET)
    group.add_argument(
        "--branches",
        metavar="B",
        help="gate and SD-RPN to use: a folder or a hub id (default: those of the model, or of the perceiver)",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="configuration in YAML, such as the config.yaml of a saved run. That also holds the model's own values; "
        "--set KEY=null returns one to the model",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, such as budget.max_turns=3"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    server = parser.add_argument_group("server of the model")
    server.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help="ask --model at this OpenAI-compatible server (http://localhost:8000/v1); several share the work",
    )
    add_fields(server, Connection, CONNECTION)
    server.add_argument(
        "--header", action="append", metavar="NAME:VALUE", help="further header of each request; may be repeated"
    )
    server.add_argument(
        "--extra-body",
        metavar="YAML",
        help="further fields of each request, such as '{top_k: 20, seed: null}'; null leaves one out",
    )


def read_config(args: argparse.Namespace) -> AgentConfig:
    """Return the configuration that the flags describe. Raises ConfigError."""
    from qzoom_agent.config import AgentConfig, read_setting
    from qzoom_agent.models.chat_client import base_url
    from qzoom_agent.models.hosted import served_preset
    from qzoom_agent.models.presets import resolve_model

    config = AgentConfig.load(args.config) if args.config else AgentConfig()
    changes: dict[str, Any] = dict(read_setting(text) for text in args.set)
    changes |= given(args, SETTINGS) | {f"budget.{key}": value for key, value in given(args, BUDGET).items()}
    config = config.replace(**changes)
    if args.server:
        for url in args.server:
            base_url(url)
        preset = served_preset(args.server[0], config.model, native=config.tools == "native")
    else:
        preset = resolve_model(config.model)
    if config.own_tools:
        from qzoom_agent.zoom.own_tools import require_place  # loads LangChain

        require_place(config.own_tools, config.protocol or preset.protocol)
    if config.perceiver and not is_reference(config.perceiver):
        resolve_model(config.perceiver)
    return config


def load_agent(args: argparse.Namespace, *, device: str | None = None) -> Agent:
    """Return the agent that the flags describe.

    Args:
        device: Where the model runs, instead of --device.

    Raises:
        ConfigError, BackendError: The flags do not fit, or the model cannot be loaded.
    """
    config = read_config(args)
    options = _server_options(args)
    # Last, because it takes seconds: a wrong flag or name must not wait for these imports.
    from qzoom_agent.agent import Agent

    where, branches = device or args.device, args.branches
    if branches and not Path(branches).is_dir():
        from qzoom_agent.perception.hub import local_branches

        branches = str(local_branches(branches))
    if config.perceiver and not is_reference(config.perceiver):
        from qzoom_agent.models.perceiver import load_perceiver

        options["perceiver"] = load_perceiver(config.perceiver, branches=branches, device=where)
        branches = None
    if args.server:
        if branches:
            raise ConfigError(
                "Branches need a model's hidden states, which a server keeps. Leave out --branches, or name the local "
                "model that they belong to (--perceiver)."
            )
        return Agent.from_server(args.server, model=config.model, config=config, **options)
    return Agent.from_pretrained(config.model, config=config, device=where, branches=branches, **options)


def _server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Agent.from_server` that flags give. Raises ConfigError for flags without --server."""
    from qzoom_agent.config import read_setting

    options = given(args, CONNECTION)
    if (options or args.header or args.extra_body) and not args.server:
        raise ConfigError(
            "--api, --key-variable, --server-timeout, --extra-body and --header are about a server. Name it with "
            "--server."
        )
    if args.header:
        parts = [text.partition(":") for text in args.header]
        options["headers"] = {name.strip(): value.strip() for name, _, value in parts}
        if not all(colon and name.strip() for name, colon, _ in parts):
            raise ConfigError("--header takes a name and a value, such as 'api-version: 2026-01-01'.")
    if args.extra_body is not None:
        options["extra_body"] = read_setting(f"extra_body={args.extra_body}")[1]
        if not isinstance(options["extra_body"], dict):
            raise ConfigError(
                f"--extra-body takes fields and their values, such as '{{top_k: 20}}'; got {args.extra_body}."
            )
    most = max(getattr(args, flag, None) or 1 for flag in ("workers", "batch"))
    if args.server and most > 8:  # fewer fit into what a client allows anyway
        options["concurrency"] = most
    return options


# -- flags made from fields --------------------------------------------------------------------------------------------


def add_fields(flags: argparse._ActionsContainer, section: type[BaseModel], names: Mapping[str, str]) -> None:
    """Add a flag for each of these fields. One that is not given stays None, so that the configuration has its default.

    Args:
        names: Flag of each field with a name for its value, such as {"batch": "--batch N"}.
    """
    for name, flag in names.items():
        option, _, metavar = flag.partition(" ")
        field = section.model_fields[name]
        flags.add_argument(option, help=_help(field), **_reading(_kind(field), metavar))


def given(args: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields whose flags were given."""
    values = {name: getattr(args, flag.split()[0].strip("-").replace("-", "_")) for name, flag in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _kind(field: FieldInfo) -> Any:
    """Return the type of a field's values other than None."""
    kinds = get_args(field.annotation)
    return next(one for one in kinds if one is not NoneType) if NoneType in kinds else field.annotation


def _reading(kind: Any, metavar: str) -> dict[str, Any]:
    """Return how argparse reads values of a type."""
    if kind is bool:
        return {"action": "store_true", "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": metavar}
    return {"type": kind, "metavar": metavar}


def _help(field: FieldInfo) -> str:
    """Return the first sentence of a description, and the default, which "None: ..." at its end says in words."""
    text, _, default = " ".join((field.description or "").split()).replace("`", "").partition(" None: ")
    text = re.split(r"\.(?: |$)", text)[0]
    text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
    if get_origin(_kind(field)) is tuple:
        text += "; may be repeated"
    value = field.default
    default = default.rstrip(".") or (f"{value:g}" if isinstance(value, float) else str(value or ""))
    return (f"{text} (default: {default})" if default and value != () else text).replace("%", "%%")
