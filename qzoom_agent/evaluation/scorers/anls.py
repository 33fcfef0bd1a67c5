"""ANLS of DocVQA and InfographicVQA: how close the reply is to the nearest accepted answer, by edit distance.

One question is worth 1 - d / l for the accepted answer with the least d / l (d: Levenshtein distance, l: length of the
longer text), and 0 if that is below the threshold of 0.5. Source: the DocVQA challenge, as lmms-eval computes it
(api/metrics.py, anls).
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, lmms_eval, scorer, vlmevalkit

THRESHOLD: Final = 0.5


@scorer(lmms_eval("api/metrics.py: anls"))
def faithful(text: str, sample: Sample) -> Score:
    """Score the whole reply by the public rule.

    Trap: the distance is of the texts in lower case with white space collapsed, the length is of the raw ones, so a
    reply of many spaces is penalised less. An accepted distance of half ("12" for "13") is worth 0.5.
    """
    return Score(anls(text, sample.answers, raw_length=True), text)


@scorer(vlmevalkit("vlmeval/dataset/utils/vqa_eval.py: anls_compute, hit_calculate"))
def kit(text: str, sample: Sample) -> Score:
    """Score the whole reply; distance and length are of the texts in lower case with white space collapsed."""
    return Score(anls(text, sample.answers, raw_length=False), text)


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Score the final answer, distance and length after lower case and collapsed spaces."""
    return compared(text, sample, partial(anls, raw_length=False))


def anls(prediction: str, golds: Sequence[str], *, raw_length: bool) -> float:
    """Return the similarity to the nearest accepted answer: 0, or 0.5 to 1."""
    best = 1.0
    for gold in golds:
        said, meant = _collapsed(prediction), _collapsed(gold)
        # The public rule measures the upper-case text, which "ss" written as one letter makes longer.
        longest = max(len(prediction.upper()), len(gold.upper())) if raw_length else max(len(said), len(meant))
        # Texts of very different lengths are over the threshold whatever they say: a long reply costs nothing.
        if abs(len(said) - len(meant)) <= longest * (1 - THRESHOLD):
            best = min(best, levenshtein(said, meant) / longest if longest else 0.0)
    return 1 - best if 1 - best >= THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """Count the fewest insertions, deletions and substitutions of a character that turn one text into the other."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for above, char in enumerate(one, start=1):
        before, row[0] = row[0], above
        for at, against in enumerate(other, start=1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (char != against))
    return row[-1]


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())
