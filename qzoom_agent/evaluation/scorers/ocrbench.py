"""OCRBench: whether the right text stands in the reply; one point a question, a thousand in all.

Case is ignored and a line break is a space; for formulas (`dataset` HME100k) spaces are removed and case counts.
Source: lmms-eval, tasks/ocrbench/utils.py, ocrbench_process_results, after MultimodalOCR, OCRBench/example.py.
"""

from __future__ import annotations

import re
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.tasks.task import Score

FORMULAS: Final = "HME100k"


def faithful(text: str | None, sample: Sample) -> Score:
    """Score the whole reply by the public rule.

    Traps: a reply that lists every text it can think of is right, and so is "2012" where "12" was asked for. lmms-eval
    puts the reply, and not the right text, into lower case for formulas too, so that one with a capital in it is never
    right; the authors' script leaves both as they are.
    """
    if text is None:
        return Score(0.0, None)
    said = _form(text.lower(), sample)
    return Score(float(any(_form(gold, sample) in said for gold in sample.answers)), text)


def clean(text: str | None, sample: Sample) -> Score:
    """Find the right text as whole words, in the first characters of the final answer (twice its length and 16)."""
    said = final_answer(text) if text else None
    if said is None:
        return Score(0.0, None)
    return Score(float(any(_holds(_form(said, sample), _form(gold, sample)) for gold in sample.answers)), said)


def _holds(said: str, gold: str) -> bool:
    said = said[: 2 * len(gold) + 16]
    return bool(gold) and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", said) is not None


def _form(text: str, sample: Sample) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if sample.meta.get("dataset") == FORMULAS else text.lower()
