"""Text in pages, infographics, charts and scenes: DocVQA, InfographicVQA, ChartQA, TextVQA and OCRBench.

Open questions with a list of accepted answers; each task has a measure of its own (see `evaluation/scorers`). Questions
and instructions are those of lmms-eval (tasks/docvqa, infovqa, chartqa, textvqa, ocrbench: *_doc_to_text and the
default post_prompt). Besides the hub's tables, the publishers' own JSON files and VLMEvalKit's tables are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from qzoom_agent.data.cells import first_of, texts
from qzoom_agent.data.image_column import seen
from qzoom_agent.data.questions import SHORT, instructed
from qzoom_agent.data.rows import HubTable, Row, Rows, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import anls, chartqa, ocrbench, vqa
from qzoom_agent.evaluation.tasks.task import Scored, Scorer, Task

OCRBENCH_QUESTIONS: Final = 1000
_LONGEST_NAME: Final = 1024
_KINDS: Final = {"test_human": "human_test", "test_augmented": "augmented_test"}
"""The hub's names of kinds that ChartQA's files and VLMEvalKit's table call otherwise."""
_DATASETS: Final = {"Handwritten Mathematical Expression Recognition": "HME100k"}
"""OCRBench's dataset whose formulas are compared differently, by the kind that has only this one."""
_RECOGNITION: Final = "Text Recognition"
_OCRBENCH_GROUPS: Final = {
    "Regular Text Recognition": _RECOGNITION,
    "Irregular Text Recognition": _RECOGNITION,
    "Artistic Text Recognition": _RECOGNITION,
    "Handwriting Recognition": _RECOGNITION,
    "Digit String Recognition": _RECOGNITION,
    "Non-Semantic Text Recognition": _RECOGNITION,
}


@dataclass(frozen=True)
class Layout:
    """The columns of a task's table, and how its questions are asked."""

    place: HubTable
    answers: str
    several: bool = True
    """False: the cell is one answer, even where it reads like a list ("[Yes, No]")."""
    id: str | None = None
    """None: the row's number."""
    kind: str | None = None
    written: Callable[[str], str] = str.strip
    """Form in which the public code writes the question."""
    instruction: str = ""
    meta: str | None = None
    """A column that the scorer needs beside."""
    published: Mapping[str, str] = field(default_factory=dict)
    """The hub's names of columns that the publisher's file or VLMEvalKit's table calls otherwise."""
    folders: tuple[str, ...] = ()
    """Folders beside the publisher's file, or beside its folder, that hold the images."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.id, "question", self.answers, self.kind, self.meta, "image")))

    def rows(self, source: TaskSource) -> Rows:
        """Return the table under the hub's names; ids, kinds and what scorers need beside may be missing in it."""
        rows = open_rows(source, self.place)
        names: dict[str, str] = {}
        for theirs, ours in self.published.items():
            if theirs in rows.columns and ours not in (*rows.columns, *names.values()):
                names[theirs] = ours
        rows = rows.renamed(names)
        needed = {"question", "image", *([self.answers] if source.answered else [])}
        return rows if needed <= set(rows.columns) else rows.need(self.columns)

    def image(self, row: Row, folder: Path | None) -> object:
        """Return the image's cell, or its path where the publisher keeps images in a folder of their own."""
        cell = row["image"]
        if folder is None or not isinstance(cell, str) or len(cell) > _LONGEST_NAME:
            return cell
        places = [folder, *(base / name for base in (folder, folder.parent) for name in self.folders)]
        names = (cell, f"{cell}.jpg", Path(cell).name)
        return next((str(at) for place in places for name in names if (at := place / name).is_file()), cell)


def load(name: str, layout: Layout, source: TaskSource) -> RowSamples:
    """Return the samples of one of these tasks."""
    rows = layout.rows(source)
    ending = Path(rows.name).stem

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(layout.image(row, rows.folder), rows.folder)
        cell = row.get(layout.answers)
        answers = texts(cell) if layout.several else (() if cell is None else (str(cell),))
        if source.answered and not answers:
            raise ConfigError("there is no answer")
        kind = _kind(row, layout, ending)
        meta: dict[str, JsonValue] = {layout.meta: row.get(layout.meta) or _DATASETS.get(kind)} if layout.meta else {}
        return Sample(
            id=f"{name}-{row.get(layout.id, index) if layout.id else index}",
            task=name,
            kind=kind,
            image=image,
            question=instructed(layout.written(row["question"]), layout.instruction),
            answer=answers[0] if answers else "",
            answers=answers,
            cluster=cluster,
            meta=meta,
        )

    kinds = [_kind(row, layout, ending) for row in rows.only(layout.kind)] if layout.kind else ["all"] * len(rows)
    return RowSamples(rows, make, kinds)


def _kind(row: Row, layout: Layout, file: str) -> str:
    """Return the kind in a row, else that of its file: ChartQA has one for each."""
    kind = first_of(row, layout.kind, default=file if file in _KINDS else "other") if layout.kind else "all"
    return _KINDS.get(kind, kind)


def points(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return OCRBench's points, one a question, in all and by its five groups; `score` is the share of the thousand.

    A part of the task has that part's points only.
    """
    figures = {"points": sum(one.value for one in scored)}
    figures["score"] = figures["points"] / OCRBENCH_QUESTIONS
    for one in scored:
        group = f"points, {_OCRBENCH_GROUPS.get(one.kind, one.kind)}"
        figures[group] = figures.get(group, 0.0) + one.value
    return figures


def _moved(name: str) -> tuple[str, ...]:
    """Return the hub ids of a dataset that changed its owner."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


def _task(
    name: str,
    title: str,
    layout: Layout,
    scorers: Mapping[str, Scorer],
    *,
    least_tokens: int = 256,
    aggregate: Callable[[Sequence[Scored]], Mapping[str, float]] | None = None,
) -> Task:
    return Task(
        name=name,
        title=title,
        load=partial(load, name, layout),
        scorers=scorers,
        aggregate=aggregate,
        coarse_tokens=(least_tokens, 576),
        sources=layout.place.ids,
        columns=layout.columns,
    )


DOCUMENTS: Final = (
    _task(
        "docvqa",
        "DocVQA: scanned pages (5,349, ANLS)",
        Layout(
            HubTable(_moved("DocVQA"), config="DocVQA", split="validation"),
            answers="answers",
            id="questionId",
            kind="question_types",
            instruction=SHORT,
            published={"answer": "answers", "index": "questionId", "image_path": "image"},
            folders=("documents", "spdocvqa_images"),
        ),
        {"faithful": anls.faithful, "clean": anls.clean, "vlmevalkit": anls.kit},
    ),
    _task(
        "infovqa",
        "InfographicVQA: infographics (2,801, ANLS)",
        Layout(
            HubTable(_moved("DocVQA"), config="InfographicVQA", split="validation"),
            answers="answers",
            id="questionId",
            kind="answer_type",
            instruction=SHORT,
            published={"answer": "answers", "index": "questionId", "image_local_name": "image", "image_path": "image"},
            folders=("infographicsvqa_images", "images"),
        ),
        {"faithful": anls.faithful, "clean": anls.clean, "vlmevalkit": anls.kit},
    ),
    _task(
        "chartqa",
        "ChartQA: charts, written and generated questions (2,500, relaxed accuracy)",
        Layout(
            HubTable(_moved("ChartQA")),
            answers="answer",
            several=False,
            kind="type",
            instruction="Answer the question with a single word.",
            published={
                "query": "question",
                "label": "answer",
                "imgname": "image",
                "split": "type",
                "image_path": "image",
            },
            folders=("png",),
        ),
        {"faithful": chartqa.faithful, "clean": chartqa.clean, "vlmevalkit": chartqa.kit},
    ),
    _task(
        "textvqa",
        "TextVQA: text in photographs (5,000, soft accuracy of ten answers)",
        Layout(
            HubTable(_moved("textvqa"), split="validation"),
            answers="answers",
            id="question_id",
            written=str.capitalize,
            instruction=SHORT,
            published={"answer": "answers", "index": "question_id", "image_id": "image", "image_path": "image"},
            folders=("train_images", "train_val_images", "val_images", "test_images"),
        ),
        {"faithful": vqa.faithful, "clean": vqa.clean, "vlmevalkit": vqa.kit},
    ),
    _task(
        "ocrbench",
        "OCRBench: text, scenes, documents, receipts, formulas (1,000 points)",
        Layout(
            HubTable(("echo840/OCRBench",)),
            answers="answer",
            kind="question_type",
            meta="dataset",
            published={
                "answers": "answer",
                "type": "question_type",
                "category": "question_type",
                "dataset_name": "dataset",
                "image_path": "image",
            },
            folders=("OCRBench_Images",),
        ),
        {"faithful": ocrbench.faithful, "clean": ocrbench.clean, "vlmevalkit": ocrbench.kit},
        least_tokens=128,
        aggregate=points,
    ),
)
