"""OCRBench: whether the right text stands in the reply; one point a question, a thousand in all.

Case is ignored and a line break is a space; for formulas spaces are removed and case counts. Sources: lmms-eval and
VLMEvalKit, both after the authors' MultimodalOCR, OCRBench/example.py.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Final

from qzoom_agent.data.answers import CJK, FULL_WIDTH
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, lmms_eval, scorer, vlmevalkit

FORMULAS: Final = "HME100k"
"""Dataset of the formulas."""
FORMULA_KIND: Final = "Handwritten Mathematical Expression Recognition"
"""Their `question_type`."""
_IN_WORD: Final = rf"[^\W{CJK}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
"""A letter or digit of a word that spaces part from others; not in East Asian, Thai, Lao, Burmese or Khmer text."""


@scorer(lmms_eval("tasks/ocrbench/utils.py: ocrbench_process_results"))
def faithful(text: str, sample: Sample) -> Score:
    """Score the whole reply by the public rule, which reads full-width signs and letters as plain ones.

    Traps: a reply that lists every text it can think of is right, and so is "2012" where "12" was asked for.
    """
    if sample.meta.get("dataset") == FORMULAS:
        return _contains(text, sample, formula)
    return _contains(text, sample, lambda one: line(one.translate(FULL_WIDTH)))


@scorer(vlmevalkit("vlmeval/dataset/image_vqa.py: OCRBench.evaluate"))
def kit(text: str, sample: Sample) -> Score:
    """Score the whole reply by the same rule, without full-width letters; formulas are known by the question's type."""
    return _contains(text, sample, formula if sample.kind == FORMULA_KIND else line)


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Find the right text as whole words, in the first characters of the final answer (twice its length and 16)."""
    form = formula if sample.meta.get("dataset") == FORMULAS else line
    return compared(text, sample, lambda said, golds: float(any(_holds(form(said), form(gold)) for gold in golds)))


def _contains(text: str, sample: Sample, form: Callable[[str], str]) -> Score:
    said = form(text)
    return Score(float(any(form(gold) in said for gold in sample.answers)), text)


def _holds(said: str, gold: str) -> bool:
    said = said[: 2 * len(gold) + 16]
    places = re.finditer(rf"(?<!{_IN_WORD}){re.escape(gold)}(?!{_IN_WORD})", said) if gold else ()
    # A vowel sign or an accent after the text belongs to its last letter.
    return any(unicodedata.category(said[place.end() : place.end() + 1] or " ")[0] != "M" for place in places)


def formula(text: str) -> str:
    """Return the form in which formulas are compared: without spaces."""
    return text.strip().replace("\n", " ").replace(" ", "")


def line(text: str) -> str:
    """Return the form in which other texts are compared: in lower case, on one line."""
    return text.lower().strip().replace("\n", " ")
