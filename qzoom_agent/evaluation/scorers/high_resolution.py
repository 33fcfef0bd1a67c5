"""Choices of HRScene and XLRS-Bench: their public rules, and ours for questions with several right options."""

import re
from typing import Final

from qzoom_agent.data.options import letters_of
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.tasks.task import PublicRule, Score, lmms_eval, scorer

_TAGGED: Final = re.compile(r"<ans>([A-Z])</ans>")
_BRACKETED: Final = re.compile(r"\(([A-Z])\)")
_BRACKETED_TO_E: Final = re.compile(r"\(([a-eA-E])\)")


@scorer(
    PublicRule(
        package="HRScene",
        version="main",
        commit="23f5cf57c501f37b8c0693502a2f3095f2bbdf4e",
        function="RealWorld/evaluators/utils.py: realworld_parse",
    )
)
def hr_scene(text: str, sample: Sample) -> Score:
    """Score by HRScene's rule: the letter in the first `<ans>`, else the first "(B)", else the whole reply.

    Traps: "B." and "<ans>b</ans>" are wrong, and of "not (A) but (B)" the A counts.
    """
    found = _TAGGED.search(text) or _BRACKETED.search(text)
    said = found[1] if found else text
    return Score(float(said == sample.answer), said if found or said == sample.answer else None)


@scorer(lmms_eval("tasks/xlrs/mcq_utils.py: extract_characters_regex, xlrs_aggregate_results"))
def xlrs(text: str, sample: Sample) -> Score:
    """Score by XLRS-Bench's rule: the letters in brackets, else every letter a to e, are those of the right options.

    Stock phrases are cut before, and a reply without a capital A to E names none.

    Trap: "Blue" names B and E, and "B, the bus" A to E but C and D.
    """
    rest = choice.without(choice.PHRASES, text)
    named = set()
    if re.search("[ABCDE]", rest):
        named = set(map(str.upper, _BRACKETED_TO_E.findall(rest) or re.findall("[a-eA-E]", rest)))
    return _score(named, sample)


@scorer()
def letters(text: str, sample: Sample) -> Score:
    """Return 1 if the final answer names the right options and no other; one right option is read by `choice.clean`."""
    if not sample.meta.get("several"):
        return choice.clean(text, sample)
    said = final_answer(text) or ""
    options = set(letters_of(sample.options))
    bracketed = set(_BRACKETED.findall(said))
    words = [word for word in re.findall(r"\w+", said) if word.lower() not in ("and", "option", "options")]
    plain = all(set(word.upper()) <= options and (len(word) == 1 or word.isupper()) for word in words)
    named = bracketed or (set("".join(words).upper()) if plain else set())
    return _score(named if named <= options else set(), sample)


def _score(named: set[str], sample: Sample) -> Score:
    return Score(float(bool(named) and named == set(sample.answer)), "".join(sorted(named)) or None)
