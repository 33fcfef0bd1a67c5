"""Write the questions about a folder of receipts as a table for `qzoom train branches`.

    python rl/receipt_table.py DIR runs/receipts/train --split train

Whole receipts, whose print a coarse view does not show, and for the gate parts of them that it does. The table has
`image`, `question`, `answer` and `boxes`; boxes are used to measure, not to train.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

from nano.paper import Paper
from nano.paper_boards import PaperBoard, board_of
from nano.receipts import Receipts
from qzoom_agent.data.receipts import Split
from qzoom_agent.errors import finished
from qzoom_agent.evaluation.tasks.needle.boards import Fact
from qzoom_agent.evaluation.tasks.needle.ink import Rect
from qzoom_agent.evaluation.tasks.receipts import BESIDE

_LINES_IN_PART = (3.0, 7.0)
"""Least and most heights of a line that a part is high."""
_BESIDE = 3
"""Most questions about labels on a whole receipt."""


def rows(receipts: Receipts | Sequence[Paper], folder: Path, *, parts: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of all receipts, and write their images below `folder`."""
    for number in range(len(receipts)):
        rng = Random(f"{seed}/{number}")
        board = board_of(rng, receipts[number])
        whole = (0.0, 0.0, float(board.image.width), float(board.image.height))
        labels = [fact for fact in board.facts if fact.kind == BESIDE]
        asked = [fact for fact in board.facts if fact.kind != BESIDE]
        asked += rng.sample(labels, min(_BESIDE, len(labels)))
        yield from _cut(board, whole, asked, folder / f"{number:03}.jpg", board.facts)
        for part, fact in enumerate(rng.sample(board.facts, min(parts, len(board.facts)))):
            yield from _cut(board, _around(rng, board, fact), [fact], folder / f"{number:03}-{part}.jpg", ())


def _around(rng: Random, board: PaperBoard, fact: Fact) -> Rect:
    """Return a part of a page with what a question is about: as wide as that needs, a few lines high."""
    left, top, right, bottom = zip(*fact.boxes, *fact.seen, strict=True)
    tall = max(1.0, min(box[3] - box[1] for box in fact.boxes)) * rng.uniform(*_LINES_IN_PART)
    spare = max(0.0, tall - (max(bottom) - min(top)))
    wide = 1.5 * tall
    x, y = min(left) - rng.random() * wide, min(top) - rng.random() * spare
    return (
        max(0.0, x),
        max(0.0, y),
        min(float(board.image.width), max(right) + rng.random() * wide),
        min(float(board.image.height), max(max(bottom), y + tall)),
    )


def _cut(
    board: PaperBoard, box: Rect, asked: Sequence[Fact], path: Path, marked: Sequence[Fact]
) -> Iterator[dict[str, Any]]:
    """Write a part of a page and yield its questions, with boxes where they are among `marked`."""
    if not asked:
        return
    board.image.crop(box).save(path, quality=92)
    for fact in asked:
        boxes = [list(fact.boxes[0])] if fact in marked else []
        yield {"image": path.name, "question": fact.question, "answer": fact.answer, "boxes": boxes}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("receipts", type=Path, help="folder of receipts (receipts.jsonl, images/)")
    parser.add_argument("output", type=Path, help="folder to write: questions.jsonl and the images")
    parser.add_argument("--split", choices=get_args(Split), default="train")
    parser.add_argument("--parts", type=int, default=2, help="parts of each receipt")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    found = list(rows(Receipts(options.receipts, options.split), options.output, parts=options.parts))
    table = options.output / "questions.jsonl"
    table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), "utf-8")
    print(f"{table}: {len(found)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(finished("receipt_table", main))
