"""Questions about images for training, as rows of one table, whatever they come from.

A source is a hub id, a local folder (of the hub's form, or what `save_to_disk` wrote) or file, whose rows are read as
in evaluation (`data.questions`), or `needle`, whose boards are drawn when a row is read. Training needs no boxes;
metrics and head selection use them if they are there. Where fewer rows are asked for than there are, each source gives
its share: boards, which are drawn at random anyway, their first, and a table those that its seed draws, in the table's
order.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, Final, Protocol

from pydantic import Field
from torch.utils.data import ConcatDataset

from qzoom_agent.data.columns import Columns, column_of, find_columns, value
from qzoom_agent.data.image_column import picture
from qzoom_agent.data.questions import Question, read_question, read_questions
from qzoom_agent.data.rows import Row, Rows, RowSamples, listed_rows, on_hub, open_table, refuse_rows
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.tasks.needle import NeedleTask
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact, draw_board
from qzoom_agent.files import expanded
from qzoom_agent.geometry import Box
from qzoom_agent.images import MAX_PIXELS, digest
from qzoom_agent.perception.labels import Mode
from qzoom_agent.training.recipe_io import Section

NEEDLE_SEED: Final = 600_000_000
"""Boards of branch training begin here. The base's, of the same split, are 64 to a batch: with the recipe's seed 0 the
first few millions from each multiple of 64,000,000 on, one for a stage, which meet none of these; with others from
6,400,000,000 on. Evaluation draws from other splits."""
NEEDLE_SPAN: Final = 100_000_000
"""Seeds of a needle source with `seed` s are s spans higher, so that sources share no board."""
_LAYOUTS: Final = {
    "scene": (0.64, {"needle-scene", "needle-global"}),
    "form": (0.12, {"needle-doc", "needle-global"}),
    "receipt": (0.12, {"needle-doc", "needle-global"}),
    "table": (0.12, {"needle-doc", "needle-global"}),
    "hop": (0.34, {"needle-hop"}),
    "chain": (0.34, {"needle-chain"}),
}
"""Share of each layout, and the tasks whose questions it has."""


class DatasetSpec(Section):
    """A source of questions, and the names of its columns."""

    renamed: ClassVar = {"suites": "tasks"}

    path: str
    """`needle`, a hub id, or a local folder or file (what `save_to_disk` wrote, or JSON lines)."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    columns: dict[str, str] = Field(default={})
    """Names that our columns (`data.columns.NAMES`) have in the source, where they differ; `a.b` is the field b of a
    column of records, an empty name means none. Of a list of questions the first is asked, with its own answer; of one
    question all answers of a list are right."""
    images: str | None = None
    """Configuration of the same hub dataset that holds the images, by `id`; `image` then names one (GQA)."""
    limit: int | None = Field(default=None, gt=0)
    """Rows to take, drawn by `seed` where there are more. `needle`: questions to draw (default 1,000)."""
    suffix: str = ""
    """Text after each question, such as "Answer the question using a single word or phrase."."""
    short_labels: bool = True
    """Ask that sentence also where published heads make the labels (DocVQA was labelled without it)."""
    mode: Mode = "textual"
    """Source of the answers, print or objects in a scene; decides on the published heads and prompts."""
    topic: str | None = Field(default=None, exclude_if=lambda given: given is None)
    """What its images show, where a question about them has no answer in the images of sources with another topic."""
    seed: int = Field(default=0, ge=0, lt=8)
    """`needle`: which boards. Of a table: which of its rows, where not all are taken."""
    tasks: tuple[NeedleTask, ...] = Field(default=("needle-scene", "needle-doc", "needle-global"), min_length=1)
    """`needle`: tasks that questions are taken from (needle-hop and needle-chain, too, whose questions have two
    and three boxes in order)."""
    a_board: int = Field(default=8, gt=0)
    """`needle`: questions of one board. A board that has fewer is asked them again."""
    skip_bad: bool = Field(default=False, exclude_if=lambda given: given is False)
    """Leave out rows that cannot be used, instead of stopping at them."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, exclude_if=lambda given: given == MAX_PIXELS)
    """Most pixels of an image."""

    @property
    def is_needle(self) -> bool:
        return self.path == "needle"

    def shares_rows(self, other: "DatasetSpec") -> bool:
        """Return whether both read the same boards, or the same split of a table."""
        keys = ["path", "name", "seed" if self.is_needle else "split"]
        if expanded(self.path).is_file():  # which has no splits
            keys.remove("split")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


@dataclass(frozen=True)
class Record(Sample):
    """A question about one image: a sample whose task and kind are its mode, and whose cluster is its image."""

    exact: bool = False
    """A reply has to be the answer and nothing else."""
    short_labels: bool = True
    """See `DatasetSpec`."""

    @property
    def mode(self) -> Mode:
        """Source of the answer, see `DatasetSpec`."""
        return "natural" if self.task == "natural" else "textual"


class Records(Protocol):
    """Rows that are read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def record_batches(records: Records, indices: range, size: int) -> Iterator[tuple[range, list[Record]]]:
    """Iterate over records in batches, with the indices of each batch."""
    for start in range(indices.start, indices.stop, size):
        chosen = range(start, min(start + size, indices.stop))
        yield chosen, [records[index] for index in chosen]


def load_records(sources: Sequence[DatasetSpec], *, limit: int | None = None) -> "ConcatenatedRecords":
    """Return the rows of some sources, one after another; at most `limit`.

    Raises ConfigError if a source cannot be read, lacks a column, or has bad rows and no `skip_bad`.
    """
    tables = [_open(source) for source in sources]
    if limit is not None:
        shares = spread([len(table) for table in tables], limit)
        tables = [table.some(share) for table, share in zip(tables, shares, strict=True)]
    tables = [table.checked() for table in tables]
    return ConcatenatedRecords(tables)  # type: ignore[arg-type]


def _open(source: DatasetSpec) -> "_Boards | _Table":
    if source.is_needle:
        return _Boards(source, source.limit or 1000)
    table = _Table.open(source)
    return table if source.limit is None else table.some(source.limit)


def spread(sizes: Sequence[int], limit: int) -> list[int]:
    """Return how many of each size to take, in proportion, for `limit` (or all, if they are fewer) in all."""
    total = sum(sizes)
    if limit >= total:
        return list(sizes)
    shares = [limit * size // total for size in sizes]
    most_cut = sorted(range(len(sizes)), key=lambda at: -(limit * sizes[at] % total))
    for at in most_cut[: limit - sum(shares)]:
        shares[at] += 1
    return shares


class ConcatenatedRecords(ConcatDataset[Any]):
    """The rows of several sources as one sequence."""

    def questions(self) -> Iterator[tuple[str, Sequence[int], list[str]]]:
        """Iterate over the questions of tables (not boards) without reading images: path, rows from 0, questions."""
        for table in self.datasets:
            if isinstance(table, _Table):
                asked = list(table.questions())
                for at in range(0, len(asked), 1000):
                    yield table.source.path, table.numbers[at : at + 1000], asked[at : at + 1000]

    def topics(self) -> list[str | None]:
        """Return the topic of each row, without reading it."""
        tables: list[Any] = self.datasets
        return [table.source.topic for table in tables for _ in range(len(table))]


@dataclass(frozen=True)
class _Boards:
    """The questions of a needle source."""

    source: DatasetSpec
    count: int

    def some(self, count: int) -> "_Boards":
        """Return the first boards' questions: all boards are drawn at random."""
        return _Boards(self.source, min(count, self.count))

    def checked(self) -> "_Boards":
        """Return itself: boards are drawn right."""
        return self

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        seed = NEEDLE_SEED + self.source.seed * NEEDLE_SPAN + index // self.source.a_board
        board, facts = _board(seed, self.source.tasks)
        place = index % self.source.a_board
        fact = facts[place % len(facts)]
        mode = "natural" if fact.kind in ("pips", "color", "shape", "count") else "textual"
        return Record(
            id=f"needle-{seed}-{place}",
            task=mode,
            kind=mode,
            image=board.image,
            question=fact.question + self.source.suffix,
            answer=fact.answer,
            answers=(fact.answer,),
            boxes=tuple(Box(*box) for box in fact.boxes),
            coarse_suffices=not fact.boxes,
            cluster=f"needle-{seed}",
            exact=True,
        )


@dataclass(frozen=True)
class _Table:
    """The questions of another source."""

    source: DatasetSpec
    rows: Rows
    columns: Columns
    numbers: Sequence[int]
    """Rows of the whole table that these are."""
    images: Rows | None = None
    """The table that holds the images, if it is another one."""
    places: Mapping[Any, int] = field(default_factory=dict)
    """Rows of `images` by their id."""

    @classmethod
    def open(cls, source: DatasetSpec) -> "_Table":
        """Return the table of a source; ConfigError if it cannot be read, or has not the columns."""
        path = source.path
        rows = replace(open_table(path, config=source.name, split=source.split), name=f"the dataset {path}")
        found = find_columns(f"The dataset {path}", rows.columns, source.columns)
        needed = ("image", "question") if "answers" in found.names else ("image", "question", "answer")
        wanted = {ours: found.names.get(ours, (ours,))[0] for ours in needed}
        wanted |= {ours: named for ours, named in source.columns.items() if named}
        missing = [named for named in wanted.values() if not _has(rows, named)]
        if missing:
            raise ConfigError(
                f"The dataset {path} has no column {' and no column '.join(missing)}; it has "
                f"{', '.join(rows.columns)}. Say in the source's `columns` what they are called."
            )
        if source.images is None:
            return cls(source, rows, found, range(len(rows)))
        images = open_table(path, config=source.images, split=source.split).need(("id", "image"))
        places = {row["id"]: place for place, row in enumerate(images.only("id"))}
        return cls(source, rows, found, range(len(rows)), images, places)

    def some(self, count: int) -> "_Table":
        """Return so many rows, drawn by the source's seed, in their order."""
        if count >= len(self):
            return self
        return self._only(sorted(Random(f"rows/{self.source.seed}").sample(range(len(self)), count)))

    def checked(self) -> "_Table":
        """Return the rows that can be used; ConfigError if there are others and they are not to be left out."""
        wrong = self.samples.problems(range(len(self)))  # of images the headers are read
        found = {self.numbers[at]: told for at, told in wrong.items()}
        name = f"The dataset {self.source.path}"
        refuse_rows(name, found, total=len(self), skip_bad=self.source.skip_bad)
        if not found:
            return self
        print(f"{name}: {len(found)} of {len(self)} rows left out: {listed_rows(found)}", file=sys.stderr)
        return self._only([at for at in range(len(self)) if at not in wrong])

    def _only(self, places: Sequence[int]) -> "_Table":
        return replace(self, rows=self.rows.select(places), numbers=[self.numbers[at] for at in places])

    @property
    def samples(self) -> RowSamples:
        """The rows as samples, in clusters of the same image."""
        return RowSamples(self.rows, self._record, ())

    def questions(self) -> Iterator[str]:
        """Yield the question of every row, without reading an image; empty for one that cannot be used."""
        for found in read_questions(self.rows.only(*self.columns.top), self.columns):
            yield (found.asked if isinstance(found, Question) else "") + self.source.suffix

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def _record(self, row: Row, index: int) -> Record:
        question, cell = read_question(row, self.columns), self.columns.cell(row, "image")
        if self.images is not None:
            if cell not in self.places:
                raise ImageError(f"There is no image {cell!r} in the table of images.")
            cell = self.images[self.places[cell]]["image"]
        image = picture(cell, self.rows.folder, max_pixels=self.source.max_pixels)
        # A column of that name may be empty, number documents, or name other images in another source.
        image_id = digest(image)[:16]
        # Several questions about an image are several rows, whatever a column of ids says.
        short = hashlib.sha256(question.question.encode()).hexdigest()[:8]
        sample, source = question.sample(self.source.mode, index, image, cluster=image_id), self.source
        own = {
            "id": f"{row['id'] if 'id' in self.rows.columns else image_id}-{short}",
            "kind": source.mode,
            "question": sample.question + source.suffix,
            "short_labels": source.short_labels,
        }
        return Record(**vars(sample) | own)


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


@lru_cache(maxsize=32)
def _board(seed: int, tasks: tuple[str, ...]) -> tuple[Board, list[Fact]]:
    """Return a board and its questions of these tasks, shuffled so that every kind comes before any comes again."""
    rng = Random(f"records/{seed}")
    layouts = {name: share for name, (share, offers) in _LAYOUTS.items() if offers & set(tasks)}
    layout = rng.choices(list(layouts), weights=list(layouts.values()))[0]
    board = draw_board(layout, seed, split="train")
    facts = [fact for fact in board.facts if fact.task in tasks]
    rng.shuffle(facts)
    kinds = [fact.kind for fact in facts]
    order = [kinds[:at].count(kind) for at, kind in enumerate(kinds)]
    return board, [facts[at] for at in sorted(range(len(facts)), key=order.__getitem__)]


def count_rows(sources: Sequence[DatasetSpec]) -> int | None:
    """Return the number of rows of some sources; None where a hub's is taken whole.

    Raises ConfigError for a file that cannot be read or lacks a column.
    """
    counts = [_count(one) for one in sources]
    return None if None in counts else sum(count or 0 for count in counts)


def _count(source: DatasetSpec) -> int | None:
    if not source.is_needle and not expanded(source.path).exists() and on_hub(source.path):
        return source.limit
    return len(_open(source))
