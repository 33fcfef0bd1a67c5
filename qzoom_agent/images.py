"""Read any image safely, and name its pixels.

`load_image` turns a path, bytes, a data URI, a Pillow image or an array into one upright RGB image, or raises an
ImageError. Size, shape and metadata are checked while the header is read, before a pixel is decoded, and formats that
run other programs are not tried. Files are decoded at full size: Pillow's JPEG `draft` would lose the detail that a
zoom is for. Colour profiles are not applied. `check_image` reads the header alone.
"""

import asyncio
import base64
import hashlib
import io
import logging
import math
import ssl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.IcoImagePlugin import IcoImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from qzoom_agent.errors import ImageError
from qzoom_agent.extensions import awaited
from qzoom_agent.files import expanded
from qzoom_agent.geometry import MAX_ASPECT, Box
from qzoom_agent.pdf import is_pdf, page_size, render_page

logger = logging.getLogger(__name__)

MAX_PIXELS = 89_000_000
"""Default limit on width times height (a 10000 x 8900 image): a few hundred MB while it is read."""
MAX_BYTES = 1_000_000_000
"""Limit on the encoded size of one file."""
MAX_BYTES_IN_MEMORY = 256_000_000
"""Limit on the encoded size of what is read at once: base64, downloads, and formats without a streaming decoder."""
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""File formats that are read (JPEG includes MPO). Open anything else with Pillow and pass the Pillow image."""
_BUILT_IN = ("BMP", "GIF", "JPEG", "PNG", "PPM")
_TRIED = (*_BUILT_IN, *(name for name in FORMATS if name not in _BUILT_IN))
"""The same, those first that Pillow opens without importing the modules of all its formats."""

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray[Any, Any]
"""What `load_image` takes; tensors of torch, too."""

_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SMALLER = "Make it smaller, or raise the setting max_pixels."
_HEADER_BYTES = 16_000_000
_HEADER_READS = 10_000
_READS = 400_000
"""Limits on the metadata of a file: Pillow handles each block of it in Python, some with quadratic effort."""
_COST = {"JPEG2000": 36, "AVIF": 24, "WEBP": 24, "I": 24, "F": 24}
"""Bytes of memory to decode a pixel, by format or mode; 12 for others."""
_GRANTED = 18
"""Bytes of memory for each of `max_pixels`."""
_SLOW_BYTES = 2_000_000
"""Limit on the encoded size where Pillow decodes in Python (QOI, plain PPM, BMP with runs), a microsecond a byte."""
_SCANNED_PIXELS = 2_500_000_000
"""Limit on pixels times scans of a progressive JPEG, each of which goes over all pixels."""
_TAIL = 65_536
_OPENING = Lock()
_STRIP_PIXELS = 500_000
_OVERSHOOT = 0.25
"""How far samples of 0..1 may lie beyond it, as bicubic resizing leaves them; below 0, as a share of their highest."""
_URL_TIMEOUT_S = 120
"""Seconds for the whole of a download: a server that sends a byte now and then would hold a thread for ever."""
_FETCH = "Download it and pass the file."
_DAMAGED = "The file is damaged or unusual."
_PERHAPS_CLOSED = f"{_DAMAGED[:-1]}, or was closed before its pixels were read: call load() on the image first."


def load_image(source: ImageSource, *, allow_url: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an upright RGB image without file or metadata behind it.

    EXIF orientation is applied, transparency is flattened on white, the first frame of several is taken, with a
    warning. 16-bit samples map 0..65535 to 0..255; the range of 32-bit and float samples is the smallest of 0..1 (float
    only; what resizing leaves beyond, up to a quarter, is cut off), 0..255 and 0..65535 that holds them, else their
    minimum to maximum.

    Args:
        source: A path, encoded bytes or an open file of them, a `data:` URI, an http(s) URL, a Pillow image, or an
            array of shape [H, W] or [H, W, 1 to 4] (grey, grey + alpha, RGB, RGB + alpha); a tensor of torch may also
            be [1 to 4, H, W]. "FILE.pdf#page=2" is a page of a PDF (extra `[pdf]`).
        allow_url: Fetch URLs.
        max_pixels: Most pixels, checked before decoding.

    Raises:
        ImageError: There is no such file, or it is no image, damaged, empty or over the limit.
    """
    given = _plain(source)
    if isinstance(given, np.ndarray):
        return _from_array(given, max_pixels)
    if isinstance(given, Image.Image):
        return _decode(given, "the Pillow image", max_pixels, advice=_PERHAPS_CLOSED)
    if is_pdf(given):
        page = render_page(given, max_pixels=max_pixels)
        return _decode(page, "the page", max_pixels)
    with _opened(given, allow_url, max_pixels) as (image, name, _):
        shown = _decode(image, name, max_pixels, ours=True)
        if _has_more_frames(image):
            logger.warning("%s has several frames or pages; only the first is shown", name)
        return shown


def check_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the upright size of an image without decoding it, unless its end seems to be missing; of a page, without
    rendering it.

    Raises:
        ImageError: `load_image` would raise it. Damage in the middle of a file is not found.
    """
    given = _plain(source)
    if isinstance(given, np.ndarray):
        return _from_array(given, max_pixels).size
    if isinstance(given, Image.Image):
        _check_size(given.size, "the Pillow image", max_pixels)
        return upright_size(given)
    if is_pdf(given):
        size = page_size(given, max_pixels=max_pixels)
        _check_size(size, "the page", max_pixels)
        return size
    with _opened(given, False, max_pixels) as (image, name, file):
        size = upright_size(image)
        if not _ends(file, image.format):
            _decode(image, name, max_pixels)
        return size


def _plain(source: Any) -> str | Path | bytes | Image.Image | np.ndarray[Any, Any]:
    """Return an open file, a buffer or a PDF's data URI as its bytes, a tensor as an array, anything else as it is."""
    if isinstance(source, str) and source[:20].lower() == "data:application/pdf":
        return _data_uri(source)
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if callable(getattr(source, "read", None)):
        try:
            if getattr(source, "seekable", bool)():
                source.seek(0)  # as Pillow does: it may have been read, or just written
            data = source.read(MAX_BYTES_IN_MEMORY + 1)
        except (OSError, ValueError) as error:
            raise ImageError(f"Cannot read the file given: {_cause(error)}. Open it in binary mode.") from error
        if not isinstance(data, bytes):
            raise ImageError(f"The file given is open for {type(data).__name__}, not bytes. Open it in binary mode.")
        if len(data) > MAX_BYTES_IN_MEMORY:
            raise ImageError(f"The file given has over {MAX_BYTES_IN_MEMORY} bytes. Give its path.")
        return data
    if callable(getattr(source, "detach", None)):  # a tensor, without an import of torch
        tensor = source.detach().cpu()
        array: np.ndarray[Any, Any] = np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
        first = array.ndim == 3 and array.shape[0] in (1, 2, 3, 4) and array.shape[2] not in (1, 2, 3, 4)
        return np.moveaxis(array, 0, 2) if first else array
    plain: str | Path | bytes | Image.Image | np.ndarray[Any, Any] = source
    return plain


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photo with a preview
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what follows the first frame is damaged; that frame was read
        return False


@contextmanager
def _opened(
    source: str | Path | bytes, allow_url: bool, max_pixels: int
) -> Iterator[tuple[Image.Image, str, "_CountedFile"]]:
    """Open a file whose header is within all limits, and give its name for errors."""
    data, name = _encoded(source, allow_url)
    with data.open("rb") if isinstance(data, Path) else data as raw:
        file = _CountedFile(raw, name)
        try:
            with _own_limit(max_pixels):
                image = Image.open(file, formats=_TRIED)
            _check_header(image, file, max_pixels)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError(
                f"Not an image that can be read: {name}. Formats read: {', '.join(FORMATS)}. Save it as PNG or JPEG "
                "(in Python, what Pillow opens with a plugin may also be given as its image)."
            ) from error
        except Image.DecompressionBombError as error:
            raise ImageError(
                f"An image is over the limit of {max_pixels} px: {name}. {_cause(error)}. {_SMALLER}"
            ) from error
        except Exception as error:  # decoders raise any class on hostile bytes
            raise ImageError(
                f"Cannot read {name} as an image: {_cause(error)}. Save it again as PNG or JPEG."
            ) from error
        file.reads_left = _READS
        file.bytes_left = None
        with image:
            yield image, name, file


class _CountedFile:
    """A binary file that gives out so many bytes and reads; then it raises ImageError."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.reads_left = _HEADER_READS
        self.bytes_left: int | None = _HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        whole = size is None or size < 0
        if whole and self.size > MAX_BYTES_IN_MEMORY:
            raise ImageError(
                f"{self._name} has {self.size} bytes, over the limit of {MAX_BYTES_IN_MEMORY} for its format. Save it "
                "as PNG or JPEG."
            )
        self.reads_left -= 1
        if not whole and self.bytes_left is not None:
            self.bytes_left -= max(size, 0)
        if self.reads_left < 0 or (self.bytes_left is not None and self.bytes_left < 0):
            raise ImageError(f"{self._name} has too much metadata to be an image. Save it again without metadata.")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check_header(image: Image.Image, file: _CountedFile, max_pixels: int) -> None:
    """Raise ImageError if decoding an opened image would take too much memory or time."""
    name, (width, height) = file._name, image.size
    _check_size(image.size, name, max_pixels)
    if isinstance(image, IcoImageFile):  # its directory says one size, and the image inside may have another
        _check_size(image.ico.getimage(image.size).size, name, max_pixels)
    cost = max(_COST.get(image.format or "", 12), _COST.get(image.mode, 12))
    if width * height * cost > _GRANTED * max_pixels:
        most = _GRANTED * max_pixels // cost
        raise ImageError(
            f"An image of {width}x{height} px is over the limit of {most} px for {image.format} {image.mode}: {name}. "
            f"{_SMALLER}"
        )
    tiles = image.tile if isinstance(image, ImageFile) else []
    in_python = isinstance(image, IcoImageFile) or any(tile[0] in Image.DECODERS for tile in tiles[:1])
    if in_python and file.size > _SLOW_BYTES:
        raise ImageError(
            f"{name} has {file.size} bytes, over the limit of {_SLOW_BYTES} for this kind of {image.format}. Save it "
            "as PNG or JPEG."
        )
    if image.info.get("progressive") and _scans(file) * width * height > _SCANNED_PIXELS:
        raise ImageError(f"{name} has too many scans for its {width}x{height} px. Save it again as PNG or JPEG.")


def _scans(file: _CountedFile) -> int:
    """Return the number of scans of a JPEG; marks in previews are counted, too."""
    place, count, last = file.tell(), 0, b""
    file.seek(0)
    while block := file._file.read(1 << 20):
        count += (last + block).count(b"\xff\xda")
        last = block[-1:]
    file.seek(place)
    return count


def _ends(file: _CountedFile, format: str | None) -> bool:
    """Return whether a file has the mark that ends its format, near its end; True for formats without one."""
    mark = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(format or "", b"")
    place = file.tell()
    file.seek(max(0, file.size - _TAIL))
    tail = file._file.read(_TAIL)
    file.seek(place)
    return mark in tail


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the size that an opened image has once it is upright."""
    width, height = image.size
    # Pillow itself turns the size of a TIFF as it opens it.
    lies = _orientation(image) in _TURNED and not isinstance(image, TiffImageFile)
    return (height, width) if lies else (width, height)


def cut(image: Image.Image, box: Box) -> Image.Image:
    """Return the part of an image in a box of whole pixels inside it, also beyond Pillow's limit."""
    corners = (int(box.x1), int(box.y1), int(box.x2), int(box.y2))
    if box.area <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return image.crop(corners)
    with _own_limit(int(box.area)):
        return image.crop(corners)


@contextmanager
def _own_limit(max_pixels: int) -> Iterator[None]:
    """Raise Pillow's limit, which holds for the whole process, to ours for a moment, and switch its warning off."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max(max_pixels, before or 0)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def digest(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels, as 64 hex digits, whatever file they came from."""
    found = hashlib.sha256(f"RGB {image.width}x{image.height}\n".encode())
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        found.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return found.hexdigest()


def _encoded(source: str | Path | bytes, allow_url: bool) -> tuple[Path | io.BytesIO, str]:
    """Return the file or buffer of the encoded bytes, and its name for errors."""
    if isinstance(source, bytes):
        name = f"the {len(source)} bytes given"
        return _buffer(source, name), name
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _buffer(_data_uri(source), "the data URI"), "the data URI"
        if scheme.startswith(("http://", "https://")):
            if not allow_url:
                raise ImageError(
                    f"Will not fetch {_short(source)}: URLs are off. Download it and give the file; in Python, "
                    "load_image(url, allow_url=True) does both."
                )
            return _buffer(_download(source), _short(source)), _short(source)
        if scheme.startswith("file:") or not source:
            raise ImageError(f"{_short(source)} is no path of an image. Give the path of a file, without file://.")
    if not isinstance(source, str | Path):
        raise ImageError(
            f"Cannot read an image from {type(source).__name__}: pass a path, bytes, an open file, a data URI, a "
            "Pillow image or an array."
        )
    return _file(Path(source)), _short(str(source))


def _file(path: Path) -> Path:
    try:
        path = expanded(path)
        if path.is_dir():
            raise ImageError(f"{_short(str(path))} is a folder, not an image. Pass the path of one file.")
        if not path.is_file():
            raise ImageError(f"There is no image file at {_short(str(path))}. Check the path.")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise ImageError(f"Cannot open {_short(str(path))}: {_cause(error)}. Check the path.") from error
    _check_bytes(size, _short(str(path)))
    return path


def _buffer(data: bytes, name: str) -> io.BytesIO:
    _check_bytes(len(data), name)
    return io.BytesIO(data)


def _check_bytes(size: int, name: str) -> None:
    if size == 0:
        raise ImageError(f"There is no image in {name}: it is empty.")
    if size > MAX_BYTES:
        raise ImageError(f"The image in {name} has {size} bytes, over the limit of {MAX_BYTES}. Make it smaller.")


def _data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"Cannot read the data URI {_short(uri)}: write it as data:image/png;base64,...")
    try:
        return decode_base64(body, "The data URI")
    except ValueError as error:
        raise ImageError(f"The data URI {_short(uri)} is not valid base64: {error}. Encode the file again.") from error


def decode_base64(text: str, name: str) -> bytes:
    """Return the bytes of an image in base64.

    Raises:
        ImageError: It is too long; nothing is decoded then.
        ValueError: It is not base64.
    """
    if len(text) > MAX_BYTES_IN_MEMORY * 3 // 2:
        raise ImageError(f"{name} has {len(text)} characters, over the limit for an image in base64. Give a file.")
    return base64.b64decode("".join(text.split()), validate=True)


def _download(url: str) -> bytes:
    import httpx

    try:
        data: bytes = awaited(asyncio.wait_for(_fetched(url), _URL_TIMEOUT_S))
    except TimeoutError as error:
        raise ImageError(f"Cannot fetch {_short(url)}: it took longer than {_URL_TIMEOUT_S} s. {_FETCH}") from error
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"Cannot fetch {_short(url)}: {_cause(error)}. {_FETCH}") from error
    return data


async def _fetched(url: str) -> bytes:
    import httpx

    data = bytearray()
    async with (
        httpx.AsyncClient(timeout=None, follow_redirects=True, verify=ssl.create_default_context()) as client,
        client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response,
    ):
        if not response.is_success:
            raise httpx.HTTPError(f"status {response.status_code} {response.reason_phrase}")
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > MAX_BYTES_IN_MEMORY:
                raise ValueError(f"it has over {MAX_BYTES_IN_MEMORY} bytes")
    return bytes(data)


def _decode(
    image: Image.Image, name: str, max_pixels: int, *, ours: bool = False, advice: str = _DAMAGED
) -> Image.Image:
    """Return the upright RGB image of an opened one; `ours` if nobody else has its pixels, which are not copied then.

    Raises:
        ImageError: It is damaged, or over the limit.
    """
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
        # Some containers state one size and hold another.
        _check_size(image.size, name, max_pixels)
        rgb = _to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            rgb = rgb.transpose(turn)
        elif rgb is image:
            rgb = image._new(image.im) if ours else image.copy()
    except ImageError:
        raise
    except Exception as error:  # decoders raise any class on hostile bytes
        raise ImageError(f"Cannot decode {name}: {_cause(error)}. {advice}") from error
    rgb.info.clear()
    return rgb


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"An image of {width}x{height} px has no pixels: {name}. Save it again.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"An image of {width}x{height} px is longer than {MAX_ASPECT}:1 and cannot be shown to a model: {name}. "
            "Cut out the part that matters."
        )
    if width * height > max_pixels:
        raise ImageError(f"An image of {width}x{height} px is over the limit of {max_pixels} px: {name}. {_SMALLER}")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata that cannot be read says nothing about the pixels, which were
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image with the pixels of a loaded one: itself if it is RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        samples, clear = np.asarray(image), image.info.get("transparency")
        grey = Image.fromarray(_to_bytes(samples, *_shown_range(samples))).convert("RGB")
        if isinstance(clear, int):  # of a PNG in 16 bits, the grey that is transparent
            grey.paste("white", mask=Image.fromarray(samples == clear))
        return grey
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image)
    return flat


def _from_array(array: np.ndarray[Any, Any], max_pixels: int) -> Image.Image:
    shape = "x".join(str(side) for side in array.shape)
    if array.dtype.kind not in "buif":
        raise ImageError(f"An array of dtype {array.dtype} is not an image. Pass uint8, uint16 or float samples.")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ImageError(f"An array of shape {shape} is not an image. Pass [H, W] or [H, W, 1 to 4].")
    name = f"the {shape} array"
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    if array.dtype != np.uint8:
        array = _to_bytes(array, *_shown_range(array))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _decode(Image.fromarray(np.ascontiguousarray(array)), name, max_pixels)


def _shown_range(samples: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the values shown as black and as white."""
    if samples.dtype.kind == "b":
        return 0.0, 1.0
    if samples.dtype.kind == "u" and samples.itemsize == 2:
        return 0.0, 65535.0
    floating = samples.dtype.kind == "f"
    low, high = math.inf, -math.inf
    for rows in _strips(samples):
        kept = rows[np.isfinite(rows)] if floating else rows
        if kept.size:
            low, high = min(low, float(kept.min())), max(high, float(kept.max()))
    if low > high:
        return 0.0, 1.0
    if floating and -_OVERSHOOT * high <= low and high <= 1 + _OVERSHOOT:
        return 0.0, 1.0
    if low >= 0:
        for top in (255.0, 65535.0):
            if high <= top:
                return 0.0, top
    return low, high


def _to_bytes(samples: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    # Halved so that the span of extreme doubles stays finite.
    span = high / 2 - low / 2
    if span == 0:  # one value everywhere
        return (samples >= low).astype(np.uint8) * np.uint8(255)
    found = np.empty(samples.shape, np.uint8)
    gain = 255 / span
    for rows, out in zip(_strips(samples), _strips(found), strict=True):
        scaled = rows.astype(np.float64)
        scaled /= 2
        scaled -= low / 2
        scaled *= gain
        np.clip(scaled, 0, 255, out=scaled)
        np.rint(scaled, out=scaled)
        scaled[np.isnan(scaled)] = 0
        out[...] = scaled
    return found


def _strips(samples: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield views of a few rows each, so that converting a large array needs no second one of its size in float."""
    rows = max(1, _STRIP_PIXELS // samples.shape[1])
    for top in range(0, samples.shape[0], rows):
        yield samples[top : top + rows]


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}")


def _cause(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}".rstrip(": .")
