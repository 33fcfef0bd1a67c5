"""Backgrounds: plain papers, stripes and washed-out photographs.

The photographs are the freely licensed ones inside scikit-image (NASA's astronaut, CC0 grass, gravel, brick, coffee and
others). Only the files are read; the package itself is never imported, which would cost a second.
"""

from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Final

from PIL import Image, ImageDraw

from qzoom_agent.extras import require

PHOTOS: Final = {
    "train": ("astronaut.png", "brick.png", "coffee.png", "grass.png", "rocket.jpg", "hubble_deep_field.jpg"),
    "ood": ("gravel.png", "chelsea.png", "moon.png"),
}
Color = tuple[int, int, int]


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
    red, green, blue = (min(255, max(0, level + rng.randint(-14, 14))) for _ in range(3))
    return red, green, blue


def _stripes(rng: Random, size: tuple[int, int], base: Color) -> Image.Image:
    image = Image.new("RGB", size, base)
    draw = ImageDraw.Draw(image)
    step, shift = rng.randint(14, 60), rng.choice((-9, -6, 6, 9))
    other: Color = (base[0] + shift, base[1] + shift, base[2] + shift)
    other = tuple(min(255, max(0, value)) for value in other)  # type: ignore[assignment]
    horizontal = rng.random() < 0.5
    for start in range(0, max(size), 2 * step):
        end = start + step
        draw.rectangle((0, start, size[0], end) if horizontal else (start, 0, end, size[1]), fill=other)
    return image
