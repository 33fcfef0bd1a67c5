"""Ask an agent every row of a table, or one question about every image of a folder; no answers are needed.

    done = run_table(agent, "scans", out="runs/scans", question="What is the total?")
    print(done.path, len(done.failed))

The run folder is that of an evaluation (`run_log`), so a killed run resumes and loses at most the questions under way.
Answers go into results.parquet, one row for each row of the table. A row that cannot be read or asked has status
"error" and does not stop the others; it is asked again when the run is.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

from PIL import Image

from qzoom_agent.agent import Agent
from qzoom_agent.data.columns import Columns, id_text
from qzoom_agent.data.image_column import LONGEST_PATH, all_seen, each_image
from qzoom_agent.data.questions import read_question
from qzoom_agent.data.rows import SUFFIXES, Row, Rows, RowSamples, is_saved, open_path, tables_in
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.evaluation.export import RESULTS, require_pyarrow, write_parquet
from qzoom_agent.evaluation.run_log import RunFolder, RunSpec, weights_of_agent
from qzoom_agent.evaluation.runner import ProgressListener, Shard, TaskRun, ask_all, plan
from qzoom_agent.evaluation.sample_result import SampleResult
from qzoom_agent.evaluation.tasks.custom import named_columns, table_file, task_name
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.files import atomic_write, expanded, translating, valid_unicode
from qzoom_agent.images import FORMATS
from qzoom_agent.messages import require_question
from qzoom_agent.pdf import file_of, pages

logger = logging.getLogger(__name__)

ANSWERED: Final[Mapping[str, str]] = {
    "answer": "string",
    "status": "string",
    "error": "string",
    "confidence": "double",
    "answer_probability": "double",
    "boxes": "boxes",
    "visual_tokens": "int64",
    "turns": "int64",
    "seconds": "double",
}
"""Columns of an answer, and their types."""
COLUMNS: Final = {
    "index": "int64",
    "id": "string",
    "image": "string",
    "question": "string",
    **ANSWERED,
    "box_images": "numbers",
}
_WRONG_ROW: Final = (QzoomError, AttributeError, LookupError, TypeError, ValueError)
_PART: Final = 1000
"""Rows of the results that are in memory at a time."""


@dataclass(frozen=True)
class TableRun:
    """A finished run over a table."""

    path: Path
    rows: int
    failed: Mapping[int, str]
    """The error of each row that has no answer, by the row's number from 0."""


@dataclass(frozen=True)
class Questions:
    """The questions of a table, or one question about every image of a folder."""

    task: str
    rows: Rows
    columns: Columns
    question: str | None = None
    """The question of all rows; None: each row has its own."""
    max_pixels: int = 0
    named: Mapping[str, str] = field(default_factory=dict)
    """Names of the columns, as they were given."""
    path: Path = Path()
    """Where the table is."""

    def samples(self) -> RowSamples:
        """Return the samples to ask; what is wrong with a row is raised when it is read."""
        return RowSamples(self.rows, self._sample, ["all"] * len(self.rows))

    def digest(self, index: int) -> str:
        """Return the digest of a row and of the size of its image's file; empty if the row cannot be read."""
        try:
            row = self.rows[index]
            images = each_image(self.columns.cell(row, "image"))
        except _WRONG_ROW:
            return ""
        found = hashlib.sha256(
            ((self.question or "") + (repr(sorted(self.named.items())) if self.named else "")).encode()
        )
        for column, cell in sorted(row.items()):
            held = cell if isinstance(cell, bytes) else repr(_plain(cell)).encode()
            found.update(f"{column} {len(held)} ".encode() + held)
        for image in filter(None, map(_image_name, images)):
            with suppress(OSError, ValueError):  # there is no such file
                found.update(
                    str(((self.rows.folder or Path()) / file_of(str(expanded(image)))).stat().st_size).encode()
                )
        return found.hexdigest()[:24]

    def names(self, index: int) -> dict[str, str | None]:
        """Return what the table calls a row, its image and its question; None where it does not say, or is damaged."""
        try:
            row = self._row(self.rows[index])
            return {**self._names(row), "question": _text(self.columns.cell(row, "question"))}
        except _WRONG_ROW:
            return {"id": None, "image": None, "question": self.question}

    def _row(self, row: Row) -> Row:
        """Return a row with the question that is asked of all."""
        return row if self.question is None else {**row, "question": self.question}

    def _names(self, row: Row) -> dict[str, str | None]:
        images = [_image_name(image) for image in each_image(self.columns.cell(row, "image"))]
        named = [image for image in images if image is not None]
        image = valid_unicode(", ".join(named)) if len(named) == len(images) > 0 else None
        return {"id": _text(self.columns.cell(row, "id")), "image": image}

    def _sample(self, row: Row, index: int) -> Sample:
        row = self._row(row)
        cell = self.columns.cell(row, "image")
        image, cluster, others = all_seen(cell, self.rows.folder, max_pixels=self.max_pixels)
        sample = read_question(row, self.columns, answered=False).sample(self.task, index, image, cluster=cluster)
        names = self._names(row)
        return replace(sample, others=others, meta={key: name for key, name in names.items() if name is not None})


def image_rows(path: Path, *, without: Path | None = None) -> Rows | None:
    """Return the images in a folder, sorted, or the one image or PDF at `path`; None if there are none.

    Hidden files and those in the folder `without` are left out, and so are files of other kinds and folders that cannot
    be read, with a warning that counts them. A PDF needs pypdfium2.
    """
    left_out = None if without is None else without.resolve()
    folder = path if path.is_dir() else path.parent
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    names, others = list[str](), Counter[str]()
    with translating("read", path):
        files = _files(path, others) if path.is_dir() else [path]
        files = [file for file in files if left_out is None or not _real(file).is_relative_to(left_out)]
        for name in sorted(file.relative_to(folder).as_posix() for file in files):
            file, suffix = folder / name, Path(name).suffix.lower()
            if name.startswith(".") or "/." in name:
                continue
            if suffix in known:
                names.append(name)
            elif suffix == ".pdf":
                names += [f"{name}#page={page + 1}" for page in range(pages(file))]
            else:
                others[suffix or "without an ending"] += 1
    if names and others:
        told = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        logger.warning("%s: files of other kinds are left out (%s)", path, told)
    return Rows(str(path), [{"image": name} for name in names], ("image",), folder) if names else None


def _files(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, linked ones too, each once; count those that cannot be read."""
    root = folder.resolve()
    seen = {root}

    def unseen(path: Path) -> bool:
        real = _real(path)
        if real in seen or (path.is_symlink() and real.is_relative_to(root)):
            return False
        seen.add(real)
        return True

    def unreadable(_: OSError) -> None:
        others["folder that cannot be read"] += 1

    for where, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if unseen(Path(where, name))]
        yield from (Path(where, name) for name in files)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a link to itself


def find_questions(
    table: str | Path,
    *,
    out: str | Path,
    max_pixels: int,
    question: str | None = None,
    columns: Mapping[str, str] | None = None,
    n: int | None = None,
    split: str | None = None,
) -> Questions:
    """Return the questions of a run, checked without a model. For arguments and errors see `run_table`.

    What lies in `out`, the run folder, is no image to ask about.
    """
    require_pyarrow()
    if n is not None and n < 1:
        raise ConfigError(f"A run needs at least one row; got n = {n}.")
    if question is not None:
        require_question(question)
    if not isinstance(table, str | Path):
        raise ConfigError(
            f"table is the path of a table or of a folder; got {type(table).__name__}. Agent.batch answers a list."
        )
    path = expanded(table)
    if not path.exists():
        raise ConfigError(f"There is nothing at {table}. Give a table or a folder of images.")
    if path.is_dir() and path.resolve() == Path(out).resolve():
        raise ConfigError(
            f"The run folder is {out}, where the images are. Give another one, such as {path / 'answers'}."
        )
    with translating("read", path):
        is_table = is_saved(path) or bool(tables_in(path)) if path.is_dir() else path.suffix.lower() in SUFFIXES
    rows = None if is_table else image_rows(path, without=Path(out))
    if rows is None and path.is_dir() and not is_table:
        raise ConfigError(f"There is neither an image nor a table ({', '.join(SUFFIXES)}) in {path}.")
    rows = rows or open_path(table_file(path), split=split, skip_bad=True)
    named = dict(columns or {})
    given = named if question is None else {**named, "question": "question"}
    found = named_columns(rows, given, question=question is None, answers=False)
    return Questions(task_name(path), rows, found, question, max_pixels, named, path)


def run_table(
    agent: Agent,
    table: str | Path | Questions,
    *,
    out: str | Path,
    question: str | None = None,
    columns: Mapping[str, str] | None = None,
    n: int | None = None,
    split: str | None = None,
    workers: int | None = None,
    traces: bool = False,
    weights: str | None = None,
    environment: dict[str, str] | None = None,
    shard: Shard | None = None,
    watch: ProgressListener | None = None,
) -> TableRun:
    """Ask every row that `out` has no answer to yet, and write the answers to `out`/results.parquet.

    Args:
        agent: The agent that is asked.
        table: A table (JSON lines, JSON, CSV, TSV, parquet, a saved dataset) with the columns image (or a list
            of several) and, unless `question` is given, question; or a folder of images and PDFs, or one of these. Or
            what `find_questions` made of it, with its `question` and `columns`.
        out: Run folder. The same call goes on with an interrupted run; rows may be added to the table.
        question: Question that is asked about every image, in place of a column.
        columns: Names that `image`, `question`, `options` and `id` have in the table, where they differ.
        n: Number of rows to ask, the first ones; None: all.
        split: Split of a saved dataset that has several.
        workers: Most questions at a time, see `Agent.batch`.
        traces: Keep the record of every episode, with pictures.
        weights: `run_log.fingerprint` of the model; None: of what the agent was loaded with.
        environment: `run_log.environment`, for the record.
        shard: This process among several that share the work; `failed` is that of all.
        watch: Receiver of progress.

    Raises:
        ConfigError: The table cannot be read, a number is out of range, or `out` holds another run.
        MissingDependency: pyarrow is not installed.
    """
    shard, config = shard or Shard(), agent.config
    if isinstance(table, Questions):
        asked = table
    else:
        how: dict[str, Any] = {"question": question, "columns": columns, "n": n, "split": split}
        asked = find_questions(table, out=out, max_pixels=config.max_pixels, **how)
    path = asked.path
    source = TaskSource(str(path.resolve()), split, config.seed, n=n, answered=False)
    samples = asked.samples()
    selection, places = plan(samples, source)
    task = Task(name=asked.task, title=f"rows of {path}", load=lambda _: samples, scorers={})
    asker, workers = agent.side_by_side(workers, most=len(places))
    folder = RunFolder(out)
    weights = weights or weights_of_agent(agent)
    run = TaskRun(task, samples, places, asker, folder, config.seed, weights, traces, row_digest=asked.digest)
    spec = RunSpec(seed=config.seed, weights=weights, repeats=1, tasks={task.name: selection})

    def begin() -> None:
        asked_before = folder.ask.tasks if (folder.path / "run.json").exists() else {}
        if others := asked_before.keys() - {task.name}:  # whose rows would stand among those of this table
            raise ConfigError(
                f"{folder.path} holds the answers to {', '.join(sorted(others))}, and the table is {task.name}. Choose "
                "another folder (--out, in Python: out)."
            )
        folder.begin(config, spec, environment or {})

    def finish() -> None:
        folder.replace_rows(folder.in_order())
        with atomic_write(folder.path / RESULTS) as part:
            write_parquet(part, COLUMNS, _parts(folder, asked))

    ask_all([run], folder, begin=begin, finish=finish, workers=workers, shard=shard, watch=watch)
    failed = {row.index: _error(row, asked) or "" for row in folder.in_order() if row.status == "error"}
    return TableRun(folder.path / RESULTS, len(places), failed)


def _parts(folder: RunFolder, asked: Questions) -> Iterator[dict[str, list[Any]]]:
    """Yield the rows of the results, some at a time, by column."""
    rows = folder.in_order()
    while cells := [_result(row, asked) for row in islice(rows, _PART)]:
        yield {column: [one[column] for one in cells] for column in COLUMNS}


def _result(row: SampleResult, asked: Questions) -> dict[str, Any]:
    named = {**row.meta, "question": row.question} if row.image else asked.names(row.index)
    return {
        "index": row.index,
        "id": named.get("id"),
        "image": named.get("image"),
        "question": named["question"],
        "answer": row.answer,
        "status": row.status,
        "error": _error(row, asked),
        "confidence": row.confidence,
        "answer_probability": row.answer_probability,
        "boxes": row.crops,
        "box_images": row.crop_images or None,
        "visual_tokens": row.visual_tokens,
        "turns": row.turns,
        "seconds": row.usage.seconds.total,
    }


def _error(row: SampleResult, asked: Questions) -> str | None:
    """Return the error of a row, without its place in the table, which is known here."""
    return row.error and row.error.replace(f"Row {row.index + 1} of {asked.rows.name}: ", "", 1)


def _text(cell: object) -> str | None:
    return None if cell is None else id_text(cell)


def _image_name(cell: object) -> str | None:
    """Return the path of an image, where the table has one."""
    name = cell.get("path") if isinstance(cell, Mapping) else cell
    return name if isinstance(name, str) and len(name) <= LONGEST_PATH and name[:5].lower() != "data:" else None


def _plain(cell: object) -> object:
    """Return a cell as something whose `repr` is the same in every process."""
    return hashlib.sha256(cell.tobytes()).hexdigest() if isinstance(cell, Image.Image) else cell
