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

import re
from decimal import Decimal, localcontext
from typing import Final

from qzoom_agent.data.answers import exact_match, number, written
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, lmms_eval, scorer, vlmevalkit

TOLERANCE: Final = Decimal("0.05")
_YEAR: Final = re.compile(r"1[5-9]\d\d|20\d\d")


@scorer(lmms_eval("tasks/chartqa/utils.py: relaxed_correctness"))
def faithful(text: str, sample: Sample) -> Score:
    """Score the whole reply by the public rule."""
    return Score(float(_relaxed(text, sample.answer)), text)


@scorer(vlmevalkit("vlmeval/dataset/utils/vqa_eval.py: process_line, relaxed_correctness"))
def kit(text: str, sample: Sample) -> Score:
    """Score by the same rule without the white space around the reply."""
    return Score(float(_relaxed(text.strip(), sample.answer)), text)


def _relaxed(text: str, answer: str) -> bool:
    said, meant = _float(text), _float(answer)
    if said is not None and meant:
        return abs(said - meant) / abs(meant) <= float(TOLERANCE)
    return text.lower() == answer.lower()


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Score the final answer: a year must be equal, another number within 5 %, anything else equal by `match`.

    Where only one of the two has a per cent sign, it may be a unit (5% is 5) or a hundredth (5% is 0.05). A right
    answer of four digits from 1500 to 2099 is a year, which is strict where a chart counts that many of something.
    """
    return compared(text, sample, lambda said, golds: float(_close(said, golds[0])))


def _close(said: str, answer: str) -> bool:
    value, meant = number(said), number(answer)
    if value is None or meant is None or _YEAR.fullmatch(answer.strip()):
        return exact_match(said, answer)
    with localcontext() as context:
        context.clear_traps()  # a reply of a million digits is a number, and no error
        readings = [(value, meant)]
        if _per_cent(said) and not _per_cent(answer):
            readings.append((value / 100, meant))
        if _per_cent(answer) and not _per_cent(said):
            readings.append((value, meant / 100))
        return any(abs(one - other) <= TOLERANCE * abs(other) for one, other in readings)


def _per_cent(text: str) -> bool:
    return "%" in written(text)


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
