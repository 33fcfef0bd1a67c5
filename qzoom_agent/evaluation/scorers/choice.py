"""Multiple choice: our reading, and the four public ones that published figures were measured with.

`clean` follows `letters`. The others are named after the task whose public scorer they repeat, with its traps: use
them to compare with a published figure, never to say how good a model is. They differ, so a V*Bench figure of one
protocol says nothing about another: the first V*Bench protocol compares the likelihoods of the options (the right one
always first), and some papers show the options unshuffled and let a language model judge. Neither is here.
"""

import re
from collections.abc import Sequence
from typing import Final

from qzoom_agent.data.options import letters_of
from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers.letters import choice
from qzoom_agent.evaluation.tasks.task import PublicRule, Score, lmms_eval, scorer, vlmevalkit

# Of the reply in capitals.
_VSTAR: Final = (
    r"^([A-D])",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)
PHRASES: Final = ("The best answer is", "The correct answer is", "The answer is", "The answer")
_MME_LABELS: Final = ("The best option is", "The correct option is", "Best answer:", "Best option:")
_KIT_SAYS: Final = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_HR_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_HR_FAILED: Final = "Failed to obtain answer via API"


@scorer()
def clean(text: str, sample: Sample) -> Score:
    """Return 1 if the option that the reply chooses (`letters.choice`) is the right letter."""
    return _score(choice(text, sample.options), sample)


@scorer(lmms_eval("tasks/vstar_bench/utils.py: extract_answer_letter"))
def vstar(text: str, sample: Sample) -> Score:
    """Score as lmms-eval does V*Bench: the first of five patterns that matches, else the only A to D in the reply.

    Traps: the first pattern takes the first letter of any reply that begins with A to D: "Based on ... (C)" is B,
    "A man" is A, "Definitely C" is D. "The answer depends" is D, and "it is blue", with one such letter, is B. A letter
    inside `<answer>` is not found at all: the tag's own A makes three of them.
    """
    reply = text.strip().upper()
    found = next((match[1] for pattern in _VSTAR if (match := re.search(pattern, reply))), None)
    letters = re.findall(r"[A-D]", reply)
    return _score(found or (letters[0] if len(letters) == 1 else None), sample)


@scorer(lmms_eval("tasks/mme_realworld/utils.py: extract_characters_regex"))
def mme_realworld(text: str, sample: Sample) -> Score:
    """Score by MME-RealWorld's rule: the first capital A to E without stock phrases, else a part of "(a)".

    Traps: an empty reply is A (the empty text is part of "(A)"), and so is "An image of C".
    """
    return _score(_mme_letter(text, (*PHRASES, *_MME_LABELS)), sample)


@scorer(vlmevalkit("vlmeval/dataset/utils/multiple_choice.py: extract_characters_regex"))
def mme_realworld_kit(text: str, sample: Sample) -> Score:
    """Score by the older state of that rule, where commas are missing: "Best answer: D" is B.

    Four stock phrases are joined to two there, which no reply holds.
    """
    first, second, third, fourth = _MME_LABELS
    return _score(_mme_letter(text, (*PHRASES, first + second, third + fourth)), sample)


def without(phrases: Sequence[str], text: str) -> str:
    """Return a reply without these phrases."""
    rest = text.strip()
    for phrase in phrases:
        rest = rest.replace(phrase, "")
    return rest


def _mme_letter(text: str, phrases: Sequence[str]) -> str | None:
    rest = without(phrases, text)
    found = re.search(r"[A-E]", rest)
    if found is not None:
        return found[0]
    if len(rest.split()) > 10:
        return None
    return next((letter for letter in "ABCDE" if rest.lower() in f"({letter.lower()})"), None)


@scorer(lmms_eval("tasks/hrbench/hrbench_evals.py: can_infer"))
def hr_bench(text: str, sample: Sample) -> Score:
    """Score by HR-Bench's rule without its judge: one letter among the words, else one option text in the reply.

    Two letters name none. One of four refusals, and a Z where no letter is named, are no answer whatever else the reply
    says. Where the public scorer now asks a language model, this one gives no answer.

    Trap: "A bus, so green" is A. The public code knows that A may be an article, and gives way to the option's text,
    only where an environment variable asks it to be verbose.
    """
    reply = text.strip()
    return _score(_named(reply, sample.options) or _text_in(reply, sample.options), sample)


@scorer(vlmevalkit("vlmeval/utils/matching_util.py: can_infer"))
def kit(text: str, sample: Sample) -> Score:
    """Score by the rule of VLMEvalKit without its judge: HR-Bench's rule with three differences.

    The letter has to be among the last four words, else the first "answer is X" of A to D decides, and an option's text
    is not looked for in a reply of more than twice the length of all options.
    """
    named = _named(text, sample.options, last=4)
    if named is None and _HR_FAILED not in text:
        said = _KIT_SAYS.search(text)
        if said is not None and said[1].upper() in letters_of(sample.options):
            named = said[1].upper()
    short = len(text.lower()) <= 2 * sum(map(len, sample.options))
    return _score(named or (_text_in(text, sample.options) if short else None), sample)


def _named(reply: str, options: Sequence[str], *, last: int | None = None) -> str | None:
    """Return the one letter among the words (Z for a refusal), `last`: among so many last ones; None if there is none.

    One letter that stands earlier than those is none.
    """
    if _HR_FAILED in reply:
        return None
    if any(refusal in reply for refusal in _HR_REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    named = [letter for letter in letters_of(options) if letter in words]
    if not named:
        return "Z" if "Z" in words else None
    if len(named) > 1 or (last is not None and words.index(named[0]) < len(words) - last):
        return None
    return named[0]


def _text_in(reply: str, options: Sequence[str]) -> str | None:
    found = [
        letter for letter, option in zip(letters_of(options), options, strict=True) if option.lower() in reply.lower()
    ]
    return found[0] if len(found) == 1 else None


@scorer(
    PublicRule(package="TreeVGR", version="main", commit="not noted", function="inference_treebench.py: eval_model_row")
)
def treebench(text: str, sample: Sample) -> Score:
    """Score by TreeBench's rule: the first `<answer>`, or a reply without one, must be the letter and nothing else.

    Traps: "(B)" and "B." are wrong, in a tag and without; of two tags the first counts.
    """
    # The public regular expression is <answer>(.*?)</answer>, which takes quadratic time on many opening tags.
    tagged, closing, _ = text.partition("<answer>")[2].partition("</answer>")
    said = (tagged.strip() if closing else text).upper()
    return _score(said if len(said) == 1 else None, sample)


def _score(letter: str | None, sample: Sample) -> Score:
    letter = None if letter == "Z" and len(sample.options) < 26 else letter
    return Score(float(letter is not None and letter == sample.answer.strip().upper()), letter)
