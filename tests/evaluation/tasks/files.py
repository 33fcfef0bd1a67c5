"""Pictures with a text, and tables of them as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from PIL import Image as Pillow
from PIL import ImageDraw


def draw(text: str, *, colour: str = "navy", size: tuple[int, int] = (96, 64)) -> Pillow.Image:
    """A small picture of its own: a coloured bar and a text."""
    image = Pillow.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((8, 8, 40, 24), fill=colour)
    pen.text((8, 40), text, fill="black")
    return image


def png(image: Pillow.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(image: Pillow.Image) -> str:
    return base64.b64encode(png(image)).decode()


def picture(text: str) -> dict[str, Any]:
    """Return a picture as a row of a dataset holds it."""
    return {"bytes": png(draw(text)), "path": None}


def dataset(rows: Sequence[Mapping[str, Any]], features: Mapping[str, Any] | None = None) -> Dataset:
    """Return rows as a table with these features; further columns hold text."""
    every = {**dict.fromkeys(rows[0], Value("string")), **(features or {})}
    return Dataset.from_list([dict(row) for row in rows], features=Features(every))


def parquet(data: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(path))
    return path
