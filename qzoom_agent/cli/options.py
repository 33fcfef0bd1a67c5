"""Flags that several verbs share, and the agent they describe.

A flag of its own overrides `--set`, which overrides the configuration file. Nothing heavy is imported before an agent
is loaded, so that `--help` of a verb is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qzoom_agent.errors import ConfigError
from qzoom_agent.extensions import is_reference

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent
    from qzoom_agent.config import AgentConfig


def add_agent_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model runs, and how."""
    from qzoom_agent.config import PolicyName

    group = parser.add_argument_group("agent")
    group.add_argument("--model", metavar="M", help="preset name, folder or hub id (default: nano)")
    group.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help="ask --model at this OpenAI-compatible server (http://localhost:8000/v1); several share the work",
    )
    group.add_argument(
        "--api",
        choices=("chat", "responses"),
        help="the server's API: Chat Completions or Responses (default: responses at OpenAI, else chat)",
    )
    group.add_argument(
        "--tools",
        choices=("native", "text"),
        help="form of the model's zoom calls: native calls of the server's API, or text that is parsed here (default: "
        "native for models of OpenAI, Anthropic and Google, else text)",
    )
    group.add_argument(
        "--tool",
        action="append",
        metavar="NAME",
        help="tool that the model may call beside zoom: rotate, enhance, read_text or module:function; may be repeated",
    )
    group.add_argument(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the server's key (default: OPENAI_API_KEY; at Anthropic and Google their own)",
    )
    group.add_argument(
        "--header",
        action="append",
        metavar="NAME:VALUE",
        help="further header of each request to the server; may be repeated",
    )
    group.add_argument(
        "--server-timeout", type=float, metavar="S", help="seconds to wait for one reply of the server (default: 600)"
    )
    group.add_argument(
        "--extra-body",
        metavar="YAML",
        help="further fields of each request to the server, such as '{top_k: 20, seed: null}'; null leaves one out",
    )
    group.add_argument(
        "--perceiver",
        metavar="M",
        help="local model with branches (preset, folder, hub id or module:name) that decides whether and where --model "
        "looks closer, such as for one at a --server",
    )
    group.add_argument(
        "--branches",
        metavar="B",
        help="gate and SD-RPN to use: a folder or a hub id (default: those of the model, or of the perceiver)",
    )
    group.add_argument(
        "--policy",
        choices=get_args(PolicyName),
        help="rule that decides which crops the model sees (default: implicit with branches or a perceiver, else "
        "explicit)",
    )
    group.add_argument(
        "--protocol", metavar="P", help="format of zoom calls: a name or module:name (default: the model's own)"
    )
    group.add_argument(
        "--prompt",
        metavar="FILE",
        help="YAML or JSON file with the model's own words for any part of the conversation (default: the file "
        "qzoom_prompt.yaml in the model's folder, else the protocol's words)",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt, put before what the format itself says there")
    group.add_argument(
        "--budget", type=int, metavar="TOKENS", help="most visual tokens of the coarse view (default: the model's own)"
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


def read_config(args: argparse.Namespace) -> AgentConfig:
    """Return the configuration that the flags describe. Raises ConfigError."""
    from qzoom_agent.config import AgentConfig, read_setting
    from qzoom_agent.models.chat_client import base_url
    from qzoom_agent.models.hosted import served_preset
    from qzoom_agent.models.presets import resolve_model

    config = AgentConfig.load(args.config) if args.config else AgentConfig()
    changes: dict[str, Any] = dict(read_setting(text) for text in args.set)
    flags = {
        "model": args.model,
        "policy": args.policy,
        "protocol": args.protocol,
        "tools": args.tools,
        "own_tools": args.tool,
        "prompt": args.prompt,
        "system": args.system,
        "perceiver": args.perceiver,
        "budget.coarse_tokens": args.budget,
    }
    changes |= {key: value for key, value in flags.items() if value is not None}
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
        args: Flags of `add_agent_flags`.
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

    flags = ("api", "key_variable", "server_timeout", "extra_body", "header")
    given = {name.removeprefix("server_"): getattr(args, name) for name in flags if getattr(args, name) is not None}
    if given and not args.server:
        raise ConfigError(
            "--api, --key-variable, --server-timeout, --extra-body and --header are about a server. Name it with "
            "--server."
        )
    if args.header is not None:
        parts = [text.partition(":") for text in given.pop("header")]
        given["headers"] = {name.strip(): value.strip() for name, _, value in parts}
        if not all(colon and name.strip() for name, colon, _ in parts):
            raise ConfigError("--header takes a name and a value, such as 'api-version: 2026-01-01'.")
    if args.extra_body is not None:
        given["extra_body"] = read_setting(f"extra_body={args.extra_body}")[1]
        if not isinstance(given["extra_body"], dict):
            raise ConfigError(
                f"--extra-body takes fields and their values, such as '{{top_k: 20}}'; got {args.extra_body}."
            )
    if (
        getattr(args, "workers", None) or 1
    ) > 8:  # of `qzoom eval` and `qzoom run`; fewer fit into what a client allows anyway
        given["concurrency"] = args.workers
    return given
