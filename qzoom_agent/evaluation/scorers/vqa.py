"""TextVQA's soft accuracy: how many of ten people gave the same answer, after the EvalAI normaliser.

For each of the ten answers: the share min(1, matches among the other nine / 3); the question is worth the mean of the
ten. Three of ten who agree are so worth 0.9, four 1. Source: the VQA challenge's evaluation, as lmms-eval repeats it
(tasks/textvqa/utils.py, textvqa_process_results; tasks/_task_utils/vqa_eval_metric.py, EvalAIAnswerProcessor). The
public code overwrites the answers of the sample with normalised ones as it goes, so that scoring twice is not
scoring once; here a sample is never changed.
"""

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.open_answer import compared
from qzoom_agent.evaluation.tasks.task import Score, lmms_eval, scorer, vlmevalkit

_ENOUGH: Final = 3
_ARTICLES: Final = frozenset({"a", "an", "the"})
_COUNTED: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS: Final = {"none": "0"} | {word: str(at) for at, word in enumerate(_COUNTED)}
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`!'
# As published: "(?!<=\d)" was meant to look behind and looks ahead, so that a full stop after a digit goes too.
_PERIOD: Final = re.compile(r"(?!<=\d)\.(?!\d)")
_DIGIT_COMMA: Final = re.compile(r"\d,\d")
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
# Each without one of its apostrophes. The last one is the public list's own: the other way round.
_CONTRACTIONS: Final = {
    word[:at] + word[at + 1 :]: word for word in _SPELT.split() for at, char in enumerate(word) if char == "'"
} | {"somebody'd": "somebodyd"}


def normalise(text: str) -> str:
    """Normalise as EvalAI: lower case, digits for number words, no articles or punctuation, contractions spelt out.

    >>> normalise("The 7-Eleven"), normalise("it's"), normalise("Two, 1,000")
    ('7 eleven', "it 's", '2 1000')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _in_words(_without_punctuation(text, _PUNCTUATION))


def normalise_kit(text: str) -> str:
    """Normalise as VLMEvalKit: as EvalAI, except that commas and question marks are punctuation like any other.

    >>> normalise_kit("it's"), normalise_kit("yes,no"), normalise_kit("1,000-2"), normalise_kit("7-2")
    ("it's", 'yes no', '10002', '7 2')
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # A comma between digits anywhere makes every sign go without leaving a space.
    return _in_words(_without_punctuation(text, f"{_PUNCTUATION},?", joined=_DIGIT_COMMA.search(text) is not None))


def _in_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str, signs: str, *, joined: bool = False) -> str:
    kept = text
    for sign in signs:
        kept = kept.replace(sign, "" if joined or f"{sign} " in text or f" {sign}" in text else " ")
    return _PERIOD.sub("", kept, count=_MOST_PERIODS)


def soft_accuracy(prediction: str, golds: Sequence[str], normal: Callable[[str], str] = normalise) -> float:
    """Return the soft accuracy after the normaliser `normal`, 0 to 1; 0 without answers."""
    said, meant = normal(prediction), [normal(gold) for gold in golds]
    agree = meant.count(said)
    return fmean(min(1.0, (agree - (gold == said)) / _ENOUGH) for gold in meant) if meant else 0.0


@scorer(lmms_eval("tasks/textvqa/utils.py: textvqa_process_results"))
def faithful(text: str, sample: Sample) -> Score:
    """Score the whole reply by the public rule."""
    return Score(soft_accuracy(text, sample.answers), text)


@scorer(vlmevalkit("vlmeval/dataset/utils/vqa_eval.py: process_line, process_answer"))
def kit(text: str, sample: Sample) -> Score:
    """Score the whole reply by the same measure after VLMEvalKit's normaliser (`normalise_kit`)."""
    return Score(soft_accuracy(text, sample.answers, normalise_kit), text)


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Score the final answer by the same measure."""
    return compared(text, sample, soft_accuracy)
