"""Text in pages, infographics, charts and scenes: DocVQA, InfographicVQA, ChartQA, TextVQA and OCRBench.

Open questions with a list of accepted answers; each task has a measure of its own (see `evaluation/scorers`). Questions
and instructions are those of lmms-eval (tasks/docvqa, infovqa, chartqa, textvqa, ocrbench: *_doc_to_text and the
default post_prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from pydantic import JsonValue

from qzoom_agent.data.image_column import seen
from qzoom_agent.data.questions import SHORT, first_of, instructed, texts
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.scorers import anls, chartqa, ocrbench, vqa
from qzoom_agent.evaluation.tasks.task import Scored, Scorer, Task

OCRBENCH_QUESTIONS: Final = 1000
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

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.id, "question", self.answers, self.kind, self.meta, "image")))


def load(name: str, layout: Layout, source: TaskSource) -> RowSamples:
    """Return the samples of one of these tasks."""
    rows = open_rows(source, layout.place, layout.columns)

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row["image"], rows.folder)
        answers = texts(row[layout.answers]) if layout.several else (str(row[layout.answers]),)
        meta: dict[str, JsonValue] = {layout.meta: row[layout.meta]} if layout.meta else {}
        return Sample(
            id=f"{name}-{row[layout.id] if layout.id else index}",
            task=name,
            kind=_kind(row, layout),
            image=image,
            question=instructed(layout.written(row["question"]), layout.instruction),
            answer=answers[0] if answers else "",
            answers=answers,
            cluster=cluster,
            meta=meta,
        )

    kinds = [_kind(row, layout) for row in rows.only(layout.kind)] if layout.kind else ["all"] * len(rows)
    return RowSamples(rows, make, kinds)


def _kind(row: Row, layout: Layout) -> str:
    return first_of(row, layout.kind, default="other") if layout.kind else "all"


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
        ),
        {"faithful": vqa.faithful, "clean": vqa.clean, "vlmevalkit": vqa.kit},
    ),
    _task(
        "ocrbench",
        "OCRBench: text, scenes, documents, receipts, formulas (1,000 points)",
        Layout(HubTable(("echo840/OCRBench",)), answers="answer", kind="question_type", meta="dataset"),
        {"faithful": ocrbench.faithful, "clean": ocrbench.clean, "vlmevalkit": ocrbench.kit},
        least_tokens=128,
        aggregate=points,
    ),
)
