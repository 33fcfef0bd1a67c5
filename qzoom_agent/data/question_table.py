"""Tables of questions as training reads them: rows with the columns of `QuestionRow`, whatever they are called.

A table is a hub id, a folder (of the hub's form, or what `save_to_disk` wrote), or a file, whose images lie beside it.
Rows are understood as in evaluation (`data.questions`). Images are decoded when a row is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import PIL.Image

from qzoom_agent.data.columns import Columns, column_of, find_columns, value
from qzoom_agent.data.image_column import picture
from qzoom_agent.data.questions import Question, read_question, read_questions
from qzoom_agent.data.rows import Row, Rows, RowSamples, open_table
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.images import MAX_PIXELS, digest


class QuestionRow(TypedDict):
    """One question about one image."""

    id: str
    image: PIL.Image.Image
    """RGB."""
    image_id: str
    """Rows with the same one show the same image."""
    question: str
    """With the options of a multiple choice."""
    answer: str
    """The first of `answers`."""
    answers: list[str]
    """All that are right; the letter of a multiple choice."""
    options: NotRequired[list[str]]
    """Of a multiple choice."""
    boxes: list[list[float]] | None
    """Boxes of the answer, in pixels of the image; None if unknown, empty if no part of the image is meant."""


@dataclass(frozen=True)
class QuestionTable:
    """A table whose rows are `QuestionRow`s."""

    rows: Rows
    columns: Columns
    images: Rows | None = None
    """The table that holds the images, if it is another one."""
    places: Mapping[Any, int] | None = None
    """Rows of `images` by their id."""
    max_pixels: int = MAX_PIXELS

    @classmethod
    def open(
        cls,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        images: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> QuestionTable:
        """Return the table at a local path or hub id.

        Args:
            path: Hub id, or local folder or file.
            name: Configuration of a hub dataset.
            split: Split of it.
            columns: Names that our columns (`data.columns.NAMES`) have in the table, where they differ; `a.b` is the
                field b of a column of records, an empty name means none. Of a list of questions the first is asked,
                with its own answer; of one question all answers of a list are right.
            images: Configuration of the same hub dataset that holds the images, by `id`; `image` then names one.
            max_pixels: Most pixels of an image.

        Raises:
            ConfigError: The table cannot be read, lacks a column, or has one with nearly the name of ours.
        """
        rows = replace(open_table(path, config=name, split=split), name=f"the dataset {path}")
        found = find_columns(f"The dataset {path}", rows.columns, columns)
        needed = ("image", "question") if "answers" in found.names else ("image", "question", "answer")
        wanted = {ours: found.names.get(ours, (ours,))[0] for ours in needed}
        wanted |= {ours: named for ours, named in (columns or {}).items() if named}
        missing = [named for named in wanted.values() if not _has(rows, named)]
        if missing:
            raise ConfigError(
                f"The dataset {path} has no column {' and no column '.join(missing)}; it has "
                f"{', '.join(rows.columns)}. Say in the source's `columns` what they are called."
            )
        if images is None:
            return cls(rows, found, max_pixels=max_pixels)
        pictures = open_table(path, config=images, split=split)
        places = {row["id"]: place for place, row in enumerate(pictures.only("id"))}
        return cls(rows, found, pictures, places, max_pixels)

    def select(self, places: Sequence[int]) -> QuestionTable:
        """Return these rows, in this order."""
        return replace(self, rows=self.rows.select(places))

    @property
    def samples(self) -> RowSamples:
        """The rows as samples, in clusters of the same image."""
        return RowSamples(self.rows, self._sample, ())

    def problems(self) -> dict[int, str]:
        """Return what is wrong with each row that cannot be used; of images the headers are read."""
        return self.samples.problems(range(len(self)))

    def questions(self) -> Iterator[str]:
        """Yield the question of every row, without reading an image; empty for one that cannot be used."""
        for found in read_questions(self.rows.only(*self.columns.top), self.columns):
            yield found.asked if isinstance(found, Question) else ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> QuestionRow:
        sample = self.samples[index]
        return {
            "id": sample.id,
            "image": sample.image,
            "image_id": sample.cluster,
            "question": sample.question,
            "answer": sample.answer,
            "answers": list(sample.answers),
            "options": list(sample.options),
            "boxes": None if sample.coarse_suffices is None else [box.as_list() for box in sample.boxes],
        }

    def _sample(self, row: Row, index: int) -> Sample:
        question, cell = read_question(row, self.columns), self.columns.cell(row, "image")
        if self.images is not None and self.places is not None:
            if cell not in self.places:
                raise ImageError(f"There is no image {cell!r} in the table of images.")
            cell = self.images[self.places[cell]]["image"]
        image = picture(cell, self.rows.folder, max_pixels=self.max_pixels)
        known = self.rows.columns
        image_id = str(row["image_id"]) if "image_id" in known else digest(image)[:16]
        # Several questions about an image are several rows, whatever a column of ids says.
        short = hashlib.sha256(question.question.encode()).hexdigest()[:8]
        sample = question.sample("", index, image, cluster=image_id)
        return replace(sample, id=f"{row['id'] if 'id' in known else image_id}-{short}")


def _has(rows: Rows, name: str) -> bool:
    """Return whether a table has this column, or its first row this field of a column."""
    column = column_of(name, rows.columns)
    if column not in rows.columns or column == name:
        return column in rows.columns
    try:
        value(next(rows.only(column), {}), name)
    except ConfigError:
        return False
    return True
