"""MME-RealWorld and its Lite subset: five options, real photographs (Zhang et al. 2024, arXiv 2408.13257).

The overall figure is over all questions alike (micro); the paper averages the classes, which is given beside it. A kind
is a class ("Perception/Remote Sensing"); the finer subtasks merge all attributes of a thing, as the public code does
(lmms-eval, tasks/mme_realworld/utils.py: the prompt, without its last space, and the figures).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Final

from qzoom_agent.data.cells import texts
from qzoom_agent.data.image_column import seen
from qzoom_agent.data.options import bare, letter
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.tasks.task import Scored, Task

COLUMNS: Final = ("bytes", "index", "question", "multi-choice options", "answer", "category", "l2-category")
INSTRUCTION: Final = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "({letters}) of the correct option.\nThe best answer is:"
)


def load(name: str, hub: str, source: TaskSource) -> RowSamples:
    """Return the samples; the picture is the column `bytes`."""
    rows = open_rows(source, HubTable((hub,), split="train"), COLUMNS)

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row["bytes"], rows.folder)
        shown = texts(row["multi-choice options"])
        letters = [letter(at) for at in range(len(shown))]
        instruction = INSTRUCTION.format(letters=", ".join(letters[:-1]) + f", or {letters[-1]}")
        answer = str(row["answer"]).strip().upper()
        return Sample(
            id=f"{name}-{row['index']}",
            task=name,
            kind=row["category"],
            image=image,
            question="\n".join((f"{row['question']} The choices are listed below:", *shown, instruction)),
            answer=answer,
            answers=(answer,),
            options=tuple(map(bare, shown)),
            cluster=cluster,
            meta={"subtask": subtask(row["l2-category"])},
        )

    return RowSamples(rows, make, [row["category"] for row in rows.only("category")])


def subtask(name: str) -> str:
    """Return the name in lower case; `<x>/attribute` for every attribute of x."""
    name = name.lower()
    return f"{name.split('/')[0]}/attribute" if "attribute" in name else name


def aggregate(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return `overall` (micro), `class average`, both for Perception and Reasoning, and every subtask of a class."""
    figures = {}
    for side in ("", "Perception", "Reasoning"):
        classes: dict[str, list[float]] = defaultdict(list)
        for one in scored:
            if not side or _side(one.kind) == side:
                classes[one.kind].append(one.value)
        if classes:
            every = [value for values in classes.values() for value in values]
            figures[side or "overall"] = fmean(every)
            figures[f"{side} class average".strip()] = fmean(map(fmean, classes.values()))
    subtasks: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        subtasks[f"{one.kind}/{one.meta['subtask']}"].append(one.value)
    return figures | {name: fmean(values) for name, values in sorted(subtasks.items())}


def _side(kind: str) -> str:
    return "Perception" if "perception" in kind.lower() else "Reasoning"


MME: Final = tuple(
    Task(
        name=name,
        title=f"{title}: recognition and reasoning in real photographs ({n}, multiple choice)",
        load=partial(load, name, hub),
        scorers={"faithful": choice.mme_realworld, "clean": choice.clean, "vlmevalkit": choice.mme_realworld_kit},
        aggregate=aggregate,
        coarse_tokens=(512, 4096),
        sources=(hub,),
        columns=COLUMNS,
    )
    for name, title, n, hub in (
        ("mme-realworld", "MME-RealWorld", 23_609, "yifanzhang114/MME-RealWorld-Lmms-eval"),
        ("mme-realworld-lite", "MME-RealWorld Lite", 1_919, "yifanzhang114/MME-RealWorld-lite-lmms-eval"),
    )
)
