"""Questions: what a row asks, with its accepted answers, options and boxes. Evaluation and training read rows here."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from PIL import Image

from qzoom_agent.data.answers import WIDE
from qzoom_agent.data.columns import BoxColumn, Columns, id_text, is_empty, items, text, value, written
from qzoom_agent.data.options import Options, gold_letter, inline_options, letters_of, listed, read_options
from qzoom_agent.data.samples import Sample
from qzoom_agent.errors import BoxError, ConfigError
from qzoom_agent.geometry import Box, Size

LETTER: Final = "Answer with the option's letter from the given choices directly."
SHORT: Final = "Answer the question using a single word or phrase."
_TAGGED: Final = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOXED: Final = re.compile(r"\$*\\boxed\{(.*)\}\$*", re.DOTALL)
_MARKER: Final = re.compile(
    r"<\|vision_start\|>.{0,200}?<\|vision_end\|>|<start_of_image>|<imagehere>|\[img\]"
    r"|<\|?(?:image|img|image_pad|image_placeholder)[ _]?(\d*)\|?>",
    re.IGNORECASE | re.DOTALL,
)
_SLACK: Final = 1.0
"""Pixels by which a rounded box may lie over the edge of its image."""


def instructed(question: str, instruction: str) -> str:
    """Return the question and the instruction on a line of its own, unless the question ends with it already."""
    question = question.rstrip()
    return question if question.endswith(instruction) else f"{question}\n{instruction}"


@dataclass(frozen=True)
class Question:
    """The question of one row, the image apart."""

    question: str
    """Without the marks that show where the image stands."""
    golds: tuple[str, ...]
    """All accepted answers; the letter of a multiple choice. Empty for a row that is asked without an answer."""
    options: tuple[str, ...] = ()
    inline: bool = False
    """The question lists its options itself."""
    boxes: tuple[Box, ...] | None = None
    """The location of the answer, in the frame that the table has; None if unknown, empty if no part is meant."""
    id: str = ""
    """Empty: the row's number."""
    kind: str = "all"

    @property
    def asked(self) -> str:
        """The question with its options."""
        if not self.options:
            return self.question
        shown = self.question if self.inline else f"{self.question}\n{listed(self.options)}"
        return instructed(shown, LETTER)

    def sample(self, task: str, index: int, image: Image.Image, *, cluster: str = "") -> Sample:
        """Return the sample of a task that this question is about an image; `index` is its row.

        Raises ConfigError for a box that is not inside the image.
        """
        inside = [_inside(box, Size(*image.size)) for box in self.boxes or ()]
        # A table may say one place in two columns: in pixels, and as shares of the image.
        boxes = tuple({tuple(map(round, box.corners)): box for box in inside}.values())
        return Sample(
            id=f"{task}-{self.id or index}",
            task=task,
            kind=self.kind,
            image=image,
            question=self.asked,
            answer=self.golds[0] if self.golds else "",
            boxes=boxes,
            coarse_suffices=None if self.boxes is None else not boxes,
            answers=self.golds,
            options=self.options,
            cluster=cluster,
        )


def read_question(row: Mapping[str, Any], columns: Columns, *, answered: bool = True) -> Question:
    """Return the question of a row, whose image is not looked at; without `answered` it may have no answer.

    Raises:
        ConfigError: The question is empty, there is no answer, or options, answer or boxes cannot be understood.
    """
    cell = columns.cell(row, "question")
    several = isinstance(cell, list | tuple)
    question = _question(next(iter(cell), "") if several else cell)
    options = _options(row, columns)
    found = columns.cell(row, "answer")
    # Of several questions the first is asked, whose answer is the first.
    golds = _golds(found)[:1] if several else (*_golds(found), *_golds(columns.cell(row, "answers"), listed=True))
    inline = False
    named = {str(gold).translate(WIDE).strip("(). ").upper() for gold in golds}
    if not options.texts and len(named) == 1:
        own = inline_options(question)
        inline = bool(own) and named <= set(letters_of(own))
        options = Options(own) if inline else options
    if not golds and answered:
        raise ConfigError("there is neither an answer nor answers")
    return Question(
        question=question,
        golds=_letters(golds, options) if options.texts else tuple(dict.fromkeys(text(gold) for gold in golds)),
        options=options.texts,
        inline=inline,
        boxes=_boxes(row, columns.boxes),
        id="" if (name := columns.cell(row, "id")) is None else id_text(name),
        kind=text(next(iter(items(columns.cell(row, "kind"))), "all")),
    )


def read_questions(
    rows: Iterable[Mapping[str, Any]], columns: Columns, *, answered: bool = True, unique: bool = False
) -> Iterator[Question | str]:
    """Yield the question of every row, or what is wrong with it.

    An id is used once if they are `unique`; that of a row without one is its number from 0.
    """
    ids: Counter[str] = Counter()
    for index, row in enumerate(rows):
        try:
            question = read_question(row, columns, answered=answered)
        except ConfigError as error:
            yield str(error)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            yield f"{type(error).__name__}: {error}"
        else:
            name = question.id or str(index)
            ids[name] += 1
            told = f"two rows have the id {name!r}{'' if question.id else ', this one by its number from 0'}"
            yield told if unique and ids[name] > 1 else question


def _question(cell: object) -> str:
    """Return a question without the marks for its image; inside a sentence, a mark is read as "the image"."""
    if cell is None:
        raise ConfigError("there is no question")
    said = text(cell)
    marks = list(_MARKER.finditer(said))
    named = {mark[1] or f"place {at}" for at, mark in enumerate(marks)}
    if len(named) > 1 or (marks and marks[0][1] not in (None, "", "0", "1")):
        raise ConfigError(f"it is about several images, and only questions about one can be asked: {said[:60]!r}")
    if marks:
        said = _MARKER.sub(lambda mark: "" if _stands_apart(mark) else "the image", said).strip()
    if not said.strip():
        raise ConfigError("the question is empty")
    return said


def _stands_apart(mark: re.Match[str]) -> bool:
    """Return whether a mark is first, last or on a line of its own."""
    before, after = mark.string[: mark.start()], mark.string[mark.end() :]
    line = before.rsplit("\n", 1)[-1] + after.split("\n", 1)[0]
    return not (before.strip() and after.strip() and line.strip())


def _options(row: Mapping[str, Any], columns: Columns) -> Options:
    options = read_options(cell) if (cell := columns.cell(row, "options")) is not None else Options()
    cells = [value(row, name) for name in columns.letters]
    while cells and cells[-1] is None:
        cells.pop()
    if not cells:
        return options
    if None in cells:
        raise ConfigError(f"the option in column {columns.letters[cells.index(None)]} is empty")
    lettered = read_options(list(map(text, cells)))
    if options.texts and options.texts != lettered.texts:
        raise ConfigError(f"the options and the columns {', '.join(columns.letters)} differ")
    return lettered


def _golds(cell: object, *, listed: bool = False) -> list[Any]:
    """Return the answers in a cell; `listed` where a text that reads like a list is always one."""
    found = written(cell) if isinstance(cell, str) else None
    # "[Yes, No]" and "[0, 5]" are answers of their own; ["a", "b"] is how a table of texts writes a list.
    if isinstance(found, list) and (listed or all(isinstance(one, str) for one in found)):
        cell = found
    answers = []
    for one in items(cell) if not isinstance(cell, str) else (cell,):
        if isinstance(one, Mapping):  # as VQAv2 has them
            one = one.get("answer")
        if isinstance(one, str):
            one = _untagged(one)
        if not is_empty(one):
            answers.append(one)
    return answers


def _untagged(answer: str) -> str:
    """Return what an answer's tag holds; ConfigError if there are several tags or half of one."""
    if "<answer>" in answer.lower() or "</answer>" in answer.lower():
        inside = _TAGGED.findall(answer)
        if len(inside) != 1:
            raise ConfigError(f"the answer should stand in one <answer>...</answer>: {answer[:60]!r}")
        answer = inside[0]
    boxed = _BOXED.fullmatch(answer.strip())
    return (boxed[1] if boxed else answer).strip()


def _letters(golds: Sequence[Any], options: Options) -> tuple[str, ...]:
    found = [gold_letter(gold, options) for gold in golds]
    if None in found:
        gold = golds[found.index(None)]
        raise ConfigError(f"the answer {gold!r} is none of the options {', '.join(options.texts)}")
    letters = tuple(dict.fromkeys(one for one in found if one is not None))
    if len(letters) > 1:
        raise ConfigError(f"the options {', '.join(letters)} are all right; only questions with one can be scored")
    return letters


def _boxes(row: Mapping[str, Any], columns: Sequence[BoxColumn]) -> tuple[Box, ...] | None:
    found: list[Box] | None = None
    for column in columns:
        cell = value(row, column.name)
        if cell is None:
            continue
        held = items(cell)
        if held and not isinstance(held[0], list | tuple | Mapping):
            held = (held,)
        found = [*(found or ()), *(_box(corners, column) for corners in held)]
    return None if found is None else tuple(dict.fromkeys(found))


def _box(corners: Any, column: BoxColumn) -> Box:
    told = f"{column.name} {list(corners) if isinstance(corners, tuple) else corners!r:.80}"
    try:
        numbers = [float(one) for one in corners if not isinstance(one, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not isinstance(corners, list | tuple) or len(corners) != 4:
        raise ConfigError(f"{told} is no box: write [x1, y1, x2, y2] in pixels of the image")
    if not all(map(isfinite, numbers)):
        raise ConfigError(f"{told} is no box: its numbers must be finite")
    x1, y1, x2, y2 = numbers
    if column.form == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if not (x1 < x2 and y1 < y2):
        raise ConfigError(
            f"{told} is no box: x1 < x2 and y1 < y2 must hold. Call a column of x, y, width and height box_xywh"
        )
    if column.frame == "pixel" and max(numbers) <= 1:
        raise ConfigError(f"{told} looks like shares of the image: write pixels, or call the column box_unit")
    return Box(x1, y1, x2, y2, column.frame)


def _inside(box: Box, size: Size) -> Box:
    """Return a box in pixels of its image, without the fraction by which it may lie over the edge."""
    try:
        pixels = box.to_frame("pixel", size)
    except BoxError as error:
        raise ConfigError(f"a box cannot be read: {error}") from None
    width, height = size
    outside = max(-pixels.x1, -pixels.y1, pixels.x2 - width, pixels.y2 - height)
    inside = Box(max(pixels.x1, 0.0), max(pixels.y1, 0.0), min(pixels.x2, width), min(pixels.y2, height))
    if outside > _SLACK or not (inside.x1 < inside.x2 and inside.y1 < inside.y2):
        raise ConfigError(f"the box {pixels.as_list()} is not inside its image of {width} x {height} px")
    return inside
