"""Questions as they are asked: options, instructions, and the cells that tables write them in."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from qzoom_agent.errors import ConfigError

LETTER: Final = "Answer with the option's letter from the given choices directly."
SHORT: Final = "Answer the question using a single word or phrase."
_MARK: Final = re.compile(r"(?:^|(?<=\s))(?:\(([A-H])\)|([A-H])[.):])[ \t]*")


def letter(index: int) -> str:
    """A for 0."""
    return chr(ord("A") + index)


def listed(options: Sequence[str]) -> str:
    """The options one a line, as (A) ..., (B) ..."""
    return "\n".join(f"({letter(index)}) {option}" for index, option in enumerate(options))


def instructed(question: str, instruction: str) -> str:
    """The question and the instruction on a line of its own, unless the question ends with it already."""
    question = question.rstrip()
    return question if question.endswith(instruction) else f"{question}\n{instruction}"


def inline_options(text: str) -> tuple[str, ...]:
    """The options that a question lists itself, as "(A) red (B) blue" or "A. red" lines; nothing if it lists none.

    >>> inline_options("Which colour? (A) red (B) dark blue\\nAnswer directly.")
    ('red', 'dark blue')
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if (mark[1] or mark[2]) == letter(len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return tuple((text[mark.end() : end].split("\n") or [""])[0].strip() for mark, end in zip(marks, ends, strict=True))


def bare(option: str) -> str:
    """An option without the letter before it: "(A) red" is red."""
    mark = _MARK.match(option.strip())
    return option.strip()[mark.end() :] if mark else option.strip()


def texts(cell: object) -> tuple[str, ...]:
    """The texts in a cell: a list, a list written as text (JSON or Python), or one text; empty for an empty cell."""
    return tuple(str(item) for item in items(cell))


def items(cell: object) -> Sequence[Any]:
    """The items of a cell that holds a list, a list written as text, or one item; ConfigError if it is cut off."""
    if cell is None or cell == "":
        return ()
    if isinstance(cell, str) and cell.strip().startswith("["):
        return _written(cell)
    return (cell,) if isinstance(cell, str) or not isinstance(cell, Iterable) else tuple(cell)


def first_of(row: Mapping[str, Any], *columns: str, default: str) -> str:
    """The first text in one of these columns that is there and not empty."""
    return next((text for column in columns for text in texts(row.get(column)) if text), default)


def _written(cell: str) -> Sequence[Any]:
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(cell)
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, list):
            return found
    raise ConfigError(f"A cell should hold a list, such as [1, 2], but holds {cell[:80]!r}.")
