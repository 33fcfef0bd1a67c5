"""Pages of PDF files as images: `load_image("contract.pdf#page=3")`. Needs the extra `[pdf]`.

What is filled into a form is on them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from PIL import Image

from qzoom_agent.errors import ImageError
from qzoom_agent.extras import require
from qzoom_agent.files import expanded

logger = logging.getLogger(__name__)

DPI: Final = 200
"""Dots per inch of a page, where the limit of pixels allows it."""
_NAMED: Final = re.compile(r"(?is)(?!https?://)(?P<path>.+\.pdf)(?:#page=(?P<page>.*))?")
_LEADING: Final = b"%PDF-"
_BEFORE: Final = b"\xef\xbb\xbf\0\t\n\f\r "
"""Bytes that readers of PDF skip before the first line: a byte order mark, and white space."""
_RENDERING: Final = Lock()
"""PDFium is not for several threads."""


def is_pdf(source: object) -> bool:
    """Return whether a source of an image is the path of a PDF file, with or without a page, or its bytes."""
    if isinstance(source, bytes):
        return source[:1024].lstrip(_BEFORE).startswith(_LEADING)
    return isinstance(source, str | Path) and _NAMED.fullmatch(str(source)) is not None


def file_of(name: str) -> str:
    """Return the path of the file that holds an image: of FILE.pdf#page=N the PDF, of any other name itself."""
    found = _NAMED.fullmatch(name)
    return name if found is None else found["path"]


def pages(path: Path) -> int:
    """Return the number of pages of a PDF file, 1 for one that cannot be read.

    Raises:
        MissingDependency: pypdfium2 is not installed.
    """
    try:
        with _opened(path, f"'{path}'") as document:
            return max(1, len(document))
    except ImageError:
        return 1


def render_page(source: str | Path | bytes, *, max_pixels: int) -> Image.Image:
    """Return a page of a PDF as RGB, at 200 dots per inch or what `max_pixels` leaves: the first, or that of #page=N.

    Raises:
        ImageError: There is no such file or page, or the file cannot be read.
        MissingDependency: pypdfium2 is not installed.
    """
    with _opened_page(source, max_pixels, warn=True) as (page, scale):
        image: Image.Image = page.render(scale=scale).to_pil()
    return image.convert("RGB")


def page_size(source: str | Path | bytes, *, max_pixels: int) -> tuple[int, int]:
    """Return the size of what `render_page` returns, without rendering it; raise the same for a page that is not there.

    Rendering takes most of a second; the size is read in a moment.
    """
    with _opened_page(source, max_pixels, warn=False) as (page, scale):
        width, height = page.get_size()
        return math.ceil(width * scale), math.ceil(height * scale)  # as pypdfium2 rounds them


@contextmanager
def _opened_page(source: str | Path | bytes, max_pixels: int, *, warn: bool) -> Iterator[tuple[Any, float]]:
    """Open a page as PDFium's, with its scale in pixels a point; `warn` if it is one of several and none is named."""
    given: Path | bytes
    if isinstance(source, bytes):
        given, name, chosen = source, f"the PDF of {len(source)} bytes", None
    else:
        found = _NAMED.fullmatch(str(source))
        assert found is not None
        given, chosen = expanded(found["path"]), found["page"]
        name = f"'{given!s}'"
    number = chosen if chosen is not None else "1"
    with _opened(given, name) as document:
        import pypdfium2 as pdfium

        try:
            count = len(document)
            if not number.isdecimal() or len(number) > 9 or not 1 <= int(number) <= count:
                raise ImageError(
                    f"{name} has pages 1 to {count}; got page {number!r:.20}. Write it as FILE.pdf#page=2."
                )
            if warn and chosen is None and count > 1:
                logger.warning("%s has %d pages; only the first is shown (FILE.pdf#page=2 is the second)", name, count)
            page = document[int(number) - 1]
            width, height = page.get_size()
            if not (width > 0 and height > 0 and math.isfinite(width * height)):
                raise ImageError(f"Page {number} of {name} has no size. Save it again.")
            yield page, min(DPI / 72, 0.99 * math.sqrt(max_pixels / (width * height)))
        except pdfium.PdfiumError as error:
            raise ImageError(f"Cannot show page {number} of {name}: {error}. Save the page as an image.") from None


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Any]:
    """Open a PDF as PDFium's document, for this thread alone. Raises ImageError or MissingDependency."""
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except (OSError, ValueError) as error:
            raise ImageError(f"Cannot open {name}: {getattr(error, 'strerror', error)}. Check the path.") from None
    require("pypdfium2", extra="pdf", use="A PDF")
    import pypdfium2 as pdfium

    with _RENDERING:
        try:
            document = pdfium.PdfDocument(source)
            document.init_forms()  # before pages are opened; without it, what is filled in is not rendered
        except pdfium.PdfiumError as error:
            cause = str(error).rstrip(".")
            raise ImageError(
                f"Cannot read {name} as a PDF: {cause}. It has no pages, a password or damage. Save it again."
            ) from None
        try:
            yield document
        finally:
            document.close()
