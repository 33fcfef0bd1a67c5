"""CharXiv: charts of papers, with four descriptive questions and one of reasoning (Wang et al. 2024, 2406.18521).

The published figures are verdicts of a language model with a rubric for each question (princeton-nlp/CharXiv,
src/evaluate.py). Here a rule compares short answers, and a judge can be asked beside. A descriptive question is a
number in the table, 1 to 19; the questions are the authors', the instructions that follow say theirs in fewer words.

lmms-eval (tasks/charxiv/utils.py) asks other questions: of the four of a chart it asks one, four times, and it takes
the column `reasoning_q_source` (who wrote the question) for the kind of answer, which is `reasoning_a_type`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from qzoom_agent.data.rows import ComputedRows, HubTable, Row, Rows, RowSamples
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark

PLACE: Final = HubTable(("princeton-nlp/CharXiv",), split="validation")
_EACH: Final = 4
"""Descriptive questions of a chart."""
_KINDS: Final = {"1": "Text-in-Chart", "2": "Text-in-General", "3": "Number-in-Chart", "4": "Number-in-General"}
_REASONING: Final = {
    1: "Answer with text that is written in the chart, in full names unless the question says otherwise; separate "
    "several terms with commas.",
    2: "Answer with one of the options or as the question says; if it has neither, with a short phrase.",
    3: "Answer with a number that is written in the chart, even if it is an approximate value.",
}

_GROUPS: Final = {
    str(number): group
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


def _ask_reasoning(row: Row, answers: tuple[str, ...]) -> Asked:
    instruction = _REASONING.get(int(row["reasoning_a_type"])) or _number_instruction(*answers)
    return Asked(f"{row['reasoning_q'].strip()}\n{instruction}", id=Path(row["figure_path"]).stem)


def _number_instruction(answer: str = "") -> str:
    """Return the precision that is asked for, which only the answer tells."""
    _, point, decimals = answer.partition(".")
    if point:
        return f"Answer with a number with {len(decimals)} decimal places."
    return "Answer with an exact integer." if answer else "Answer with a number."


def _ask_descriptive(row: Row, answers: tuple[str, ...]) -> Asked:
    number = int(row["number"])
    asked, instruction = _DESCRIPTIVE[number]
    where = "" if number in _WHOLE else _where(row)
    return Asked(f"{where}{asked}\n{instruction}", id=f"{Path(row['figure_path']).stem}-{row['part']}")


def _where(row: Row) -> str:
    if row["subplot_loc"]:
        return f"For {row['subplot_loc']}, "
    return (
        f"For the subplot at row {int(row['subplot_row'])} and column {int(row['subplot_col'])}, "
        if row["subplot_row"]
        else "For the current plot, "
    )


def _question(charts: Rows, index: int) -> Row:
    """Return the row of one of the four descriptive questions about each chart."""
    chart, part = charts[index // _EACH], index % _EACH + 1
    return {**chart, "part": part, "number": chart[f"descriptive_q{part}"], "answer": chart[f"descriptive_a{part}"]}


def load_descriptive(source: TaskSource) -> RowSamples:
    """Return the samples of the descriptive questions, four a chart; a kind is the group of the question."""
    charts = DESCRIPTIVE.rows(source)
    numbers = [f"descriptive_q{part}" for part in range(1, _EACH + 1)]
    kinds = [_GROUPS[str(int(row[number]))] for row in charts.only(*numbers) for number in numbers]
    questions = ComputedRows(len(kinds), partial(_question, charts))
    return DESCRIPTIVE.samples(replace(charts, data=questions), source, kinds)


REASONING: Final = Benchmark(
    name="charxiv-reasoning",
    title="CharXiv, reasoning about charts of papers (1,000, open)",
    place=PLACE,
    columns=("image", "figure_path", "reasoning_q", "reasoning_a", "reasoning_a_type"),
    kind="reasoning_a_type",
    kinds=_KINDS,
    ask=_ask_reasoning,
    answer="reasoning_a",
    scorers={"rule": rule},
)
DESCRIPTIVE: Final = Benchmark(
    name="charxiv-descriptive",
    title="CharXiv, descriptions of charts of papers (4,000 = 1,000 x 4, open)",
    place=PLACE,
    columns=(
        *("image", "figure_path", "subplot_row", "subplot_col", "subplot_loc"),
        *(f"descriptive_{cell}{part}" for cell in "qa" for part in range(1, _EACH + 1)),
    ),
    kind="number",
    kinds=_GROUPS,
    ask=_ask_descriptive,
    scorers={"rule": rule},
)
CHARXIV: Final = (REASONING.task, replace(DESCRIPTIVE.task, load=load_descriptive))
