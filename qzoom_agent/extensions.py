"""Doors for extensions: rewards, scorers, tasks, protocols, tools and policy rules that live outside this package.

Wherever the package takes one of these by name, it takes three forms:

- a name of this package, or of an installed package that registers an entry point in the group of that kind
  (`[project.entry-points."qzoom_agent.rewards"]`);
- `module:attribute`, imported from the Python path and the working directory;
- in Python, the object itself, which is recorded as `module:name` (`reference`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from traceback import extract_tb
from typing import Any, Final

from qzoom_agent.errors import ConfigError, QzoomError, describe_error

GROUPS: Final = {
    "reward": "qzoom_agent.rewards",
    "scorer": "qzoom_agent.scorers",
    "task": "qzoom_agent.tasks",
    "protocol": "qzoom_agent.protocols",
    "tool": "qzoom_agent.tools",
    "own tool": "qzoom_agent.own_tools",
    "policy rule": "qzoom_agent.policy_rules",
}
"""Entry point group of each kind of extension."""


@contextmanager
def calling(name: str, *, kind: str) -> Iterator[None]:
    """Raise an error of an extension's own code as a ConfigError that names the extension and the line."""
    try:
        yield
    except QzoomError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        where = extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"The {kind} '{name}' failed with {describe_error(error)} ({where.filename}, line {where.lineno}). Mend it "
            "or its settings, then give the command again: what is done is kept."
        ) from error


def awaited(value: Any) -> Any:
    """Return the result of an awaitable, in this context but from a loop in another thread: one may run in this."""

    async def wait() -> Any:
        return await value

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, wait()).result()


def is_reference(name: str) -> bool:
    """Return whether `name` has the form `module:attribute`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def find(name: str, *, kind: str, known: Mapping[str, Any]) -> Any:
    """Return the extension called `name`: one of `known`, an entry point, or a `module:attribute`.

    Args:
        kind: One of `GROUPS`, for the entry point group and for messages.
        known: What this package itself offers, by name.

    Raises:
        ConfigError: There is no such name, or it cannot be imported.
    """
    if name in known:
        return known[name]
    if is_reference(name):
        return _imported(name, kind)
    group = GROUPS[kind]
    points = entry_points(group=group)
    installed = {point.name: point for point in points}
    if len(meant := sorted({point.value for point in points if point.name == name})) > 1:
        raise ConfigError(
            f"Several installed packages register the {kind} '{name}': {', '.join(meant)}. Write which one is meant in "
            "place of the name, or uninstall the others."
        )
    if name in installed:
        try:
            return installed[name].load()
        except Exception as error:  # whatever a foreign package raises while it is imported
            package = installed[name].dist
            raise ConfigError(
                f"The {kind} '{name}' of the installed package '{package.name if package else installed[name].value}' "
                f"cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    names = sorted([*known, *installed])
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"There is no {kind} '{name}'. Known: {', '.join(names)}. Your own: write 'module:name', or install a package "
        f"with an entry point in the group '{group}'.{hint}"
    )


def reference(value: Any) -> str:
    """Return `module:name` of an object, under which `find` gives it, or its class, again where it can be imported.

    The arguments of a `functools.partial` follow it: with others it is another extension, which no name imports.
    """
    if isinstance(value, partial):
        return reference(value.func) + bound_arguments(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    members = vars(sys.modules.get(named.__module__, sys))
    own = next((name for name, member in members.items() if member is value), named.__qualname__)
    return f"{named.__module__}:{own}"


def bound_arguments(value: partial[Any]) -> str:
    """Return the arguments of a partial in brackets, such as "(limit=20)"; of those that may change, the class.

    Without arguments, the text is empty.
    """
    given = [*(("", one) for one in value.args), *((f"{key}=", one) for key, one in sorted(value.keywords.items()))]
    plain = str | int | float | None
    written = ", ".join(key + (repr(one) if isinstance(one, plain) else reference(one)) for key, one in given)
    return written and f"({written})"


def satisfying(value: Any, protocol: type, *arguments: object, kind: str) -> Any:
    """Return an extension that has every member of `protocol`; a class is called with `arguments` first.

    Raises:
        ConfigError: Members are missing, or the class cannot be called like that.
    """
    made = created(value, *arguments, kind=kind) if isinstance(value, type) else value
    members = [name for name in vars(protocol) if not name.startswith("_") or name == "__call__"]
    missing = [name for name in members if not hasattr(made, name)]
    if missing:
        raise ConfigError(
            f"The {kind} {reference(value)!r} lacks {', '.join(missing)}. What a {kind} has to offer is written at "
            f"{protocol.__module__}.{protocol.__qualname__}."
        )
    return made


def require_call(function: Callable[..., Any], *arguments: str, kind: str, name: str) -> None:
    """Raise ConfigError unless a function can be called with so many arguments, which the message names."""
    given = " and ".join(arguments)
    if not callable(function):
        raise ConfigError(f"The {kind} {name!r} is {type(function).__name__}, not a function of {given}.")
    try:
        takes = signature(function)
    except ValueError:  # some functions written in C tell nothing of what they take
        return
    try:
        takes.bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"The {kind} {name!r} is called with {given}, and takes {takes}: {error}.") from error


def created(maker: Callable[..., Any], *arguments: object, kind: str) -> Any:
    """Return the extension that a class or function makes. Raises ConfigError if it fails."""
    try:
        return maker(*arguments)
    except QzoomError:
        raise
    except Exception as error:  # whatever a foreign class raises
        given = ", ".join(type(one).__name__ for one in arguments)
        raise ConfigError(
            f"The {kind} {reference(maker)!r} cannot be made: {type(error).__name__}: {error}. It is called with "
            f"{given or 'no arguments'}."
        ) from error


def _imported(name: str, kind: str) -> Any:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)  # the `qzoom` command starts without the working directory on its path
    try:
        return resolve_name(name)
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise ConfigError(
            f"The {kind} '{name}' cannot be imported: {type(error).__name__}: {error}. "
            f"'{name}' means '{attribute}' of the module '{module}', found from {here} and the Python path."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
