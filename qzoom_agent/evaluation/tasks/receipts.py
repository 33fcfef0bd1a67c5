"""Questions about receipts in a folder of yours: four fields, and the values that stand beside labels.

The folder has the form that `qzoom_agent.data.receipts` describes; `--path` names it. The test split is asked unless
`--split` says train, validation or all. Boxes come from the lines of print; a value that is printed otherwise than it
is given, or in a place that cannot be told, has none.

The words of the questions are here alone: the tasks ask the first wording of each, and nano is trained on all of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from qzoom_agent.data.answers import number
from qzoom_agent.data.image_column import seen
from qzoom_agent.data.receipts import Line, Receipt, Rect, read_receipts
from qzoom_agent.data.rows import Row, Rows, RowSamples
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import anls, receipts
from qzoom_agent.evaluation.scorers.anls import levenshtein
from qzoom_agent.evaluation.scorers.receipts import DATE, NUMBER, TOTAL, amount, same
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.files import expanded
from qzoom_agent.geometry import Box

FIELD: Final = "receipt-field"
LINE: Final = "receipt-line"
FIELD_QUESTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "company": ("what is the company?", "which is the company?", "who is the seller?"),
    DATE: ("what is the date?", "what date is on the receipt?", "which is the date?"),
    "address": ("what is the address?", "where is the company?", "which is the address?"),
    TOTAL: ("what is the total?", "how much is the total?", "what is the total amount?"),
}
"""Wordings by field, the one that tasks use first."""
BESIDE_QUESTIONS: Final = ("what stands beside {}?", "what is next to {}?", "what is the value of {}?")
"""The same for the value beside a label."""
BESIDE: Final = "beside"
TOTAL_WORDS: Final = ("TOTAL", "AMOUNT DUE", "BALANCE", "NETT", "PAYABLE")
_FIRST_LINES: Final = 12
"""Lines from the top among which company and address stand."""
_CLOSE: Final = 0.75
"""Least similarity of a value and the lines that are taken for it."""
_MOST_LINES: Final = 6
"""Lines of such a value."""
_ROW: Final = 0.5
"""Furthest that the middles of two lines of one row are apart, as a share of the height."""
_INLINE: Final = re.compile(r"\s*(?P<label>[^:]{3,24}?)(?<!\d)\s*:\s*(?P<value>[^:\s](?:[^:]|:(?=\d\d))*?)\s*")
_COLON: Final = re.compile(r":(?!\d\d)")
_AMOUNT: Final = re.compile(rf"(?<![\d./:-])(?:{NUMBER.pattern})(?![\d/:-])")
_CENTS: Final = re.compile(r"[.,]\d{1,2}(?!\d)")


class ReceiptQuestion(NamedTuple):
    """A question with one answer."""

    kind: str
    """A field, or "beside"."""
    wordings: tuple[str, ...]
    """The same question in several words."""
    answer: str
    box: Rect | None
    """Place of the answer in pixels of the page; None if it could not be found."""
    label: Rect | None = None
    """Place of the label that is asked about."""


def field_questions(lines: Sequence[Line], fields: Mapping[str, str]) -> Iterator[ReceiptQuestion]:
    """Yield a question for every field that has a value."""
    for name, value in fields.items():
        if value and name in FIELD_QUESTIONS:
            yield ReceiptQuestion(name, FIELD_QUESTIONS[name], value, place_of(lines, name, value))


def place_of(lines: Sequence[Line], name: str, value: str) -> Rect | None:
    """Return the box of a field's value.

    Of several equal totals it is the last one beside a word for a total; of several dates, the first.
    """
    if name == TOTAL:
        places = [(line, box) for line in lines for box in _amounts(line, value)]
        named = [(line, box) for line, box in places if any(map(_named_total, row_of(lines, line)))]
        places = named or (places if len(places) == 1 else [])
        return places[-1][1] if places else None
    top = lines if name == DATE else lines[:_FIRST_LINES]
    exact = next((box for line in top if (box := found_in(line, value)) is not None), None)
    if exact is not None or name == DATE:
        return exact or next((line.box for line in top if same(line.text, value, DATE)), None)
    return _lines_of(top, value)


def line_questions(lines: Sequence[Line]) -> Iterator[ReceiptQuestion]:
    """Yield a question for the value beside each label that names one row.

    Label and value are two lines of print in one row that holds nothing else, or one line with a colon between them.
    """
    texts = [line.text.upper() for line in lines]
    for line in lines:
        inline = _INLINE.fullmatch(line.text)
        label = (inline["label"] if inline else line.text).strip(" :.")
        if not is_label(label) or sum(label.upper() in text for text in texts) > 1:
            continue
        row = row_of(lines, line)
        if inline is not None:
            holder, value, start = line, inline["value"], inline.start("value")
            named = part_of(line, inline.start("label"), inline.end("label"))
            alone = len(row) == 1
        else:
            place = next(at for at, one in enumerate(row) if one is line)
            right = [one for one in row[place + 1 :] if one.text.strip(" :")]
            holder, named = right[0] if right else line, line.box
            value = holder.text.strip(" :")
            start = holder.text.find(value)
            # The heads of two columns are no label and its value.
            told = any(map(str.isdigit, value)) or line.text.rstrip()[-1:] == ":" or holder.text.lstrip()[:1] == ":"
            alone = len(right) == 1 and told and not _COLON.search(value)
        if alone:
            wordings = tuple(one.format(label) for one in BESIDE_QUESTIONS)
            yield ReceiptQuestion(BESIDE, wordings, value, part_of(holder, start, start + len(value)), named)


def is_label(text: str) -> bool:
    """Return whether a text can name a row: mostly letters, neither a stray sign nor a sentence."""
    letters = sum(char.isalpha() for char in text)
    return 3 <= len(text) <= 24 and letters >= 3 and letters >= 0.6 * len(text.replace(" ", ""))


def row_of(lines: Sequence[Line], line: Line) -> list[Line]:
    """Return the lines in the same row of a page, from left to right, this one among them."""
    same_row = [one for one in lines if one is line or abs(one.middle - line.middle) < _ROW * line.height]
    return sorted(same_row, key=lambda one: one.box[0])


def centers_of(line: Line) -> tuple[float, ...]:
    """Return where the characters of a line are: as known, or spread evenly."""
    if line.centers is not None:
        return line.centers
    width = (line.box[2] - line.box[0]) / max(1, len(line.text))
    return tuple(line.box[0] + (at + 0.5) * width for at in range(len(line.text)))


def part_of(line: Line, start: int, end: int) -> Rect:
    """Return the box of some characters of a line."""
    centers = centers_of(line)
    half = (line.box[2] - line.box[0]) / max(1, len(line.text)) / 2
    return max(line.box[0], centers[start] - half), line.box[1], min(line.box[2], centers[end - 1] + half), line.box[3]


def found_in(line: Line, text: str) -> Rect | None:
    """Return the box of a text that stands in a line once, by itself; case does not matter."""
    whole, wanted = line.text.upper(), text.upper()
    start = whole.find(wanted)
    if start < 0 or not wanted or whole.count(wanted) > 1 or len(whole) != len(line.text):
        return None
    before, after = whole[:start][-1:], whole[start + len(wanted) :][:1]
    # "9.00" is part of "19.00" and of "1,9.00", but stands by itself in "RM9.00".
    part = before.isdigit() or before in tuple(".,-") if wanted[0].isdigit() else before.isalnum()
    return None if part or after.isalnum() else part_of(line, start, start + len(text))


def _amounts(line: Line, value: str) -> Iterator[Rect]:
    """Yield the places of an amount in a line."""
    wanted = amount(value)
    if wanted is None:
        return
    for match in _AMOUNT.finditer(line.text):
        written = match[0]
        if bool(_CENTS.search(written)) >= bool(_CENTS.search(value)) and number(written) == abs(wanted):
            box = found_in(line, written)
            if box is not None:
                yield box


def _named_total(line: Line) -> bool:
    text = line.text.upper()
    return any(word in text for word in TOTAL_WORDS) and "SUB" not in text


def _lines_of(lines: Sequence[Line], value: str) -> Rect | None:
    """Return the box of the lines that a value is printed in, as it is given or nearly so."""
    wanted, texts = _plain(value), [_plain(line.text) for line in lines]
    parts = [at for at, text in enumerate(texts) if len(text) > 3 and text in wanted]
    if parts and sum(len(texts[at]) for at in parts) >= 0.8 * len(wanted):
        return _around([lines[at] for at in parts])
    best, chosen, letters = _CLOSE, range(0), Counter(wanted)
    for start in range(len(lines)):
        for end in range(start + 1, min(len(lines), start + _MOST_LINES) + 1):
            text = "".join(texts[start:end])
            longest = max(len(text), len(wanted), 1)
            # The edit distance is slow: letters in common say first how near two texts can be at best.
            if (Counter(text) & letters).total() > best * longest:
                near = 1 - levenshtein(text, wanted) / longest
                if near > best:
                    best, chosen = near, range(start, end)
    return _around([lines[at] for at in chosen]) if chosen else None


def _around(lines: Sequence[Line]) -> Rect:
    left, top, right, bottom = zip(*(line.box for line in lines), strict=True)
    return min(left), min(top), max(right), max(bottom)


def _plain(text: str) -> str:
    return "".join(char for char in text.upper() if char.isalnum())


def load(name: str, ask: Callable[[Receipt], Iterable[ReceiptQuestion]], source: TaskSource) -> RowSamples:
    """Return the questions about the receipts of one split; ConfigError if there is no such folder or split."""
    if source.path is None:
        raise ConfigError(f"{name} asks about receipts of yours. Give their folder as the path (--path DIR).")
    folder = expanded(source.path)
    asked: list[dict[str, Any]] = [
        {"receipt": receipt, "question": question, "id": f"{name}-{receipt.number}-{at}"}
        for receipt in read_receipts(folder, source.split or "test")
        for at, question in enumerate(ask(receipt))
    ]
    rows = Rows(f"the questions about {folder}", asked, ("receipt", "question", "id"))
    make = partial(_sample, name, folder if folder.is_dir() else folder.parent, source.max_pixels)
    return RowSamples(rows, make, [row["question"].kind for row in asked])


def _sample(name: str, folder: Path, max_pixels: int, row: Row, index: int) -> Sample:
    question: ReceiptQuestion = row["question"]
    image, cluster = seen(row["receipt"].image, folder, max_pixels=max_pixels)
    return Sample(
        id=row["id"],
        task=name,
        kind=question.kind,
        image=image,
        question=question.wordings[0],
        answer=question.answer,
        boxes=() if question.box is None else (Box(*question.box),),
        answers=(question.answer,),
        cluster=cluster,
        meta={"image": row["receipt"].image},
    )


RECEIPTS: Final = (
    Task(
        name=FIELD,
        title="receipts of yours: company, date, address and total",
        load=partial(load, FIELD, lambda receipt: field_questions(receipt.lines, receipt.fields)),
        scorers={"clean": receipts.clean, "exact": receipts.exact},
    ),
    Task(
        name=LINE,
        title="receipts of yours: the value beside a label",
        load=partial(load, LINE, lambda receipt: line_questions(receipt.lines)),
        scorers={"exact": receipts.exact, "clean": anls.clean},
    ),
)
