"""TextVQA's soft accuracy: how many of ten people gave the same answer, after the EvalAI normaliser.

For each of the ten answers: the share min(1, matches among the other nine / 3); the question is worth the mean of the
ten. Three of ten who agree are so worth 0.9, four 1. Source: the VQA challenge's evaluation, as lmms-eval repeats it
(tasks/textvqa/utils.py, textvqa_process_results; tasks/_task_utils/vqa_eval_metric.py, EvalAIAnswerProcessor). The
public code overwrites the answers of the sample with normalised ones as it goes, so that scoring twice is not
scoring once; here a sample is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.extraction import final_answer
from qzoom_agent.evaluation.tasks.task import Score

_ENOUGH: Final = 3
_ARTICLES: Final = frozenset({"a", "an", "the"})
_NUMBERS: Final = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
        strict=True,
    )
)
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`!'
# As published: "(?!<=\d)" was meant to look behind and looks ahead, so that a full stop after a digit goes too.
_PERIOD: Final = re.compile(r"(?!<=\d)\.(?!\d)")
_MOST_PERIODS: Final = 32
"""The public code hands a flag (of value 32) where the number of replacements belongs."""

_SPELT: Final = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings(word: str) -> dict[str, str]:
    """Return every way to leave out one apostrophe."""
    return {word[:at] + word[at + 1 :]: word for at, char in enumerate(word) if char == "'"}


# The last one is the public list's own: the other way round.
_CONTRACTIONS: Final = {wrong: right for word in _SPELT.split() for wrong, right in _misspellings(word).items()} | {
    "somebody'd": "somebodyd"
}


def normalise(text: str) -> str:
    """Normalise as EvalAI: lower case, digits for number words, no articles or punctuation, contractions spelt out.

    >>> normalise("The 7-Eleven"), normalise("it's"), normalise("Two, 1,000")
    ('7 eleven', "it 's", '2 1000')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    kept = text
    for sign in _PUNCTUATION:
        kept = kept.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    return _PERIOD.sub("", kept, count=_MOST_PERIODS)


def soft_accuracy(prediction: str, golds: Sequence[str]) -> float:
    """Return the soft accuracy, 0 to 1; 0 without answers."""
    said, meant = normalise(prediction), [normalise(gold) for gold in golds]
    agree = meant.count(said)
    return fmean(min(1.0, (agree - (gold == said)) / _ENOUGH) for gold in meant) if meant else 0.0


def faithful(text: str | None, sample: Sample) -> Score:
    """Score the whole reply by the public rule."""
    return Score(0.0, None) if text is None else Score(soft_accuracy(text, sample.answers), text)


def clean(text: str | None, sample: Sample) -> Score:
    """Score the final answer by the same measure."""
    said = final_answer(text) if text else None
    return Score(soft_accuracy(said, sample.answers) if said is not None else 0.0, said)
