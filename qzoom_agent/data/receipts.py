"""A folder of receipts: scans, the text and place of every line of print, and the fields that are known.

`receipts.jsonl` holds one receipt a line, the scans lie beside it:

    {"image": "images/000.jpg", "fields": {"company": "...", "date": "...", "address": "...", "total": "9.00"},
     "lines": [{"box": [72, 25, 326, 64], "text": "TAN WOON YANN"}, ...]}

Boxes are left, top, right, bottom in pixels of the scan. The split follows from the position in the file, so that
training and evaluation never share a receipt; one that is there twice counts as seen in training.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from qzoom_agent.errors import ConfigError
from qzoom_agent.files import first_fault

Rect = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
"""Left, top, right and bottom edge in pixels."""
Split = Literal["train", "validation", "test", "all"]
_PERIOD: Final = 25
_EVERY, _VALIDATION, _TEST = frozenset(range(_PERIOD)), frozenset({3, 13}), frozenset({8, 18, 23})
SPLITS: Final[Mapping[str, frozenset[int]]] = {
    "train": _EVERY - _VALIDATION - _TEST,
    "validation": _VALIDATION,
    "test": _TEST,
    "all": _EVERY,
}
"""Positions in every 25 receipts of a file: of 500, 400 for training, 40 to tune on and 60 to report.

Receipts of the last two that are also among the first are left out of them.
"""
INDEX: Final = "receipts.jsonl"


@dataclass(frozen=True)
class Line:
    """A stretch of print without wide gaps."""

    box: Rect
    """Its place on the page."""
    text: str
    centers: tuple[float, ...] | None = None
    """Horizontal centre of every character of `text` in pixels of the page, where it is known."""

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def middle(self) -> float:
        """Vertical centre."""
        return (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Receipt:
    """One receipt."""

    image: str
    """Path of its scan, relative to the folder."""
    lines: tuple[Line, ...]
    """Its lines in reading order."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Values by the name of their field: company, date, address, total."""
    number: int = 0
    """Position in the file, from 0."""

    @property
    def sale(self) -> tuple[str, ...] | None:
        """Company, date and total, which two receipts of different sales do not share; None unless all are known."""
        known = tuple(self.fields[name] for name in ("company", "date", "total") if name in self.fields)
        return known if len(known) == 3 else None


_READER: Final = TypeAdapter(Receipt)


def read_receipts(folder: Path, split: str = "test") -> list[Receipt]:
    """Return the receipts of one split of a folder; their scans are not opened.

    Args:
        folder: Folder that holds `receipts.jsonl`, or that file.
        split: One of `SPLITS`.

    Raises:
        ConfigError: There is no such file or split, a row is no receipt, or no receipt is in the split.
    """
    index = folder if folder.is_file() else folder / INDEX
    if split not in SPLITS:
        raise ConfigError(f"Receipts have no split {split!r}. The splits are {', '.join(SPLITS)}.")
    try:
        rows = [row for row in index.read_bytes().removeprefix(BOM_UTF8).splitlines() if row.strip()]
    except OSError as error:
        raise ConfigError(f"Cannot read {index}: {error.strerror}. Give a folder with {INDEX}.") from None
    every = [_receipt(index, number, row) for number, row in enumerate(rows)]
    trained = {one.sale for one in every if one.number % _PERIOD in SPLITS["train"]} - {None}
    unseen = split in ("validation", "test")
    found = [one for one in every if one.number % _PERIOD in SPLITS[split] and not (unseen and one.sale in trained)]
    if not found:
        raise ConfigError(
            f"{index} holds {len(rows)} receipts, and none is in the split {split!r}. The split 'all' has all of them."
        )
    return found


def _receipt(index: Path, number: int, row: bytes) -> Receipt:
    try:
        receipt = _READER.validate_json(row)
    except ValidationError as error:
        given = json.loads(row) if error.errors()[0]["type"] == "missing" else None
        there = f" There are: {', '.join(given)}." if isinstance(given, dict) else ""
        raise ConfigError(
            f"Row {number + 1} of {index} is no receipt: {first_fault(error)}. Needed: image, fields, lines.{there}"
        ) from None
    kept = tuple(
        line for line in receipt.lines if line.text.strip() and line.box[0] < line.box[2] and line.box[1] < line.box[3]
    )
    fields = {name: value for name, value in receipt.fields.items() if value.strip()}
    return Receipt(receipt.image, kept, fields, number)
