"""TreeBench: ten subtasks of perception and reasoning, with the boxes of the objects that the answer depends on.

405 multiple-choice questions in one tab-separated file. Besides accuracy it measures grounding: the mean over the
targets of the best IoU that a box of the model has with it (`grounding.mean_iou`); the samples carry the
targets in pixels, so crops that an episode was shown can be measured against them. Source: Wang et al. 2025 (TreeVGR,
inference_treebench.py: the prompt, without its system message, and the scorer).

The options are shown as the one text in which the file lists them, "A. red" a line; some have five or more, and some
questions about text list them without the point. The columns A, B, ... repeat them, but not for every question.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Final

from qzoom_agent.data.cells import items
from qzoom_agent.data.image_column import seen
from qzoom_agent.data.options import inline_options
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.geometry import Box

NAME: Final = "treebench"
PLACE: Final = HubTable(("HaochenWang/TreeBench",), file="TreeBench.tsv")
COLUMNS: Final = ("index", "image", "question", "multi-choice options", "answer", "category", "target_instances")
INSTRUCTION: Final = (
    "Select the best answer to the above multiple-choice question based on the image. After the reasoning process, "
    "respond with only the letter of the correct option between <answer> and </answer>."
)
_BARE_LETTER: Final = re.compile(r"^[ \t]*([A-H])(?=[ \t])", re.MULTILINE)


def load(source: TaskSource) -> RowSamples:
    """Return the samples; `source.path` may be the file, or the folder that holds it."""
    rows = open_rows(source, PLACE, COLUMNS)
    return RowSamples(rows, partial(_make, rows.folder), [row["category"] for row in rows.only("category")])


def _make(folder: Path | None, row: Row, index: int) -> Sample:
    image, cluster = seen(row["image"], folder)
    shown = row["multi-choice options"].strip()
    repeated = tuple(str(row[letter]) for letter in "ABCDEFGH" if row.get(letter))
    answer = str(row["answer"]).strip().upper()
    return Sample(
        id=f"{NAME}-{row['index']}",
        task=NAME,
        kind=row["category"],
        image=image,
        question=f"{row['question'].strip()} Options:\n{shown}\n{INSTRUCTION}",
        answer=answer,
        boxes=_boxes(row),
        answers=(answer,),
        options=max(inline_options(_BARE_LETTER.sub(r"\1.", shown)), repeated, key=len),
        cluster=cluster,
    )


def _boxes(row: Row) -> tuple[Box, ...]:
    targets = items(row["target_instances"])
    try:
        return tuple(Box(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in targets)
    except (TypeError, ValueError):
        raise ConfigError(
            f"Question {row['index']} of TreeBench has targets that are no boxes [x1, y1, x2, y2]: {targets!r}."
        ) from None


TREEBENCH: Final = Task(
    name=NAME,
    title="TreeBench: ten subtasks with target boxes in dense photographs (405, multiple choice)",
    load=load,
    scorers={"faithful": choice.treebench, "clean": choice.clean},
    sources=PLACE.ids,
    columns=COLUMNS,
)
