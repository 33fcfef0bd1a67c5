"""A user's own questions as a task: a file or a folder of rows with `image`, `question` and `answer`.

    {"image": "meter.jpg", "question": "What does the meter read?", "answer": "04217", "box": [310, 88, 402, 131]}
    {"image": "shelf.jpg", "question": "Which is cheapest?", "answer": "B", "options": ["tea", "milk", "oil"]}

A question about several images has a list of them, as `images`, and boxes on the first. JSON lines, JSON, CSV, TSV,
parquet or a saved dataset; in CSV and TSV, lists are written as JSON. A folder holds one such file, with the pictures
beside it. All rows are checked when the task is loaded, before a model is asked anything.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from qzoom_agent.data.columns import NAMES, Columns, column_of, find_columns
from qzoom_agent.data.image_column import all_seen
from qzoom_agent.data.questions import read_questions
from qzoom_agent.data.rows import SUFFIXES, Row, Rows, RowSamples, is_saved, open_path, refuse_rows, tables_in
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.task import Task

NEEDED: Final = ("image", "question")


def custom_task(path: Path, *, name: str | None = None) -> Task:
    """Return the task in a file or folder, which is read when the task is loaded; `name` if not that of `task_name`."""
    name = task_name(path) if name is None else name
    return Task(
        name=name,
        title=f"your questions in {path}",
        load=partial(load, name, path),
        scorers={"rule": rule},
        columns=NEEDED,
        path=str(path),
    )


def task_name(path: Path) -> str:
    """Return a name for the task in a file or folder: its letters, with their accents and vowel signs, and digits."""
    resolved = path.resolve()
    name = unicodedata.normalize("NFC", resolved.name if resolved.is_dir() else resolved.stem)
    kept = (char if char in "_.-" or unicodedata.category(char)[0] in "LMN" else " " for char in name)
    return re.sub("[ \ufe0e\ufe0f\u20e3]+", "-", "".join(kept)).strip("-") or "own"  # marks of emoji are no letters


def load(name: str, path: Path, source: TaskSource) -> RowSamples:
    """Return the samples of the table at `source.path`, else at `path`; raise ConfigError that names wrong rows."""
    rows = open_path(table_file(Path(source.path) if source.path else path), split=source.split)
    columns = named_columns(rows, source.columns)
    questions = list(read_questions(rows.only(*columns.top), columns, answered=source.answered, unique=True))
    wrong = {place: told for place, told in enumerate(questions) if isinstance(told, str)}
    refuse_rows(rows.name, wrong, total=len(rows), skip_bad=source.skip_bad)

    def make(row: Row, index: int) -> Sample:
        question = questions[index]
        if isinstance(question, str):
            raise ConfigError(question)
        cell = columns.cell(row, "image")
        image, cluster, others = all_seen(cell, rows.folder, max_pixels=source.max_pixels)
        return replace(question.sample(name, index, image, cluster=cluster), others=others)

    return RowSamples(rows, make, ["" if isinstance(one, str) else one.kind for one in questions])


def named_columns(
    rows: Rows, given: Mapping[str, str] | None, *, question: bool = True, answers: bool = True
) -> Columns:
    """Return the columns of a table of questions.

    Args:
        given: Names that our columns have in it, where they differ.
        question: Each row has its question.
        answers: As for `find_columns`.

    Raises:
        ConfigError: It lacks images, questions, rows or a column that was named.
    """
    named = {column_of(name, rows.columns): ours for ours, name in (given or {}).items() if name}
    rows.need([name for name, ours in named.items() if question or ours != "question"])
    columns = find_columns(rows.name, rows.columns, given, answers=answers)
    for ours in NEEDED if question else NEEDED[:1]:
        if ours not in columns.names:
            one_for_all = ", or ask one about all rows: --question TEXT" if ours == "question" and not answers else ""
            advice = one_for_all or ", or add it to the table"
            raise ConfigError(
                f"{rows.name} has no column {ours} ({', '.join(NAMES[ours][1:])}). It has: "
                f"{', '.join(rows.columns) or 'none'}. Say what it is called, --column {ours}=NAME{advice} (in "
                f"Python: columns{', question' if one_for_all else ''})."
            )
    if not len(rows):
        raise ConfigError(f"{rows.name} has no rows.")
    return columns


def table_file(path: Path) -> Path:
    """Return the file that holds the rows, or the folder if `datasets` has saved it."""
    if not path.is_dir() or is_saved(path):
        return path
    found = tables_in(path)
    if len(found) != 1:
        there = f"it holds {', '.join(file.name for file in found)}" if found else "it holds none"
        raise ConfigError(f"{path} should hold one table ({', '.join(SUFFIXES)}), but {there}. Give the file itself.")
    return found[0]
