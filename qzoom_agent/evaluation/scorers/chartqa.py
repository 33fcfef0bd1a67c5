"""ChartQA's relaxed accuracy: numbers may be off by 5 % of the right one, other answers must be equal.

`faithful` is the public rule (lmms-eval, tasks/chartqa/utils.py, relaxed_correctness). `clean` is ours where that is
wrong; figures of the two are not comparable. What differs:

| prediction, gold | faithful | clean | why |
|---|---|---|---|
| 0.0, 0 | wrong | right | a gold of 0 counts as no number |
| 5%, 5 | wrong | right | the per cent sign divides by 100 on its own side only |
| 1,000, 1000 | wrong | right | grouped thousands are no number |
| yes., yes | wrong | right | punctuation counts |
| 2019, 2010 | right | wrong | years are within 5 % of one another |
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.scorers.match import exact_match, number
from qzoom_agent.evaluation.tasks.task import Score

TOLERANCE: Final = Decimal("0.05")
_YEAR: Final = re.compile(r"1[5-9]\d\d|20\d\d")


def faithful(text: str | None, sample: Sample) -> Score:
    """Score the whole reply by the public rule."""
    if text is None:
        return Score(0.0, None)
    said, meant = _float(text), _float(sample.answer)
    if said is not None and meant:
        return Score(float(abs(said - meant) / abs(meant) <= float(TOLERANCE)), text)
    return Score(float(text.lower() == sample.answer.lower()), text)


def clean(text: str | None, sample: Sample) -> Score:
    """Score the final answer: a year must be equal, another number within 5 %, anything else equal by `match`.

    Where only one of the two has a per cent sign, it may be a unit (5% is 5) or a hundredth (5% is 0.05). A right
    answer of four digits from 1500 to 2099 is a year, which is strict where a chart counts that many of something.
    """
    said = final_answer(text) if text else None
    if said is None:
        return Score(0.0, None)
    value, meant = number(said), number(sample.answer)
    if value is None or meant is None or _YEAR.fullmatch(sample.answer.strip()):
        return Score(float(exact_match(said, sample.answer)), said)
    with localcontext() as context:
        context.clear_traps()  # a reply of a million digits is a number, and no error
        readings = [(value, meant)]
        if _per_cent(said) and not _per_cent(sample.answer):
            readings.append((value / 100, meant))
        if _per_cent(sample.answer) and not _per_cent(said):
            readings.append((value, meant / 100))
        return Score(float(any(abs(one - other) <= TOLERANCE * abs(other) for one, other in readings)), said)


def _per_cent(text: str) -> bool:
    return text.strip().removesuffix(".").endswith("%")


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
