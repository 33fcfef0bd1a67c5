"""Questions about images for training, as rows of one table, whatever they come from.

A source is a hub id, a local folder or file (`qzoom_agent.data.question_table`), or `needle`, whose boards are drawn
when a row is read. Training needs no boxes; metrics and head selection use them if they are there. Rows about one image
stand together, so that it is decoded and encoded once. Where fewer rows are asked for than there are, each source gives
its share of them: boards, which are drawn at random anyway, their first, and a table those that its seed draws, in the
table's order.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, Protocol

from datasets import Dataset, load_from_disk
from pyarrow.parquet import read_metadata
from pydantic import Field, JsonValue
from torch.utils.data import ConcatDataset

from qzoom_agent.data.question_table import QuestionReader, QuestionRow, open_questions, questions_of
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact, draw_board
from qzoom_agent.perception.labels import Mode
from qzoom_agent.training.recipe_io import Section

NEEDLE_SEED: Final = 600_000_000
"""Boards of branch training begin here. The base's, of the same split, are 64 to a batch: below 200,000,000 with the
recipe's seed 0, from 6,400,000,000 on with others. Evaluation draws from other splits."""
NEEDLE_SPAN: Final = 100_000_000
"""Seeds of a needle source with `seed` s are s spans higher, so that sources share no board."""
_OF_TABLES: Final = {"limit", "short_labels"}
"""Keys of a source that change nothing about a board's question."""
_LAYOUTS: Final = {
    "scene": (0.64, {"needle-scene", "needle-global"}),
    "form": (0.12, {"needle-doc", "needle-global"}),
    "receipt": (0.12, {"needle-doc", "needle-global"}),
    "table": (0.12, {"needle-doc", "needle-global"}),
    "hop": (0.34, {"needle-hop"}),
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
    """Names that `image`, `question`, `answer` and `boxes` have in the source; see `open_questions`."""
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
    seed: int = Field(default=0, ge=0, lt=4)
    """`needle`: which boards. Of a table: which of its rows, where not all are taken."""
    tasks: tuple[str, ...] = ("needle-scene", "needle-doc", "needle-global")
    """`needle`: tasks that questions are taken from (needle-hop, too, whose questions have two boxes in order)."""
    a_board: int = Field(default=8, gt=0)
    """`needle`: questions of one board."""

    @property
    def is_needle(self) -> bool:
        return self.path == "needle"

    def identity(self) -> dict[str, JsonValue]:
        """Return the settings that decide what the rows hold. More boards leave the first as they are."""
        settings: dict[str, JsonValue] = self.model_dump(mode="json")
        settings["suites"] = settings.pop("tasks")  # the key in folders that earlier versions wrote
        return {key: settings[key] for key in settings if not (self.is_needle and key in _OF_TABLES)}


class Record(QuestionRow):
    """One row."""

    exact: bool
    """A reply has to be the answer and nothing else."""
    mode: Mode
    short_labels: bool
    """See `DatasetSpec`."""


class Records(Protocol):
    """Rows that are read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a `Record`."""
        ...


def load_records(sources: Sequence[DatasetSpec], *, limit: int | None = None) -> "ConcatenatedRecords":
    """Return the rows of some sources, one after another; at most `limit`.

    Raises:
        ConfigError: A source cannot be read, or lacks a column.
    """
    tables = [_needle(one) if one.is_needle else _table(one) for one in sources]
    if limit is not None:
        shares = spread([len(table) for table in tables], limit)
        tables = [_some(*one) for one in zip(sources, tables, shares, strict=True)]
    return ConcatenatedRecords(sources, tables)


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


def _some(source: DatasetSpec, table: Dataset, count: int) -> Dataset:
    """Return so many rows of a source, in its order."""
    if count >= len(table):
        return table
    if source.is_needle:
        return table.select(range(count))
    return table.select(sorted(Random(f"rows/{source.seed}").sample(range(len(table)), count)))


class ConcatenatedRecords(ConcatDataset[Any]):
    """Several tables as one. (`concatenate_datasets` would lose the transforms that rows get when they are read.)"""

    def __init__(self, sources: Sequence[DatasetSpec], tables: Sequence[Dataset]) -> None:
        super().__init__(tables)  # type: ignore[arg-type]
        self.sources, self.tables = sources, tables

    def questions(self) -> Iterator[tuple[str, int, list[str]]]:
        """Iterate over the questions of tables (not boards) without reading images: path, first row, questions."""
        for source, table in zip(self.sources, self.tables, strict=True):
            at = 0
            while not source.is_needle and at < len(table):
                found = questions_of(table, source.columns.get("question", "question"), at)
                yield source.path, at, [question + source.suffix for question in found]
                at += len(found)


def _needle(source: DatasetSpec) -> Dataset:
    count = source.limit or 1000
    boards = -(-count // source.a_board)
    rows = [(board, index) for board in range(boards) for index in range(source.a_board)][:count]
    first = NEEDLE_SEED + source.seed * NEEDLE_SPAN
    table = Dataset.from_dict({"seed": [first + board for board, _ in rows], "index": [index for _, index in rows]})
    return table.with_transform(_Draw(source.tasks, source.suffix))


class _Draw:
    """Draws the boards of rows that are read; an object, so that worker processes can have it."""

    def __init__(self, tasks: Sequence[str], suffix: str) -> None:
        self.tasks, self.suffix = tuple(tasks), suffix

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        drawn = [self._row(seed, index) for seed, index in zip(rows["seed"], rows["index"], strict=True)]
        return {name: [row[name] for row in drawn] for name in Record.__annotations__}  # type: ignore[literal-required]

    def _row(self, seed: int, index: int) -> Record:
        board, facts = _board(seed, self.tasks)
        fact = facts[index % len(facts)]
        return Record(
            id=f"needle-{seed}-{index}",
            image=board.image,
            image_id=f"needle-{seed}",
            question=fact.question + self.suffix,
            answer=fact.answer,
            answers=[fact.answer],
            exact=True,
            boxes=[list(box) for box in fact.boxes],
            mode="natural" if fact.kind in ("pips", "color", "shape", "count") else "textual",
            short_labels=True,
        )


@lru_cache(maxsize=32)
def _board(seed: int, tasks: tuple[str, ...]) -> tuple[Board, list[Fact]]:
    """Return a board and its questions of these tasks, shuffled so that every kind comes before any comes again."""
    rng = Random(f"records/{seed}")
    layouts = _layouts(tasks)
    layout = rng.choices(list(layouts), weights=list(layouts.values()))[0]
    board = draw_board(layout, seed, split="train")
    facts = [fact for fact in board.facts if fact.task in tasks]
    rng.shuffle(facts)
    seen: dict[str, int] = {}
    order = []
    for fact in facts:
        seen[fact.kind] = seen.get(fact.kind, 0) + 1
        order.append(seen[fact.kind])
    return board, [fact for _, fact in sorted(zip(order, facts, strict=True), key=lambda pair: pair[0])]


def _layouts(tasks: Sequence[str]) -> dict[str, float]:
    """Return the layouts to draw for these tasks, with their shares. Raises ConfigError if there are none."""
    found = {name: share for name, (share, offers) in _LAYOUTS.items() if offers & set(tasks)}
    if not found:
        raise ConfigError(f"No board has questions of {', '.join(tasks)}. Name needle tasks.")
    return found


def _table(source: DatasetSpec) -> Dataset:
    limit = source.limit
    table, reader = open_questions(
        source.path,
        name=source.name,
        split=source.split,
        columns=source.columns,
        images=source.images,
        choose=lambda table: table if limit is None else _some(source, table, limit),
    )
    return table.with_transform(_Asked(source, reader))


class _Asked:
    """Adds to the rows of a table what its source says of them; an object, so that worker processes can have it."""

    def __init__(self, source: DatasetSpec, reader: QuestionReader) -> None:
        self.source, self.reader = source, reader

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = self.reader(rows)
        same = {"exact": False, "mode": self.source.mode, "short_labels": self.source.short_labels}
        return (
            found
            | {"question": [question + self.source.suffix for question in found["question"]]}
            | {name: [value] * len(found["id"]) for name, value in same.items()}
        )


def count_rows(sources: Sequence[DatasetSpec]) -> int | None:
    """Return the number of rows of some sources without reading them; None where one is taken whole from the hub.

    Raises:
        ConfigError: A file or folder is missing or cannot be read.
    """
    counts = [_count(one) for one in sources]
    return None if None in counts else sum(count or 0 for count in counts)


def _count(source: DatasetSpec) -> int | None:
    if source.is_needle:
        return source.limit or 1000
    try:
        count = _stored_rows(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The rows of {source.path} cannot be counted: {error}.") from None
    return min((known for known in (count, source.limit) if known is not None), default=None)


def _stored_rows(source: DatasetSpec) -> int | None:
    """Return the rows of a local file or folder; None for a dataset of the hub."""
    where = Path(source.path).expanduser()
    if (where / "dataset_info.json").is_file():
        return len(Dataset.load_from_disk(str(where)))
    if (where / "dataset_dict.json").is_file():
        return len(load_from_disk(str(where))[source.split])
    if where.is_file():
        if where.suffix == ".parquet":
            return int(read_metadata(where).num_rows)
        with where.open(encoding="utf-8") as file:
            is_list = file.read(1) == "["
            file.seek(0)
            return len(json.load(file)) if is_list else sum(bool(line.strip()) for line in file)
    if source.path.startswith(("/", ".", "~")):
        raise FileNotFoundError("there is no such file or folder")
    return None
