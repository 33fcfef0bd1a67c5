"""Batches of paper: for the vision tower alone parts of drawn pages (`drawn`), parts and lines of real receipts
(`receipts`) and whole pages (`sheets`), all without questions; and questions about parts (`paper_parts`), coarse views
(`paper_coarse`, `paper_relaid` with receipts in other layouts, and `paper_looks` for their places alone) and whole
pages (`paper_whole`) of both. Where receipts come with other pages, `receipts`, `sheets` and `paper_parts` show these,
too.

Neighbouring batches share drawn pages, because drawing one costs as much as many views of it; which batch shows which
page follows from its number alone.
"""

from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import Final, Literal, get_args

from nano.drawn_paper import draw_paper
from nano.paper import Paper
from nano.paper_boards import PaperBoard, board_of
from nano.paper_trees import coarse_paper_tree, look_tree, part_tree, whole_paper_tree
from nano.paper_views import crop_view, line_view, page_view
from nano.receipts import Receipts
from nano.relaid import relaid
from nano.scan import aged
from nano.trees import Look, Tree

PaperKind = Literal[
    "drawn", "receipts", "sheets", "paper_parts", "paper_coarse", "paper_looks", "paper_relaid", "paper_whole"
]
PAPER_KINDS: Final = frozenset(get_args(PaperKind))
REAL_KINDS: Final = PAPER_KINDS - {"drawn"}
"""Kinds that show real receipts."""
_REAL_SHARE: Final = 0.6
"""Of the pages of batches that show both."""
_REAL_LOOKS: Final = 0.85
"""The same where places alone are asked for: fields are what is hard to find."""
_PARTS, _PARTS_OF_A_PAGE, _COARSE, _LOOKS = 6, 3, 1, 3
"""Trees of a batch of parts, how many of them share a page; of coarse views with answers, and of those with places."""
CROP_TOKENS: Final = (32, 256)
"""Fewest and most visual tokens of a part of a page."""
SHEET_TOKENS: Final = (128, 256, 400, 600, 900, 1300, 2048)
"""Most visual tokens of a whole page; one drawn at random."""
HEIGHTS: Final = (18.0, 60.0)
"""Least and greatest height of a line in a view of part of a page, in pixels."""
_LINES_ALONE: Final = 0.4
_JOINED: Final = 0.5
"""Of the receipts in other layouts, those whose lower half may be that of another."""
_BATCHES_PER_PAGE: Final = 6
_SHARED_PAGES: Final = 10


def paper_trees(
    rng: Random,
    kind: str,
    number: int,
    receipts: Receipts | None,
    *,
    tokens: int,
    heights: tuple[float, float] = HEIGHTS,
) -> list[Tree]:
    """Return the trees of a batch of paper.

    Args:
        rng: Decides what is shown and asked.
        kind: One of `PAPER_KINDS`.
        number: Number of the batch; neighbours share drawn pages.
        receipts: Real receipts, for `REAL_KINDS`.
        tokens: Visual tokens from which on a batch without questions is full.
        heights: Least and greatest height of a line in its views of parts, in pixels.

    Raises:
        ValueError: the kind needs receipts and there are none.
    """
    if not kind.startswith("paper_"):
        return [Tree([look], []) for look in paper_looks(rng, kind, number, receipts, tokens=tokens, heights=heights)]
    if receipts is None:
        raise ValueError(f"Batches of the kind {kind!r} need a folder of receipts. Give one with --receipts.")
    if kind == "paper_whole":
        return [whole_paper_tree(rng, _asked(rng, number, receipts))]
    if kind == "paper_coarse":
        return [coarse_paper_tree(rng, _asked(rng, number, receipts)) for _ in range(_COARSE)]
    if kind == "paper_relaid":
        return [coarse_paper_tree(rng, _asked(rng, number, receipts, real=1.0, moved=True)) for _ in range(_COARSE)]
    if kind == "paper_looks":
        return [look_tree(rng, _asked(rng, number, receipts, real=_REAL_LOOKS)) for _ in range(_LOOKS)]
    boards = [_asked(rng, number, receipts, pages=True) for _ in range(_PARTS // _PARTS_OF_A_PAGE)]
    return [part_tree(rng, board) for board in boards for _ in range(_PARTS_OF_A_PAGE)]


def _asked(
    rng: Random, number: int, receipts: Receipts, *, real: float = _REAL_SHARE, pages: bool = False, moved: bool = False
) -> PaperBoard:
    """Return a page, aged, that something can be asked about.

    Args:
        rng: Chooses the page.
        number: Number of the batch.
        receipts: Real receipts.
        real: Share of these; the others are drawn.
        pages: Take the pages among the receipts as well, even where only their lines can be asked for.
        moved: Show receipts in other layouts than their own (`relaid`).
    """
    for _ in range(8):
        drawn = rng.random() >= real
        if drawn:
            paper = _drawn(rng, number)
        elif pages:
            paper = receipts.any(rng)
        else:
            paper = receipts[rng.randrange(len(receipts))]
        if moved and not drawn:
            paper = relaid(rng, paper, receipts[rng.randrange(len(receipts))] if rng.random() < _JOINED else None)
        board = board_of(rng, replace(paper, image=aged(rng, paper.image)))
        if board.facts or (pages and receipts.pages is not None and not drawn and not paper.fields):
            break
    return board


def paper_looks(
    rng: Random,
    kind: str,
    number: int,
    receipts: Receipts | None,
    *,
    tokens: int,
    heights: tuple[float, float] = HEIGHTS,
) -> list[Look]:
    """Return the views of a batch of paper without questions.

    Args:
        rng: Decides what is shown.
        kind: drawn, receipts or sheets.
        number: Number of the batch; neighbours share drawn pages.
        receipts: Real receipts, for the kinds that show them.
        tokens: Visual tokens from which on the batch is full.
        heights: Least and greatest height of a line in a view of part of a page, in pixels.

    Raises:
        ValueError: the kind needs receipts and there are none.
    """
    if kind != "drawn" and receipts is None:
        raise ValueError(f"Batches of the kind {kind!r} need a folder of receipts. Give one with --receipts.")
    looks: list[Look] = []
    while sum(_tokens(look) for look in looks) < tokens:
        if kind == "drawn" or receipts is None:
            look = crop_view(rng, _drawn(rng, number), tokens=CROP_TOKENS, heights=heights)
        elif kind == "receipts":
            look = _part(rng, receipts.any(rng), heights)
        else:
            paper = _drawn(rng, number) if rng.random() < 0.4 else receipts.any(rng)
            look = page_view(paper, tokens=rng.choice(SHEET_TOKENS), rng=rng)
        if look.readings:  # a batch without anything to read would have no loss
            looks.append(look)
    return looks


def _part(rng: Random, paper: Paper, heights: tuple[float, float]) -> Look:
    if rng.random() < _LINES_ALONE:
        line = max(rng.choice(paper.lines), rng.choice(paper.lines), key=lambda line: len(line.text))
        return line_view(paper, line, height=rng.uniform(*heights), rng=rng)
    return crop_view(rng, paper, tokens=CROP_TOKENS, heights=heights)


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
