"""Real receipts (`qzoom_agent.data.receipts`) as pages of paper, transcribed as nano learns them."""

from functools import lru_cache
from pathlib import Path

from PIL import Image

from nano.paper import Line, Paper, transcribed
from qzoom_agent.data.receipts import Receipt, Split, read_receipts


class Receipts:
    """The receipts of one split of a folder, opened when asked for and kept in memory."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Read the index of a folder of receipts; see `read_receipts`."""
        self.folder, self.split = folder, split
        self._receipts = read_receipts(folder, split)
        self._read = lru_cache(maxsize=None)(self._paper)

    def __len__(self) -> int:
        return len(self._receipts)

    def __getitem__(self, index: int) -> Paper:
        return self._read(index % len(self))

    def _paper(self, index: int) -> Paper:
        receipt: Receipt = self._receipts[index]
        with Image.open(self.folder / receipt.image) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
        lines = [Line(line.box, transcribed(line.text)) for line in receipt.lines]
        fields = {name: transcribed(value) for name, value in receipt.fields.items()}
        return Paper(image, tuple(line for line in lines if line.text), fields, name=receipt.image)
