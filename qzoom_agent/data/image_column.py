"""The picture in a cell of a table, however the table holds it.

An image feature of `datasets` ({"bytes", "path"}, not decoded), encoded bytes, a Pillow image, a path relative to the
table's folder (FILE.pdf#page=N, too), a data URI, or base64 text; a list of exactly one of these. `key` names the
picture by its encoded form, so questions about one image are found without decoding it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from PIL import Image

from qzoom_agent.data.columns import written
from qzoom_agent.errors import ImageError
from qzoom_agent.files import expanded
from qzoom_agent.images import MAX_PIXELS, check_image, decode_base64, digest, load_image
from qzoom_agent.pdf import file_of

_Encoded = str | Path | bytes | Image.Image
"""The content of a cell; a text is a data URI."""
LONGEST_PATH = 1024
"""Characters; a longer text in a cell is an image."""
_SHORTEST_BASE64 = 48
"""Characters; anything shorter is a path that is not there."""


_HEADERS_ONLY: ContextVar[bool] = ContextVar("headers_only", default=False)


@contextmanager
def headers_only() -> Iterator[None]:
    """Check images instead of reading them: inside, `picture` and `seen` give blank ones of the right size."""
    token = _HEADERS_ONLY.set(True)
    try:
        yield
    finally:
        _HEADERS_ONLY.reset(token)


def picture(cell: object, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded, upright RGB image of a cell; raise ImageError if there is none."""
    return _load(_source(cell, folder), max_pixels)


def key(cell: object, folder: Path | None = None) -> str:
    """Return 32 hex digits that are equal for cells that hold the same encoded picture."""
    return _key(_source(cell, folder))


def seen(cell: object, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Return `picture` and `key` of a cell; its text is decoded once."""
    source = _source(cell, folder)
    return _load(source, max_pixels), "" if _HEADERS_ONLY.get() else _key(source)


def all_seen(
    cell: object, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, str, tuple[Image.Image, ...]]:
    """Return `seen` of the first image of a question, and its further images."""
    cells = each_image(cell) or [None]
    (image, cluster), *others = (seen(one, folder, max_pixels=max_pixels) for one in cells)
    return image, cluster, tuple(other for other, _ in others)


def each_image(cell: object) -> list[object]:
    """Return the cell of each image of a question: the items of a list, else the cell itself."""
    if isinstance(cell, str) and cell.startswith("["):
        cell = written(cell) or cell
    return list(cell) if isinstance(cell, Sequence) and not isinstance(cell, str | bytes) else [cell]


def _load(source: _Encoded, max_pixels: int) -> Image.Image:
    if _HEADERS_ONLY.get():
        return Image.new("1", check_image(source, max_pixels=max_pixels))
    return load_image(source, max_pixels=max_pixels)


def _key(source: _Encoded) -> str:
    if isinstance(source, Image.Image):
        return digest(source if source.mode == "RGB" else load_image(source))[:32]
    if isinstance(source, Path):
        file = file_of(str(source))
        data = Path(file).read_bytes() + str(source)[len(file) :].encode()  # a page of a PDF is a picture of its own
    else:
        data = source if isinstance(source, bytes) else str(source).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def _source(cell: object, folder: Path | None) -> _Encoded:
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        return _source(data if data is not None else path, folder)
    if isinstance(cell, str) and cell.startswith("["):
        cell = written(cell) or cell
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
    if len(text) <= LONGEST_PATH:
        path = expanded(text)
        path = path if folder is None else folder / path
        try:
            if Path(file_of(str(path))).is_file():
                return path
        except (OSError, ValueError):
            pass  # no path at all
    try:
        if len(text) < _SHORTEST_BASE64:
            raise ValueError("too short for an image")
        return decode_base64(text, "The image")
    except ValueError:
        shown = text if len(text) <= 80 else f"{text[:60]}..."
        raise ImageError(
            f"The image {shown!r} is neither a file{f' in {folder}' if folder else ''} nor base64. Check the path."
        ) from None
