"""Tables of questions, read row by row: from the hub, a saved dataset, parquet, CSV, TSV, JSON or JSON lines.

Pictures stay encoded until a row is made a sample, so a table of 20 GB needs the memory of one row: `datasets` maps its
files, and of JSON lines, CSV and TSV only the offsets are kept. CSV and TSV cells stay text ("007" is no number, "NA"
is not missing). What a table must have are its columns, not its name: hub repositories move and are copied.
"""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qzoom_agent.data.image_column import headers_only
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError, MissingDependency, QzoomError
from qzoom_agent.extras import require
from qzoom_agent.files import expanded, valid_unicode

Row = Mapping[str, Any]
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}
"""Marks between cells; of several, the first that the header has."""
_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *_LINES, ".json", *_SEPARATORS)
"""Files that are read as tables."""
_WRONG_CELLS = (AttributeError, LookupError, TypeError, ValueError)
"""Errors of a cell that holds something else."""
_LONGEST_INDEX = 64
"""Longer cells are images."""
_SHOWN = 5


class HubTable(NamedTuple):
    """The place of a task's table on the hub."""

    ids: tuple[str, ...]
    """The preferred one first."""
    config: str | None = None
    split: str = "test"
    file: str | None = None
    """The table is this file of the repository; what it refers to lies beside it."""


@dataclass(frozen=True)
class ComputedRows:
    """Rows that a function makes when they are asked for."""

    count: int
    row: Callable[[int], Row]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return self.row(index)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(self.count))


@dataclass(frozen=True)
class Rows:
    """A table: `len`, a row by its number, and the cells of some columns without reading the others."""

    name: str
    """For messages."""
    data: Any
    """A list of mappings, or a `datasets.Dataset` whose pictures are not decoded."""
    columns: tuple[str, ...]
    folder: Path | None = None
    """Folder that paths in the cells are relative to."""
    numbers: Sequence[int] | None = None
    """For messages, the number that each row has in its file, from 0; None: its place here."""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        row: Row = self.data[index]
        return row

    def select(self, places: Sequence[int]) -> Rows:
        """Return these rows, in this order."""
        numbers = [self.number(place) for place in places]
        if hasattr(self.data, "select"):
            return replace(self, data=self.data.select(places), numbers=numbers)
        return replace(self, data=ComputedRows(len(places), partial(_selected, self.data, places)), numbers=numbers)

    def number(self, place: int) -> int:
        """Return the number that a row has in its file, from 0."""
        return place if self.numbers is None else self.numbers[place]

    def only(self, *columns: str) -> Iterator[Row]:
        """Return every row, with no more than these of its columns."""
        wanted = [column for column in columns if column in self.columns]
        if not wanted:  # a dataset without columns has no rows
            return iter([{}] * len(self))
        data = self.data.select_columns(wanted) if hasattr(self.data, "select_columns") else self.data
        return ({column: row.get(column) for column in wanted} for row in data)

    def renamed(self, names: Mapping[str, str]) -> Rows:
        """Return the same rows with other names for some columns."""
        if not names:
            return self
        columns = tuple(names.get(column, column) for column in self.columns)
        if hasattr(self.data, "rename_columns"):
            return replace(self, data=self.data.rename_columns(dict(names)), columns=columns)
        return replace(self, data=ComputedRows(len(self), partial(_renamed, self.data, names)), columns=columns)

    def need(self, columns: Sequence[str]) -> Rows:
        """Return itself; raise ConfigError if a column is missing."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise ConfigError(
                f"{self.name} lacks the column{'s'[: len(missing) > 1]} {', '.join(missing)}. "
                f"Needed: {', '.join(columns)}. There are: {', '.join(self.columns) or 'none'}."
            )
        return self


@dataclass(frozen=True)
class RowSamples:
    """The samples of a table, made one at a time."""

    rows: Rows
    make: Callable[[Row, int], Sample]
    kinds: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self.make(self.rows[index], index)
        except QzoomError as error:
            place = self._place(index)  # a row that cannot be parsed says so itself
            raise type(error)(str(error) if str(error).startswith(place) else f"{place}: {error}") from error
        except _WRONG_CELLS as error:
            raise ConfigError(f"{self._place(index)} cannot be asked: {_why(error)}.") from error

    def _place(self, index: int) -> str:
        return f"Row {self.rows.number(index) + 1} of {self.rows.name}"

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def problems(self, places: Iterable[int]) -> dict[int, str]:
        """Return what is wrong with each of these samples that cannot be asked; of images the headers are read."""
        found = {}
        with headers_only():
            for place in places:
                try:
                    self.make(self.rows[place], place)
                except (QzoomError, *_WRONG_CELLS) as error:
                    found[place] = str(error) if isinstance(error, QzoomError) else _why(error)
        return found


def refuse_rows(name: str, problems: Mapping[int, str], *, total: int, skip_bad: bool = False) -> None:
    """Raise ConfigError that names the rows with problems (by their place from 0), unless they are left out
    (`skip_bad`) and others of all `total` rows remain.
    """
    if not problems or (skip_bad and len(problems) < total):
        return
    told = listed_rows(problems)
    hint = "no row is left" if skip_bad else "Mend these rows, or leave them out: --skip-bad (in a recipe: skip_bad)"
    raise ConfigError(f"{name} has {len(problems)} of {total} rows that cannot be asked: {told}. {hint}.")


def listed_rows(problems: Mapping[int, str]) -> str:
    """Return the first problems in a line, with the numbers of their rows from 1."""
    told = [f"row {place + 1}: {problems[place].rstrip('.')}" for place in sorted(problems)]
    more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
    return "; ".join(told[:_SHOWN] + more)


def open_rows(source: TaskSource, place: HubTable) -> Rows:
    """Return the table at `source.path` (local, or a hub id), else the first of the hub's ids that loads.

    Raises:
        ConfigError: nothing there can be read (each reason is given), or the split is not there.
    """
    if source.path is None:
        return _first_on_hub(place, source.split)
    path = expanded(source.path)
    if path.exists():
        return open_path(path, place, split=source.split)
    if not _is_hub_id(source.path):
        example = place.ids[0] if place.ids else "owner/name"
        raise ConfigError(
            f"There is nothing at {source.path}. Give a local file or folder, or a hub id such as {example}."
        )
    return _first_on_hub(place._replace(ids=(source.path,)), source.split)


def open_path(path: Path, place: HubTable | None = None, *, split: str | None = None, skip_bad: bool = False) -> Rows:
    """Return the table in a local file or folder.

    Args:
        path: The file or folder.
        place: The place of the table in a folder that holds several.
        split: Split of a saved dataset.
        skip_bad: Open JSON lines of which some are damaged: the others have the columns, and reading one that is
            damaged raises ConfigError.

    Raises:
        ConfigError: It cannot be read.
    """
    place = place or HubTable(())
    try:
        if path.is_file():
            return _file(path, split=split, skip_bad=skip_bad)
        if is_saved(path):
            _require_datasets()
            from datasets import load_from_disk

            return _dataset(load_from_disk(str(path)), str(path), path, split, place.split)
        if place.file and (path / place.file).is_file():
            return _file(path / place.file, split=split)
        return _folder(str(path), place, split, folder=path)
    except (ConfigError, MissingDependency):
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8. Save it as UTF-8 (in Excel: CSV UTF-8).") from None
    except Exception as error:  # pyarrow, pandas and datasets each have their own errors for a damaged file
        raise ConfigError(f"Cannot read {path} as a table: {_why(error)}.{_cache_advice(error, path)}") from error


def _cache_advice(error: Exception, path: Path) -> str:
    """Return what to do if not the table at `path` but the cache of `datasets` is closed to us; empty otherwise."""
    closed = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS) and error.filename
    if not closed or Path(str(closed)).resolve().is_relative_to(path.resolve()):
        return ""
    return " `datasets` keeps a copy of the table there: set HF_HOME to a folder that can be written."


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` has saved a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def tables_in(folder: Path) -> list[Path]:
    """Return the files in a folder that are read as tables."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def open_table(path: str, *, config: str | None = None, split: str = "train") -> Rows:
    """Return the table at a local path or hub id; the configuration and the split must be there.

    Raises:
        ConfigError: It cannot be read, or is a file without rows.
    """
    where = expanded(path)
    if where.is_dir() and not is_saved(where) and len(found := tables_in(where)) == 1:
        (where,) = found  # beside the images that it names
    try:
        if where.is_file():
            if not len(rows := _file(where)):
                raise ConfigError("there is nothing in it")
            return rows
        if not (where.exists() or on_hub(path)):
            seen = "" if where.is_absolute() else f", seen from {Path.cwd()}"
            raise ConfigError(f"there is nothing at that path{seen}")
        _require_datasets()
        from datasets import load_dataset, load_from_disk

        data = load_from_disk(str(where)) if is_saved(where) else load_dataset(path, config, split=split)
        return _dataset(data, path, None, None, split)
    except MissingDependency:
        raise
    except Exception as error:  # the hub's client, pyarrow and datasets each raise their own
        raise ConfigError(
            f"The dataset {path} cannot be read: {error or type(error).__name__}. Give a hub id, a folder that "
            f"save_to_disk wrote, or a file ({', '.join(SUFFIXES)})."
        ) from None


def on_hub(path: str) -> bool:
    """Return whether a path that is not on this machine may be a hub id, and is not that of a file."""
    return Path(path).suffix.lower() not in SUFFIXES and ("/" not in path or _is_hub_id(path))


def _kind(path: Path) -> str:
    """Return the suffix that says how a file is read: of .json files and of those of other names what they hold.

    That is one JSON value or one a line; a single line may be either.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and suffix != ".json":
        return suffix
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first, second = file.readline().strip(), file.readline().strip()
    if suffix not in SUFFIXES and first[:1] not in ("[", "{"):
        return suffix
    try:
        row = _parsed(first)
    except ValueError:
        return ".json" if first[:1] in ("[", "{", "") else ".jsonl"
    has_rows = isinstance(row, list) or (isinstance(row, dict) and not second and isinstance(row.get("data"), list))
    return ".json" if has_rows else ".jsonl"


def _file(path: Path, *, split: str | None = None, skip_bad: bool = False) -> Rows:
    if split is not None:
        raise ConfigError(f"{path} is one table and has no split {split!r}. Leave the split out, or give its own file.")
    suffix, name, folder = _kind(path), str(path), path.parent
    if suffix in _LINES:
        return _json_lines(path, skip_bad=skip_bad)
    if suffix == ".json":
        data = _json_rows(path)
        return Rows(name, data, tuple(dict.fromkeys(key for row in data for key in row)), folder)
    if suffix in _SEPARATORS:
        table = _Delimited(path, _separator(path, _SEPARATORS[suffix]))
        return Rows(name, ComputedRows(len(table.starts), table.row), table.header, folder)
    if suffix == ".parquet":
        _require_datasets()
        from datasets import Dataset

        return _dataset(Dataset.from_parquet(name), name, folder, None)
    raise ConfigError(f"Cannot read {path} as a table. Files that are read: {', '.join(SUFFIXES)}.")


def _separator(path: Path, marks: str) -> str:
    """Return the first of these marks that the first line of a file with text has."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = next((line for line in file if line.strip()), "")
    return next((mark for mark in marks if mark in header), marks[0])


def _parsed(text: str) -> Any:
    """Return the value of a JSON text, whose strings can be written as UTF-8. Raises ValueError if it is none."""
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is left where a text was cut inside an emoji
        data = json.loads(valid_unicode(json.dumps(data, ensure_ascii=False)))
    return data


def _json_rows(path: Path) -> list[Row]:
    """Return a list of rows, or the one that a record holds beside names and versions ({"data": [...]})."""
    data = _parsed(path.read_text(encoding="utf-8-sig"))
    if isinstance(data, dict):
        lists = [held for held in data.values() if isinstance(held, list) and held and isinstance(held[0], dict)]
        data = data.get("data", lists[0] if len(lists) == 1 else None)
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ConfigError(
            f'{path} is not a list of rows: write [{{...}}, ...] or {{"data": [{{...}}, ...]}}, or one row a line as '
            ".jsonl."
        )
    return data


def _require_datasets() -> None:
    require("datasets", extra="eval", use="Reading parquet, saved datasets and the hub")


def _first_on_hub(place: HubTable, split: str | None) -> Rows:
    _require_datasets()
    reasons = []
    for name in place.ids:
        try:
            if place.file is None:
                return _folder(name, place, split, folder=None)
            from huggingface_hub import snapshot_download

            return _file(Path(snapshot_download(name, repo_type="dataset")) / place.file, split=split)
        except Exception as error:  # the hub's client, its transports and the readers each raise their own
            reasons.append(f"{name}: {_why(error)}")
    raise ConfigError(
        "None of the hub's datasets could be loaded. "
        + "; ".join(reasons)
        + ". Check the connection, or give a local copy or another id as the path."
    )


def _folder(name: str, place: HubTable, split: str | None, *, folder: Path | None) -> Rows:
    """Return a hub repository or a local copy of one, which `datasets` reads alike."""
    _require_datasets()
    from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

    configs = get_dataset_config_names(name)
    if place.config in configs:
        config = place.config
    elif len(configs) == 1:
        config = configs[0]
    else:
        raise ConfigError(f"{name} has no configuration {place.config!r}. There are: {', '.join(configs)}.")
    chosen = _split(name, get_dataset_split_names(name, config), split, place.split)
    return _dataset(load_dataset(name, config, split=chosen), name, folder, None)


def _dataset(data: Any, name: str, folder: Path | None, split: str | None, default: str = "test") -> Rows:
    """Return `data` (a Dataset, or a DatasetDict and the split to take): pictures encoded, classes by their names."""
    from datasets import ClassLabel, DatasetDict, Image, List, Value

    if isinstance(data, DatasetDict):
        data = data[_split(name, list(data), split, default)]
    elif split not in (None, str(data.split)):
        raise ConfigError(f"{name} is one table, of the split {data.split}, and has no split {split!r}.")
    for column, feature in data.features.items():
        several = isinstance(feature, List)
        item = feature.feature if several else feature
        if isinstance(item, Image):
            data = data.cast_column(column, List(Image(decode=False)) if several else Image(decode=False))
        elif isinstance(item, ClassLabel):
            names = [_class_names(item, cell) for cell in data[column]]
            text = Value("string")
            data = data.remove_columns(column).add_column(column, names, feature=List(text) if several else text)
    return Rows(name, data, tuple(data.column_names), folder)


def _class_names(classes: Any, cell: Any) -> Any:
    """Return the name of a class, or of each in a list, by its number; None for one that is not known."""
    if isinstance(cell, list):
        return [_class_names(classes, one) for one in cell]
    return None if cell is None or cell < 0 else classes.int2str(cell)


def _split(name: str, there: Sequence[str], wanted: str | None, default: str) -> str:
    """Return the split to read; where none is asked for and only one is there, that one."""
    if wanted is None and default not in there and len(there) == 1:
        return there[0]
    if (wanted or default) in there:
        return wanted or default
    raise ConfigError(f"{name} has no split {wanted or default!r}. There are: {', '.join(there)}.")


def _json_lines(path: Path, *, skip_bad: bool) -> Rows:
    """Return JSON lines; blank ones are no rows. ConfigError if one cannot be read, or with `skip_bad` if none can."""
    starts, position = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                starts.append(position)
            position += len(line)
    keys, fault = dict[str, None](), None
    for index in range(len(starts)):
        try:
            keys |= dict.fromkeys(_json_line(path, starts, index))
        except ConfigError as error:
            fault = fault or error
    if fault is not None and not (skip_bad and keys):
        raise fault
    return Rows(str(path), ComputedRows(len(starts), partial(_json_line, path, starts)), tuple(keys), path.parent)


# Functions of the module and not of a method: rows are pickled on their way to the workers of a data loader.


def _selected(data: Any, places: Sequence[int], index: int) -> Row:
    row: Row = data[places[index]]
    return row


def _renamed(data: Any, names: Mapping[str, str], index: int) -> Row:
    return {names.get(column, column): cell for column, cell in data[index].items()}


def _json_line(path: Path, starts: Sequence[int], index: int) -> Row:
    with path.open("rb") as file:
        file.seek(starts[index])
        try:
            row = _parsed(file.readline().decode("utf-8-sig"))
        except ValueError as error:
            raise ConfigError(f"Row {index + 1} of {path} is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise ConfigError(f"Row {index + 1} of {path} is not an object: write {{...}}.")
    return row


class _Delimited:
    """A CSV or TSV file, whose rows are parsed when they are asked for. Cells may be of any size and stay text.

    Where a cell of `image` is the `index` of another row, that row's image is meant (VLMEvalKit's tables).
    """

    def __init__(self, path: Path, separator: str) -> None:
        self.path, self.separator, self.by_index = path, separator, dict[str, int]()
        self.starts: list[int] = []
        """Start of each row, in bytes."""
        with path.open("rb") as file:
            records = self._records(file)
            _, first = next(records, (0, []))
            self.header = tuple(cell.strip() for cell in first)
            for start, cells in records:
                if "index" in self.header and len(cells) == len(self.header):
                    self.by_index[cells[self.header.index("index")]] = len(self.starts)
                self.starts.append(start)
        self.by_index.pop("", None)  # an empty cell is the number of no row
        twice = next((name for name in self.header if self.header.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path} has two columns {twice!r}. Rename one.")

    def row(self, index: int) -> Row:
        with self.path.open("rb") as file:
            row = self._row(file, index)
            other = self.by_index.get(row.get("image", ""))
            if other is not None and len(row["image"]) <= _LONGEST_INDEX:
                row["image"] = self._row(file, other)["image"]
        return row

    def _row(self, file: BinaryIO, index: int) -> dict[str, str]:
        file.seek(self.starts[index])
        _, cells = next(self._records(file))
        if len(cells) > len(self.header):
            raise ConfigError(
                f"Row {index + 1} of {self.path} has {len(cells)} cells, but there are {len(self.header)} columns. Put "
                "cells that hold a separator into quotes."
            )
        return dict(zip_longest(self.header, cells, fillvalue=""))

    def _records(self, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows from here on, with the place where each starts; lines without a cell are left out."""
        place = file.tell()

        def lines() -> Iterator[str]:
            nonlocal place
            for line in file:
                place += len(line)
                yield line.decode("utf-8-sig" if place == len(line) else "utf-8")

        csv.field_size_limit(2**31 - 1)  # of the whole process: images are cells here; Windows takes no more
        start = place
        # The csv module takes one line at a time, so that after a row `place` is where the next one starts.
        for cells in csv.reader(lines(), delimiter=self.separator, strict=True):
            if cells:
                yield start, cells
            start = place


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    return (
        len(parts) == 2
        and all(part and part not in (".", "..", "~") for part in parts)
        and Path(text).suffix.lower() not in SUFFIXES
    )


def _why(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(". ")
