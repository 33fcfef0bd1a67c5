"""Scores of a tower on the lines of paper: characters wrong, and lines without a mistake.

Each line is shown alone at a fixed height, as a policy would zoom onto it, and spelled from the frames along it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from nano.frames import reading_batch
from nano.packed import see
from nano.paper import Line, Paper
from nano.paper_views import line_view
from nano.reading import along_lines, spelled
from nano.trees import WINDOW, Look, image_blocks, pixels_of
from qzoom_agent.evaluation.scorers.anls import levenshtein

HEIGHT = 44.0
"""Height of a line in pixels of the view that it is read from."""
_TOGETHER = 24


class LineScores(NamedTuple):
    """The result of reading some lines.

    Attributes:
        error: Character error rate: edits that lead from what was read to what is there, per character there.
        exact: Share of lines without a mistake.
        lines: Number of lines.
        characters: Number of characters that are there.
    """

    error: float
    exact: float
    lines: int
    characters: int


@torch.no_grad()
def read_lines(model: Any, looks: Sequence[Look]) -> list[str]:
    """Return what a nano with its training heads spells along all lines of some views, in order."""
    grids = [look.grid for look in looks]
    batch = reading_batch([(*look.grid, look.readings or ()) for look in looks])
    pixels, sizes = pixels_of(looks)
    windows, whole = image_blocks(grids, window=WINDOW), image_blocks(grids, window=None)
    seen = see(model, pixels, sizes, windows=windows, whole=whole)
    return spelled(along_lines(model.training_heads.lines(seen), batch), batch["lengths"].tolist())


def score_lines(model: Any, papers: Iterable[Paper], *, height: float = HEIGHT, most: int | None = None) -> LineScores:
    """Read the lines of some pages (or `most` of each, from top to bottom), each in a view of its own."""
    chosen: list[tuple[Paper, Line]] = []
    for paper in papers:
        count = len(paper.lines)
        kept = count if most is None else min(most, count)
        chosen += [(paper, paper.lines[at * count // kept]) for at in range(kept)]
    edits = exact = characters = 0
    for start in range(0, len(chosen), _TOGETHER):
        looks = [line_view(paper, line, height=height) for paper, line in chosen[start : start + _TOGETHER]]
        shown = [look for look in looks if look.readings]
        read = iter(read_lines(model, shown)) if shown else iter(())
        for look, (_, line) in zip(looks, chosen[start : start + _TOGETHER], strict=True):
            got = next(read) if look.readings else ""
            wrong = levenshtein(got.strip(), line.text)
            edits, exact, characters = edits + wrong, exact + (wrong == 0), characters + len(line.text)
    return LineScores(edits / max(1, characters), exact / max(1, len(chosen)), len(chosen), characters)
