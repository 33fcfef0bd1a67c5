"""A sheet of paper that is printed from top to bottom: rows of cells, parts side by side, rules and barcodes."""

from collections.abc import Callable, Sequence
from random import Random

from nano.printer import Strip, Type, pick_type

Cell = tuple[str, str, float]
"""Text, alignment ("l", "r" or "c") and place as a share of the printed width."""
Part = tuple[float, float, Callable[[], None]]
"""Left and right edge as shares of the printed width, and the function that prints what lies between them."""


class Sheet:
    """A strip with a cursor: rows are set one below the other.

    Attributes:
        strip: The print so far.
        type: Type of plain rows.
        left, right: Edges of what is printed, in dots.
        edge: Where a cell that has no room within them ends at the latest.
        y: Top of the next row, in dots.
        money: Format of an amount.
        colon: Print between a label and its value.
    """

    def __init__(
        self,
        rng: Random,
        *,
        width: int,
        height: int,
        columns: tuple[float, float] = (26, 56),
        margin: tuple[float, float] = (0.01, 0.08),
    ) -> None:
        """Take an empty sheet.

        Args:
            rng: Chooses typeface, leading, margins and formats.
            width: Width in dots.
            height: Height in dots.
            columns: Fewest and most characters across.
            margin: Least and greatest margin at either side, as a share of the width.
        """
        self.rng, self.width = rng, width
        self.strip = Strip(width, height)
        self.type = pick_type(rng, width=width, columns=columns)
        self.left = width * rng.uniform(*margin)
        self.right = width * rng.uniform(1 - margin[1], 1 - margin[0])
        self.edge = width - 2.0
        self.leading = rng.uniform(1.15, 1.7)
        self.y = rng.uniform(8, 60)
        self.money = rng.choice(
            ("{:.2f}", "{:.2f}", "{:.2f}", "{:,.2f}", "RM{:.2f}", "RM {:.2f}", "${:.2f}", "{:.2f} SR")
        )
        self.colon = rng.choice((":", " :", "", ": ", ":"))

    @property
    def full(self) -> bool:
        return self.y > self.strip.image.height - 6 * self.type.size

    @property
    def rows_left(self) -> int:
        """Plain rows until the sheet is full."""
        return int((self.strip.image.height - 6 * self.type.size - self.y) / (self.type.size * self.leading))

    @property
    def wide(self) -> float:
        """Printed width in dots."""
        return self.right - self.left

    def down(self, type_: Type | None = None, *, gap: float = 0.0) -> None:
        """Move the cursor by a row, and by a gap in sizes of the plain type."""
        size = (type_ or self.type).size * (type_ or self.type).stretch[1]
        self.y += size * self.leading + gap * self.type.size

    def row(self, cells: Sequence[Cell], type_: Type | None = None) -> None:
        """Print cells side by side; those that there is no room for are left out."""
        set_in = type_ or self.type
        if sum(set_in.width(text) for text, _, _ in cells) > 0.9 * self.wide:
            set_in = self.type
        end = -1.0
        for text, align, place in cells:
            text = text.strip()
            while text and set_in.width(text) > self.wide:
                text = text[:-1].strip()
            if not text or self.full:
                continue
            width = set_in.width(text)
            x = self.left + place * self.wide - {"l": 0.0, "r": width, "c": width / 2}[align]
            x = min(max(x, 1.0, end + 0.8 * set_in.size), self.edge - width)
            if x < end + 0.4 * set_in.size:
                continue
            self.strip.put(text, set_in, x=x, y=self.y)
            end = x + width
        self.down(set_in)

    def rows(self, texts: Sequence[str], type_: Type | None = None, *, align: str = "l", place: float = 0.0) -> None:
        """Print texts one below the other, each broken between words where it is too long.

        What does not fit in a type of its own is printed in the plain type.
        """
        room = 0.9 * self.wide * (1 - place if align == "l" else 1)
        set_in = type_ or self.type
        if any(set_in.width(text) > room for text in texts):
            set_in = self.type
        for text in texts:
            for part in broken(text, set_in, room):
                self.row([(part, align, place)], set_in)

    def side_by_side(self, *parts: Part) -> None:
        """Print parts beside each other and go on below the longest."""
        left, wide, right, edge, top, lowest = self.left, self.wide, self.right, self.edge, self.y, self.y
        for start, end, fill in parts:
            self.left, self.right, self.y = left + start * wide, left + end * wide, top
            self.edge = self.right
            fill()
            lowest = max(lowest, self.y)
        self.left, self.right, self.edge, self.y = left, right, edge, lowest

    def rule(self) -> None:
        """Print a line across, more often than not."""
        if self.rng.random() < 0.6:
            self.strip.rule(round(self.y + 0.1 * self.type.size), self.rng, self.type)
            self.y += 0.6 * self.type.size

    def line(self, *, weight: int = 1) -> None:
        """Print a solid line as wide as the print."""
        y = round(self.y)
        self.strip.draw.line((self.left, y, self.right, y), fill=0, width=weight)
        self.y += weight + 0.5 * self.type.size

    def barcode(self, start: float, end: float, *, tall: float) -> None:
        """Print a barcode between two shares of the printed width; `tall` is its height in dots."""
        x, last = self.left + start * self.wide, self.left + end * self.wide
        unit = max(1, round((last - x) / self.rng.randint(90, 150)))
        while x < last:
            bar = unit * self.rng.choice((1, 1, 1, 2, 2, 3))
            self.strip.draw.rectangle((round(x), self.y, round(x) + bar - 1, self.y + tall), fill=0)
            x += bar + unit * self.rng.choice((1, 1, 2, 2, 3))
        self.y += tall + 0.5 * self.type.size

    def emphasis(self, chance: float) -> Type:
        """Return a larger type, at a chance."""
        if self.rng.random() > chance:
            return self.type
        return self.type.scaled(*self.rng.choice(((1, 2), (2, 1), (2, 2))))

    def large(self, times: float) -> Type:
        """Return a type so many times as large: dots are doubled, shapes are set larger."""
        if self.type.smooth:
            return self.type.sized(times)
        return self.type.scaled(max(1, round(times)), max(1, round(times)))


def broken(text: str, type_: Type, width: float) -> list[str]:
    """Return a text in lines of at most a width in dots, broken between words; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if type_.width(longer) <= width:
            lines[-1] = longer
            continue
        while word and type_.width(word) > width:
            word = word[:-1]
        lines.append(word)
    return [line for line in lines if line]
