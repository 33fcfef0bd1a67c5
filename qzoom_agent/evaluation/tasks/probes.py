"""VisualProbe and ZoomBench: open questions and choices about details that one look at the image does not show.

VisualProbe (Lai et al. 2025, Mini-o3) has three levels; its published figures are the mean of 32 runs, in each of which
a language model compares what stands in the first `<answer>` with the solution (Mini-o3,
verl/utils/reward_score/general_qa_tool.py).

ZoomBench (Wei et al. 2026, Zooming without Zooming) has two views: the whole image (`zoombench`), which has the box
of the gold crop, and that crop (`zoombench-crop`). Both have the same ids, so that the difference, the zooming gap, is
a paired one. Its table says whether a question is a choice ("mcq", 621) or open ("blank", 224) and names no dimension;
the published figures are of equal answers and, for all others, of a language model's verdict
(Zooming-without-Zooming, mm-eval/judge_qwenlm.py).

Both are scored by rule here; a judge can be asked beside.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from qzoom_agent.data.cells import items, texts
from qzoom_agent.data.image_column import key, picture, seen
from qzoom_agent.data.options import inline_options, letter
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.task import Task
from qzoom_agent.geometry import Box

LEVELS: Final = {"easy": 141, "medium": 268, "hard": 106}
PROBE_COLUMNS: Final = ("problem", "solution", "images", "doc_id")
ZOOM_PLACE: Final = HubTable(("inclusionAI/ZoomBench",))
ZOOM_COLUMNS: Final = ("image", "crop_image", "id", "query", "response", "question_type", "bbox")
_PLACEHOLDER: Final = "<image>"


def load_probe(level: str, source: TaskSource) -> RowSamples:
    """Return the samples of one level; `source.path` may be val.json, or the folder that holds it."""
    name, repository = f"visualprobe-{level}", f"VisualProbe_{level.title()}"
    rows = open_rows(source, HubTable((f"Mini-o3/{repository}",), file="val.json"), PROBE_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        # The paths lead from the folder above: "VisualProbe_Easy/data/1.jpg" lies at data/1.jpg beside val.json.
        images = [at.removeprefix(f"{repository}/") if isinstance(at, str) else at for at in items(row["images"])]
        image, cluster = seen(images, rows.folder)
        answers = texts(row["solution"])
        return Sample(
            id=f"{name}-{row['doc_id']}",
            task=name,
            kind=level,
            image=image,
            question=row["problem"].replace(_PLACEHOLDER, "").strip(),
            answer=answers[0],
            answers=answers,
            cluster=cluster,
        )

    return RowSamples(rows, make, [level] * len(rows))


def load_zoom(name: str, view: str, source: TaskSource) -> RowSamples:
    """Return the samples of one view, `image` or `crop_image`."""
    rows = open_rows(source, ZOOM_PLACE, ZOOM_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        question = row["query"].replace(_PLACEHOLDER, "").strip()
        options = inline_options(question) if row["question_type"] == "mcq" else ()
        answer = str(row["response"]).strip()
        chosen = answer.strip("(). ").upper()
        if chosen not in map(letter, range(len(options))):
            options = ()
        answer = chosen if options else answer
        return Sample(
            id=f"zoombench-{row['id']}",
            task=name,
            kind=row["question_type"],
            image=picture(row[view], rows.folder),
            question=question,
            answer=answer,
            boxes=(_box(row),) if view == "image" else (),
            answers=(answer,),
            options=options,
            cluster=key(row["image"], rows.folder),
        )

    return RowSamples(rows, make, [row["question_type"] for row in rows.only("question_type")])


def _box(row: Row) -> Box:
    """Return the box of the gold crop, in pixels of the whole image."""
    try:
        x1, y1, x2, y2 = map(float, items(row["bbox"]))
    except (TypeError, ValueError):
        raise ConfigError(
            f"Question {row['id']} of ZoomBench has a bbox that is no box [x1, y1, x2, y2]: {row['bbox']!r}."
        ) from None
    return Box(x1, y1, x2, y2)


PROBES: Final = (
    *(
        Task(
            name=f"visualprobe-{level}",
            title=f"VisualProbe {level}: details of large photographs ({n}, open)",
            load=partial(load_probe, level),
            scorers={"rule": rule},
            sources=(f"Mini-o3/VisualProbe_{level.title()}",),
            columns=PROBE_COLUMNS,
        )
        for level, n in LEVELS.items()
    ),
    *(
        Task(
            name=name,
            title=f"ZoomBench, {title} (845, choices and open)",
            load=partial(load_zoom, name, view),
            scorers={"rule": rule},
            sources=ZOOM_PLACE.ids,
            columns=ZOOM_COLUMNS,
        )
        for name, view, title in (
            ("zoombench", "image", "the whole image"),
            ("zoombench-crop", "crop_image", "the gold crop"),
        )
    ),
)
