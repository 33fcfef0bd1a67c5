"""Open questions by rule: the final answer of the reply is one of the accepted ones.

A rule compares short answers. A wrong reply that is a sentence has no answer that a rule can compare: it counts as
unparsed, and a judge can read it (`judge.judged`).
"""

from collections.abc import Callable, Sequence

from qzoom_agent.data.answers import exact_match
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.scorers.extraction import final_answer, is_sentence, plain
from qzoom_agent.evaluation.tasks.task import Score, scorer


def compared(text: str, sample: Sample, worth: Callable[[str, Sequence[str]], float]) -> Score:
    """Return the worth of the final answer beside the accepted ones, all of them in plain letters.

    Without an answer where there is none, or it is a sentence worth 0.
    """
    said, golds = final_answer(text), [plain(gold) for gold in sample.answers or (sample.answer,)]
    if said is None:
        return Score(0.0, None)
    value = worth(said, golds)
    return Score(value, said if value or not is_sentence(said, golds) else None)


@scorer()
def rule(text: str, sample: Sample) -> Score:
    """Return 1 if the final answer matches (`match.exact_match`) an accepted one, or the letter of a choice."""
    if sample.options:
        return choice.clean(text, sample)
    return compared(text, sample, lambda said, golds: float(any(exact_match(said, gold) for gold in golds)))
