"""Read any image safely, and name its pixels.

`load_image` turns a path, bytes, a data URI, a Pillow image or an array into one upright RGB image, or raises an
ImageError. The size is checked before a pixel is decoded, and formats that run other programs are not tried. Files are
decoded at full size: Pillow's JPEG `draft` would lose the detail that a zoom is for. Colour profiles are not applied.
"""

import base64
import binascii
import hashlib
import http.client
import io
import math
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from qzoom_agent.errors import ImageError
from qzoom_agent.geometry import Box

MAX_PIXELS = 89_000_000
"""Default limit on width times height (a 10000 x 8900 image): a few hundred MB while it is read."""
MAX_BYTES = 1_000_000_000
"""Limit on the encoded size of one image."""
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""File formats that are read (JPEG includes MPO). Open anything else with Pillow and pass the Pillow image."""

ImageSource = str | Path | bytes | Image.Image | np.ndarray[Any, Any]

_ORIENTATION_TAG = 0x0112
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
_OPENING = Lock()
_STRIP_PIXELS = 500_000
_URL_TIMEOUT_S = 30


def load_image(source: ImageSource, *, allow_url: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an upright RGB image without file or metadata behind it.

    EXIF orientation is applied, transparency is flattened on white, the first frame of an animation is taken. 16-bit
    samples map 0..65535 to 0..255; the range of 32-bit and float samples is the smallest of 0..1 (float only), 0..255
    and 0..65535 that holds them, else their minimum to maximum.

    Args:
        source: A path, encoded bytes, a `data:` URI, an http(s) URL, a Pillow image, or an array of shape [H, W] or
            [H, W, 1 to 4] (grey, grey + alpha, RGB, RGB + alpha).
        allow_url: Fetch URLs.
        max_pixels: Most pixels, checked before decoding.

    Raises:
        ImageError: There is no such file, or it is no image, damaged, empty or over the limit.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, "the Pillow image", max_pixels)
    file, name = _encoded(source, allow_url)
    try:
        with _own_limit(max_pixels):
            opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"Not an image that can be read: {name}. Formats read: {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"An image is over the limit of {max_pixels} px: {name}. {_cause(error)}. {_SMALLER}"
        ) from error
    except Exception as error:  # decoders raise any class on hostile bytes
        raise ImageError(f"Cannot read {name} as an image: {_cause(error)}. Save it again as PNG or JPEG.") from error
    with opened:
        return _decode(opened, name, max_pixels)


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
    if rows >= image.height:
        found.update(image.tobytes())  # the same bytes as below, without a copy of the pixels
        return found.hexdigest()
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
    if not isinstance(source, str | Path):
        raise ImageError(
            f"Cannot read an image from {type(source).__name__}: pass a path, bytes, a data URI, a Pillow image or a "
            "numpy array."
        )
    return _file(Path(source)), _short(str(source))


def _file(path: Path) -> Path:
    try:
        path = path.expanduser()
        if path.is_dir():
            raise ImageError(f"{_short(str(path))} is a folder, not an image. Pass the path of one file.")
        if not path.is_file():
            raise ImageError(f"There is no image file at {_short(str(path))}. Check the path.")
        size = path.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:
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
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The data URI {_short(uri)} is not valid base64: {error}. Encode the file again.") from error


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_URL_TIMEOUT_S) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, urllib.error.URLError, http.client.HTTPException) as error:
        raise ImageError(f"Cannot fetch {_short(url)}: {_cause(error)}. Download it and pass the file.") from error
    return data


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    try:
        image.load()
        # Some containers state one size and hold another.
        _check_size(image.size, name, max_pixels)
        rgb = _to_rgb(image)
        turn = _UPRIGHT.get(_orientation(image))
        rgb = rgb.transpose(turn) if turn is not None else rgb
    except ImageError:
        raise
    except Exception as error:  # decoders raise any class on hostile bytes
        raise ImageError(f"Cannot decode {name}: {_cause(error)}. The file is damaged or unusual.") from error
    rgb.info.clear()
    return rgb


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"An image of {width}x{height} px has no pixels: {name}. Save it again.")
    if width * height > max_pixels:
        raise ImageError(f"An image of {width}x{height} px is over the limit of {max_pixels} px: {name}. {_SMALLER}")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata that cannot be read says nothing about the pixels, which were
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return a new RGB image with the pixels of a loaded one."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        samples = np.asarray(image)
        return Image.fromarray(_to_bytes(samples, *_shown_range(samples))).convert("RGB")
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
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
    if low >= 0:
        for top in (1.0, 255.0, 65535.0) if floating else (255.0, 65535.0):
            if high <= top:
                return 0.0, top
    return (low, high) if low < high else (low - 1, low)


def _to_bytes(samples: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    found = np.empty(samples.shape, np.uint8)
    # Halved so that the span of extreme doubles stays finite.
    gain = 255 / (high / 2 - low / 2)
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
