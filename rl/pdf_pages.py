"""Write pages of PDFs that have a text layer as a folder for nano's training (`train_nano.py --pages`).

    apt-get download r-doc-pdf && dpkg -x r-doc-pdf*.deb runs/documents
    python rl/pdf_pages.py runs/documents runs/pages

The folder holds `lines.jsonl`, a page a row with the box, the text and the centres of the characters of every line,
and the pages as images. Any folder of `.pdf` and `.pdf.gz` will do; packages of documentation are free to use and hold
print of many kinds. Needs the extra `[pdf]`.
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from nano.paper import Paper
from nano.pdf_lines import read_page
from nano.receipts import PAGES_INDEX
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.extras import require

DOTS = (100.0, 200.0)
"""Least and most dots per inch; one drawn at random for each page."""
_LEAST_LINES = 6
"""Lines of a page that is worth showing."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, help="folder of PDFs, or one file")
    parser.add_argument("output", type=Path, help="folder to write: lines.jsonl and images/")
    parser.add_argument("--most", type=int, default=12, help="pages of each document at most, drawn at random")
    options = parser.parse_args(argv)
    paths = documents(options.documents)
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    index, pages, lines = options.output / PAGES_INDEX, 0, 0
    with index.open("w", encoding="utf-8") as file:
        for page in every_page(paths, most=options.most):
            file.write(json.dumps(_row(page, options.output)) + "\n")
            pages, lines = pages + 1, lines + len(page.lines)
    if not pages:
        raise ConfigError(f"None of the {len(paths)} PDFs in {options.documents} has pages with a text layer.")
    print(f"{index}: {pages} pages of {len(paths)} PDFs, {lines} lines")
    return 0


def documents(place: Path) -> list[Path]:
    """Return the PDFs at a place, those that are packed among them, in the order of their names.

    Raises:
        ConfigError: There are none.
    """
    every = [place] if place.is_file() else sorted(place.rglob("*"))
    found = [path for path in every if path.name.lower().endswith((".pdf", ".pdf.gz")) and path.is_file()]
    if not found:
        raise ConfigError(f"There is no PDF in {place}. Give a folder that holds files .pdf or .pdf.gz.")
    return found


def every_page(paths: Sequence[Path], *, most: int) -> Iterator[Paper]:
    """Yield at most so many pages of each document; the same document is read once, whatever it is called."""
    require("pypdfium2", extra="pdf", use="A PDF")
    import pypdfium2 as pdfium

    known: set[str] = set()
    for path in paths:
        digest, content = _content(path)
        if digest in known:
            continue
        known.add(digest)
        try:
            document = pdfium.PdfDocument(content)
        except pdfium.PdfiumError as error:
            print(f"{path}: left out, {error}", file=sys.stderr)
            continue
        for number in sorted(Random(digest).sample(range(len(document)), min(most, len(document)))):
            name = f"{path.name.split('.')[0]}-{digest[:6]}-{number + 1:04}"
            page = read_page(document[number], dots=Random(name).uniform(*DOTS), name=name)
            if page is not None and len(page.lines) >= _LEAST_LINES:
                yield page
        document.close()


def _content(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return hashlib.sha256(content).hexdigest(), content


def _row(page: Paper, folder: Path) -> dict[str, object]:
    """Write the image of a page and return its row."""
    image = f"images/{page.name}.png"
    page.image.save(folder / image)
    lines = [
        {
            "box": [round(edge, 1) for edge in line.box],
            "text": line.text,
            "centers": [round(x, 1) for x in line.centers or ()],
        }
        for line in page.lines
    ]
    return {"image": image, "lines": lines}


if __name__ == "__main__":
    sys.exit(finished("pdf_pages", main))
