"""Paper as a board that can be asked, in the words and with the boxes of the tasks `receipt-field` and `receipt-line`.

A question about a field is left out where its value could not be found on the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Final

from nano.paper import Line, Paper
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact
from qzoom_agent.evaluation.tasks.needle.ink import Glyph
from qzoom_agent.evaluation.tasks.receipts import (
    BESIDE,
    FIELD,
    LINE,
    ReceiptQuestion,
    centers_of,
    field_questions,
    line_questions,
)

LINE_QUESTION: Final = "read the line at {}."


@dataclass(slots=True)
class PaperBoard(Board):
    """A page as a board: `glyphs` are all its characters, `facts` what can be asked of it."""

    paper: Paper = field(kw_only=True)


def board_of(rng: Random, paper: Paper) -> PaperBoard:
    """Return a page as a board with all its questions, each in one of its wordings."""
    glyphs = [glyph for line in paper.lines for glyph in glyphs_of(line)]
    facts = [_fact(rng, asked) for asked in _questions(paper.lines, tuple(paper.fields.items()))]
    return PaperBoard(paper.image.convert("RGB"), facts, glyphs, paper=paper)


@lru_cache(maxsize=1024)  # a page is shown many times, aged differently
def _questions(lines: tuple[Line, ...], fields: tuple[tuple[str, str], ...]) -> list[ReceiptQuestion]:
    every = [*field_questions(lines, dict(fields)), *line_questions(lines)]
    return [asked for asked in every if asked.box is not None]


def _fact(rng: Random, asked: ReceiptQuestion) -> Fact:
    assert asked.box is not None
    task = LINE if asked.kind == BESIDE else FIELD
    seen = () if asked.label is None else (asked.label,)
    return Fact(task, asked.kind, rng.choice(asked.wordings), asked.answer, (asked.box,), seen=seen)


def glyphs_of(line: Line) -> list[Glyph]:
    y, height = line.middle, 0.7 * line.height
    return [Glyph(char, x, y, height) for char, x in zip(line.text, centers_of(line), strict=True)]


def shuffled(rng: Random, facts: Sequence[Fact]) -> list[Fact]:
    """Return facts in random order, fields before what stands beside labels: there are fewer of them."""
    chosen = list(facts)
    rng.shuffle(chosen)
    return sorted(chosen, key=lambda fact: fact.task != FIELD)
