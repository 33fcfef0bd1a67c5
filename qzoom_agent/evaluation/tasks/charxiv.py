"""CharXiv: charts of papers, with four descriptive questions and one of reasoning (Wang et al. 2024, 2406.18521).

The published figures are verdicts of a language model with a rubric for each question (princeton-nlp/CharXiv,
src/evaluate.py). Here a rule compares short answers, and a judge can be asked beside. A descriptive question is a
number in the table, 1 to 19; the questions (charxiv.yaml) are the authors', the instructions that follow say theirs in
fewer words.

lmms-eval (tasks/charxiv/utils.py) asks other questions: of the four of a chart it asks one, four times, and it takes
the column `reasoning_q_source` (who wrote the question) for the kind of answer, which is `reasoning_a_type`.
"""

from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Final

from pydantic import BaseModel, TypeAdapter

from qzoom_agent.data.rows import ComputedRows, HubTable, Row, Rows, RowSamples
from qzoom_agent.data.samples import TaskSource
from qzoom_agent.evaluation.scorers.open_answer import rule
from qzoom_agent.evaluation.tasks.public import Asked, Benchmark
from qzoom_agent.files import read_yaml

PLACE: Final = HubTable(("princeton-nlp/CharXiv",), split="validation")
_EACH: Final = 4
"""Descriptive questions of a chart."""


class _Wording(BaseModel):
    """A descriptive question, or the instruction for a kind of answer."""

    kind: str
    instruction: str = ""
    question: str = ""
    whole_figure: bool = False


_WORDINGS: Final = TypeAdapter(dict[str, dict[int, _Wording]]).validate_python(
    read_yaml((files("qzoom_agent.evaluation.tasks") / "charxiv.yaml").read_text(encoding="utf-8"))
)
_DESCRIPTIVE, _REASONING = _WORDINGS["descriptive"], _WORDINGS["reasoning"]


def _ask_reasoning(row: Row, answers: tuple[str, ...]) -> Asked:
    instruction = _REASONING[int(row["reasoning_a_type"])].instruction or _number_instruction(*answers)
    return Asked(f"{row['reasoning_q'].strip()}\n{instruction}", id=Path(row["figure_path"]).stem)


def _number_instruction(answer: str = "") -> str:
    """Return the precision that is asked for, which only the answer tells."""
    _, point, decimals = answer.partition(".")
    if point:
        return f"Answer with a number with {len(decimals)} decimal places."
    return "Answer with an exact integer." if answer else "Answer with a number."


def _ask_descriptive(row: Row, answers: tuple[str, ...]) -> Asked:
    asked = _DESCRIPTIVE[int(row["number"])]
    where = "" if asked.whole_figure else _where(row)
    return Asked(f"{where}{asked.question}\n{asked.instruction}", id=f"{Path(row['figure_path']).stem}-{row['part']}")


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
    kinds = [_DESCRIPTIVE[int(row[number])].kind for row in charts.only(*numbers) for number in numbers]
    questions = ComputedRows(len(kinds), partial(_question, charts))
    return DESCRIPTIVE.samples(replace(charts, data=questions), source, kinds)


REASONING: Final = Benchmark(
    name="charxiv-reasoning",
    title="CharXiv, reasoning about charts of papers (1,000, open)",
    place=PLACE,
    columns=("image", "figure_path", "reasoning_q", "reasoning_a", "reasoning_a_type"),
    kind="reasoning_a_type",
    kinds={str(number): wording.kind for number, wording in _REASONING.items()},
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
    kinds={str(number): wording.kind for number, wording in _DESCRIPTIVE.items()},
    ask=_ask_descriptive,
    scorers={"rule": rule},
)
CHARXIV: Final = (REASONING.task, replace(DESCRIPTIVE.task, load=load_descriptive))
