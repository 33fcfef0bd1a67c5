"""Pages of PDF files as images: `load_image("contract.pdf#page=3")`. Needs the extra `[pdf]`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from threading import Lock
from typing import Final

from PIL import Image

from qzoom_agent.errors import ImageError
from qzoom_agent.extras import require

DPI: Final = 200
"""Dots per inch of a page, where the limit of pixels allows it."""
_NAMED: Final = re.compile(r"(?is)(?P<path>.+\.pdf)(?:#page=(?P<page>.*))?")
_LEADING: Final = b"%PDF-"
_RENDERING: Final = Lock()
"""PDFium is not for several threads."""


def is_pdf(source: object) -> bool:
    """Return whether a source of an image is the path of a PDF file, with or without a page, or its bytes."""
    if isinstance(source, bytes):
        return source[: len(_LEADING)] == _LEADING
    return isinstance(source, str | Path) and _NAMED.fullmatch(str(source)) is not None


def render_page(source: str | Path | bytes, *, max_pixels: int) -> Image.Image:
    """Return a page of a PDF as RGB, at 200 dots per inch or what `max_pixels` leaves: the first, or that of #page=N.

    Raises:
        ImageError: There is no such file or page, or the file cannot be read.
        MissingDependency: pypdfium2 is not installed.
    """
    if isinstance(source, bytes):
        data, name, number = source, f"the PDF of {len(source)} bytes", "1"
    else:
        found = _NAMED.fullmatch(str(source))
        assert found is not None
        path, number = Path(found["path"]).expanduser(), "1" if found["page"] is None else found["page"]
        name = f"'{path}'"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(f"Cannot open {name}: {error.strerror}. Check the path.") from None
    require("pypdfium2", extra="pdf", use="A PDF")
    import pypdfium2 as pdfium

    with _RENDERING:
        try:
            document = pdfium.PdfDocument(data)
        except pdfium.PdfiumError as error:
            raise ImageError(f"Cannot read {name} as a PDF: {error}. Save it again, without a password.") from None
        try:
            pages = len(document)
            if not number.isdecimal() or len(number) > 9 or not 1 <= int(number) <= pages:
                raise ImageError(
                    f"{name} has pages 1 to {pages}; got page {number!r:.20}. Write it as FILE.pdf#page=2."
                )
            page = document[int(number) - 1]
            width, height = page.get_size()
            if not (width > 0 and height > 0 and math.isfinite(width * height)):
                raise ImageError(f"Page {number} of {name} has no size. Save it again.")
            scale = min(DPI / 72, 0.99 * math.sqrt(max_pixels / (width * height)))
            image: Image.Image = page.render(scale=scale).to_pil()
        except pdfium.PdfiumError as error:
            raise ImageError(f"Cannot show page {number} of {name}: {error}. Save the page as an image.") from None
        finally:
            document.close()
    return image.convert("RGB")
