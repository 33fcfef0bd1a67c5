"""Real receipts from a folder of the form `receipts.jsonl` + `images/`, and their split.

Each line of `receipts.jsonl` is one receipt: `image` (a path below the folder), `fields` (company, date, address,
total) and `lines` (`box` in pixels and `text`). The split is fixed by position in the file, so that every run, now and
later, keeps the same receipts unseen.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image

from nano.paper import Line, Paper, transcribed
from qzoom_agent.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: Final[dict[Split, frozenset[int]]] = {
    "train": frozenset({0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20, 21, 22, 24}),
    "validation": frozenset({3, 13}),
    "test": frozenset({8, 18, 23}),
}
"""Positions in every 25 receipts of the file: of 500, 400 for training, 40 to tune on and 60 to report."""
_PERIOD: Final = 25


def split_of(index: int) -> Split:
    """Return the split of the receipt at this position of the file."""
    return next(name for name, places in SPLITS.items() if index % _PERIOD in places)


class Receipts:
    """The receipts of one split of a folder, read when asked for and kept in memory."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Read the index of a folder of receipts.

        Raises:
            ConfigError: `folder` holds no `receipts.jsonl`, or the split is empty.
        """
        index = folder / "receipts.jsonl"
        if not index.is_file():
            raise ConfigError(f"No receipts found: {index} does not exist. Give a folder with receipts.jsonl.")
        rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        self.folder, self.split = folder, split
        self._rows: Sequence[dict[str, Any]] = [row for at, row in enumerate(rows) if split_of(at) == split]
        if not self._rows:
            raise ConfigError(f"{index} holds {len(rows)} receipts, and none is in the split {split!r}.")
        self._read = lru_cache(maxsize=None)(self._paper)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Paper:
        return self._read(index % len(self))

    def _paper(self, index: int) -> Paper:
        row = self._rows[index]
        with Image.open(self.folder / row["image"]) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
        lines = [_line(line["box"], line["text"]) for line in row["lines"]]
        fields = {name: transcribed(value) for name, value in row["fields"].items()}
        return Paper(image, tuple(line for line in lines if line.text), fields, name=row["image"])


def _line(box: Sequence[float], text: str) -> Line:
    left, top, right, bottom = (float(edge) for edge in box)
    return Line((left, top, right, bottom), transcribed(text))
