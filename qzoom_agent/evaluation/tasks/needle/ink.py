"""The parts of a board: typefaces, backgrounds, shapes, printed text with tracking, and dice.

Typefaces and photographs are from pip packages, so that a seed draws the same pixels everywhere. `TRAIN` and `OOD` are
disjoint families: a score on the `ood` split is a score on letter shapes that no training image had. Sizes of print are
the height of a capital in pixels, because that decides whether it is legible; point sizes mean different things in
different typefaces. Photographs are the freely licensed ones inside scikit-image (NASA's astronaut, CC0 grass, gravel,
brick, coffee and others), of which only the files are read.

Functions that draw return where the ink is, in pixels of the board, because the needle's box and the dense labels of
vision pretraining come from the drawing itself and never from a detector.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

from qzoom_agent.errors import ConfigError
from qzoom_agent.extras import require

Color = tuple[int, int, int]
Rect = tuple[float, float, float, float]

SHAPES: Final = ("circle", "square", "triangle", "star", "diamond", "ring", "cross")
COLORS: Final = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_PALETTES: Final = {
    "train": "#ce2024 #f08616 #f2d428 #28943c #2cc8d4 #2446cc #78289c #f68cc0",
    "ood": "#b4182c #e2740a #e2c614 #3ea632 #46d6ce #3a60d8 #642eb0 #f078ac",
}
"""Shades of `COLORS`, in that order."""
TRAIN: Final = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneralBol.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/cmss10.ttf"),
    ("font_source_sans_pro", "files/SourceSansPro-Semibold.ttf"),
    ("font_source_sans_pro", "files/SourceSansPro-Bold.ttf"),
    ("font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf"),
    ("font_hanken_grotesk", "files/HankenGrotesk-Medium.otf"),
    ("font_hanken_grotesk", "files/HankenGrotesk-Bold.otf"),
    ("font_lato", "files/Lato-Regular.ttf"),
    ("font_lato", "files/Lato-Bold.ttf"),
)
OOD: Final = (
    ("font_manrope", "files/Manrope-SemiBold.ttf"),
    ("font_manrope", "files/Manrope-Bold.ttf"),
    ("font_caladea", "files/Caladea-Bold.ttf"),
    ("font_rhd", "files/RedHatDisplay-Medium.ttf"),
    ("font_rhd", "files/RedHatDisplay-Bold.ttf"),
)
SUFFIXES: Final = (".ttf", ".otf")
PHOTOS: Final = {
    "train": ("astronaut.png", "brick.png", "coffee.png", "grass.png", "rocket.jpg", "hubble_deep_field.jpg"),
    "ood": ("gravel.png", "chelsea.png", "moon.png"),
}


class Glyph(NamedTuple):
    """One printed character and the centre and height of its ink."""

    char: str
    x: float
    y: float
    height: float


class Printed(NamedTuple):
    box: Rect
    glyphs: tuple[Glyph, ...]


@lru_cache(maxsize=8)
def typefaces(split: str, folder: Path | None = None) -> tuple[Path, ...]:
    """Return the font files of a split, or those below `folder` (sorted by name) when one is given.

    Raises ConfigError if it holds no font, MissingDependency if a font package is not installed.
    """
    if folder is not None:
        found = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES))
        if not found:
            raise ConfigError(
                f"No typeface found: {folder} holds no {' or '.join(SUFFIXES)} file. Give a folder of fonts."
            )
        return found
    return tuple(
        require(package, extra="eval", use="Drawing boards") / name
        for package, name in (OOD if split == "ood" else TRAIN)
    )


@lru_cache(maxsize=64)
def _capital_share(path: Path) -> float:
    """Return the height of a capital as a share of the font size."""
    box = ImageFont.truetype(path, 200).getbbox("H")
    return max(float(box[3] - box[1]), 1.0) / 200


@lru_cache(maxsize=1024)
def font(path: Path, capital: int) -> ImageFont.FreeTypeFont:
    """Return the typeface whose capitals are `capital` pixels tall; ConfigError if FreeType cannot read the file."""
    try:
        return ImageFont.truetype(path, max(6, round(capital / _capital_share(path))))
    except OSError as error:
        raise ConfigError(f"Cannot read the typeface {path}: {error}. Remove it from the folder of fonts.") from error


def photo_folder() -> Path:
    """Return the folder of the photographs. Raises MissingDependency."""
    return require("skimage", extra="eval", use="Drawing boards") / "data"


@lru_cache(maxsize=16)
def _photo(name: str) -> Image.Image:
    with Image.open(photo_folder() / name) as file:
        image = file.convert("RGB")
    image.thumbnail((384, 384), Image.Resampling.BICUBIC)
    return image


def background(rng: Random, size: tuple[int, int], *, split: str) -> tuple[Image.Image, bool]:
    """Return a background of `size` and whether it is light (so that dark print reads on it)."""
    photo_folder()  # a training fails at its first board, not at the first one with a photograph
    light = rng.random() < 0.75
    base = _shade(rng, 205, 250) if light else _shade(rng, 18, 62)
    style = rng.random()
    if style < 0.45:
        return Image.new("RGB", size, base), light
    if style < 0.6:
        return _stripes(rng, size, base), light
    photo = _photo(rng.choice(PHOTOS["ood" if split == "ood" else "train"]))
    side = rng.randint(100, 250)
    left, top = rng.randint(0, max(0, photo.width - side)), rng.randint(0, max(0, photo.height - side))
    patch = photo.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.BILINEAR)
    return Image.blend(Image.new("RGB", size, base), patch, rng.uniform(0.06, 0.22)), light


def _shade(rng: Random, low: int, high: int) -> Color:
    level = rng.randint(low, high)
    return _clamped(level + rng.randint(-14, 14) for _ in range(3))


def _clamped(levels: Iterable[int]) -> Color:
    red, green, blue = (min(255, max(0, level)) for level in levels)
    return red, green, blue


def _stripes(rng: Random, size: tuple[int, int], base: Color) -> Image.Image:
    image = Image.new("RGB", size, base)
    draw = ImageDraw.Draw(image)
    step, shift = rng.randint(14, 60), rng.choice((-9, -6, 6, 9))
    other = _clamped(level + shift for level in base)
    horizontal = rng.random() < 0.5
    for start in range(0, max(size), 2 * step):
        end = start + step
        draw.rectangle((0, start, size[0], end) if horizontal else (start, 0, end, size[1]), fill=other)
    return image


def paint(rng: Random, name: str, *, split: str) -> Color:
    """Return a shade of the named colour."""
    base = ImageColor.getrgb(_PALETTES["ood" if split == "ood" else "train"].split()[COLORS.index(name)])
    return _clamped(level + rng.randint(-12, 12) for level in base)


def draw_text(
    draw: ImageDraw.ImageDraw,
    text: str,
    *,
    at: tuple[float, float],
    typeface: Path,
    capital: int,
    fill: Color,
    advance: float | None = None,
) -> Printed:
    """Print `text` with its capitals' top-left corner at `at`.

    With `advance`, every character is centred in a slot of that many pixels (wide tracking, as on number plates), or of
    its own width where that is more; without it, the typeface's own spacing is used.
    """
    face = font(typeface, capital)
    top = face.getbbox("H")[1]
    x, y = at
    glyphs: list[Glyph] = []
    for char in text:
        left_ink, _, right_ink, _ = face.getbbox(char)
        slot = _slot(face, char, capital, advance)
        origin = x + (slot - (right_ink - left_ink)) / 2 - left_ink
        draw.text((round(origin), round(y - top)), char, font=face, fill=fill)
        glyphs.append(Glyph(char, x + slot / 2, y + capital / 2, float(capital)))
        x += slot
    return Printed((at[0], y, x, y + capital), tuple(glyphs))


def text_width(text: str, *, typeface: Path, capital: int, advance: float | None = None) -> float:
    """Return the width in pixels that `draw_text` will use."""
    face = font(typeface, capital)
    return sum(_slot(face, char, capital, advance) for char in text)


def _slot(face: ImageFont.FreeTypeFont, char: str, capital: int, advance: float | None) -> float:
    ink = _ink_width(face, char)
    if advance is None:
        return ink + max(1.0, 0.14 * capital)
    return max(advance * (0.5 if char == "." else 1.0), ink + 2)


@lru_cache(maxsize=100_000)
def _ink_width(face: ImageFont.FreeTypeFont, char: str) -> float:
    left, _, right, _ = face.getbbox(char)
    return float(right - left)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Rect, *, fill: Color, outline: Color) -> None:
    """Draw one of `SHAPES`, filling `box`."""
    x1, y1, x2, y2 = box
    cx, cy, radius = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2
    if shape == "circle":
        draw.ellipse(box, fill=fill, outline=outline, width=2)
    elif shape == "square":
        inset = radius * 0.1
        draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), fill=fill, outline=outline, width=2)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(radius * 0.36))
    elif shape == "cross":
        arm = radius * 0.36
        left, right, top, bottom = cx - arm, cx + arm, cy - arm, cy + arm
        first = ((left, y1), (right, y1), (right, top), (x2, top), (x2, bottom), (right, bottom))
        rest = ((right, y2), (left, y2), (left, bottom), (x1, bottom), (x1, top), (left, top))
        draw.polygon(first + rest, fill=fill, outline=outline)
    else:
        corners = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.45)}[shape]
        draw.polygon(_polygon(cx, cy, radius, *corners), fill=fill, outline=outline)


def _polygon(cx: float, cy: float, radius: float, corners: int, inner: float) -> list[tuple[float, float]]:
    points = []
    for index in range(corners):
        length = radius * (inner if inner < 1 and index % 2 else 1.0)
        angle = -math.pi / 2 + 2 * math.pi * index / corners
        # rounded, so that the last bit of a platform's sine cannot move a pixel
        points.append((round(cx + length * math.cos(angle), 2), round(cy + length * math.sin(angle), 2)))
    return points


_PIPS: Final = {
    1: ((0, 0),),
    2: ((-1, -1), (1, 1)),
    3: ((-1, -1), (0, 0), (1, 1)),
    4: ((-1, -1), (1, -1), (-1, 1), (1, 1)),
    5: ((-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)),
    6: ((-1, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (1, 1)),
}


def draw_die(draw: ImageDraw.ImageDraw, pips: int, center: tuple[float, float], *, side: float) -> Rect:
    """Draw a die face of `side` pixels with 1 to 6 pips; return its box."""
    cx, cy = center
    box = (cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2)
    draw.rounded_rectangle(box, radius=side * 0.15, fill=(250, 250, 246), outline=(60, 60, 60), width=1)
    radius = side * 0.085
    for column, row in _PIPS[pips]:
        x, y = cx + column * side * 0.27, cy + row * side * 0.27
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(20, 20, 24))
    return box
