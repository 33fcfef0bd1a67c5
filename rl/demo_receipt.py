"""Choose the receipt of `qzoom demo`: the first of some drawn ones that nano-paper reads the total of.

    python rl/demo_receipt.py                               asks nano-paper, and writes qzoom_agent/data/demo
    python rl/demo_receipt.py --draw 1500 1800 --out DIR    draws pages to look at, and asks nothing

The pages are drawn by the generator that nano-paper was trained with, from seeds that no training draws: those of its
batches lie below 100 million or beyond a billion (`nano/paper_batches.py`). A page is chosen if nano-paper's answer is
right under its default policy and a crop that it was shown holds the total.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from nano.drawn_paper import draw_paper
from qzoom_agent import Agent
from qzoom_agent.data.receipts import Rect
from qzoom_agent.errors import QzoomError, finished
from qzoom_agent.evaluation.scorers.receipts import TOTAL, same
from qzoom_agent.evaluation.tasks.receipts import field_questions
from qzoom_agent.images import load_image

DEMO: Final = Path(__file__).parents[1] / "qzoom_agent" / "data" / "demo"
NAME: Final = "4-receipt.jpg"
MODEL: Final = "nano-paper"
FIRST_SEED: Final = 700_000_000
# fmt: off
LIKE_SCANS: Final = (
    1343, 441, 874, 521, 672, 849, 139, 524, 602, 627, 1217, 1126, 545, 510, 918, 466, 586, 600,
    699, 644, 1095, 1020, 589, 745, 129, 302, 384, 927, 170, 1371, 571,
)
# fmt: on
"""Those of the first 1,500 pages from `FIRST_SEED` on that look most like scans of receipts; the best come first."""
LARGEST: Final = 250_000
"""Bytes of a scan that ships."""
WIDTHS: Final = (680, 960)
"""Pixels across."""
SHAPES: Final = (1.35, 2.15)
"""Height as a share of the width."""


class Page(NamedTuple):
    """A drawn receipt, as it is scanned to a file, and its total."""

    seed: int
    scan: bytes
    question: str
    total: str
    box: Rect


def pages(seeds: Iterable[int]) -> Iterator[Page]:
    """Yield the pages of these seeds that are receipts of a fitting size with a total."""
    for seed in seeds:
        paper = draw_paper(seed, layout="receipt")
        width, height = paper.image.size
        asked = next((one for one in field_questions(paper.lines, paper.fields) if one.kind == TOTAL), None)
        if asked is None or asked.box is None:
            continue
        buffer = io.BytesIO()
        paper.image.save(buffer, "JPEG", quality=80, optimize=True)
        fits = WIDTHS[0] <= width <= WIDTHS[1] and SHAPES[0] <= height / width <= SHAPES[1]
        if fits and buffer.tell() <= LARGEST:
            yield Page(seed, buffer.getvalue(), asked.wordings[0], asked.answer, asked.box)


def is_read(agent: Agent, page: Page) -> bool:
    """Return whether a model reads the total of a page, in a crop that holds it."""
    answer = agent.run(load_image(page.scan), page.question)
    left, top, right, bottom = page.box
    held = any(x1 <= left and y1 <= top and x2 >= right and y2 >= bottom for x1, y1, x2, y2 in answer.boxes)
    verdict = "right" if same(answer.text, page.total, TOTAL) else f"wrong, it is {page.total}"
    print(f"{page.seed}: {answer.text} ({verdict}), the total is {'' if held else 'not '}in a crop", flush=True)
    return held and verdict == "right"


def write(folder: Path, page: Page) -> None:
    """Write the scan of a page into the folder of the demo, and its question after those about boards."""
    table = folder / "questions.json"
    rows = [row for row in json.loads(table.read_text(encoding="utf-8")) if row["image"] != NAME]
    rows.append(
        {
            "image": NAME,
            "shows": "a receipt, drawn to look like a scan: nano-paper, a second small model, zooms in on the total",
            "question": page.question,
            "answer": page.total,
            "boxes": [[round(side, 1) for side in page.box]],
            "kind": TOTAL,
            "model": MODEL,
            "seed": page.seed,
        }
    )
    (folder / NAME).write_bytes(page.scan)
    table.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: that of the demo)")
    parser.add_argument("--draw", type=int, nargs=2, metavar=("FROM", "TO"), help="draw pages of these numbers instead")
    options = parser.parse_args(argv)
    if options.draw:
        options.out.mkdir(parents=True, exist_ok=True)
        for page in pages(FIRST_SEED + at for at in range(*options.draw)):
            (options.out / f"{page.seed - FIRST_SEED}.jpg").write_bytes(page.scan)
        return 0
    with Agent.from_pretrained(MODEL) as agent:
        chosen = next((page for page in pages(FIRST_SEED + at for at in LIKE_SCANS) if is_read(agent, page)), None)
    if chosen is None:
        raise QzoomError(
            f"{MODEL} reads none of the {len(LIKE_SCANS)} pages in LIKE_SCANS. Draw more (--draw 1500 1800 --out DIR), "
            "and add the numbers of those that look like scans."
        )
    write(options.out, chosen)
    print(f"Wrote {options.out / NAME}. Draw its picture: python evals/report_picture.py docs/images/report.png")
    return 0


if __name__ == "__main__":
    sys.exit(finished("rl/demo_receipt.py", main))
