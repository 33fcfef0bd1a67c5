"""Questions about images as rows of a `datasets` table, whatever they come from.

Columns: `id`, `image` (PIL), `image_id` (rows with the same one show the same image), `question`, `answer` (which is
learned), `answers` (which are all right), `mode`, and `boxes`: where in pixels of the image the answer is, None where
nobody knows, empty where no part of it is. Training needs no boxes; metrics and head selection use them if they are
there.

A source is a hub id, a local folder or file that `datasets` reads, or `needle`, whose boards are drawn when a row is
read. Rows about one image stand together, so that it is decoded and encoded once. Where fewer rows are asked for than
there are, each source gives its share of them: boards, which are drawn at random anyway, their first, and a table those
that its seed draws, in the table's order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol, TypedDict

import PIL.Image
from datasets import Dataset, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue

from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.evaluation.tasks.needle.boards import Board, Fact, draw_board
from qzoom_agent.images import digest
from qzoom_agent.perception.labels import Mode

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
"""How often each is drawn, among those that are drawn for a task that is asked for."""


class DatasetSpec(BaseModel):
    """Where questions come from, and what their columns are called there."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """`needle`, a hub id, or a local folder or file (what `save_to_disk` wrote, or JSON lines)."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    columns: dict[str, str] = {}
    """What `image`, `question`, `answer` and `boxes` are called in the source, where that differs; `a.b` is the field b
    of a column of records. Of a list of images the first is taken, and of a list of questions the first with its own
    answer; of one question all answers of a list are right."""
    images: str | None = None
    """Configuration of the same hub dataset that holds the images, by `id`; `image` then names one (GQA)."""
    limit: int | None = Field(default=None, gt=0)
    """Rows to take, drawn by `seed` where there are more. `needle`: questions to draw (default 1,000)."""
    suffix: str = ""
    """What is asked after each question, such as "Answer the question using a single word or phrase."."""
    short_labels: bool = True
    """Whether that sentence is also asked where published heads make the labels (DocVQA was labelled without it)."""
    mode: Mode = "textual"
    """What answers are read off: print, or objects in a scene (decides on the published heads and prompts)."""
    seed: int = Field(default=0, ge=0, lt=4)
    """`needle`: which boards. Of a table: which of its rows, where not all are taken."""
    tasks: tuple[str, ...] = Field(
        default=("needle-scene", "needle-doc", "needle-global"), validation_alias=AliasChoices("tasks", "suites")
    )
    """`needle`: tasks that questions are taken from (needle-hop, too, whose questions have two boxes in order)."""
    a_board: int = Field(default=8, gt=0)
    """`needle`: questions of one board."""

    @property
    def is_needle(self) -> bool:
        return self.path == "needle"

    def identity(self) -> dict[str, JsonValue]:
        """What decides what the rows hold. More boards leave the first as they are; more of a table are other rows."""
        told: dict[str, JsonValue] = self.model_dump(mode="json")
        told["suites"] = told.pop("tasks")  # the key in folders that earlier versions wrote
        return {key: told[key] for key in told if not (self.is_needle and key in _OF_TABLES)}


class Record(TypedDict):
    """One row."""

    id: str
    image: PIL.Image.Image
    image_id: str
    question: str
    answer: str
    answers: list[str]
    exact: bool
    """Whether a reply has to be the answer and nothing else (see `verdicts`)."""
    boxes: list[list[float]] | None
    mode: Mode
    short_labels: bool
    """See `DatasetSpec`."""


class Records(Protocol):
    """Rows that are read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """A `Record`."""
        ...


def load_records(sources: Sequence[DatasetSpec], *, limit: int | None = None) -> "ConcatenatedRecords":
    """The rows of some sources, one after another, of the columns in the module's note; at most `limit`.

    Raises:
        ConfigError: a source cannot be read, or lacks a column.
    """
    tables = [_needle(one) if one.is_needle else _table(one) for one in sources]
    if limit is not None:
        shares = spread([len(table) for table in tables], limit)
        tables = [_some(*one) for one in zip(sources, tables, shares, strict=True)]
    return ConcatenatedRecords(sources, tables)


def spread(sizes: Sequence[int], limit: int) -> list[int]:
    """How many of each to take, in proportion to how many there are, for `limit` (or all, if they are fewer) in all."""
    total = sum(sizes)
    if limit >= total:
        return list(sizes)
    shares = [limit * size // total for size in sizes]
    most_cut = sorted(range(len(sizes)), key=lambda at: -(limit * sizes[at] % total))
    for at in most_cut[: limit - sum(shares)]:
        shares[at] += 1
    return shares


def _some(source: DatasetSpec, table: Dataset, count: int) -> Dataset:
    """So many rows of a source, in its order."""
    if count >= len(table):
        return table
    if source.is_needle:
        return table.select(range(count))
    return table.select(sorted(Random(f"rows/{source.seed}").sample(range(len(table)), count)))


class ConcatenatedRecords:
    """Several tables as one. (`concatenate_datasets` would lose what is done to rows when they are read.)"""

    def __init__(self, sources: Sequence[DatasetSpec], tables: Sequence[Dataset]) -> None:
        self.sources, self.tables = sources, tables

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for table in self.tables:
            if index < len(table):
                return table[index]
            index -= len(table)
        raise IndexError(index)

    def questions(self) -> Iterator[tuple[str, int, list[str]]]:
        """What is asked of each table but boards, without reading an image: its path, a row, and the questions from
        that row on, some at a time."""
        for source, table in zip(self.sources, self.tables, strict=True):
            if source.is_needle:
                continue
            name = source.columns.get("question", "question")
            at = 0
            for rows in table.with_format(None).select_columns(name.split(".")[0]).iter(batch_size=1000):
                asked = _asked(_column(rows, name), source)
                yield source.path, at, asked
                at += len(asked)


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
    """A board and its questions of these tasks, shuffled so that every kind comes before any comes again."""
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
    """The layouts to draw for these tasks, with their shares. Raises ConfigError if there are none."""
    found = {name: share for name, (share, offers) in _LAYOUTS.items() if offers & set(tasks)}
    if not found:
        raise ConfigError(f"No board has questions of {', '.join(tasks)}. Name needle tasks.")
    return found


def _table(source: DatasetSpec) -> Dataset:
    table = _read(source)
    if source.limit is not None:
        table = _some(source, table, source.limit)
    named = {name: source.columns.get(name, name) for name in ("image", "question", "answer", "boxes")}
    missing = [named[name] for name in ("image", "question", "answer") if not _has(table, named[name])]
    if missing:
        raise ConfigError(
            f"The dataset {source.path} has no column {' and no column '.join(missing)}; it has "
            f"{', '.join(table.column_names)}. Say in the source's `columns` what they are called."
        )
    images = None
    if source.images is not None:
        images = _read(source.model_copy(update={"name": source.images}))
    elif isinstance(table.features.get(named["image"]), Value | Image):
        table = table.cast_column(named["image"], Image(decode=False))
    named["boxes"] = named["boxes"] if _has(table, named["boxes"]) else ""
    _require_readable(table, named["answer"], named["boxes"], source)
    return table.with_transform(_Rename(named, source, columns=table.column_names, images=images))


def _has(table: Dataset, name: str) -> bool:
    """Whether a table has this column, or field of a column."""
    column, *fields = name.split(".")
    kind: Any = table.features.get(column)
    for field in fields:
        kind = kind.get(field) if isinstance(kind, dict) else None
    return kind is not None


def _require_readable(table: Dataset, answer: str, boxes: str, source: DatasetSpec) -> None:
    """Nothing where every row has an answer, and boxes that are boxes or none.

    Raises:
        ConfigError: one has not; said before anything is asked, with its row.
    """
    plain = table.select_columns(sorted({name.split(".")[0] for name in (answer, boxes) if name}))
    at = 0
    for rows in plain.iter(batch_size=1000):
        said = _column(rows, answer)
        for one, drawn in zip(said, _column(rows, boxes) if boxes else [None] * len(said), strict=True):
            if one is None:
                raise ConfigError(
                    f"Row {at} of the dataset {source.path} has no answer ({answer} is null). Give it one, or leave "
                    "the row out."
                )
            if drawn is not None and not all(map(_is_box, drawn)):
                raise ConfigError(
                    f"Row {at} of the dataset {source.path} has boxes that cannot be read: {drawn!r:.80}. Give a list "
                    "of [x1, y1, x2, y2] in pixels of the image, x1 < x2 and y1 < y2; an empty one where no part of "
                    "the image is meant, null where nobody knows."
                )
            at += 1


def _is_box(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    numbers = [one for one in value if isinstance(one, int | float)]
    return len(numbers) == 4 and numbers[0] < numbers[2] and numbers[1] < numbers[3]


def _column(rows: dict[str, list[Any]], name: str) -> list[Any]:
    """The values of a column, or of a field of one."""
    column, *fields = name.split(".")
    values = rows[column]
    for field in fields:
        values = [value[field] for value in values]
    return values


class _Rename:
    """Gives the rows of a table our names."""

    def __init__(
        self, named: dict[str, str], source: DatasetSpec, *, columns: Sequence[str], images: Dataset | None
    ) -> None:
        self.named, self.source = named, source
        self.has_ids = "id" in columns
        self.has_image_ids = "image_id" in columns
        self._decoder = Image()
        self._images = images
        self._where = {} if images is None else {name: at for at, name in enumerate(images["id"])}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        questions, boxes = _column(rows, self.named["question"]), self.named["boxes"]
        images = [self._image(value) for value in _column(rows, self.named["image"])]
        own = rows["image_id"] if self.has_image_ids else [digest(image)[:16] for image in images]
        image_ids = [str(one) for one in own]
        named = [str(value) for value in rows["id"]] if self.has_ids else image_ids
        answers = [_answers(*pair) for pair in zip(questions, _column(rows, self.named["answer"]), strict=True)]
        return {
            # several questions about an image are several records, whatever a column of ids says
            "id": [f"{one}-{_short(_texts(asked)[0])}" for one, asked in zip(named, questions, strict=True)],
            "image": images,
            "image_id": image_ids,
            "question": _asked(questions, self.source),
            "answer": [some[0] for some in answers],
            "answers": answers,
            "exact": [False] * len(questions),
            "boxes": _column(rows, boxes) if boxes else [None] * len(questions),
            "mode": [self.source.mode] * len(questions),
            "short_labels": [self.source.short_labels] * len(questions),
        }

    def _image(self, value: Any) -> PIL.Image.Image:
        if self._images is not None:
            value = self._images[self._where[value]]["image"]
        if isinstance(value, list):
            value = value[0]
        if isinstance(value, PIL.Image.Image):
            return value.convert("RGB")
        try:
            decoded: PIL.Image.Image = self._decoder.decode_example(value)
        except OSError as error:
            raise ImageError(f"An image of the dataset {self.source.path} cannot be read: {error}.") from None
        return decoded.convert("RGB")


def _asked(questions: Sequence[Any], source: DatasetSpec) -> list[str]:
    """What is asked of each row, whose column holds one question or several."""
    return [_texts(question)[0] + source.suffix for question in questions]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _answers(question: Any, answer: Any) -> list[str]:
    """All that is right. Several questions have an answer each, and the first is asked."""
    found = _texts(answer)
    return found[:1] if isinstance(question, list | tuple) else list(dict.fromkeys(found))


def _texts(value: Any) -> list[str]:
    """The texts of a cell that holds one or several; an empty one where it holds none."""
    return [str(one) for one in value] or [""] if isinstance(value, list | tuple) else [str(value)]


def _read(source: DatasetSpec) -> Dataset:
    where = Path(source.path).expanduser()
    try:
        if (where / "dataset_info.json").is_file():
            return Dataset.load_from_disk(str(where))
        if (where / "dataset_dict.json").is_file():
            return load_from_disk(str(where))[source.split]
        if where.is_file():
            kind = "parquet" if where.suffix == ".parquet" else "json"
            table: Dataset = load_dataset(kind, data_files=str(where), split="train")
            return _beside(table, where, source.columns.get("image", "image"))
        loaded: Dataset = load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, KeyError, DatasetsError, StopIteration) as error:
        reason = str(error) or "there is nothing in it"  # which is all that StopIteration says
        raise ConfigError(
            f"The dataset {source.path} cannot be read: {reason}. Give a hub id, a folder that save_to_disk wrote, or "
            "a file of JSON lines."
        ) from None
    return loaded


def _beside(table: Dataset, file: Path, column: str) -> Dataset:
    """Paths of images in a file of JSON lines are relative to it.

    Raises:
        ConfigError: there is no such image.
    """
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
