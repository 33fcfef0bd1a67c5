"""Paper: a scanned or drawn page, its lines of print and the fields that a question may ask for.

Real receipts and pages (`receipts.py`) and drawn ones (`drawn_paper.py`) have the same form, so that everything after
them, views, labels and questions, is written once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from PIL import Image

from qzoom_agent.data.receipts import Line as Line
from qzoom_agent.data.receipts import Rect as Rect

ALPHABET: Final = "".join(chr(code) for code in (*range(0x20, 0x61), *range(0x7B, 0x7F)))
"""Characters that are told apart: printable ASCII without lower case. Receipts are transcribed in capitals."""
BLANK: Final = 0
"""Class of a frame without a character; character `ALPHABET[i]` is class `i + 1`."""
CLASSES: Final = len(ALPHABET) + 1
_CLASS_OF: Final = {char: index + 1 for index, char in enumerate(ALPHABET)}


@dataclass(frozen=True)
class Paper:
    """One page.

    Attributes:
        image: The scan, in grey ("L") or colour ("RGB").
        lines: Its lines in reading order.
        fields: Values by the name of their field: company, date, address, total.
        name: What the page is called in tables and logs.
    """

    image: Image.Image
    lines: tuple[Line, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


def transcribed(text: str) -> str:
    """Return `text` as it is learned: capitals, single spaces, characters of `ALPHABET` alone."""
    plain = " ".join(text.upper().split())
    return "".join(char for char in plain if char in _CLASS_OF)


def transcribed_line(line: Line) -> Line:
    """Return a line as it is learned, with the places of the characters that are left where they are known."""
    if line.centers is None:
        return Line(line.box, transcribed(line.text))
    pairs = zip(line.text, line.centers, strict=True)
    kept = [(char.upper(), center) for char, center in pairs if char.upper() in _CLASS_OF]
    return Line(line.box, "".join(char for char, _ in kept), tuple(center for _, center in kept))


def classes_of(text: str) -> list[int]:
    """Return the class of every character of a transcribed text."""
    return [_CLASS_OF[char] for char in text]


def text_of(classes: list[int]) -> str:
    """Return the text of classes without blanks."""
    return "".join(ALPHABET[number - 1] for number in classes)
