"""The tools that come with the package beside zoom: `rotate`, `enhance` and `read_text`.

Each is an ordinary own tool, as anybody may write it (docs/extend.md).
"""

from __future__ import annotations

import math
from functools import cache
from threading import Lock
from typing import Any

from PIL import Image, ImageEnhance, ImageOps

from qzoom_agent.extras import require
from qzoom_agent.geometry import Affine, composed
from qzoom_agent.zoom.tool_images import AffineImage

_ONE = Lock()
"""Runs of one agent may overlap, and the OCR program reads one image at a time."""
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def rotate(image: Image.Image, degrees: float = 90, mirror: bool = False) -> AffineImage:
    """Turn an image counter-clockwise, so that what is in it stands upright.

    Args:
        image: The image to turn.
        degrees: Degrees counter-clockwise; negative ones turn clockwise.
        mirror: Also swap left and right, before turning.
    """
    (wide, high), degrees = image.size, degrees % 360
    cos, sin = (round(turn(math.radians(degrees)), 12) for turn in (math.cos, math.sin))
    size = _side(wide * cos, high * sin), _side(wide * sin, high * cos)
    left, top = wide / 2 - (cos * size[0] - sin * size[1]) / 2, high / 2 - (sin * size[0] + cos * size[1]) / 2
    matrix: Affine = (cos, -sin, left, sin, cos, top)
    if mirror:
        image, flipped = ImageOps.mirror(image), composed(matrix, (-1, 0, wide, 0, 1, 0))
    if degrees in _TURNS:
        turned = image.transpose(_TURNS[int(degrees)])
    else:
        turned = image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor="white")
    return AffineImage(turned, flipped if mirror else matrix)


def _side(first: float, second: float) -> int:
    return math.ceil(round(abs(first) + abs(second), 6))


def enhance(image: Image.Image, contrast: float = 1.5, sharpness: float = 1.5) -> AffineImage:
    """Show an image with more contrast and sharper edges, for print that is faint or blurred.

    Args:
        image: The image to enhance.
        contrast: Factor of the contrast, 0 to 5; 1 leaves it as it is.
        sharpness: Factor of the sharpness, 0 to 5; 1 leaves it as it is.
    """
    contrast, sharpness = (min(5.0, max(0.0, factor)) for factor in (contrast, sharpness))
    clear = ImageEnhance.Contrast(image).enhance(contrast)
    return AffineImage(ImageEnhance.Sharpness(clear).enhance(sharpness))


def read_text(image: Image.Image) -> str:
    """Return the printed text of an image, line by line, as an OCR program reads it.

    Args:
        image: The image to read; a crop is read best.
    """
    with _ONE:
        found = _reader()(image.convert("RGB"))
    lines = list(found.txts or ())
    return "\n".join(lines) if lines else "No text was found."


def require_packages(function: object) -> None:
    """Raise MissingDependency if a tool of this module cannot run here."""
    if function is read_text:
        require("rapidocr", extra="ocr", use="The tool 'read_text'")


@cache
def _reader() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR()
