"""The object of a question: the words that name it, and where on the board it lies.

Told only where an *answer* is read from, a small model learns to find things by place (the cell "B4") and not by look
(the red star): the token that answers would have to gather the words, combine them and search, all before it has ever
been right. The words themselves have it easy: "star" stands there, and what it has to match is in the picture. So the
last token of a naming word is told where what it names is ("red": all that is red; "star" after it: the one star that
is), and whoever answers can look at that token (docs/maintainers/notebook.md, 11 and 13).
"""

import re
from collections.abc import Iterable
from typing import Final

from nano.paper_boards import PaperBoard
from qzoom_agent.evaluation.tasks.needle.boards import FIELDS, ITEMS, Board, Fact
from qzoom_agent.evaluation.tasks.needle.ink import COLORS, SHAPES, Glyph, Rect

Referent = tuple[int, list[Rect]]
"""Position in the question at which a naming word ends, and the boxes of its object."""

_CELL: Final = re.compile(r"[A-E]\d")
_LINE: Final = re.compile(r"\d")
_PLURALS: Final = tuple(f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES)
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "color": SHAPES,
    "shape": COLORS,
    "count": (*COLORS, *_PLURALS, "objects"),
}
"""Words that can name what a question of this kind is about."""
_LABELS: Final[dict[str, tuple[str, ...]]] = {"form": FIELDS, "receipt": ITEMS}
_THING_KINDS: Final = ("code", "pips", "relation", "hop")


def referents(board: Board, fact: Fact) -> list[Referent]:
    """The naming words of a question in order; empty if nothing is named."""
    if isinstance(board, PaperBoard):  # every wording ends with what it is about
        return [(len(fact.question) - 1, [*fact.seen, *fact.boxes])]
    if fact.kind in _THING_KINDS:
        return _thing(board, fact)
    if fact.kind in _WORDS:
        return _first(fact.question, _WORDS[fact.kind], list(fact.seen))
    if fact.kind in _LABELS:
        return _first(fact.question, _LABELS[fact.kind], [*fact.boxes, *_label(board, fact.boxes[0])])
    found = {"table": _CELL, "line": _LINE}.get(fact.kind)
    match = found.search(fact.question) if found else None
    return [(match.end(), list(fact.boxes))] if match else []


def _thing(board: Board, fact: Fact) -> list[Referent]:
    for thing in board.things:
        match = re.search(rf"\b{thing.name}\b", fact.question)
        if match:
            alike = [other.box for other in board.things if other.color == thing.color]
            return [(match.start() + len(thing.color), alike), (match.end(), [thing.box])]
    return []


def _first(question: str, words: Iterable[str], rects: list[Rect]) -> list[Referent]:
    for word in words:
        match = re.search(rf"\b{re.escape(word)}\b", question)
        if match:
            return [(match.end(), rects)]
    return []


def _label(board: Board, plate: Rect) -> list[Rect]:
    """The large print on the line of a plate."""
    middle, height = (plate[1] + plate[3]) / 2, plate[3] - plate[1]
    return [
        ink(glyph) for glyph in board.glyphs if glyph.height > height and abs(glyph.y - middle) < 0.6 * glyph.height
    ]


def ink(glyph: Glyph) -> Rect:
    """About where a character's ink lies."""
    across, down = 0.4 * glyph.height, 0.5 * glyph.height
    return glyph.x - across, glyph.y - down, glyph.x + across, glyph.y + down
