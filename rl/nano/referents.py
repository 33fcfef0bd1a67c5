"""What a question is about: the word that names it, and where on the board it lies.

Told only where an *answer* is read from, a small model learns to find things by place (the cell "B4") and not by look
(the red star): the token that answers would have to gather the words, combine them and search, all before it has ever
been right. The word itself has it easy: "star" stands there, and what it has to match is in the picture. So the last
token of the naming word is told where the thing is, and whoever answers can look at that token (docs/lab.md, 11).
"""

import re
from collections.abc import Iterator
from typing import Final

from qzoom_agent.evals.suites.needle.boards import FIELDS, ITEMS, Board, Fact
from qzoom_agent.evals.suites.needle.ink import COLORS, SHAPES, Rect

_CELL: Final = re.compile(r"[A-E]\d")
_LINE: Final = re.compile(r"\d")
_PLURALS: Final = tuple(f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES)
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "color": SHAPES,
    "shape": COLORS,
    "count": (*COLORS, *_PLURALS, "objects"),
    "form": FIELDS,
    "receipt": ITEMS,
}
"""Words that can name what a question of this kind is about."""
_THING_KINDS: Final = ("code", "pips", "relation", "hop")


def referent(board: Board, fact: Fact) -> tuple[int, list[Rect]] | None:
    """Where in the question the naming word ends, and the boxes of what it names; None if nothing is named."""
    if fact.kind in _THING_KINDS:
        return _named(fact.question, ((thing.name, [thing.box]) for thing in board.things))
    if fact.kind in _WORDS:
        rects = list(fact.seen or fact.boxes)
        return _named(fact.question, ((word, rects) for word in _WORDS[fact.kind]))
    found = {"table": _CELL, "line": _LINE}.get(fact.kind)
    match = found.search(fact.question) if found else None
    return (match.end(), list(fact.boxes)) if match else None


def _named(question: str, names: Iterator[tuple[str, list[Rect]]]) -> tuple[int, list[Rect]] | None:
    for name, rects in names:
        match = re.search(rf"\b{re.escape(name)}\b", question)
        if match:
            return match.end(), rects
    return None
