"""Questions about receipts in a folder of yours: four fields, and the values that stand beside labels.

The folder has the form that `qzoom_agent.data.receipts` describes; `--path` names it. The test split is asked unless
`--split` says train, validation or all. Boxes come from the lines of print; a value that is not printed as it is given
has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

from qzoom_agent.data.image_column import seen
from qzoom_agent.data.receipts import Receipt, read_receipts
from qzoom_agent.data.rows import Row, Rows, RowSamples
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import anls, receipts
from qzoom_agent.evaluation.tasks.receipt_questions import ReceiptQuestion, field_questions, line_questions
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.geometry import Box

FIELD: Final = "receipt-field"
LINE: Final = "receipt-line"


def load(name: str, ask: Callable[[Receipt], Iterable[ReceiptQuestion]], source: TaskSource) -> RowSamples:
    """Return the questions about the receipts of one split; ConfigError if there is no such folder or split."""
    if source.path is None:
        raise ConfigError(f"{name} asks about receipts of yours. Give their folder as the path (--path DIR).")
    folder = Path(source.path).expanduser()
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
