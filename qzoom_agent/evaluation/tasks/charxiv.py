"""CharXiv: charts of papers, with four descriptive questions and one of reasoning (Wang et al. 2024, 2406.18521).

The published figures are verdicts of a language model with a rubric for each question (princeton-nlp/CharXiv,
src/evaluate.py). Here a rule compares short answers, and a judge can be asked beside. A descriptive question is a
number in the table, 1 to 19; the questions are the authors', the instructions that follow say theirs in fewer words.

lmms-eval (tasks/charxiv/utils.py) asks other questions: of the four of a chart it asks one, four times, and it takes
the column `reasoning_q_source` (who wrote the question) for the kind of answer, which is `reasoning_a_type`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from qzoom_agent.data.image_column import seen
from qzoom_agent.data.rows import HubTable, Row, RowSamples, open_rows
from qzoom_agent.data.samples import Sample, TaskSource
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.task import Task

PLACE: Final = HubTable(("princeton-nlp/CharXiv",), split="validation")
REASONING_COLUMNS: Final = ("image", "figure_path", "reasoning_q", "reasoning_a", "reasoning_a_type")
_EACH: Final = 4
"""Descriptive questions of a chart."""
_NUMBERS: Final = tuple(f"descriptive_q{number}" for number in range(1, _EACH + 1))
_ANSWERS: Final = tuple(f"descriptive_a{number}" for number in range(1, _EACH + 1))
DESCRIPTIVE_COLUMNS: Final = (
    *("image", "figure_path", "subplot_row", "subplot_col", "subplot_loc"),
    *_NUMBERS,
    *_ANSWERS,
)

_KINDS: Final = {1: "Text-in-Chart", 2: "Text-in-General", 3: "Number-in-Chart", 4: "Number-in-General"}
_REASONING: Final = {
    1: "Answer with text that is written in the chart, in full names unless the question says otherwise; separate "
    "several terms with commas.",
    2: "Answer with one of the options or as the question says; if it has neither, with a short phrase.",
    3: "Answer with a number that is written in the chart, even if it is an approximate value.",
}

_GROUPS: Final = {
    number: group
    for group, numbers in {
        "Information Extraction": range(1, 8),
        "Enumeration": (8, 9, 13, 14, 15),
        "Pattern Recognition": (11, 16, 18),
        "Counting": (10, 12, 19),
        "Compositionality": (17,),
    }.items()
    for number in numbers
}
_X: Final = "If there are two x-axes, take the one at the bottom."
_Y: Final = "If there are two y-axes, take the one on the left."
_TICK: Final = "Answer with the tick as it is written, without units or scales that stand apart from it."
_STEP: Final = "Answer Not Applicable if the ticks are not numbers or not evenly spaced."
_LINES: Final = "Grid lines, tick marks and auxiliary lines do not count. Answer Not Applicable if it is no line plot."
_LEGEND: Final = "Answer Not Applicable if no legend belongs to this plot."
_BAR: Final = "Leave out the percentage sign. Answer Not Applicable if no colorbar with ticks belongs to this plot."
_WHOLE: Final = (18, 19)
"""Questions about the whole figure."""
_DESCRIPTIVE: Final = {
    1: ("what is its title?", "Answer Not Applicable if no title is written or it is only a letter."),
    2: ("what is the label of the x-axis?", f"{_X} Answer Not Applicable if there is no label."),
    3: ("what is the label of the y-axis?", f"{_Y} Answer Not Applicable if there is no label."),
    4: ("what is the leftmost labeled tick on the x-axis?", f"{_X} {_TICK}"),
    5: ("what is the rightmost labeled tick on the x-axis?", f"{_X} {_TICK}"),
    6: ("what is the spatially lowest labeled tick on the y-axis?", f"{_Y} {_TICK}"),
    7: ("what is the spatially highest labeled tick on the y-axis?", f"{_Y} {_TICK}"),
    8: ("what is difference between consecutive numerical tick values on the x-axis?", f"{_X} {_STEP}"),
    9: ("what is difference between consecutive numerical tick values on the y-axis?", f"{_Y} {_STEP}"),
    10: ("how many lines are there?", _LINES),
    11: ("do any lines intersect?", f"Answer Yes or No. {_LINES}"),
    12: ("how many discrete labels are there in the legend?", _LEGEND),
    13: (
        "what are the names of the labels in the legend?",
        f"List them from top to bottom, then from left to right, separated by commas. {_LEGEND}",
    ),
    14: (
        "what is the difference between the maximum and minimum values of the tick labels on the continuous legend "
        "(i.e., colorbar)?",
        _BAR,
    ),
    15: ("what is the maximum value of the tick labels on the continuous legend (i.e., colorbar)?", _BAR),
    16: (
        "what is the general trend of data from left to right?",
        'Answer in a few words, such as "increases" or "increases then stabilizes".',
    ),
    17: ("what is the total number of explicitly labeled ticks across all axes?", "Shared axes count as well."),
    18: ("What is the layout of the subplots?", 'Answer "n by m": n rows, m columns. One plot alone is "1 by 1".'),
    19: ("What is the number of subplots?", 'One plot alone is "1".'),
}


def load_reasoning(source: TaskSource) -> RowSamples:
    """Return the samples of the reasoning questions; a kind is what the answer is."""
    rows = open_rows(source, PLACE, REASONING_COLUMNS)

    def make(row: Row, index: int) -> Sample:
        kind, answer = int(row["reasoning_a_type"]), source.answer(row["reasoning_a"])
        instruction = _REASONING.get(kind) or _number_instruction(answer)
        return _sample(
            row,
            rows.folder,
            source,
            task="charxiv-reasoning",
            kind=_KINDS[kind],
            question=f"{row['reasoning_q'].strip()}\n{instruction}",
            answer=answer,
        )

    return RowSamples(rows, make, [_KINDS[int(row["reasoning_a_type"])] for row in rows.only("reasoning_a_type")])


def load_descriptive(source: TaskSource) -> RowSamples:
    """Return the samples of the descriptive questions, four a chart; a kind is the group of the question."""
    charts = open_rows(source, PLACE, DESCRIPTIVE_COLUMNS)
    rows = charts.select([index // _EACH for index in range(_EACH * len(charts))])

    def make(row: Row, index: int) -> Sample:
        at = index % _EACH
        number, answer = int(row[_NUMBERS[at]]), source.answer(row[_ANSWERS[at]])
        asked, instruction = _DESCRIPTIVE[number]
        return _sample(
            row,
            rows.folder,
            source,
            task="charxiv-descriptive",
            part=f"-{at + 1}",
            kind=_GROUPS[number],
            question=f"{'' if number in _WHOLE else _where(row)}{asked}\n{instruction}",
            answer=answer,
        )

    kinds = [_GROUPS[int(row[number])] for row in charts.only(*_NUMBERS) for number in _NUMBERS]
    return RowSamples(rows, make, kinds)


def _where(row: Row) -> str:
    if row["subplot_loc"]:
        return f"For {row['subplot_loc']}, "
    return (
        f"For the subplot at row {int(row['subplot_row'])} and column {int(row['subplot_col'])}, "
        if row["subplot_row"]
        else "For the current plot, "
    )


def _number_instruction(answer: str) -> str:
    """Return the precision that is asked for, which only the answer tells."""
    _, point, decimals = answer.partition(".")
    if point:
        return f"Answer with a number with {len(decimals)} decimal places."
    return "Answer with an exact integer." if answer else "Answer with a number."


def _sample(
    row: Row,
    folder: Path | None,
    source: TaskSource,
    *,
    task: str,
    kind: str,
    question: str,
    answer: str,
    part: str = "",
) -> Sample:
    image, cluster = seen(row["image"], folder, max_pixels=source.max_pixels)
    return Sample(
        id=f"{task}-{Path(row['figure_path']).stem}{part}",
        task=task,
        kind=kind,
        image=image,
        question=question,
        answer=answer,
        answers=(answer,) if answer else (),
        cluster=cluster,
    )


CHARXIV: Final = (
    Task(
        name="charxiv-reasoning",
        title="CharXiv, reasoning about charts of papers (1,000, open)",
        load=load_reasoning,
        scorers={"rule": rule},
        sources=PLACE.ids,
        columns=REASONING_COLUMNS,
    ),
    Task(
        name="charxiv-descriptive",
        title="CharXiv, descriptions of charts of papers (4,000 = 1,000 x 4, open)",
        load=load_descriptive,
        scorers={"rule": rule},
        sources=PLACE.ids,
        columns=DESCRIPTIVE_COLUMNS,
    ),
)
