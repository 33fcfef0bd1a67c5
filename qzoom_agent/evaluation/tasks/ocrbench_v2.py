"""OCRBench v2: thirty types of questions about text, English and Chinese (Fu et al. 2024, arXiv 2501.00321).

`ocrbench-v2` has the questions of the types that a rule scores (`scorers/ocrbench_v2.py`). `ocrbench-v2-pages` has the
others: full pages, tables, charts, documents, translations and long handwritten answers. The public code measures them
with BLEU, METEOR and tree edit distances; here only an equal text is right, or what a judge accepts. The published
overall figures average both, and so are not given; the groups that are given are complete.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Final

from pydantic import JsonValue

from qzoom_agent.data.columns import items, texts, written
from qzoom_agent.data.options import inline_options
from qzoom_agent.data.rows import HubTable, Row, RowSamples
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import ocrbench_v2
from qzoom_agent.evaluation.scorers.ocrbench_v2 import CHOICE, FIELDS, GROUNDING, HANDWRITTEN, POSITION, RULES, SPOTTING
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark, grouped, options_of
from qzoom_agent.evaluation.tasks.task import Scored

_LONG_ANSWER: Final = "简答"
"""Stands in the handwritten questions whose answer is long."""
_GROUPS: Final = {
    "text detection": (GROUNDING, POSITION),
    "text spotting": (SPOTTING,),
    "relationship extraction": ("key information extraction en", "key information mapping en"),
    "mathematical calculation": ("math QA en", "text counting en"),
    "visual text understanding": ("document classification en", "cognition VQA en", "diagram QA en"),
    "knowledge reasoning": ("reasoning VQA en", "science QA en", "APP agent en", "ASCII art classification en"),
    "visual text understanding, Chinese": ("cognition VQA cn",),
}
"""The published groups all of whose types are scored here."""


def load(benchmark: Benchmark, by_rule: bool, source: TaskSource) -> RowSamples:
    """Return the samples of the types that a rule scores, or of the others."""
    rows = benchmark.rows(source)
    wanted = [at for at, row in enumerate(rows.only("type", "question")) if _has_rule(row) is by_rule]
    return benchmark.samples(rows.select(wanted), source)


def _ask(row: Row, answers: tuple[str, ...]) -> Asked:
    question = row["question"].strip()
    answers, gold = _right(row)
    options = inline_options(question) if row["eval"] == CHOICE else ()
    return Asked(
        question,
        answers,
        options_of(answers, options),
        meta={"eval": str(row["eval"]), **({"gold": gold} if gold is not None else {})},
    )


def _has_rule(row: Row) -> bool:
    return row["type"] in RULES and not (row["type"] == HANDWRITTEN and _LONG_ANSWER in row["question"])


def _right(row: Row) -> tuple[tuple[str, ...], JsonValue]:
    """Return the accepted answers, and what the rule of the type compares with, if that is something else."""
    kind, answers = row["type"], texts(row["answers"])
    if kind in FIELDS:
        fields = _fields(answers[0])
        first = {name: values[0] for name, values in fields.items()}
        return (json.dumps(first, ensure_ascii=False),), {name: [*values] for name, values in fields.items()}
    if kind == GROUNDING:
        box = [int(number) for number in answers]
        return (str(tuple(box)),), list(box)
    if kind == POSITION:
        box = [int(number) for number in items(row["bbox"])]
        reply = json.dumps({"answer": answers[0], "bbox": box}, ensure_ascii=False)
        return (reply,), {"answers": list(answers), "bbox": list(box)}
    if kind == SPOTTING:
        spotted = [
            [min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]), text]
            for points, text in zip(items(row["bbox_list"]), texts(row["content"]), strict=True)
        ]
        return (str([tuple(one) for one in spotted]),), list(spotted)
    return answers, None


def _fields(cell: str) -> dict[str, list[str]]:
    """Return the accepted values of every field, which the table writes as JSON or as a Python dict."""
    data = written(cell)
    if not isinstance(data, dict):
        raise ConfigError(f"the answer holds no fields: {cell[:80]!r}")
    listed = {name: value if isinstance(value, list) else [value] for name, value in data.items()}
    return {name: [str(value) for value in values] for name, values in listed.items() if values != [None]}


def figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return the mean of every published group all of whose types are scored here."""
    values = grouped(scored, lambda one: one.kind)
    groups = {name: [value for kind in kinds for value in values.get(kind, ())] for name, kinds in _GROUPS.items()}
    return {name: fmean(found) for name, found in groups.items() if found}


RULED: Final = Benchmark(
    name="ocrbench-v2",
    title="OCRBench v2: the types that a rule scores (5,800 English questions and the Chinese ones)",
    place=HubTable(("ling99/OCRBench_v2",)),
    columns=("id", "question", "type", "answers", "image", "eval", "bbox", "bbox_list", "content"),
    id="id",
    kind="type",
    ask=_ask,
    answer="answers",
    answers=texts,
    scorers={"faithful": ocrbench_v2.faithful, "clean": ocrbench_v2.clean},
    aggregate=figures,
    coarse_tokens=(128, 576),
)
PAGES: Final = replace(
    RULED,
    name="ocrbench-v2-pages",
    title="OCRBench v2: pages, tables, charts, documents, translations (1,600 English, for a judge)",
    scorers={"rule": rule},
    aggregate=None,
)
OCRBENCH_V2: Final = (
    replace(RULED.task, load=partial(load, RULED, True)),
    replace(PAGES.task, load=partial(load, PAGES, False)),
)
