"""Public benchmarks: where the table of one is, what its columns mean and how a row is asked; one reader for all.

A table is read from the hub, from a copy of its repository, or from a file, whatever repository it came from: what it
must have are its columns.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import JsonValue

from qzoom_agent.data.columns import first_of
from qzoom_agent.data.image_column import LONGEST_PATH, key, seen
from qzoom_agent.data.options import letters_of
from qzoom_agent.data.rows import HubTable, Row, Rows, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.task import Scored, Scorer, Task
from qzoom_agent.geometry import Box


class Asked(NamedTuple):
    """What a row asks, apart from its image."""

    question: str
    """With options and instruction."""
    answers: tuple[str, ...] | None = None
    """All accepted answers; None: those of the answer's column."""
    options: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    meta: Mapping[str, JsonValue] = MappingProxyType({})
    id: str = ""
    """Empty: that of the id's column."""
    cluster: str = ""
    """Empty: questions about one image are a cluster."""


def one_text(cell: object) -> tuple[str, ...]:
    """Return the text of a cell as the only answer; none for a cell that is empty."""
    text = "" if cell is None else str(cell).strip()
    return (text,) if text else ()


def one_letter(cell: object) -> tuple[str, ...]:
    """Return the letter of an option, in upper case, as the only answer."""
    return tuple(map(str.upper, one_text(cell)))


def options_of(answers: Sequence[str], options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options if the first answer is the letter of one; else none: the question is an open one."""
    return options if answers and answers[0] in letters_of(options) else ()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose questions are the rows of a table."""

    name: str
    title: str
    place: HubTable
    columns: tuple[str, ...]
    """Columns that the table must have."""
    ask: Callable[[Row, tuple[str, ...]], Asked]
    """Function of a row and of the answers in its answer's column."""
    scorers: Mapping[str, Scorer]
    id: str | None = None
    """Column of the id; None, or a table without it: the row's number."""
    kind: str | None = None
    """Column of the kind; None: all are of the kind "all"."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Names of kinds that the table calls otherwise."""
    image: str = "image"
    picture: Callable[[Row], object] | None = None
    """Function that returns the image's cell, where it is not as it stands in the column `image`."""
    answer: str = "answer"
    answers: Callable[[Any], tuple[str, ...]] = one_text
    """Function that reads the answer's column."""
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None
    coarse_tokens: tuple[int, int] | None = None
    id_prefix: str = ""
    """Beginning of the samples' ids, where it is not the name: tasks with the same questions share their ids."""
    shared_image: str = ""
    """Column of the image that the questions of a cluster share, where it is not `image`."""
    published: Mapping[str, str] = field(default_factory=dict)
    """The hub's names of columns that another copy of the table calls otherwise."""
    folders: tuple[str, ...] = ()
    """Folders beside the publisher's file, or beside its folder, that hold the images."""

    @property
    def task(self) -> Task:
        return Task(
            name=self.name,
            title=self.title,
            load=self.load,
            scorers=self.scorers,
            aggregate=self.aggregate,
            coarse_tokens=self.coarse_tokens,
            sources=self.place.ids,
            columns=self.columns,
        )

    def load(self, source: TaskSource) -> RowSamples:
        return self.samples(self.rows(source), source)

    def rows(self, source: TaskSource) -> Rows:
        """Return the table under the hub's names of columns; ConfigError if there is none, or a column is missing."""
        if source.path is None and not self.place.ids:
            raise ConfigError(
                f"{self.name} is not on the hub. Give the folder that holds {self.place.file} and its images as the "
                "path."
            )
        rows = open_rows(source, self.place)
        names: dict[str, str] = {}
        for theirs, ours in self.published.items():
            if theirs in rows.columns and ours not in (*rows.columns, *names.values()):
                names[theirs] = ours
        needed = [column for column in self.columns if source.answered or column != self.answer]
        return rows.renamed(names).need(needed)

    def samples(self, rows: Rows, source: TaskSource, kinds: Sequence[str] | None = None) -> RowSamples:
        """Return the samples of a table; `kinds` are those of its rows, None: as their column says."""
        file = Path(rows.name).stem

        def kind_of(row: Row) -> str:
            # Some tables are one file a kind.
            found = first_of(row, self.kind, default=file if file in self.kinds else "other") if self.kind else "all"
            return self.kinds.get(found, found)

        def number(row: Row, index: int) -> object:
            if not self.id or self.id not in row:
                return index
            found = row[self.id]
            return f"{found}-row-{index}" if ids[str(found)] > 1 else found

        def make(row: Row, index: int) -> Sample:
            cell = self.picture(row) if self.picture else self._placed(row[self.image], rows.folder)
            image, cluster = seen(cell, rows.folder, max_pixels=source.max_pixels)
            if self.shared_image:
                cluster = key(row[self.shared_image], rows.folder)
            found = self.answers(row.get(self.answer))
            asked = self.ask(row, found)
            answers = found if asked.answers is None else asked.answers
            if source.answered and not answers:
                raise ConfigError("there is no answer")
            return Sample(
                id=f"{self.id_prefix or self.name}-{asked.id or number(row, index)}",
                task=self.name,
                kind=kind_of(row),
                image=image,
                question=asked.question,
                answer=answers[0] if answers else "",
                boxes=asked.boxes,
                answers=answers,
                options=asked.options,
                cluster=asked.cluster or cluster,
                meta=dict(asked.meta),
            )

        ids = Counter[str]()
        if kinds is None:
            kinds = []
            for row in rows.only(*filter(None, (self.kind, self.id))):
                kinds.append(kind_of(row))
                ids[str(row.get(self.id or ""))] += 1
        return RowSamples(rows, make, kinds)

    def _placed(self, cell: object, folder: Path | None) -> object:
        """Return an image's cell, or its path where the publisher keeps images in a folder of their own."""
        if not self.folders or folder is None or not isinstance(cell, str) or len(cell) > LONGEST_PATH:
            return cell
        places = [folder, *(base / name for base in (folder, folder.parent) for name in self.folders)]
        names = (cell, f"{cell}.jpg", Path(cell).name)
        return next((str(at) for place in places for name in names if (at := place / name).is_file()), cell)


def boxes_of(corners: Iterable[Any], question: str) -> tuple[Box, ...]:
    """Return boxes by their corners in pixels; ConfigError that names the question for what is no box."""
    try:
        return tuple(Box(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in corners)
    except (TypeError, ValueError):
        raise ConfigError(f"{question} has boxes that are not [x1, y1, x2, y2]: {corners!r}.") from None


def grouped(scored: Iterable[Scored], by: Callable[[Scored], str]) -> Mapping[str, list[float]]:
    """Return the values of scored samples by group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        groups[by(one)].append(one.value)
    return groups
