"""Frames: where along a line of print each character is told or looked for.

The middle of a line runs through *frames* of 7 x 14 pixels, eight to a visual token (four across, two down), and each
frame is a character or nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from nano.paper import BLANK

CELL: Final = 28
"""Side of a visual token in pixels."""
ACROSS, DOWN = 4, 2
"""Frames of a visual token."""
FRAME_WIDTH, FRAME_HEIGHT = CELL / ACROSS, CELL / DOWN


@dataclass(frozen=True)
class Reading:
    """The text of one line of a view, and the places of its frames.

    Attributes:
        y: Height of its middle in frames, from the middle of the first row of frames.
        first: First column of frames.
        count: Number of columns.
        classes: Its characters.
        places: Column of each character, counted from `first`, where it is known.
    """

    y: float
    first: int
    count: int
    classes: tuple[int, ...]
    places: tuple[int, ...] | None


def reading_batch(views: Sequence[tuple[int, int, Sequence[Reading]]]) -> dict[str, Tensor]:
    """Return the frames and targets of the lines of views whose visual tokens follow one another.

    Args:
        views: Rows and columns of visual tokens of each view, and what is read in it.

    Returns:
        `above`, `below` (F,): indices of frames in the rows over and under the middle of a line.
        `weight` (F,): share of the lower one.
        `lengths` (L,): frames of each line.
        `classes` (sum of text lengths,), `sizes` (L,): their texts.
        `told` (F,): class of each frame, -100 where the place of characters is not known.
    """
    above: list[int] = []
    below: list[int] = []
    weight: list[float] = []
    lengths: list[int] = []
    sizes: list[int] = []
    classes: list[int] = []
    told: list[int] = []
    offset = 0
    for rows, columns, readings in views:
        for one in readings:
            upper = min(int(one.y), rows * DOWN - 1)
            lower = min(upper + 1, rows * DOWN - 1)
            across = range(one.first, one.first + one.count)
            above += [offset + _frame(column, upper, columns) for column in across]
            below += [offset + _frame(column, lower, columns) for column in across]
            weight += [one.y - upper] * one.count
            lengths.append(one.count)
            sizes.append(len(one.classes))
            classes += one.classes
            told += _told(one.count, one.classes, one.places)
        offset += columns * rows * ACROSS * DOWN
    return {
        "above": torch.tensor(above, dtype=torch.long),
        "below": torch.tensor(below, dtype=torch.long),
        "weight": torch.tensor(weight, dtype=torch.float32),
        "lengths": torch.tensor(lengths, dtype=torch.long),
        "sizes": torch.tensor(sizes, dtype=torch.long),
        "classes": torch.tensor(classes, dtype=torch.long),
        "told": torch.tensor(told, dtype=torch.long),
    }


def _frame(column: int, row: int, columns: int) -> int:
    """Return the index of a frame among those of a view of so many columns of visual tokens."""
    token = (row // DOWN) * columns + column // ACROSS
    return token * ACROSS * DOWN + (row % DOWN) * ACROSS + column % ACROSS


def _told(count: int, classes: Sequence[int], places: Sequence[int] | None) -> list[int]:
    if places is None:
        return [-100] * count
    told = [BLANK] * count
    for place, number in zip(places, classes, strict=True):
        if 0 <= place < count:
            told[place] = number
    return told
