"""Open questions by rule: the final answer of the reply is one of the accepted ones."""

from __future__ import annotations

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import choice
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.scorers.match import exact_match
from qzoom_agent.evaluation.tasks.task import Score


def rule(text: str | None, sample: Sample) -> Score:
    """Return 1 if the final answer matches (`match.exact_match`) an accepted one, or the letter of a choice."""
    if sample.options:
        return choice.clean(text, sample)
    said = final_answer(text) if text else None
    return Score(float(any(exact_match(said, gold) for gold in sample.answers or (sample.answer,))), said)
