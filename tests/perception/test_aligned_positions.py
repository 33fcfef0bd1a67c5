"""Positions of a crop aligned with its place in the coarse image, against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qzoom_agent.perception.adapters import align


def grid(at: int, rows: int, columns: int) -> list[tuple[float, float, float]]:
    """(time, row, column) of the tokens of an image that starts at position `at`."""
    return [(at, at + row, at + column) for row in range(rows) for column in range(columns)]


def plain(lead: int, source: tuple[int, int], crop: tuple[int, int], tail: int) -> tuple[Tensor, int, int]:
    """Ordinary positions (3, 1, tokens) of a prompt of two images; where the two images' tokens start.

    The prompt: `lead` tokens (the last is the marker before the image); image; marker; marker; crop; marker; `tail`.
    """
    found: list[tuple[float, float, float]] = [(at, at, at) for at in range(lead)]
    first = len(found)
    found += grid(lead, *source)
    behind = lead + max(source)
    found += [(behind,) * 3, (behind + 1,) * 3]
    second = len(found)
    found += grid(behind + 2, *crop)
    after = behind + 2 + max(crop)
    found += [(after + at,) * 3 for at in range(1 + tail)]
    return torch.tensor(found, dtype=torch.long).T[:, None], first, second


def aligned(
    source: tuple[int, int], crop: tuple[int, int], cells: tuple[float, float, float, float], *, lead: int = 3
) -> tuple[Tensor, Tensor, range]:
    """Plain and aligned positions (3, tokens) of such a prompt, and where the crop's tokens stand."""
    positions, first, second = plain(lead, source, crop, 2)
    where = range(second, second + crop[0] * crop[1])
    out = align(positions, source=first, crop=(where.start, where.stop), grid=crop, cells=cells)
    return positions[:, 0], out[:, 0], where


def test_worked_example() -> None:
    """Three tokens, an image of 2 x 3 cells from position 3 on, a crop of 2 x 3 tokens of its right 2 x 2 cells."""
    _, out, where = aligned((2, 3), (2, 3), (1, 0, 3, 2))
    assert out.dtype == torch.float32
    assert out[0].tolist() == [0, 1, 2, *[3] * 6, 6, 7, *[8] * 6, 11, 12, 13]
    crop = out[:, where.start : where.stop].T.tolist()
    assert crop == [[8, 3, 4], [8, 3, 4.5], [8, 3, 5], [8, 4, 4], [8, 4, 4.5], [8, 4, 5]]
    assert out[:, where.start - 1].tolist() == [7, 7, 7], "the marker before it: one behind the image's own"
    assert out[:, where.stop].tolist() == [11, 11, 11], "the marker behind it: the longer side of the crop further on"


@pytest.mark.parametrize(
    ("crop", "cells", "rows", "columns"),
    [
        ((1, 4), (0, 1, 4, 3), [6], [5, 6, 7, 8]),  # one row: that of the box's top
        ((4, 1), (2, 0, 4, 4), [5, 6, 7, 8], [7]),  # one column: that of the box's left
        ((1, 1), (3, 3, 4, 4), [8], [8]),
        ((3, 3), (3, 3, 4, 4), [8, 8, 8], [8, 8, 8]),  # a single cell, at the right bottom
        ((2, 2), (0, 0, 4, 4), [5, 8], [5, 8]),  # all of the image: from its first to its last cell
        ((3, 2), (2, 2, 4, 4), [7, 7.5, 8], [7, 8]),
        ((2, 3), (1.5, 0.5, 3.5, 2.5), [5.5, 6.5], [6.5, 7, 7.5]),  # a box may cut cells
    ],
)
def test_end_points_are_the_first_and_last_cell_of_the_box(
    crop: tuple[int, int], cells: tuple[float, float, float, float], rows: list[float], columns: list[float]
) -> None:
    """An image of 4 x 4 cells whose corner is at position 5."""
    _, out, where = aligned((4, 4), crop, cells, lead=5)
    inside = out[:, where.start : where.stop].view(3, *crop)
    assert (inside[0] == 5 + 4 + 2).all(), "time: behind the longer side of the image and two markers"
    assert inside[1, :, 0].tolist() == rows and (inside[1] == inside[1, :, :1]).all()
    assert inside[2, 0].tolist() == columns and (inside[2] == inside[2, :1]).all()


@given(st.data())
def test_nothing_but_the_crop_moves_and_it_stays_inside_the_image(data: st.DataObject) -> None:
    source = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    crop = (data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    x1, y1 = data.draw(st.integers(0, source[1] - 1)), data.draw(st.integers(0, source[0] - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, source[1])), data.draw(st.integers(y1 + 1, source[0]))
    lead = data.draw(st.integers(1, 50))
    before, out, where = aligned(source, crop, (x1, y1, x2, y2), lead=lead)
    inside = torch.zeros(before.shape[1], dtype=torch.bool)
    inside[where.start : where.stop] = True
    assert torch.equal(out[:, ~inside], before[:, ~inside].float())
    assert torch.equal(out[0], before[0].float()), "time is the plain one"
    for axis, low, high in ((1, y1, y2), (2, x1, x2)):
        moved = out[axis, inside]
        assert moved.min() == lead + low
        assert moved.max() <= lead + high - 1 + 1e-4
    assert out.max() == before.max(), "what is generated stands where it would without alignment"


def test_the_plain_positions_are_left_alone() -> None:
    positions, first, second = plain(3, (2, 2), (2, 2), 1)
    copy = positions.clone()
    align(positions, source=first, crop=(second, second + 4), grid=(2, 2), cells=(0, 0, 1, 1))
    assert torch.equal(positions, copy)


def test_a_crop_of_another_size_is_refused() -> None:
    positions, first, second = plain(3, (2, 2), (2, 2), 1)
    with pytest.raises(ValueError, match="a crop of 2 x 3 cells has 4 visual tokens"):
        align(positions, source=first, crop=(second, second + 4), grid=(2, 3), cells=(0, 0, 1, 1))
