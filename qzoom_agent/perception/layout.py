"""Positions of an inserted crop: those of the place it was cut from (Q-Zoom 3.3, "aligned" positions).

A crop is inserted directly after the coarse image: `<vision_start> crop <vision_end>`. In plain positions it starts a
grid of its own. Aligned, its rows and columns run over the rows and columns of its box in the coarse grid, in fractions
of a cell, and only the time axis tells the two apart. Everything around keeps its plain position, since both layouts
span the same range: so aligned positions are plain ones with two rows replaced.

Source: released code (`reuse_src_pos`), whose end points are those of the box's first and last cell; the paper's
formula differs, and the code trained the checkpoints.
"""

import torch
from torch import Tensor

Cells = tuple[float, float, float, float]
"""x1, y1, x2, y2 in cells of the coarse grid, right and bottom exclusive."""


def align(positions: Tensor, *, source: int, crop: tuple[int, int], grid: tuple[int, int], cells: Cells) -> Tensor:
    """Plain positions (3, 1, tokens) with those of one crop aligned; float32.

    Args:
        source: index of the first visual token of the image that the crop was cut from.
        crop: [start, stop) of the crop's visual tokens.
        grid: rows and columns of the crop.
        cells: the crop's box in cells of the source.
    """
    start, stop = crop
    rows, columns = grid
    if stop - start != rows * columns:
        raise ValueError(f"a crop of {rows} x {columns} cells has {stop - start} visual tokens")
    out = positions.float().clone()
    x1, y1, x2, y2 = cells
    top, left = float(positions[1, 0, source]), float(positions[2, 0, source])
    down = torch.linspace(top + y1, top + y2 - 1, rows, device=out.device)
    across = torch.linspace(left + x1, left + x2 - 1, columns, device=out.device)
    out[1, 0, start:stop] = down.repeat_interleave(columns)
    out[2, 0, start:stop] = across.repeat(rows)
    return out
