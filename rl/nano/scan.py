"""The effects of printing, wear and a scanner on a clean page.

`scanned` is for whole pages and moves the lines along with the print; `aged` changes the tones and the sharpness of a
view alone and serves real receipts as well.
"""

import io
import math
from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from nano.paper import Line, Paper


def scanned(rng: Random, page: Paper) -> Paper:
    """Return a clean page as a scan of it: dots or spread ink, scaled, turned, worn, folded and scribbled on."""
    image = page.image
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.MinFilter(3)) if rng.random() < 0.4 else _thinned(rng, image)
    scale = rng.uniform(1.0, 2.0) if rng.random() < 0.75 else 2.0
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)),
        Image.Resampling.NEAREST if rng.random() < 0.3 else Image.Resampling.BILINEAR,
    )
    if rng.random() < 0.12:
        image = _dotted(rng, image, scale)
    turn = rng.gauss(0, 0.5) if rng.random() < 0.6 else 0.0
    turned = image.rotate(turn, Image.Resampling.BILINEAR, fillcolor=255) if turn else image
    lines = tuple(_moved(line, scale, turn, image.size) for line in page.lines)
    if rng.random() < 0.25:
        _scribble(rng, turned)
    tone = _toned(rng, np.asarray(turned, dtype=np.float32))
    return replace(page, image=Image.fromarray(tone.clip(0, 255).astype(np.uint8)), lines=lines)


def _moved(line: Line, scale: float, turn: float, size: tuple[int, int]) -> Line:
    """Return where a line lies after scaling and turning about the middle of the page."""
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    middle_x, middle_y = size[0] / 2, size[1] / 2

    def at(x: float, y: float) -> tuple[float, float]:
        x, y = x * scale - middle_x, y * scale - middle_y
        return middle_x + x * cos + y * sin, middle_y - x * sin + y * cos

    left, top, right, bottom = line.box
    center = (top + bottom) / 2
    start, end = at(left, center), at(right, center)
    half = (bottom - top) / 2 * scale
    middle = (start[1] + end[1]) / 2
    centers = tuple(at(x, center)[0] for x in line.centers or ())
    return Line((start[0], middle - half, end[0], middle + half), line.text, centers or None)


def _thinned(rng: Random, image: Image.Image) -> Image.Image:
    """Return print with pinholes, as a worn head leaves it."""
    pixels = np.asarray(image).copy()
    noise = np.random.default_rng(rng.getrandbits(32)).random(pixels.shape, dtype=np.float32)
    pixels[noise < rng.uniform(0.02, 0.2)] = 255
    return Image.fromarray(pixels)


def _dotted(rng: Random, image: Image.Image, scale: float) -> Image.Image:
    """Return print as separate dots."""
    pixels = np.asarray(image).copy()
    step = max(2, round(scale))
    if rng.random() < 0.7:
        pixels[::step] = np.maximum(pixels[::step], rng.randint(150, 255))
    if rng.random() < 0.5:
        pixels[:, ::step] = np.maximum(pixels[:, ::step], rng.randint(150, 255))
    return Image.fromarray(pixels)


def _scribble(rng: Random, image: Image.Image) -> None:
    """Draw what somebody wrote on the page."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        points = [(x, y)]
        for _ in range(rng.randint(4, 24)):
            x, y = x + rng.gauss(8, 22), y + rng.gauss(0, 18)
            points.append((x, y))
        draw.line(points, fill=rng.randint(20, 140), width=rng.randint(2, 4), joint="curve")


def _toned(rng: Random, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return grey values of faded ink on tinted, folded, streaked paper under uneven light."""
    rows, columns = pixels.shape
    dice = np.random.default_rng(rng.getrandbits(32))
    ink = rng.uniform(0, 70) if rng.random() < 0.7 else rng.uniform(70, 175)
    sheet = rng.uniform(225, 255) if rng.random() < 0.8 else rng.uniform(max(150.0, ink + 60), 230)
    pixels = ink + pixels * ((sheet - ink) / 255)
    if rng.random() < 0.4:  # ink that comes and goes along the strip
        fade = np.interp(np.arange(rows), np.linspace(0, rows, 8), dice.uniform(0.5, 1.0, 8)).astype(np.float32)
        pixels = sheet - (sheet - pixels) * fade[:, None]
    if rng.random() < 0.2:  # dead elements of the head
        for column in dice.integers(0, columns, rng.randint(1, 4)):
            pixels[:, column : column + rng.randint(1, 3)] = sheet
    if rng.random() < 0.5:
        light = np.interp(np.arange(rows), np.linspace(0, rows, 5), dice.uniform(0.85, 1.04, 5))
        side = np.interp(np.arange(columns), np.linspace(0, columns, 4), dice.uniform(0.88, 1.04, 4))
        pixels = pixels * light[:, None].astype(np.float32) * side[None].astype(np.float32)
    if rng.random() < 0.3:
        for fold in dice.integers(0, rows, rng.randint(1, 4)):
            band = np.exp(-np.abs(np.arange(rows) - fold) / rng.uniform(2, 30)) * rng.uniform(-40, 25)
            pixels = pixels + band[:, None].astype(np.float32)
    if rng.random() < 0.6:
        pixels = pixels + dice.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(1, 14)
    return pixels


def aged(rng: Random, image: Image.Image) -> Image.Image:
    """Return a view with other tones, sharpness and traces of compression."""
    if rng.random() < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    elif rng.random() < 0.2:
        image = image.filter(ImageFilter.UnsharpMask(1.5, rng.randint(50, 200), 0))
    if rng.random() < 0.7:
        gain, shift, gamma = rng.uniform(0.7, 1.2), rng.uniform(-25, 25), math.exp(rng.gauss(0, 0.25))
        table = [min(255, max(0, round(255 * (value / 255) ** gamma * gain + shift))) for value in range(256)]
        image = image.point(table * len(image.getbands()))
    if rng.random() < 0.3:
        pixels = np.asarray(image, dtype=np.float32)
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape, dtype=np.float32)
        image = Image.fromarray((pixels + noise * rng.uniform(2, 14)).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(25, 85))
        image = Image.open(buffer).convert(image.mode)
    return image
