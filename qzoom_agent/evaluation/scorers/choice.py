"""Multiple choice: our reading, and the four public ones that published figures were measured with.

`clean` follows `extraction`. The others are named after the task whose public scorer they repeat, with its traps: use
them to compare with a published figure, never to say how good a model is. They differ, so a V*Bench figure of one
protocol says nothing about another: the first V*Bench protocol compares the likelihoods of the options (the right one
always first), and some papers show the options unshuffled and let a language model judge. Neither is here.
"""

from __future__ import annotations

import re
from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.extraction import choice
from qzoom_agent.evaluation.tasks.task import Score

# Of the reply in capitals.
_VSTAR: Final = tuple(
    map(
        re.compile,
        (
            r"^([A-D])",
            r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
            r"\(([A-D])\)",
            r"([A-D])\s*[.)\]]",
            r"(?:^|\s)([A-D])(?:\s|$)",
        ),
    )
)
# As published: the last two are four phrases, joined where a comma is missing.
_MME_PHRASES: Final = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
_HR_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_HR_FAILED: Final = "Failed to obtain answer via API"


def clean(text: str | None, sample: Sample) -> Score:
    """Return 1 if the option that the reply chooses (`extraction.choice`) is the right letter."""
    return _score(choice(text, sample.options) if text else None, sample)


def vstar(text: str | None, sample: Sample) -> Score:
    """Score as lmms-eval does V*Bench: the first of five patterns that matches, else the only A to D in the reply.

    Traps: the first pattern takes the first letter of any reply that begins with A to D: "Based on ... (C)" is B,
    "A man" is A, "Definitely C" is D. "The answer depends" is D, and "it is blue", with one such letter, is B. A letter
    inside `<answer>` is not found at all: the tag's own A makes three of them.

    Source: lmms-eval, tasks/vstar_bench/utils.py, extract_answer_letter.
    """
    reply = (text or "").strip().upper()
    found = next((match[1] for pattern in _VSTAR if (match := pattern.search(reply))), None)
    letters = re.findall(r"[A-D]", reply)
    return _score(found or (letters[0] if len(letters) == 1 else None), sample)


def mme_realworld(text: str | None, sample: Sample) -> Score:
    """Score by MME-RealWorld's rule: the first capital A to E without stock phrases, else a part of "(a)".

    Traps: an empty reply is A (the empty text is part of "(A)"), and so is "An image of C". "Best answer: D" is B: that
    phrase was meant to be cut out and is not.

    Source: lmms-eval, tasks/mme_realworld/utils.py, extract_characters_regex.
    """
    if text is None:
        return Score(0.0, None)
    rest = text.strip()
    for phrase in _MME_PHRASES:
        rest = rest.replace(phrase, "")
    found = re.search(r"[A-E]", rest)
    if found is not None:
        return _score(found[0], sample)
    if len(rest.split()) > 10:
        return _score(None, sample)
    return _score(next((letter for letter in "ABCDE" if rest.lower() in f"({letter.lower()})"), None), sample)


def hr_bench(text: str | None, sample: Sample) -> Score:
    """Score by HR-Bench's rule without its judge: one letter among the words, else one option text in the reply.

    Two letters name none. One of four refusals, and a Z where no letter is named, are no answer whatever else the reply
    says. Where the public scorer now asks a language model, this one gives no answer.

    Trap: "A bus, so green" is A. The public code knows that A may be an article, and gives way to the option's text,
    only where an environment variable asks it to be verbose.

    Source: lmms-eval, tasks/hrbench/hrbench_evals.py, can_infer (from VLMEvalKit, utils/matching_util.py, which has
    since stopped looking for an option in replies of more than twice the length of all options).
    """
    reply = (text or "").strip()
    letters = [chr(ord("A") + index) for index in range(len(sample.options))]
    if _HR_FAILED not in reply:
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
        named = [letter for letter in letters if letter in words]
        if any(refusal in reply for refusal in _HR_REFUSALS) or (not named and "Z" in words):
            return _score(None, sample)
        if len(named) == 1:
            return _score(named[0], sample)
    inside = [letter for letter, option in zip(letters, sample.options, strict=True) if option.lower() in reply.lower()]
    return _score(inside[0] if len(inside) == 1 else None, sample)


def treebench(text: str | None, sample: Sample) -> Score:
    """Score by TreeBench's rule: the first `<answer>`, or a reply without one, must be the letter and nothing else.

    Traps: "(B)" and "B." are wrong, in a tag and without; of two tags the first counts.

    Source: TreeVGR, inference_treebench.py, eval_model_row.
    """
    reply = text or ""
    # The public regular expression is <answer>(.*?)</answer>, which takes quadratic time on many opening tags.
    tagged, closing, _ = reply.partition("<answer>")[2].partition("</answer>")
    said = (tagged.strip() if closing else reply).upper()
    return _score(said if len(said) == 1 else None, sample)


def _score(letter: str | None, sample: Sample) -> Score:
    return Score(float(letter is not None and letter == sample.answer.strip().upper()), letter)
