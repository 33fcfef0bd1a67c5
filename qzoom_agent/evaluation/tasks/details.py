"""Details that one look at an image does not show: TreeBench, O3-Bench, VisualNeedle, VisualProbe and ZoomBench.

TreeBench (Wang et al. 2025, TreeVGR): ten subtasks of perception and reasoning in dense photographs, with the boxes of
the objects that the answer depends on. Prompt, without its system message, and scorer: TreeVGR,
inference_treebench.py. O3-Bench (Li et al. 2025, arXiv 2512.18745): composite charts and maps; each answer needs
several regions. VisualNeedle (Chen et al. 2026, arXiv 2605.26380): one box of about 0.1 % of the image.

VisualProbe (Lai et al. 2025, Mini-o3) has three levels; its published figures are the mean of 32 runs, in each of which
a language model compares what stands in the first `<answer>` with the solution (Mini-o3,
verl/utils/reward_score/general_qa_tool.py). ZoomBench (Wei et al. 2026, Zooming without Zooming) has two views with
the same ids, so that their difference, the zooming gap, is a paired one: the whole image, and the gold crop. Its
published figures are of equal answers and, for all others, of a language model's verdict (Zooming-without-Zooming,
mm-eval/judge_qwenlm.py). Both are scored by rule here; a judge can be asked beside.
"""

import re
from functools import partial
from typing import Final

from qzoom_agent.data.columns import items, texts
from qzoom_agent.data.options import inline_options
from qzoom_agent.data.rows import HubTable, Row
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark, boxes_of, one_letter, options_of

_TREEBENCH_INSTRUCTION: Final = (
    "Select the best answer to the above multiple-choice question based on the image. After the reasoning process, "
    "respond with only the letter of the correct option between <answer> and </answer>."
)
_BARE_LETTER: Final = re.compile(r"^[ \t]*([A-H])(?=[ \t])", re.MULTILINE)
_PLACEHOLDER: Final = "<image>"


def _ask_treebench(row: Row, answers: tuple[str, ...]) -> Asked:
    # "A. red" a line, or "A red". The columns A, B, ... repeat the options, but not for every question.
    shown = row["multi-choice options"].strip()
    repeated = tuple(str(row[letter]) for letter in "ABCDEFGH" if row.get(letter))
    return Asked(
        f"{row['question'].strip()} Options:\n{shown}\n{_TREEBENCH_INSTRUCTION}",
        options=max(inline_options(_BARE_LETTER.sub(r"\1.", shown)), repeated, key=len),
        boxes=boxes_of(items(row["target_instances"]), f"Question {row['index']} of TreeBench"),
    )


def _ask_o3(row: Row, answers: tuple[str, ...]) -> Asked:
    shown = row["options"].replace("\\n", "\n").strip()
    corners = [row["layout_infos"][str(at)]["bbox"] for at in row["target_layouts"]]
    return Asked(
        f"{row['question'].strip()}\n{shown}", options=inline_options(shown), boxes=boxes_of(corners, "The question")
    )


def _ask_needle(row: Row, answers: tuple[str, ...]) -> Asked:
    return Asked(row["question"].strip(), boxes=boxes_of([row["bbox"]], f"Question {row['id']} of VisualNeedle"))


def _probe_picture(row: Row, *, repository: str) -> object:
    """Return the paths of a question, which lead from the folder above that of the table."""
    return [at.removeprefix(f"{repository}/") if isinstance(at, str) else at for at in items(row["images"])]


def _ask_zoom(row: Row, answers: tuple[str, ...]) -> Asked:
    question = row["query"].replace(_PLACEHOLDER, "").strip()
    letters = tuple(answer.strip("(). ").upper() for answer in answers)
    options = options_of(letters, inline_options(question) if row["question_type"] == "mcq" else ())
    return Asked(question, letters if options else answers, options)


def _ask_zoom_whole(row: Row, answers: tuple[str, ...]) -> Asked:
    boxes = boxes_of([items(row["bbox"])], f"Question {row['id']} of ZoomBench")
    return _ask_zoom(row, answers)._replace(boxes=boxes)


TREEBENCH: Final = Benchmark(
    name="treebench",
    title="TreeBench: ten subtasks with target boxes in dense photographs (405, multiple choice)",
    place=HubTable(("HaochenWang/TreeBench",), file="TreeBench.tsv"),
    columns=("index", "image", "question", "multi-choice options", "answer", "category", "target_instances"),
    id="index",
    kind="category",
    ask=_ask_treebench,
    answers=one_letter,
    scorers={"faithful": choice.treebench, "clean": choice.clean},
)
O3_BENCH: Final = Benchmark(
    name="o3-bench",
    title="O3-Bench: several regions of charts and maps, boxes known (345, multiple choice)",
    place=HubTable(("m-Just/O3-Bench",), file="test/metadata.jsonl"),
    columns=("image", "subset", "question", "options", "answer", "target_layouts", "layout_infos"),
    published={"file_name": "image"},
    kind="subset",
    ask=_ask_o3,
    answers=one_letter,
    scorers={"clean": choice.clean},
)
VISUAL_NEEDLE: Final = Benchmark(
    name="visualneedle",
    title="VisualNeedle: one tiny region of a dense scene, box known (300, open)",
    place=HubTable((), file="visualneedle_300en.jsonl"),
    columns=("id", "category", "question", "answer", "image_path", "bbox"),
    id="id",
    kind="category",
    image="image_path",
    ask=_ask_needle,
    scorers={"rule": rule},
)
VISUAL_PROBE: Final = tuple(
    Benchmark(
        name=f"visualprobe-{level.lower()}",
        title=f"VisualProbe {level.lower()}: details of large photographs ({n}, open)",
        place=HubTable((f"Mini-o3/VisualProbe_{level}",), file="val.json"),
        columns=("problem", "solution", "images", "doc_id"),
        id="doc_id",
        kinds={"all": level.lower()},
        picture=partial(_probe_picture, repository=f"VisualProbe_{level}"),
        ask=lambda row, answers: Asked(row["problem"].replace(_PLACEHOLDER, "").strip()),
        answer="solution",
        answers=texts,
        scorers={"rule": rule},
    )
    for level, n in (("Easy", 141), ("Medium", 268), ("Hard", 106))
)
ZOOM_BENCH: Final = tuple(
    Benchmark(
        name=name,
        title=f"ZoomBench, {title} (845, choices and open)",
        place=HubTable(("inclusionAI/ZoomBench",)),
        columns=("image", "crop_image", "id", "query", "response", "question_type", "bbox"),
        id="id",
        id_prefix="zoombench",
        kind="question_type",
        image=image,
        shared_image="image",
        ask=ask,
        answer="response",
        scorers={"rule": rule},
    )
    for name, title, image, ask in (
        ("zoombench", "the whole image", "image", _ask_zoom_whole),
        ("zoombench-crop", "the gold crop", "crop_image", _ask_zoom),
    )
)
