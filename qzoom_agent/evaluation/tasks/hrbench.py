"""HR-Bench 4K and 8K: questions about one detail or several across a very large image (Wang et al. 2024, 2408.15556).

200 questions, each asked four times with its options rotated, so 800 rows that are not 800 independent questions: rows
`index` // 4 are one cluster. The published figure is the mean over the four rotations of the accuracy within each; it
is not the share of questions that are right in all four, which is given beside it as `strict circular`. Prompt and
figure: lmms-eval, tasks/hrbench/utils.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Final

from qzoom_agent.data.image_column import picture
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.tasks.task import Scored, Task

HUB: Final = "DreamMr/HR-Bench"
COLUMNS: Final = ("index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image")
ROTATIONS: Final = 4
INSTRUCTION: Final = "Answer the option letter directly."
_KINDS: Final = ("single", "cross")


def load(name: str, split: str, source: TaskSource) -> RowSamples:
    """Return the samples of one of the two splits."""
    rows = open_rows(source, HubTable((HUB,), config="hrbench_version_split", split=split), COLUMNS)

    def make(row: Row, index: int) -> Sample:
        number = int(row["index"])
        options = tuple(str(row[letter]) for letter in "ABCD")
        shown = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        answer = str(row["answer"]).strip().upper()
        return Sample(
            id=f"{name}-{number}",
            task=name,
            kind=row["category"],
            image=picture(row["image"], rows.folder),
            question=f"{row['question'].strip()}\n{shown}\n{INSTRUCTION}",
            answer=answer,
            answers=(answer,),
            options=options,
            cluster=f"{name}-{number // ROTATIONS}",
            meta={"cycle": str(row["cycle_category"]), "question": number // ROTATIONS},
        )

    return RowSamples(rows, make, [row["category"] for row in rows.only("category")])


def aggregate(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return `single`, `cross` and `average` as published; `strict circular` and `consistent` beside.

    `strict circular` is the share of the questions that are right in every rotation that was asked, `consistent` the
    share that are right in all or wrong in all.
    """
    figures = {}
    for kind in (*_KINDS, "average"):
        cycles: dict[object, list[float]] = defaultdict(list)
        for one in scored:
            if kind in (one.kind, "average"):
                cycles[one.meta["cycle"]].append(one.value)
        if cycles:
            figures[kind] = fmean(map(fmean, cycles.values()))
    questions: dict[object, list[float]] = defaultdict(list)
    for one in scored:
        questions[one.meta["question"]].append(one.value)
    if questions:
        figures["strict circular"] = fmean(min(values) == 1 for values in questions.values())
        figures["consistent"] = fmean(min(values) == max(values) for values in questions.values())
    return figures


HR_BENCH: Final = tuple(
    Task(
        name=f"hrbench-{size}",
        title=f"HR-Bench {size.upper()}: one detail or several in {size.upper()} images (800 = 200 x 4 rotations)",
        load=partial(load, f"hrbench-{size}", f"hrbench_{size}"),
        scorers={"faithful": choice.hr_bench, "clean": choice.clean, "vlmevalkit": choice.kit},
        aggregate=aggregate,
        coarse_tokens=(512, 4096),
        sources=(HUB,),
        columns=COLUMNS,
    )
    for size in ("4k", "8k")
)
