"""What stands in the cells of a table: texts, lists, and lists that are written as text."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qzoom_agent.errors import ConfigError


def text(value: object) -> str:
    """Return a cell's text: of a number as it is written, true or false; ConfigError for a list or a record."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(f"a text is needed, not {type(value).__name__} ({value!r:.60})")


def texts(cell: object) -> tuple[str, ...]:
    """Return the texts in a cell: of a list, a list written as text (JSON or Python), or one; none of an empty cell."""
    return tuple(map(str, items(cell)))


def items(cell: object) -> Sequence[Any]:
    """Return the items of a cell: a list, a list written as text, or one item; raise ConfigError if it is cut off."""
    if cell is None or cell == "":
        return ()
    if isinstance(cell, str) and cell.strip().startswith("["):
        found = written(cell)
        if not isinstance(found, list):
            raise ConfigError(f"A cell should hold a list, such as [1, 2], but holds {cell[:80]!r}.")
        return found
    return (cell,) if isinstance(cell, str | Mapping) or not isinstance(cell, Iterable) else tuple(cell)


def first_of(row: Mapping[str, Any], *columns: str, default: str) -> str:
    """Return the first text in one of these columns that is there and not empty."""
    return next((text for column in columns for text in texts(row.get(column)) if text), default)


def written(cell: str) -> list[Any] | dict[str, Any] | None:
    """Return the list or mapping that a text writes in JSON or Python, or None if it writes neither."""
    if cell.strip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list | dict):
            return found
    return None
