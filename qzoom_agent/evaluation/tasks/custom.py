"""A user's own questions as a task: a file or a folder of rows with `image`, `question` and `answer`.

    {"image": "meter.jpg", "question": "What does the meter read?", "answer": "04217", "box": [310, 88, 402, 131]}
    {"image": "shelf.jpg", "question": "Which is cheapest?", "answer": "B", "options": ["tea", "milk", "oil"]}

JSON lines, JSON, CSV, TSV, parquet or a saved dataset; in CSV and TSV, lists are written as JSON. A folder holds one
such file, with the pictures beside it. All rows are checked when the task is loaded, before a model is asked anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qzoom_agent.data.image_column import seen
from qzoom_agent.data.rows import SUFFIXES, Row, Rows, RowSamples, open_path
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers.match import normalise
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.question_format import LETTER, instructed, items, letter, listed
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.geometry import Box

NEEDED: Final = ("image", "question")


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(items)]
Corners = tuple[float, float, float, float]


class Question(BaseModel):
    """One row, the picture apart. Other columns are left alone."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: Text = ""
    """Empty: the row's number."""
    question: Text
    answer: Text = ""
    """Of a multiple choice: the letter or the text of the right option."""
    answers: Texts = ()
    """All accepted answers, where there are several."""
    options: Texts = ()
    """Shown as (A), (B), ... below the question."""
    boxes: Annotated[tuple[Corners, ...], BeforeValidator(items)] = ()
    """x1, y1, x2, y2 of where the answer is, in pixels of the image."""
    box: Annotated[Corners | tuple[()], BeforeValidator(items)] = ()
    """`boxes`, where there is one."""
    kind: Text = Field(default="all", validation_alias=AliasChoices("kind", "category"))
    """Reported by itself."""

    @model_validator(mode="after")
    def _has_an_answer(self) -> Question:
        if not self.golds:
            raise ValueError("there is neither an answer nor answers")
        if self.options and self.letter is None:
            raise ValueError(f"the answer {self.golds[0]!r} is none of the options {', '.join(self.options)}")
        return self

    @property
    def golds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, (self.answer, *self.answers))))

    @property
    def letter(self) -> str | None:
        """The right option's; a text that is an option goes before a letter."""
        gold = self.golds[0]
        texts = [normalise(option) for option in self.options]
        if normalise(gold) in texts:
            return letter(texts.index(normalise(gold)))
        said = gold.strip("(). ").upper()
        return said if said in map(letter, range(len(texts))) else None

    @property
    def asked(self) -> str:
        """The question with its options."""
        if not self.options:
            return self.question
        return instructed(f"{self.question}\n{listed(self.options)}", LETTER)


def custom_task(path: Path) -> Task:
    """The task in a file or folder; whether it can be read shows when it is loaded."""
    name = re.sub(r"[^\w.-]+", "-", path.resolve().stem).strip("-") or "own"
    return Task(
        name=name,
        title=f"your questions in {path}",
        load=partial(load, name, path),
        scorers={"rule": rule},
        columns=NEEDED,
    )


def load(name: str, path: Path, source: TaskSource) -> RowSamples:
    """The samples of the table at `source.path`, else at `path`; ConfigError names every row that is wrong."""
    rows = open_path(_table(Path(source.path) if source.path else path), split=source.split).need(NEEDED)
    if not len(rows):
        raise ConfigError(f"{rows.name} has no rows.")
    questions = _questions(rows)
    kinds = [question.kind for question in questions]

    def make(row: Row, index: int) -> Sample:
        question = questions[index]
        answer = question.letter if question.options else question.golds[0]
        boxes = (*question.boxes, *([question.box] if question.box else []))
        image, cluster = seen(row["image"], rows.folder, max_pixels=source.max_pixels)
        return Sample(
            id=f"{name}-{question.id or index}",
            task=name,
            kind=question.kind,
            image=image,
            question=question.asked,
            answer=answer or "",
            boxes=tuple(Box(*corners) for corners in boxes),
            answers=(answer or "",) if question.options else question.golds,
            options=question.options,
            cluster=cluster,
        )

    return RowSamples(rows, make, kinds)


def _questions(rows: Rows) -> list[Question]:
    questions, wrong = [], []
    for number, row in enumerate(rows.only(*(column for column in rows.columns if column != "image")), start=1):
        try:
            questions.append(
                Question.model_validate({name: cell for name, cell in row.items() if cell not in (None, "")})
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            wrong.append(f"row {number}: {f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}")
        except (ConfigError, ValueError) as error:
            wrong.append(f"row {number}: {error}")
    _refuse(rows.name, wrong)
    ids = [question.id for question in questions if question.id]
    _refuse(rows.name, [f"two rows have the id {one!r}" for one in sorted({one for one in ids if ids.count(one) > 1})])
    return questions


def _refuse(name: str, wrong: Sequence[str], most: int = 5) -> None:
    if wrong:
        more = f"; and {len(wrong) - most} more" if len(wrong) > most else ""
        raise ConfigError(f"{name} cannot be asked: {'; '.join(wrong[:most])}{more}.")


def _table(path: Path) -> Path:
    """The file that holds the rows, or the folder if `datasets` has saved it."""
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(found) != 1:
        there = f"it holds {', '.join(file.name for file in found)}" if found else "it holds none"
        raise ConfigError(f"{path} should hold one table ({', '.join(SUFFIXES)}), but {there}. Give the file itself.")
    return found[0]
