"""Tables of questions as training reads them: rows with the columns of `QuestionRow`, whatever they are called.

A table is a hub id, a folder (of the hub's form, or what `save_to_disk` wrote), a parquet file, or a file of JSON
lines, whose images lie beside it. Images are decoded when a row is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import PIL.Image

from qzoom_agent.data.image_column import picture
from qzoom_agent.data.questions import texts
from qzoom_agent.data.rows import Row, Rows, open_table
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.images import digest

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


@dataclass(frozen=True)
class QuestionTable:
    """A table whose rows are `QuestionRow`s."""

    path: str
    rows: Rows
    columns: Mapping[str, str]
    """Names of the columns `image`, `question`, `answer` and, if it is there, `boxes`."""
    images: Rows | None = None
    """The table that holds the images, if it is another one."""
    places: Mapping[Any, int] | None = None
    """Rows of `images` by their id."""

    @classmethod
    def open(
        cls,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        images: str | None = None,
    ) -> QuestionTable:
        """Return the table at a local path or hub id.

        Args:
            path: Hub id, or local folder or file.
            name: Configuration of a hub dataset.
            split: Split of it.
            columns: Names that `image`, `question`, `answer` and `boxes` have in the table, where they differ; `a.b`
                is the field b of a column of records. Of a list of images the first is taken, and of a list of
                questions the first with its own answer; of one question all answers of a list are right.
            images: Configuration of the same hub dataset that holds the images, by `id`; `image` then names one.

        Raises:
            ConfigError: The table cannot be read, lacks a column, or names images that are not there.
        """
        rows = open_table(path, config=name, split=split)
        named = {column: (columns or {}).get(column, column) for column in ("image", "question", "answer", "boxes")}
        missing = [named[column] for column in ("image", "question", "answer") if not _has(rows, named[column])]
        if missing:
            raise ConfigError(
                f"The dataset {path} has no column {' and no column '.join(missing)}; it has "
                f"{', '.join(rows.columns)}. Say in the source's `columns` what they are called."
            )
        if not _has(rows, named["boxes"]):
            del named["boxes"]
        if images is None:
            _require_images(rows, named["image"])
            return cls(path, rows, named)
        pictures = open_table(path, config=images, split=split)
        places = {row["id"]: place for place, row in enumerate(pictures.only("id"))}
        return cls(path, rows, named, pictures, places)

    def select(self, places: Sequence[int]) -> QuestionTable:
        """Return these rows, in this order."""
        return replace(self, rows=self.rows.select(places))

    def require_readable(self) -> None:
        """Raise ConfigError, before anything is asked, for a row without an answer or with boxes that are none."""
        answer, boxes = self.columns["answer"], self.columns.get("boxes")
        for at, row in enumerate(self._without_image(answer, *([boxes] if boxes else []))):
            if _value(row, answer) is None:
                raise ConfigError(
                    f"Row {at} of the dataset {self.path} has no answer ({answer} is null). Give it one, or leave the "
                    "row out."
                )
            drawn = _value(row, boxes) if boxes else None
            if drawn is not None and not (isinstance(drawn, list) and all(map(_is_box, drawn))):
                raise ConfigError(
                    f"Row {at} of the dataset {self.path} has boxes that cannot be read: {drawn!r:.80}. Give a list "
                    "of [x1, y1, x2, y2] in pixels of the image, x1 < x2 and y1 < y2; an empty one where no part of "
                    "the image is meant, null where nobody knows."
                )

    def questions(self) -> Iterator[str]:
        """Yield the question of every row, without reading an image."""
        name = self.columns["question"]
        return (_first(_value(row, name)) for row in self._without_image(name))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> QuestionRow:
        row = self.rows[index]
        image, question = self._image(_value(row, self.columns["image"])), _value(row, self.columns["question"])
        known = self.rows.columns
        image_id = str(row["image_id"]) if "image_id" in known else digest(image)[:16]
        answers = _answers(question, _value(row, self.columns["answer"]))
        return {
            # several questions about an image are several rows, whatever a column of ids says
            "id": f"{row['id'] if 'id' in known else image_id}-{_short(_first(question))}",
            "image": image,
            "image_id": image_id,
            "question": _first(question),
            "answer": answers[0],
            "answers": answers,
            "boxes": _value(row, self.columns["boxes"]) if "boxes" in self.columns else None,
        }

    def _without_image(self, *columns: str) -> Iterator[Row]:
        return self.rows.only(*dict.fromkeys(name.split(".")[0] for name in columns))

    def _image(self, value: Any) -> PIL.Image.Image:
        if self.images is not None and self.places is not None:
            value = self.images[self.places[value]]["image"]
        several = isinstance(value, list)
        try:
            # a path in a list has never been relative to the file
            return picture(
                value[0] if several and value else value,
                None if several else self.rows.folder,
                max_pixels=_MAX_PIXELS,
            )
        except ImageError as error:
            raise ImageError(f"An image of the dataset {self.path} cannot be read. {error}") from None


def _value(row: Row, name: str) -> Any:
    """Return the value of a column, or of a field of one."""
    column, *fields = name.split(".")
    value: Any = row.get(column)
    for field in fields:
        value = value[field]
    return value


def _has(rows: Rows, name: str) -> bool:
    """Return whether a table has this column, or its first row this field of a column."""
    column, *fields = name.split(".")
    if column not in rows.columns or not fields:
        return column in rows.columns
    value = next(rows.only(column), {}).get(column)
    for field in fields:
        if not isinstance(value, Mapping) or field not in value:
            return False
        value = value[field]
    return True


def _require_images(rows: Rows, column: str) -> None:
    """Raise ConfigError if an image that a file names is not beside it."""
    if rows.folder is None or "." in column:
        return
    cells = [row[column] for row in rows.only(column)]
    if not all(cell is None or isinstance(cell, str) for cell in cells):
        return
    missing = [at for at, cell in enumerate(cells) if not (rows.folder / (cell or "")).is_file()]
    if missing:
        raise ConfigError(
            f"The dataset {rows.name} names images that are not there: {len(missing)} of its {len(cells)} rows, the "
            f"first of them row {missing[0]} ({cells[missing[0]]}). Paths are relative to the file."
        )


def _is_box(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    numbers = [one for one in value if isinstance(one, int | float)]
    return len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]


def _first(question: Any) -> str:
    """Return the question of a cell that holds one or several."""
    return next(iter(texts(question, written=False)), "")


def _answers(question: Any, answer: Any) -> list[str]:
    """Return all answers that are right. Several questions have an answer each, and the first is asked."""
    found = texts(answer, written=False) or ("",)
    return [found[0]] if isinstance(question, list | tuple) else list(dict.fromkeys(found))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
