"""Real receipts (`qzoom_agent.data.receipts`) and other pages of real print, transcribed as nano learns them."""

from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image

from nano.paper import Paper, transcribed, transcribed_line
from qzoom_agent.data.receipts import Receipt, Split, read_receipts

PAGES_INDEX: Final = "lines.jsonl"
"""File of a folder of pages (`pdf_pages.py`), in the form of `receipts.jsonl`, without fields."""
PAGES_SHARE: Final = 0.25
"""Of the real paper of training that has other pages, too."""


class Receipts:
    """The receipts of one split of a folder, opened when asked for and kept in memory."""

    def __init__(self, folder: Path, split: Split, *, pages: "Receipts | None" = None, kept: int | None = None) -> None:
        """Read the index of a folder of receipts; see `read_receipts`.

        Args:
            folder: Folder of receipts, or the file of an index in their form.
            split: Which of them.
            pages: Other real print that is shown among them (`any`).
            kept: How many stay in memory; None: all.
        """
        self.folder, self.split, self.pages = folder.parent if folder.is_file() else folder, split, pages
        self._receipts = read_receipts(folder, split)
        self._read = lru_cache(maxsize=kept)(self._paper)

    def __len__(self) -> int:
        return len(self._receipts)

    def __getitem__(self, index: int) -> Paper:
        return self._read(index % len(self))

    def any(self, rng: Random) -> Paper:
        """Return a receipt or, at a share, one of the other pages."""
        if self.pages is not None and rng.random() < PAGES_SHARE:
            return self.pages.any(rng)
        return self[rng.randrange(len(self))]

    def _paper(self, index: int) -> Paper:
        receipt: Receipt = self._receipts[index]
        with Image.open(self.folder / receipt.image) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
        lines = [transcribed_line(line) for line in receipt.lines]
        fields = {name: transcribed(value) for name, value in receipt.fields.items()}
        return Paper(image, tuple(line for line in lines if line.text), fields, name=receipt.image)


def read_pages(folder: Path) -> Receipts:
    """Return the pages of a folder that `pdf_pages.py` wrote. They are large, so few stay in memory."""
    return Receipts(folder / PAGES_INDEX, "all", kept=64)
