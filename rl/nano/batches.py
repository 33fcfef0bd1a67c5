"""Batches as rows of a `datasets` table: a row names a kind and a seed, and is drawn when it is read.

`print`, `glances` (a quarter of it) and the kinds of paper (`paper_batches.py`) are for the vision tower alone (dense
labels, no questions), `pages` for tower and language model; the others ask about boards, `beside` as `coarse` with more
crops and fewer calls. Nothing is stored, so an epoch is as long as one likes, any batch can be drawn again from its
row, and a resumed run sees exactly the batches it would have seen. Kinds are sized so that each costs about the same
time.
"""

from collections.abc import Mapping
from random import Random
from typing import Any, Final, Literal, get_args

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from nano.examples import (
    COARSE_TOKENS,
    LEGIBLE,
    NOTES,
    coarse_tree,
    crop_tree,
    needles,
    proposed,
    show,
    training_board,
    training_boards,
    whole_tree,
)
from nano.pages import object_page, plate_page, text_page
from nano.paper_batches import HEIGHTS, PAPER_KINDS, PaperKind, paper_trees
from nano.receipts import Receipts
from nano.several import pair_tree, paired_boards, steps_tree
from nano.trees import Look, Packer, Tree
from qzoom_agent.evaluation.tasks.needle.boards import draw_board

BUDGETS: Final = (64, 144, 256, 400, 576)
"""Visual tokens of a whole board, from the coarse view to every pixel."""
PAPER_TOKENS: Final = 460
"""Visual tokens from which on a batch of paper is full."""
COARSE_BUDGETS: Final = (48, 56, 64, 64, 64, 100)
"""Most visual tokens of a coarse view that zooms start from; one drawn at random."""
BoardKind = Literal[
    "print",
    "pages",
    "crops",
    "coarse",
    "board64",
    "board144",
    "board256",
    "board400",
    "board576",
    "glances",
    "pairs",
    "steps",
    "beside",
]
Kind = Literal[BoardKind, PaperKind]
KINDS: Final[tuple[BoardKind, ...]] = get_args(BoardKind)
VALIDATION_SEED: Final = 500_000_000
"""Batches from here on are for validation; training stays below. A batch of seed s draws boards s * 64 and on."""
NUMBERS_A_STAGE: Final = 1_000_000
_BOARDS_PER_BATCH: Final = {"board64": 8, "board144": 5, "board256": 3, "board400": 2, "board576": 2}


def trees_of(kind: str, seed: int) -> list[Tree]:
    """The trees of one batch of boards.

    Raises:
        ValueError: unknown kind.
    """
    rng = Random(f"batch/{kind}/{seed}")
    if kind in ("print", "glances"):
        whole = kind == "print"
        pages = _pages(rng, text=4, plates=6, objects=3) if whole else _pages(rng, text=1, plates=2, objects=1)
        boards = [training_board(rng, seed * 64 + index) for index in range(4 if whole else 1)]
        views = [show(board, None, tokens=(16, COARSE_TOKENS)).look for board in boards]
        if whole:
            views.append(show(boards[0], None, tokens=(16, rng.choice(BUDGETS[1:]))).look)
        crops = [_look(crop_tree(rng, board)) for board in boards]
        crops += [proposed(rng, board, rng.choice(needles(board))).look for board in boards]
        dice = [board for board in boards if any(thing.die for thing in board.things)]
        crops += [_look(crop_tree(rng, board, kind="pips")) for board in dice]  # rare, and read last of all
        return [Tree([look], []) for look in (*(_look(page) for page in pages), *views, *crops)]
    if kind == "pages":
        return _pages(rng, text=3, plates=7, objects=3)
    if kind == "crops":
        boards = [training_board(rng, seed * 64 + index) for index in range(3)]
        return [crop_tree(rng, board) for board in boards for _ in range(5)]
    if kind == "coarse":
        drawn = [training_boards(rng, seed * 64 + index) for index in range(3)]
        return [coarse_tree(rng, board, again=again, tokens=rng.choice(COARSE_BUDGETS)) for board, *again in drawn]
    if kind == "beside":
        boards = [training_board(rng, seed * 64 + index) for index in range(3)]
        budgets = [rng.choice(COARSE_BUDGETS) for _ in boards]
        return [
            coarse_tree(rng, board, crops=20, calls=0, looks=0, tokens=most)
            for board, most in zip(boards, budgets, strict=True)
        ]
    if kind == "pairs":
        pairs = [paired_boards(rng, seed * 64 + index) for index in range(2)]
        return [pair_tree(rng, pair, tokens=rng.choice(COARSE_BUDGETS)) for pair in pairs]
    if kind == "steps":
        boards = [draw_board("hop", seed * 64 + index, split="train", notes=rng.randrange(NOTES)) for index in range(3)]
        return [steps_tree(rng, board, tokens=rng.choice(COARSE_BUDGETS)) for board in boards]
    if kind in _BOARDS_PER_BATCH:
        budget, count = int(kind.removeprefix("board")), _BOARDS_PER_BATCH[kind]
        # A coarse view is only trained on alone to see what of it could be read; so all that it shows is a label.
        legible = 0.0 if budget == COARSE_TOKENS else LEGIBLE
        boards = [training_board(rng, seed * 64 + index) for index in range(count)]
        return [whole_tree(rng, board, tokens=budget, legible=legible) for board in boards]
    raise ValueError(f"Unknown kind of batch: {kind!r}. The kinds are {', '.join(KINDS)}.")


def _pages(rng: Random, *, text: int, plates: int, objects: int) -> list[Tree]:
    kinds = [*[text_page] * text, *[plate_page] * plates, *[object_page] * objects]
    return [draw(rng) for draw in kinds]


def _look(page: Tree) -> Look:
    """The image of a page, without its questions."""
    return next(piece for piece in page.prefix if isinstance(piece, Look))


class Draw:
    """Draws and packs the batches of rows that are read; an object, so that any kind of worker process can get it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        receipts: Receipts | None = None,
        *,
        paper_tokens: int = PAPER_TOKENS,
        heights: tuple[float, float] = HEIGHTS,
        times: int = 1,
        apart: int = 0,
        aligned: bool = False,
    ) -> None:
        self.packer = Packer(tokenizer, aligned=aligned)
        self.receipts, self.paper_tokens, self.heights = receipts, paper_tokens, heights
        self.times, self.apart = times, apart

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[dict[str, Any]]]:
        torch.set_num_threads(1)
        named = zip(rows["kind"], rows["seed"], strict=True)
        drawn = [(kind, self.trees(kind, number)) for kind, number in named]
        return {"batch": [self.packer.batch(trees) | {"kind": kind} for kind, trees in drawn]}

    def trees(self, kind: str, number: int) -> list[Tree]:
        """Return the trees of a batch of any kind: of `times` small ones whose numbers lie `apart`."""
        return [tree for step in range(self.times) for tree in self._small(kind, number + step * self.apart)]

    def _small(self, kind: str, number: int) -> list[Tree]:
        if kind not in PAPER_KINDS:
            return trees_of(kind, number)
        rng = Random(f"batch/{kind}/{number}")
        return paper_trees(rng, kind, number, self.receipts, tokens=self.paper_tokens, heights=self.heights)


def table(
    mix: Mapping[Kind, float],
    *,
    steps: int,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    receipts: Receipts | None = None,
    paper_tokens: int = PAPER_TOKENS,
    heights: tuple[float, float] = HEIGHTS,
    times: int = 1,
    aligned: bool = False,
) -> Dataset:
    """A table of `steps` batches of the kinds in `mix` (shares), drawn and packed on reading.

    `steps` times `times` is at most `NUMBERS_A_STAGE`, so that stages share no batch.
    """
    kinds = Random(f"mix/{seed}").choices(list(mix), weights=list(mix.values()), k=steps)
    numbers = [seed * NUMBERS_A_STAGE + step for step in range(steps)]
    return Dataset.from_dict({"kind": kinds, "seed": numbers}).with_transform(
        Draw(tokenizer, receipts, paper_tokens=paper_tokens, heights=heights, times=times, apart=steps, aligned=aligned)
    )


def single(rows: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Collator: a row already is a batch."""
    return rows[0]["batch"]
