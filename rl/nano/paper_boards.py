"""Paper as a board that can be asked: its fields, and what stands beside a label in the same row.

Gold boxes come from the lines. A question is left out where its answer is not printed on the page as it is given, or
where more than one place could be meant.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from nano.paper import Line, Paper, Rect
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact
from qzoom_agent.evaluation.tasks.needle.ink import Glyph

FIELD_QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "company": ("what is the company?", "which is the company?", "who is the seller?"),
    "date": ("what is the date?", "what date is on the receipt?", "which is the date?"),
    "address": ("what is the address?", "where is the company?", "which is the address?"),
    "total": ("what is the total?", "how much is the total?", "what is the total amount?"),
}
BESIDE_QUESTIONS: Final = ("what stands beside {}?", "what is next to {}?", "what is the value of {}?")
LINE_QUESTION: Final = "read the line at {}."
_TOTAL_WORDS: Final = ("TOTAL", "AMOUNT DUE", "BALANCE", "NETT", "PAYABLE")
_FIRST_LINES: Final = 12
"""Lines from the top among which company and address stand."""


@dataclass(slots=True)
class PaperBoard(Board):
    """A page as a board: `glyphs` are all its characters, `facts` what can be asked of it."""

    paper: Paper = field(kw_only=True)


def board_of(rng: Random, paper: Paper) -> PaperBoard:
    """Return a page as a board with all its questions, each in one of its wordings."""
    glyphs = [glyph for line in paper.lines for glyph in glyphs_of(line)]
    facts = [*_fields(rng, paper), *_beside(rng, paper)]
    return PaperBoard(paper.image.convert("RGB"), facts, glyphs, paper=paper)


def centers_of(line: Line) -> tuple[float, ...]:
    """Return where the characters of a line are: as known, or spread evenly."""
    if line.centers is not None:
        return line.centers
    width = (line.box[2] - line.box[0]) / max(1, len(line.text))
    return tuple(line.box[0] + (at + 0.5) * width for at in range(len(line.text)))


def glyphs_of(line: Line) -> list[Glyph]:
    y, height = (line.box[1] + line.box[3]) / 2, 0.7 * line.height
    return [Glyph(char, x, y, height) for char, x in zip(line.text, centers_of(line), strict=True)]


def part_of(line: Line, start: int, end: int) -> Rect:
    """Return the box of some characters of a line."""
    centers = centers_of(line)
    half = (line.box[2] - line.box[0]) / max(1, len(line.text)) / 2
    return max(line.box[0], centers[start] - half), line.box[1], min(line.box[2], centers[end - 1] + half), line.box[3]


def found_in(line: Line, text: str) -> Rect | None:
    """Return the box of a text that stands in a line once, by itself."""
    start = line.text.find(text)
    if start < 0 or not text or line.text.count(text) > 1:
        return None
    before, after = line.text[:start][-1:], line.text[start + len(text) :][:1]
    if before.isalnum() or after.isalnum() or (text[0].isdigit() and before in (".", ",") and before):
        return None
    return part_of(line, start, start + len(text))


def _fields(rng: Random, paper: Paper) -> Iterator[Fact]:
    for name, value in paper.fields.items():
        boxes = _address(paper, value) if name == "address" else _place(paper, name, value)
        if boxes and name in FIELD_QUESTIONS:
            yield Fact("receipt-field", name, rng.choice(FIELD_QUESTIONS[name]), value, (boxes,))


def _place(paper: Paper, name: str, value: str) -> Rect | None:
    """Return where a field of one line stands. Of several totals it is one beside a word for it, the last of them."""
    lines = paper.lines[:_FIRST_LINES] if name == "company" else paper.lines
    places = [(line, box) for line in lines if (box := found_in(line, value)) is not None]
    if name == "total":
        named = [(line, box) for line, box in places if any(_named_total(one) for one in row_of(paper, line))]
        places = named or (places if len(places) == 1 else [])
        return places[-1][1] if places else None
    return places[0][1] if places else None


def _named_total(line: Line) -> bool:
    return any(word in line.text for word in _TOTAL_WORDS) and "SUB" not in line.text


def row_of(paper: Paper, line: Line) -> list[Line]:
    """Return the lines in the same row of a page, from left to right, this one among them."""
    middle = (line.box[1] + line.box[3]) / 2
    same = [one for one in paper.lines if abs((one.box[1] + one.box[3]) / 2 - middle) < 0.5 * line.height]
    return sorted(same, key=lambda one: one.box[0])


def _address(paper: Paper, value: str) -> Rect | None:
    """Return the box of the lines that an address is printed in."""
    plain = _plain(value)
    lines = [line for line in paper.lines[:_FIRST_LINES] if len(_plain(line.text)) > 3 and _plain(line.text) in plain]
    if not lines or sum(len(_plain(line.text)) for line in lines) < 0.8 * len(plain):
        return None
    return (
        min(line.box[0] for line in lines),
        min(line.box[1] for line in lines),
        max(line.box[2] for line in lines),
        max(line.box[3] for line in lines),
    )


def _plain(text: str) -> str:
    return "".join(char for char in text if char.isalnum())


def _beside(rng: Random, paper: Paper) -> Iterator[Fact]:
    """Yield questions for the value beside each label that names one row."""
    texts = [line.text.rstrip(" :.") for line in paper.lines]
    for line, label in zip(paper.lines, texts, strict=True):
        if not is_label(label) or sum(label in text for text in texts) > 1:
            continue
        row = row_of(paper, line)
        right = [one for one in row[row.index(line) + 1 :] if one.text.strip(" :")]
        if len(right) != 1:
            continue
        value = right[0].text.lstrip(" :")
        start = len(right[0].text) - len(value)
        box = part_of(right[0], start, len(right[0].text))
        question = rng.choice(BESIDE_QUESTIONS).format(label)
        yield Fact("receipt-line", "beside", question, value, (box,), seen=(line.box,))


def is_label(text: str) -> bool:
    """Return whether a text can name a row: mostly letters, neither a stray sign nor a sentence."""
    letters = sum(char.isalpha() for char in text)
    return 3 <= len(text) <= 24 and letters >= 3 and letters >= 0.6 * len(text.replace(" ", ""))


def shuffled(rng: Random, facts: Sequence[Fact]) -> list[Fact]:
    """Return facts in random order, fields before what stands beside labels: there are fewer of them."""
    chosen = list(facts)
    rng.shuffle(chosen)
    return sorted(chosen, key=lambda fact: fact.task != "receipt-field")
