"""Open questions by rule: the final answer of the reply is one of the accepted ones.

A rule compares short answers. A wrong reply that is a sentence has no answer that a rule can compare: it counts as
unparsed, and a judge can read it (`judge.judged`).
"""

from collections.abc import Callable

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.scorers.extraction import final_answer, is_sentence
from qzoom_agent.evaluation.scorers.match import exact_match
from qzoom_agent.evaluation.tasks.task import Score, scorer


def compared(text: str, sample: Sample, worth: Callable[[str], float]) -> Score:
    """Return the worth of the final answer; without an answer where there is none, or it is a sentence worth 0."""
    said = final_answer(text)
    if said is None:
        return Score(0.0, None)
    value = worth(said)
    return Score(value, said if value or not is_sentence(said, sample.answers or (sample.answer,)) else None)


@scorer()
def rule(text: str, sample: Sample) -> Score:
    """Return 1 if the final answer matches (`match.exact_match`) an accepted one, or the letter of a choice."""
    if sample.options:
        return choice.clean(text, sample)
    golds = sample.answers or (sample.answer,)
    return compared(text, sample, lambda said: float(any(exact_match(said, gold) for gold in golds)))
