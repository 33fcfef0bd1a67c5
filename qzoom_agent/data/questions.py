"""Questions: the cells that tables write them in, and how they are asked, with options and instructions."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final

from PIL import Image
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qzoom_agent.data.answers import collisions, matching
from qzoom_agent.data.rows import Rows
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import ConfigError
from qzoom_agent.geometry import Box

LETTER: Final = "Answer with the option's letter from the given choices directly."
SHORT: Final = "Answer the question using a single word or phrase."
_MARK: Final = re.compile(r"(?:^|(?<=\s))(?:\(([A-H])\)|([A-H])[.):])[ \t]*")


def letter(index: int) -> str:
    """Return the letter of an option: A for 0."""
    return chr(ord("A") + index)


def listed(options: Sequence[str]) -> str:
    """Return the options one a line, as (A) ..., (B) ..."""
    return "\n".join(f"({letter(index)}) {option}" for index, option in enumerate(options))


def instructed(question: str, instruction: str) -> str:
    """Return the question and the instruction on a line of its own, unless the question ends with it already."""
    question = question.rstrip()
    return question if question.endswith(instruction) else f"{question}\n{instruction}"


def inline_options(text: str) -> tuple[str, ...]:
    """Return the options that a question lists itself, as "(A) red (B) blue" or "A. red" lines; none if it has none.

    >>> inline_options("Which colour? (A) red (B) dark blue\\nAnswer directly.")
    ('red', 'dark blue')
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if (mark[1] or mark[2]) == letter(len(marks)):
            marks.append(mark)
    if len(marks) < 2:
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return tuple((text[mark.end() : end].split("\n") or [""])[0].strip() for mark, end in zip(marks, ends, strict=True))


def bare(option: str) -> str:
    """Return an option without the letter before it: "(A) red" is red."""
    mark = _MARK.match(option.strip())
    return option.strip()[mark.end() :] if mark else option.strip()


def texts(cell: object, *, written: bool = True) -> tuple[str, ...]:
    """Return the texts in a cell: of a list, of a list written as text (JSON or Python), or one; none of an empty cell.

    Without `written`, a text that reads like a list is one text.
    """
    return (cell,) if cell and isinstance(cell, str) and not written else tuple(str(item) for item in items(cell))


def items(cell: object) -> Sequence[Any]:
    """Return the items of a cell: a list, a list written as text, or one item; raise ConfigError if it is cut off."""
    if cell is None or cell == "":
        return ()
    if isinstance(cell, str) and cell.strip().startswith("["):
        return _written(cell)
    return (cell,) if isinstance(cell, str) or not isinstance(cell, Iterable) else tuple(cell)


def first_of(row: Mapping[str, Any], *columns: str, default: str) -> str:
    """Return the first text in one of these columns that is there and not empty."""
    return next((text for column in columns for text in texts(row.get(column)) if text), default)


def _written(cell: str) -> Sequence[Any]:
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(cell)
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, list):
            return found
    raise ConfigError(f"A cell should hold a list, such as [1, 2], but holds {cell[:80]!r}.")


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
        if not self.options:
            return self
        twice = collisions(self.options)
        if twice:
            raise ValueError(f"the option {twice[0]!r} stands there twice: give each option a text of its own")
        if self.letter is None:
            fits = [self.options[index] for index in matching(self.golds[0], self.options)]
            if fits:
                raise ValueError(f"the answer {self.golds[0]!r} fits several options: {', '.join(fits)}. Give a letter")
            raise ValueError(f"the answer {self.golds[0]!r} is none of the options {', '.join(self.options)}")
        return self

    @property
    def golds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, (self.answer, *self.answers))))

    @property
    def letter(self) -> str | None:
        """The right option's, or None if it cannot be known; a text that is an option goes before a letter."""
        gold, letters = self.golds[0].strip(), [letter(index) for index in range(len(self.options))]
        found = matching(gold, self.options)
        if not found:
            said = gold.strip("(). ").upper()
            found = [letters.index(said)] if said in letters else []
        if not found and _MARK.match(gold):  # "B. milk"
            marked = gold.lstrip("(")[0]
            found = [index for index in matching(bare(gold), self.options) if letters[index] == marked]
        return letters[found[0]] if len(found) == 1 else None

    @property
    def asked(self) -> str:
        """The question with its options."""
        if not self.options:
            return self.question
        return instructed(f"{self.question}\n{listed(self.options)}", LETTER)

    def sample(self, task: str, index: int, image: Image.Image, *, cluster: str = "") -> Sample:
        """Return the sample of a task that this question is about an image; `index` is its row."""
        answers = (self.letter or "",) if self.options else self.golds
        boxes = (*self.boxes, *([self.box] if self.box else []))
        return Sample(
            id=f"{task}-{self.id or index}",
            task=task,
            kind=self.kind,
            image=image,
            question=self.asked,
            answer=answers[0],
            boxes=tuple(Box(*corners) for corners in boxes),
            answers=answers,
            options=self.options,
            cluster=cluster,
        )


def read_questions(rows: Rows) -> list[Question]:
    """Return the question of every row; raise ConfigError that names those that are wrong. No image is read."""
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
