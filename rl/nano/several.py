"""Conversations with several views at once: two boards of which a question is about one, and both crops of a question
in two steps beside their coarse view.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Final

from nano.examples import (
    OPEN,
    Frame,
    beside,
    calling,
    direct,
    inserted,
    needles,
    noting,
    proposed,
    show,
    steps_of,
    varied,
    zooming,
)
from nano.trees import Piece, Say, Tree
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact, draw_board

PAIRED: Final = (("scene",), ("form", "receipt", "table"))
"""Layouts of two boards of which one question can only be about one."""
_ASKED: Final = 7
"""Questions about each board of a pair."""
_DOUBTFUL: Final = 0.4
"""Share of the questions with a crop of each board, as where both maps are nearly as sure."""
_HOPS: Final = 10
"""Questions in two steps about a board."""


def paired_boards(rng: Random, seed: int) -> tuple[Board, Board]:
    """Return two boards for training, in either order."""
    layouts = [rng.choice(choice) for choice in PAIRED]
    rng.shuffle(layouts)
    one, other = (draw_board(layout, seed, split="train") for layout in layouts)
    return one, other


def pair_tree(rng: Random, boards: Sequence[Board], *, tokens: int) -> Tree:
    """Return questions about either of two coarse views: with a crop, calls that name the board, and calls alone."""
    frames = [replace(show(board, None, tokens=(16, tokens)), image=at) for at, board in enumerate(boards)]
    branches: list[tuple[str, Fact, list[Piece]]] = []
    for frame in frames:
        fine = varied(rng, [fact for fact in frame.board.facts if len(fact.boxes) == 1])
        for index, fact in enumerate(fine[:_ASKED]):
            if index % 3 == 0:
                branches.append(("zoom", fact, zooming(frame, fact)))
                continue
            view = inserted(rng, frame, fact.boxes[0])
            shown = [view]
            if rng.random() < _DOUBTFUL:
                other = frames[1 - frame.image].board
                shown.insert(1 - frame.image, proposed(rng, other, rng.choice(needles(other))))
            pieces = [*(crop.look for crop in shown), *direct(view, fact)]
            branches.append(("beside", fact, pieces if index % 3 == 1 else zooming(frame, fact, shown=[view])))
        branches += [("call", fact, calling(frame, fact)) for fact in fine[_ASKED : 2 * _ASKED]]
    names = [f"{mode} {fact.kind} of two" for mode, fact, _ in branches]
    return Tree([Say(OPEN), *(frame.look for frame in frames)], [pieces for _, _, pieces in branches], names)


def steps_tree(rng: Random, board: Board, *, tokens: int) -> Tree:
    """Return questions in two steps whose crops both stand beside the coarse view, as gate and SD-RPN put them."""
    frame = show(board, None, tokens=(16, tokens))
    facts = steps_of(board)[:_HOPS]
    branches = [beside(fact, _both(rng, frame, fact)) for fact in facts]
    return Tree([Say(OPEN), frame.look], branches, ["beside hop"] * len(facts))


def _both(rng: Random, frame: Frame, fact: Fact) -> list[Frame]:
    first, second = (proposed(rng, frame.board, box) for box in fact.boxes)
    return [noting(first, fact, frame), second]
