"""Text in pages, infographics, charts and scenes: DocVQA, InfographicVQA, ChartQA, TextVQA and OCRBench.

Open questions with a list of accepted answers; each task has a measure of its own (see `evaluation/scorers`). Questions
and instructions are those of lmms-eval (tasks/docvqa, infovqa, chartqa, textvqa, ocrbench: *_doc_to_text and the
default post_prompt). Besides the hub's tables, the publishers' own JSON files and VLMEvalKit's tables are read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from qzoom_agent.data.columns import first_of, items
from qzoom_agent.data.questions import SHORT, instructed
from qzoom_agent.data.rows import HubTable, Row
from qzoom_agent.evaluation.scorers import anls, chartqa, ocrbench, vqa
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark, grouped
from qzoom_agent.evaluation.tasks.task import Scored

OCRBENCH_QUESTIONS: Final = 1000
_RECOGNITION: Final = (
    *("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition"),
    *("Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition"),
)
"""Kinds of OCRBench that are one group, "Text Recognition"; the others are groups of their own."""


def _asks(instruction: str, written: Callable[[str], str] = str.strip) -> Callable[[Row, tuple[str, ...]], Asked]:
    """Return the function that asks a row's question as `written`, the form of the public code."""
    return lambda row, answers: Asked(instructed(written(row["question"]), instruction))


def _answers(cell: object) -> tuple[str, ...]:
    """Return the answers in a cell: texts, or records with a field `answer`, as the VQA challenges have them."""
    return tuple(str(one["answer"] if isinstance(one, Mapping) else one) for one in items(cell))


def _chart_answers(cell: object) -> tuple[str, ...]:
    """Return the answer in a cell, or in the list that it holds; a text that reads like a list, "[Yes, No]", is one."""
    return (cell,) if isinstance(cell, str) else _answers(cell)


def _ask_ocrbench(row: Row, answers: tuple[str, ...]) -> Asked:
    formulas = first_of(row, "question_type", default="") == ocrbench.FORMULA_KIND  # all of one dataset
    dataset = row.get("dataset") or (ocrbench.FORMULAS if formulas else None)
    return Asked(row["question"].strip(), meta={"dataset": dataset})


def points(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return OCRBench's points, one a question, in all and by its five groups; `score` is the share of the thousand.

    A part of the task has that part's points only.
    """
    total = sum(one.value for one in scored)
    groups = grouped(scored, lambda one: "Text Recognition" if one.kind in _RECOGNITION else one.kind)
    figures = {"points": total, "score": total / OCRBENCH_QUESTIONS}
    return figures | {f"points, {name}": sum(values) for name, values in groups.items()}


def _moved(name: str) -> tuple[str, ...]:
    """Return the hub ids of a dataset that changed its owner."""
    return f"lmms-lab-encoder/{name}", f"lmms-lab/{name}"


DOCVQA: Final = Benchmark(
    name="docvqa",
    title="DocVQA: scanned pages (5,349, ANLS)",
    place=HubTable(_moved("DocVQA"), config="DocVQA", split="validation"),
    columns=("question", "answers", "image"),
    published={"answer": "answers", "index": "questionId", "image_path": "image"},
    folders=("documents", "spdocvqa_images"),
    id="questionId",
    kind="question_types",
    ask=_asks(SHORT),
    answer="answers",
    answers=_answers,
    scorers={"faithful": anls.faithful, "clean": anls.clean, "vlmevalkit": anls.kit},
    coarse_tokens=(256, 576),
)
INFOVQA: Final = replace(
    DOCVQA,
    name="infovqa",
    title="InfographicVQA: infographics (2,801, ANLS)",
    place=HubTable(_moved("DocVQA"), config="InfographicVQA", split="validation"),
    published={"answer": "answers", "index": "questionId", "image_local_name": "image", "image_path": "image"},
    folders=("infographicsvqa_images", "images"),
    kind="answer_type",
)
CHARTQA: Final = Benchmark(
    name="chartqa",
    title="ChartQA: charts, written and generated questions (2,500, relaxed accuracy)",
    place=HubTable(_moved("ChartQA")),
    columns=("question", "answer", "image"),
    published={
        "query": "question",
        "label": "answer",
        "imgname": "image",
        "split": "type",
        "human_or_machine": "type",
        "image_path": "image",
    },
    folders=("png",),
    kind="type",
    kinds={
        "test_human": "human_test",
        "test_augmented": "augmented_test",
        "human": "human_test",
        "machine": "augmented_test",
    },
    ask=_asks("Answer the question with a single word."),
    answers=_chart_answers,
    scorers={"faithful": chartqa.faithful, "clean": chartqa.clean, "vlmevalkit": chartqa.kit},
    coarse_tokens=(256, 576),
)
TEXTVQA: Final = Benchmark(
    name="textvqa",
    title="TextVQA: text in photographs (5,000, soft accuracy of ten answers)",
    place=HubTable(_moved("textvqa"), split="validation"),
    columns=("question", "answers", "image"),
    published={"answer": "answers", "index": "question_id", "image_id": "image", "image_path": "image"},
    folders=("train_images", "train_val_images", "val_images", "test_images"),
    id="question_id",
    ask=_asks(SHORT, str.capitalize),
    answer="answers",
    answers=_answers,
    scorers={"faithful": vqa.faithful, "clean": vqa.clean, "vlmevalkit": vqa.kit},
    coarse_tokens=(256, 576),
)
OCRBENCH: Final = Benchmark(
    name="ocrbench",
    title="OCRBench: text, scenes, documents, receipts, formulas (1,000 points)",
    place=HubTable(("echo840/OCRBench",)),
    columns=("question", "answer", "image"),
    published={
        "answers": "answer",
        "type": "question_type",
        "category": "question_type",
        "dataset_name": "dataset",
        "image_path": "image",
    },
    folders=("OCRBench_Images",),
    kind="question_type",
    ask=_ask_ocrbench,
    answers=_answers,
    scorers={"faithful": ocrbench.faithful, "clean": ocrbench.clean, "vlmevalkit": ocrbench.kit},
    aggregate=points,
    coarse_tokens=(128, 576),
)
