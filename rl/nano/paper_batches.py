"""Batches of paper for the vision tower: parts of drawn pages, parts and lines of real receipts, and whole pages.

Neighbouring batches share drawn pages, because drawing one costs as much as many views of it; which batch shows which
page follows from its number alone.
"""

from functools import lru_cache
from random import Random
from typing import Final, Literal, get_args

from nano.drawn_paper import draw_paper
from nano.paper import Paper
from nano.paper_views import crop_view, line_view, page_view
from nano.receipts import Receipts
from nano.trees import Look

PaperKind = Literal["drawn", "receipts", "sheets"]
PAPER_KINDS: Final = frozenset(get_args(PaperKind))
CROP_TOKENS: Final = (32, 256)
"""Fewest and most visual tokens of a part of a page."""
SHEET_TOKENS: Final = (128, 256, 400, 600, 900, 1300, 2048)
"""Most visual tokens of a whole page; one drawn at random."""
LINE_HEIGHTS: Final = (20.0, 64.0)
"""Least and greatest height of a line that is shown alone, in pixels."""
_LINES_ALONE: Final = 0.4
_BATCHES_PER_PAGE: Final = 2
_SHARED_PAGES: Final = 10


def paper_looks(rng: Random, kind: str, number: int, receipts: Receipts | None, *, tokens: int) -> list[Look]:
    """Return the views of a batch of paper.

    Args:
        rng: Decides what is shown.
        kind: One of `PAPER_KINDS`.
        number: Number of the batch; neighbours share drawn pages.
        receipts: Real receipts, for the kinds that show them.
        tokens: Visual tokens from which on the batch is full.

    Raises:
        ValueError: the kind needs receipts and there are none.
    """
    if kind != "drawn" and receipts is None:
        raise ValueError(f"Batches of the kind {kind!r} need a folder of receipts. Give one with --receipts.")
    looks: list[Look] = []
    while sum(_tokens(look) for look in looks) < tokens:
        if kind == "drawn" or receipts is None:
            looks.append(crop_view(rng, _drawn(rng, number), tokens=CROP_TOKENS))
        elif kind == "receipts":
            looks.append(_part(rng, receipts[rng.randrange(len(receipts))]))
        else:
            paper = _drawn(rng, number) if rng.random() < 0.4 else receipts[rng.randrange(len(receipts))]
            looks.append(page_view(paper, tokens=rng.choice(SHEET_TOKENS), rng=rng))
    return looks


def _part(rng: Random, paper: Paper) -> Look:
    if rng.random() < _LINES_ALONE:
        line = max(rng.choice(paper.lines), rng.choice(paper.lines), key=lambda line: len(line.text))
        return line_view(paper, line, height=rng.uniform(*LINE_HEIGHTS), rng=rng)
    return crop_view(rng, paper, tokens=CROP_TOKENS)


def _drawn(rng: Random, number: int) -> Paper:
    """Return one of the drawn pages that the batches up to this one share."""
    return _page(max(0, number // _BATCHES_PER_PAGE - rng.randrange(_SHARED_PAGES)))


@lru_cache(maxsize=2 * _SHARED_PAGES)
def _page(seed: int) -> Paper:
    while not (paper := draw_paper(seed)).lines:
        seed += 1_000_000_007
    return paper


def _tokens(look: Look) -> int:
    rows, columns = look.grid
    return rows * columns
