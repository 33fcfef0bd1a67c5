"""Tables of questions as training reads them: `datasets` tables whose rows have the columns of `QuestionRow`.

A table is a hub id, a folder (of the hub's form, or what `save_to_disk` wrote), a parquet file, or a file of JSON
lines, whose images lie beside it. Images are decoded when a row is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import PIL.Image

from qzoom_agent.data.image_column import picture
from qzoom_agent.data.questions import texts
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.images import digest

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_MAX_PIXELS = 178_956_970
"""Most pixels of an image: twice Pillow's own limit, where Pillow stops."""


class QuestionRow(TypedDict):
    """One question about one image."""

    id: str
    image: PIL.Image.Image
    """RGB."""
    image_id: str
    """Rows with the same one show the same image."""
    question: str
    answer: str
    """The first of `answers`."""
    answers: list[str]
    """All that are right."""
    boxes: list[list[float]] | None
    """Boxes of the answer, in pixels of the image; None if unknown, empty if no part of the image is meant."""


def open_questions(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    images: str | None = None,
    choose: Callable[[Dataset], Dataset] = lambda table: table,
) -> tuple[Dataset, QuestionReader]:
    """Return a table, and the transform that makes its rows `QuestionRow`s when they are read.

    Args:
        path: Hub id, or local folder or file.
        name: Configuration of a hub dataset.
        split: Split of it.
        columns: Names that `image`, `question`, `answer` and `boxes` have in the table, where they differ; `a.b` is
            the field b of a column of records. Of a list of images the first is taken, and of a list of questions the
            first with its own answer; of one question all answers of a list are right.
        images: Configuration of the same hub dataset that holds the images, by `id`; `image` then names one.
        choose: Selects the rows to take.

    Raises:
        ConfigError: The table cannot be read, lacks a column, or has a row without an answer or with unreadable boxes.
    """
    from datasets import Image, Value

    named = {column: (columns or {}).get(column, column) for column in ("image", "question", "answer", "boxes")}
    table = choose(_open(path, name, split, named["image"]))
    missing = [named[column] for column in ("image", "question", "answer") if not _has(table, named[column])]
    if missing:
        raise ConfigError(
            f"The dataset {path} has no column {' and no column '.join(missing)}; it has "
            f"{', '.join(table.column_names)}. Say in the source's `columns` what they are called."
        )
    pictures = None if images is None else _open(path, images, split, named["image"])
    if pictures is None and isinstance(table.features.get(named["image"]), Value | Image):
        table = table.cast_column(named["image"], Image(decode=False))
    named["boxes"] = named["boxes"] if _has(table, named["boxes"]) else ""
    _require_readable(table, named["answer"], named["boxes"], path)
    return table, QuestionReader(path, named, table.column_names, pictures)


def questions_of(table: Dataset, column: str, at: int) -> list[str]:
    """Return the questions of up to 1,000 rows from `at` on, without reading an image."""
    rows = table.with_format(None).select_columns(column.split(".")[0])[at : at + _BATCH]
    return [_first(cell) for cell in values(rows, column)]


def values(rows: Mapping[str, list[Any]], name: str) -> list[Any]:
    """Return the values of a column, or of a field of one."""
    column, *fields = name.split(".")
    found = rows[column]
    for field in fields:
        found = [value[field] for value in found]
    return found


def _open(path: str, name: str | None, split: str, image: str) -> Dataset:
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    where = Path(path).expanduser()
    try:
        if (where / "dataset_info.json").is_file():
            return Dataset.load_from_disk(str(where))
        if (where / "dataset_dict.json").is_file():
            return load_from_disk(str(where))[split]
        if where.is_file():
            kind = "parquet" if where.suffix == ".parquet" else "json"
            return _beside(load_dataset(kind, data_files=str(where), split="train"), where, image)
        loaded: Dataset = load_dataset(path, name, split=split)
    except (OSError, ValueError, KeyError, DatasetsError, StopIteration) as error:
        reason = str(error) or "there is nothing in it"  # which is all that StopIteration says
        raise ConfigError(
            f"The dataset {path} cannot be read: {reason}. Give a hub id, a folder that save_to_disk wrote, or a file "
            "of JSON lines."
        ) from None
    return loaded


def _beside(table: Dataset, file: Path, column: str) -> Dataset:
    """Make the paths of images in a file absolute; they are relative to it. Raises ConfigError if one is not there."""
    from datasets import Value

    kind = table.features.get(column)
    if not isinstance(kind, Value) or kind.dtype != "string":
        return table
    images = [file.parent / (name or "") for name in table[column]]
    missing = [line for line, image in enumerate(images) if not image.is_file()]
    if missing:
        raise ConfigError(
            f"The dataset {file} names images that are not there: {len(missing)} of its {len(images)} rows, the first "
            f"of them row {missing[0]} ({table[missing[0]][column]}). Paths are relative to the file."
        )
    folder = file.parent
    return table.map(lambda row: {column: str(folder / row[column])})


def _has(table: Dataset, name: str) -> bool:
    """Return whether a table has this column, or field of a column."""
    column, *fields = name.split(".")
    kind: Any = table.features.get(column)
    for field in fields:
        kind = kind.get(field) if isinstance(kind, dict) else None
    return kind is not None


def _require_readable(table: Dataset, answer: str, boxes: str, path: str) -> None:
    """Raise ConfigError, before anything is asked, for a row without an answer or with boxes that are none."""
    plain = table.select_columns(sorted({name.split(".")[0] for name in (answer, boxes) if name}))
    at = 0
    for rows in plain.iter(batch_size=_BATCH):
        said = values(rows, answer)
        for one, drawn in zip(said, values(rows, boxes) if boxes else [None] * len(said), strict=True):
            if one is None:
                raise ConfigError(
                    f"Row {at} of the dataset {path} has no answer ({answer} is null). Give it one, or leave the row "
                    "out."
                )
            if drawn is not None and not all(map(_is_box, drawn)):
                raise ConfigError(
                    f"Row {at} of the dataset {path} has boxes that cannot be read: {drawn!r:.80}. Give a list of "
                    "[x1, y1, x2, y2] in pixels of the image, x1 < x2 and y1 < y2; an empty one where no part of the "
                    "image is meant, null where nobody knows."
                )
            at += 1


def _is_box(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    numbers = [one for one in value if isinstance(one, int | float)]
    return len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]


class QuestionReader:
    """Makes rows of a table `QuestionRow`s; an object, so that worker processes can have it."""

    def __init__(self, path: str, named: Mapping[str, str], columns: Sequence[str], images: Dataset | None) -> None:
        self.path, self.named, self.columns, self._images = path, named, set(columns), images
        self._where = {} if images is None else {name: at for at, name in enumerate(images["id"])}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        questions, boxes = values(rows, self.named["question"]), self.named["boxes"]
        images = [self._image(value) for value in values(rows, self.named["image"])]
        own = rows["image_id"] if "image_id" in self.columns else [digest(image)[:16] for image in images]
        image_ids = [str(one) for one in own]
        names = [str(value) for value in rows["id"]] if "id" in self.columns else image_ids
        answers = [_answers(*pair) for pair in zip(questions, values(rows, self.named["answer"]), strict=True)]
        asked = [_first(cell) for cell in questions]
        return {
            # several questions about an image are several rows, whatever a column of ids says
            "id": [f"{name}-{_short(question)}" for name, question in zip(names, asked, strict=True)],
            "image": images,
            "image_id": image_ids,
            "question": asked,
            "answer": [some[0] for some in answers],
            "answers": answers,
            "boxes": values(rows, boxes) if boxes else [None] * len(questions),
        }

    def _image(self, value: Any) -> PIL.Image.Image:
        if self._images is not None:
            value = self._images[self._where[value]]["image"]
        try:
            return picture(value[0] if isinstance(value, list) and value else value, max_pixels=_MAX_PIXELS)
        except ImageError as error:
            raise ImageError(f"An image of the dataset {self.path} cannot be read. {error}") from None


def _first(question: Any) -> str:
    """Return the question of a cell that holds one or several."""
    return next(iter(texts(question, written=False)), "")


def _answers(question: Any, answer: Any) -> list[str]:
    """Return all answers that are right. Several questions have an answer each, and the first is asked."""
    found = texts(answer, written=False) or ("",)
    return [found[0]] if isinstance(question, list | tuple) else list(dict.fromkeys(found))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
