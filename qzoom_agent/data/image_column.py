"""The picture in a cell of a table, however the table holds it.

An image feature of `datasets` ({"bytes", "path"}, not decoded), encoded bytes, a Pillow image, a path relative to the
table's folder, a data URI, or base64 text; a list of exactly one of these. `key` names the picture by its encoded form,
so questions about one image are found without decoding it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from qzoom_agent.errors import ImageError
from qzoom_agent.images import MAX_PIXELS, digest, load_image

_Encoded = str | Path | bytes | Image.Image
"""The content of a cell; a text is a data URI."""
_LONGEST_PATH = 1024


def picture(cell: object, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded, upright RGB image of a cell; raise ImageError if there is none."""
    return load_image(_source(cell, folder), max_pixels=max_pixels)


def key(cell: object, folder: Path | None = None) -> str:
    """Return 32 hex digits that are equal for cells that hold the same encoded picture."""
    return _key(_source(cell, folder))


def seen(cell: object, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Return `picture` and `key` of a cell; its text is decoded once."""
    source = _source(cell, folder)
    return load_image(source, max_pixels=max_pixels), _key(source)


def _key(source: _Encoded) -> str:
    if isinstance(source, Image.Image):
        return digest(source.convert("RGB"))[:32]
    if isinstance(source, Path):
        data = source.read_bytes()
    else:
        data = source if isinstance(source, bytes) else str(source).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def _source(cell: object, folder: Path | None) -> _Encoded:
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return _source(data if data is not None else path, folder)
    if isinstance(cell, str):
        return _from_text(cell, folder)
    if isinstance(cell, Sequence) and not isinstance(cell, bytes):
        if len(cell) != 1:
            raise ImageError(f"A question has {len(cell)} images. Only questions about exactly one can be asked.")
        return _source(cell[0], folder)
    if isinstance(cell, bytes | Image.Image):
        return cell
    raise ImageError(f"There is no image in the cell: it holds {type(cell).__name__}.")


def _from_text(text: str, folder: Path | None) -> str | Path | bytes:
    if text[:5].lower() == "data:":
        return text
    if len(text) <= _LONGEST_PATH:
        path = Path(text).expanduser()
        path = path if folder is None else folder / path
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):
            pass  # no path at all
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) <= 80 else f"{text[:60]}..."
        raise ImageError(
            f"The image {shown!r} is neither a file{f' in {folder}' if folder else ''} nor base64. Check the path."
        ) from None
