"""The picture of `docs/nano.md`: a board, its coarse view, and its needle in both.

    python evals/needle_picture.py docs/images/needle.png

One row a task. From the left: the whole board with the needle marked; the coarse view of 64 visual tokens at the size
the model sees it; the needle cut from that coarse view and enlarged; the same needle cut from the original pixels.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from qzoom_agent.evaluation.tasks.needle import sample
from qzoom_agent.evaluation.tasks.needle.ink import font, typefaces
from qzoom_agent.geometry import Size, fit_tokens

_TASKS = ("needle-scene", "needle-doc", "needle-hop")
_TALL, _GAP = 360, 24


def picture(*, seed: int = 7, coarse_tokens: int = 64) -> Image.Image:
    """Return the contact sheet, RGB."""
    rows = []
    caption = font(typefaces("train")[0], 11)
    for offset, task in enumerate(_TASKS):
        one = sample(task, seed + offset)
        board, needle = one.image.copy(), one.boxes[-1]
        draw = ImageDraw.Draw(board)
        for box in one.boxes:
            draw.rectangle((box.x1 - 5, box.y1 - 5, box.x2 + 5, box.y2 + 5), outline=(230, 30, 30), width=4)
        size = fit_tokens(Size(*one.image.size), factor=28, min_tokens=16, max_tokens=coarse_tokens)
        coarse = one.image.resize(size, Image.Resampling.BICUBIC)
        pad = 0.35 * needle.width
        around = (needle.x1 - pad, needle.y1 - pad, needle.x2 + pad, needle.y2 + pad)
        across, down = size.width / one.image.width, size.height / one.image.height
        shrunk = tuple(round(value * scale) for value, scale in zip(around, (across, down) * 2, strict=True))
        cell = (260, round(260 * (around[3] - around[1]) / (around[2] - around[0])))
        seen = coarse.crop(shrunk).resize(cell, Image.Resampling.NEAREST)  # type: ignore[arg-type]
        cut = one.image.crop(tuple(round(value) for value in around)).resize(cell, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        board.thumbnail((_TALL, _TALL))
        rows.append((f"{task}: {one.question}  ->  {one.answer}", (board, coarse, seen, cut)))
    width = max(sum(part.width + _GAP for part in parts) for _, parts in rows) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_TALL + 2 * _GAP + 6) + _GAP), "white")
    pen, y = ImageDraw.Draw(sheet), _GAP // 2
    for text, parts in rows:
        pen.text((_GAP, y), text, font=caption, fill=(30, 30, 34))
        x = _GAP
        for part in parts:
            sheet.paste(part, (x, y + _GAP))
            x += part.width + _GAP
        y += _TALL + 2 * _GAP + 6
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the needle boards as the model sees them.")
    parser.add_argument("path", type=Path, help="PNG to write")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(argv)
    options.path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed=options.seed).save(options.path)
    print(options.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
