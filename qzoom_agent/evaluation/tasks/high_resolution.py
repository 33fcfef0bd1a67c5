"""Details of very large images: O3-Bench, VisualNeedle, HRScene and XLRS-Bench-lite.

O3-Bench (Li et al. 2025, arXiv 2512.18745): composite charts and maps; each answer needs several regions, whose boxes
are in the table. VisualNeedle (Chen et al. 2026, arXiv 2605.26380): one box of about 0.1 % of the image. HRScene (Zhang
et al. 2025, arXiv 2504.18406): 25 sources, read from its table of real images; the diagnostic grids are not here.
XLRS-Bench-lite (Wang et al. 2025, arXiv 2503.23771): satellite images of up to 10,000 x 10,000 pixels.

Images above the setting `max_pixels` are refused: XLRS-Bench needs 100,000,000, HRScene's largest 946,000,000.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Final

from qzoom_agent.data.cells import texts
from qzoom_agent.data.image_column import seen
from qzoom_agent.data.options import bare, inline_options, letter
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.errors import ConfigError
from qzoom_agent.evaluation.scorers import choice, high_resolution
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.task import Scored, Task
from qzoom_agent.geometry import Box

O3_PLACE: Final = HubTable(("m-Just/O3-Bench",), file="test/metadata.jsonl")
O3_COLUMNS: Final = ("subset", "question", "options", "answer", "target_layouts", "layout_infos")
NEEDLE_PLACE: Final = HubTable((), file="visualneedle_300en.jsonl")
NEEDLE_COLUMNS: Final = ("id", "category", "question", "answer", "image_path", "bbox")
HR_SCENE_PLACE: Final = HubTable(("Wenliang04/HRScene",), config="realworld_combined", split="testmini")
HR_SCENE_COLUMNS: Final = ("id", "image", "question", "answer")
HR_SCENE_INSTRUCTION: Final = (
    "Give answer in exact this format, <ans>ANSWER</ans>, no redundant words. For example: <ans>A</ans>."
)
XLRS_PLACE: Final = HubTable(("initiacms/XLRS-Bench-lite",), split="train")
XLRS_COLUMNS: Final = ("index", "question", "multi-choice options", "answer", "category", "image")
XLRS_SEVERAL: Final = "Land use classification/Overall Land use classification"
"""The category whose questions may have several right options."""
_ONE: Final = (
    "Select the best answer for the multiple-choice question based on the image. Only respond with the letter "
    "corresponding to the correct answer (A, B, C, D).\nThe answer is:"
)
_SEVERAL: Final = (
    "Select the best answer(s) for the multiple-choice question based on the image. There may be more than one "
    "correct option. Only respond with the letter(s) corresponding to the correct answer(s) (A, B, C, D), with "
    "multiple choices separated by spaces.The answer(s) is(are):"
)


def load_o3(source: TaskSource) -> RowSamples:
    """Return the samples of O3-Bench; `source.path` may be a copy of its repository, or a table of `datasets`."""
    rows = open_rows(source, O3_PLACE, O3_COLUMNS)
    # `datasets` reads the files into a column of images.
    column = "image" if "image" in rows.columns else "file_name"
    rows.need((column,))

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row[column], rows.folder, max_pixels=source.max_pixels)
        shown = row["options"].replace("\\n", "\n").strip()
        return _sample(
            f"o3-bench-{index}",
            "o3-bench",
            row["subset"],
            question=f"{row['question'].strip()}\n{shown}",
            answer=source.answer(row["answer"]).upper(),
            image=image,
            cluster=cluster,
            boxes=tuple(Box(*row["layout_infos"][str(at)]["bbox"]) for at in row["target_layouts"]),
            options=inline_options(shown),
        )

    return RowSamples(rows, make, [row["subset"] for row in rows.only("subset")])


def load_needle(source: TaskSource) -> RowSamples:
    """Return the samples of VisualNeedle; `source.path` is its folder.

    Raises:
        ConfigError: No path is given.
    """
    if source.path is None:
        raise ConfigError(
            f"VisualNeedle is not on the hub. Give the folder that holds {NEEDLE_PLACE.file} and images/ as the path."
        )
    rows = open_rows(source, NEEDLE_PLACE, NEEDLE_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row["image_path"], rows.folder, max_pixels=source.max_pixels)
        return _sample(
            f"visualneedle-{row['id']}",
            "visualneedle",
            row["category"],
            question=row["question"].strip(),
            answer=source.answer(row["answer"]),
            image=image,
            cluster=cluster,
            boxes=(Box(*row["bbox"]),),
        )

    return RowSamples(rows, make, [row["category"] for row in rows.only("category")])


def load_hr_scene(source: TaskSource) -> RowSamples:
    """Return the samples of HRScene's real images, by default of the split `testmini`."""
    rows = open_rows(source, HR_SCENE_PLACE, HR_SCENE_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row["image"], rows.folder, max_pixels=source.max_pixels)
        question = row["question"].strip()
        # The split whose answers are kept back says "None".
        answer = source.answer(None if row["answer"] == "None" else row["answer"])
        options = inline_options(question)
        return _sample(
            f"hrscene-{row['id']}",
            "hrscene",
            "all",
            question=f"{question}\n{HR_SCENE_INSTRUCTION}",
            answer=answer,
            image=image,
            cluster=cluster,
            options=options if answer in map(letter, range(len(options))) else (),
        )

    return RowSamples(rows, make, ["all"] * len(rows))


def load_xlrs(source: TaskSource) -> RowSamples:
    """Return the samples of XLRS-Bench-lite; the 60 questions about changes have two images and cannot be asked."""
    rows = open_rows(source, XLRS_PLACE, XLRS_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        image, cluster = seen(row["image"], rows.folder, max_pixels=source.max_pixels)
        shown = texts(row["multi-choice options"])
        several = row["category"] == XLRS_SEVERAL
        return _sample(
            f"xlrs-lite-{row['index']}",
            "xlrs-lite",
            row["category"],
            question="\n".join(
                (f"{row['question'].strip()} The choices are listed below:", *shown, "", _SEVERAL if several else _ONE)
            ),
            answer="".join(filter(str.isalpha, source.answer(row["answer"]).upper())),
            image=image,
            cluster=cluster,
            options=tuple(map(bare, shown)),
            meta={"several": several},
        )

    return RowSamples(rows, make, [row["category"] for row in rows.only("category")])


def _sample(name: str, task: str, kind: str, *, answer: str, **others: Any) -> Sample:
    return Sample(id=name, task=task, kind=kind, answer=answer, answers=(answer,) if answer else (), **others)


def xlrs_figures(scored: Sequence[Scored]) -> Mapping[str, float]:
    """Return `micro`, `macro` (the mean of the subtasks that were asked) and the mean of every group of subtasks."""
    subtasks: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[float]] = defaultdict(list)
    for one in scored:
        subtasks[one.kind].append(one.value)
        groups[one.kind.split("/")[0]].append(one.value)
    if not scored:
        return {}
    figures = {"micro": fmean(one.value for one in scored), "macro": fmean(map(fmean, subtasks.values()))}
    return figures | {name: fmean(values) for name, values in sorted(groups.items())}


HIGH_RESOLUTION: Final = (
    Task(
        name="o3-bench",
        title="O3-Bench: several regions of charts and maps, boxes known (345, multiple choice)",
        load=load_o3,
        scorers={"clean": choice.clean},
        sources=O3_PLACE.ids,
        columns=O3_COLUMNS,
    ),
    Task(
        name="visualneedle",
        title="VisualNeedle: one tiny region of a dense scene, box known (300, open)",
        load=load_needle,
        scorers={"rule": rule},
        columns=NEEDLE_COLUMNS,
    ),
    Task(
        name="hrscene",
        title="HRScene: 25 sources of high-resolution images (testmini 1,000, validation 750, multiple choice)",
        load=load_hr_scene,
        scorers={"faithful": high_resolution.hr_scene, "clean": rule},
        sources=HR_SCENE_PLACE.ids,
        columns=HR_SCENE_COLUMNS,
    ),
    Task(
        name="xlrs-lite",
        title="XLRS-Bench-lite: satellite images of 100 million pixels (3,080, multiple choice)",
        load=load_xlrs,
        scorers={"faithful": high_resolution.xlrs, "clean": high_resolution.letters},
        aggregate=xlrs_figures,
        sources=XLRS_PLACE.ids,
        columns=XLRS_COLUMNS,
    ),
)
