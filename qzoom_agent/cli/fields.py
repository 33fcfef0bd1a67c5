"""Flags made from the fields of a configuration, which say type, default and description once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def add_fields(flags: argparse._ActionsContainer, section: type[BaseModel], names: Mapping[str, str]) -> None:
    """Add a flag for each of these fields. One that is not given stays None, so that the configuration has its default.

    Args:
        flags: Parser or group.
        section: The configuration.
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
