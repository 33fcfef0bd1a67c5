"""Columns of a table of questions, by the names that people give them, and what stands in their cells.

A column that looks like one of ours but is none is an error: a box, an answer or options that nobody reads would make
a figure wrong without a word.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from difflib import SequenceMatcher
from itertools import chain
from typing import Any, Final, Literal

from qzoom_agent.errors import ConfigError

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("image", "images", "image_path", "img_path", "imgname", "img", "image_file", "file_name"),
    "question": ("question", "query", "problem"),
    "answer": ("answer", "label", "solution", "ground_truth", "gt_answer"),
    "answers": ("answers",),
    "options": ("options", "choices", "multi_choice_options", "answer_choices", "candidates"),
    "boxes": (),
    "kind": ("kind", "category"),
    "id": ("id",),
}
"""Our names, and those that are read for each, the preferred one first. Case, spaces and hyphens do not matter."""

_ASKING: Final = ("image", "question", "options", "id")
Form = Literal["xyxy", "xywh"]
Frame = Literal["pixel", "unit", "per_mille"]

_BOX: Final = re.compile(
    r"(?:(?:target|gt|gold|answer|evidence|ground_truth)_)?(?:box(?:es)?|bbox(?:es)?(?:_2d)?|bounding_box(?:es)?)"
    r"(?:_(?P<form>xyxy|xywh))?(?:_(?P<frame>pixels?|px|abs|unit|norm|normali[sz]ed|relative|per_?mille|1000))?"
    r"|(?P<alone>xyxy|xywh)"
)
_LIKE_A_BOX: Final = re.compile(
    r".*box(?:es|s)?\d*d?(?:_.*)?|.*(?:xyxy|xywh).*|rois?|regions?|coords?"
    r"|coordinates|rect(?:angle)?s?|target_instances"
)
_LETTER: Final = re.compile(r"(?:(?:option|choice)_?)?([a-z])")
_CLOSE: Final = 0.8
"""Similarity from which a name is taken for a slip: "anwser" and "answer" have 0.83."""
_OFTEN_MISTYPED: Final = ("image", "question", "answer", "answers", "options", "choices", "boxes", "bbox", "category")


@dataclass(frozen=True)
class BoxColumn:
    """A column of boxes, and the form that its name says."""

    name: str
    form: Form = "xyxy"
    frame: Frame = "pixel"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read, by our names; `a.b` is the field b of a column of records, unless a column
    has that name itself.
    """

    names: Mapping[str, tuple[str, ...]]
    """Of several columns for one of ours, the first counts that is not empty in a row."""
    boxes: tuple[BoxColumn, ...] = ()
    letters: tuple[str, ...] = ()
    """Columns with one option each: A, B, ... or option_a, option_b, ..."""

    def cell(self, row: Mapping[str, Any], name: str) -> Any:
        """Return the row's cell of one of `NAMES`; None if it is empty or the table has no such column."""
        cells = (value(row, column) for column in self.names.get(name, ()))
        return next((cell for cell in cells if cell is not None), None)

    @property
    def top(self) -> tuple[str, ...]:
        """The table's columns that are read, without the image's."""
        read = [column for name, columns in self.names.items() if name != "image" for column in columns]
        named = (*read, *(box.name for box in self.boxes), *self.letters)
        return tuple(dict.fromkeys(part for name in named for part in (name, name.split(".")[0])))


def find_columns(
    table: str, columns: Sequence[str], given: Mapping[str, str] | None = None, *, answers: bool = True
) -> Columns:
    """Return the columns of a table that are read.

    Args:
        table: The table's name, for messages.
        columns: The columns that it has.
        given: Names that our columns have in the table, where they differ. An empty name means none.
        answers: Read answers, boxes and kinds too; else such columns, and slips in their names, do not matter.

    Raises:
        ConfigError: A column has nearly the name of one that is read, or `given` has a name that is not ours.
    """
    given = given or {}
    if unknown := sorted(given.keys() - NAMES.keys()):
        raise ConfigError(
            f"`columns` of {table} says what {', '.join(unknown)} is called, which is not read. Known: "
            f"{', '.join(NAMES)}."
        )
    by_key = {_key(column): column for column in columns}
    twice = [column for column in columns if by_key[_key(column)] != column]
    if twice and any(_key(twice[0]) in known for known in NAMES.values()):
        raise ConfigError(f"{table} has the columns {twice[0]!r} and {by_key[_key(twice[0])]!r}. Leave one out.")
    names: dict[str, tuple[str, ...]] = {ours: (column,) for ours, column in given.items() if column}
    for ours, known in NAMES.items():
        if not answers and ours not in _ASKING:
            continue
        found = tuple(by_key[name] for name in known if name in by_key)
        # The answers that the user names are all that are right.
        if found and ours not in given and not (ours == "answers" and "answer" in given):
            names[ours] = found
    boxes: tuple[BoxColumn, ...] = ()
    if named := names.pop("boxes", ()):
        boxes = (box_column(named[0]) or BoxColumn(named[0]),)
    elif answers and "boxes" not in given:
        boxes = tuple(one for column in columns if (one := box_column(column)))
    letters = _letters(by_key) if "options" not in given else ()
    read = {*chain(*names.values()), *given.values(), *(one.name for one in boxes), *letters}
    if answers:
        _refuse_slips(table, [column for column in columns if column not in read], given=given, boxes=bool(boxes))
    return Columns(names, boxes, letters)


def box_column(name: str) -> BoxColumn | None:
    """Return the form of the boxes in a column of this name, or None if it does not name boxes that are read."""
    found = _BOX.fullmatch(_key(name))
    if found is None:
        return None
    said = found["frame"] or "pixel"
    frame: Frame = "pixel" if said.startswith(("pi", "px", "abs")) else "unit"
    form: Form = "xywh" if "xywh" in (found["form"], found["alone"]) else "xyxy"
    return BoxColumn(name, form, "per_mille" if said.startswith(("per", "1")) else frame)


def value(row: Mapping[str, Any], name: str) -> Any:
    """Return the cell of a column, or of a field of one; None if it is empty. Raises ConfigError without the field."""
    column, *fields = [name] if name in row else name.split(".")
    cell: Any = row.get(column)
    for key in fields:
        if cell is None:
            break
        if not isinstance(cell, Mapping) or key not in cell:
            there = f"its fields are {', '.join(map(str, cell))}" if isinstance(cell, Mapping) else "it is no record"
            raise ConfigError(f"there is no field {key!r} for {name!r} in the column {column!r}: {there}")
        cell = cell[key]
    return None if is_empty(cell) else cell


def column_of(name: str, columns: Sequence[str]) -> str:
    """Return the column of a table that a name means: the one called so, else the one that it names a field of."""
    return name if name in columns else name.split(".")[0]


def is_empty(cell: object) -> bool:
    """Return whether there is nothing in a cell: null, not-a-number or the empty text."""
    return cell is None or cell == "" or (isinstance(cell, float) and cell != cell)


def _key(column: str) -> str:
    return re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", column.strip()).lower()


def _letters(by_key: Mapping[str, str]) -> tuple[str, ...]:
    found = {match[1]: column for key, column in by_key.items() if (match := _LETTER.fullmatch(key))}
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz"[: len(found)] if letter in found]
    return tuple(found[letter] for letter in letters) if {"a", "b"} <= found.keys() else ()


def _refuse_slips(table: str, others: Sequence[str], *, given: Mapping[str, str], boxes: bool) -> None:
    for column in others:
        # a name with one of ours as its first word is of another thing, as questionId and answer_type are
        longer = any(re.match(rf"{known}(?=[_A-Z\d\s-])", column) for known in _OFTEN_MISTYPED)
        near = None if longer else _nearest(_key(column))
        if near is None and not boxes and _LIKE_A_BOX.fullmatch(_key(column)):
            near = "box"
        ours = next((ours for ours, known in NAMES.items() if near in known), "boxes")
        if near and ours not in given:  # else the user has said which column it is, or that there is none
            raise ConfigError(
                f"{table} has a column {column!r}, which is not read. Did you mean {near!r}? Call it {near}, or what "
                f"it is; in a recipe, say it in `columns` ({ours}: {column}, or an empty name for none)."
            )


def _nearest(key: str) -> str | None:
    ratios = {known: SequenceMatcher(None, key, known).ratio() for known in _OFTEN_MISTYPED}
    best = max(ratios, key=lambda known: ratios[known])
    return best if ratios[best] >= _CLOSE and all(key not in names for names in NAMES.values()) else None


# -- cells: texts, lists, and lists that are written as text ----------------------------------------------------------


def text(value: object) -> str:
    """Return a cell's text: of a number as it is written, true or false; ConfigError for a list or a record."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(f"a text is needed, not {type(value).__name__} ({value!r:.60})")


def id_text(value: object) -> str:
    """Return an id as text: as `text`, and of a decimal number or a date, which databases write."""
    return str(value) if isinstance(value, Decimal | date | time) else text(value)


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


def first_of(row: Mapping[str, Any], column: str, *, default: str) -> str:
    """Return the first text in a column that is not empty; `default` without one."""
    return next(filter(None, texts(row.get(column))), default)


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
